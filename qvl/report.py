"""The comparison page of a run.

`report.html` is one file without outside resources: it opens offline, in light and dark mode, and keeps to
`MAX_PAGE_BYTES` by smaller pictures and fewer of the long texts. Its Content-Security-Policy allows only the script and
the style written here, so that markup in a caption would do nothing even if it were not escaped.
"""

import base64
import bisect
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from PIL import Image

from qvl import plots
from qvl.files import read_jsonl, write_text_atomically
from qvl.gallery import GalleryRow, evenly_spaced, gallery_rows, item_score, most_telling, training_samples
from qvl.redaction import redact
from qvl.score_table import finite, score_rows
from qvl.token_lengths import length_histogram

MAX_PAGE_BYTES = 5_000_000

_SETTINGS_SHOWN = (
    "model_name_or_path",
    "model_revision",
    "adapter",
    "dataset_name",
    "dataset_config",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "load_in_4bit",
    "load_in_8bit",
    "dtype",
    "captions_per_image",
    "max_length",
    "max_new_tokens",
    "seed",
)
# (longest side in pixels, JPEG quality), tried from the best down until one fits the picture's share of the page.
_THUMBNAIL_STEPS = ((400, 80), (360, 76), (320, 72), (288, 68), (256, 64), (224, 58), (192, 52), (160, 46), (112, 40))
_MAX_THUMBNAIL_BYTES = 30_000
_MIN_THUMBNAIL_BYTES = 1_500
_MAX_EVALUATIONS = 20
_LEAST_GALLERY = 16
_REPEATED_SPECIAL_TOKEN = re.compile(r"(<\|[^|<>]+\|>)\1{2,}")

OpenImage = Callable[[str], Image.Image | None]


def write_report(run_dir: Path, open_image: OpenImage, recipe: str | None = None) -> Path:
    """Writes `run_dir/report.html` from the files of the run folder; what is missing is left out of the page.

    Args:
        run_dir: the run folder.
        open_image: gives the first picture of the example with this id, None if it has none.
        recipe: name for the title; by default that of the folder above.

    Returns:
        The page's path.
    """
    score = item_score(run_dir)
    gallery = gallery_rows(run_dir, score)
    samples = training_samples(run_dir)
    metrics = _read_json(run_dir / "metrics.json") or {}
    training_examples = _read_json(run_dir / "training_examples.json") or []
    script, style = _resource("report.js"), _resource("report.css")
    page = {
        "recipe": recipe or run_dir.absolute().parent.name,
        "run_name": run_dir.absolute().name,
        "script": script,
        "style": style,
        "script_hash": _csp_hash(script),
        "style_hash": _csp_hash(style),
        **_settings(run_dir),
        **_scores(metrics),
        **_losses(run_dir),
        **_lengths(run_dir),
        **_evaluations(run_dir, metrics.get("scores") or {}),
        "checks": _read_json(run_dir / "checks.json") or [],
        "training_examples": [_readable_segments(example) for example in training_examples],
        "samples": samples,
        "item_score": score,
        "num_examples": len(gallery),
    }
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        _resource("report.html.jinja")
    )
    shown = most_telling(gallery)

    def rendered(pictures: Mapping[str, str]) -> str:
        return template.render(page | _gallery(shown, gallery), pictures=pictures)

    # The text's size is known once the page was rendered without pictures; they share what is left. Long texts take
    # half of the page at most, by fewer of them.
    while (text_bytes := len(rendered({}).encode())) > MAX_PAGE_BYTES // 2 and len(shown) > _LEAST_GALLERY:
        shown = most_telling(gallery, len(shown) // 2)
    evaluated = [*(sample.id for sample in samples), *(row.id for row in shown)]
    ids = [*(example["id"] for example in training_examples), *evaluated]
    pictures = _pictures(ids, open_image, MAX_PAGE_BYTES - text_bytes)
    path = run_dir / "report.html"
    write_text_atomically(path, rendered(pictures))
    return path


def _gallery(shown: list[GalleryRow], gallery: list[GalleryRow]) -> dict[str, Any]:
    return {
        "gallery": shown,
        "num_left_out": len(gallery) - len(shown),
        "common_prompt": _common_prompt(shown),
        "has_both": any(row.gain is not None for row in shown),
    }


def _scores(metrics: Mapping[str, Any]) -> dict[str, Any]:
    rows = score_rows(metrics)
    return {
        "scores": [row for row in rows if not row["is_first_reference"]],
        "first_reference_scores": [row for row in rows if row["is_first_reference"]],
        "score_plot": _score_plot(metrics, rows[0]) if rows else None,
        "training": {
            key: f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
            for key, value in (metrics.get("train") or {}).items()
            if finite(value) is not None
        },
    }


def _score_plot(metrics: Mapping[str, Any], row: Mapping[str, Any]) -> Markup:
    bars = []
    for label, stage in (("baseline", "baseline"), ("fine-tuned", "finetuned")):
        scores = metrics.get(stage) or {}
        ends = (scores.get("interval") or {}).get(row["key"]) or {}
        value, low, high = (finite(number) for number in (scores.get(row["key"]), ends.get("low"), ends.get("high")))
        if value is not None:
            bars.append(plots.Bar(label, stage, value, None if low is None or high is None else (low, high)))
    return plots.score_bars(row["name"], bars)


def _settings(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "settings.yaml"
    loaded = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    settings = redact(loaded) if isinstance(loaded, dict) else {}
    texts = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in settings.items()
    }
    shown = {key: texts[key] for key in _SETTINGS_SHOWN if settings.get(key) not in (None, False, "", -1)}
    return {"key_settings": shown, "all_settings": texts}


def _losses(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "training_log.jsonl"
    rows = read_jsonl(path) if path.exists() else []
    training, held_out = (
        [(row["step"], row[key]) for row in rows if finite(row.get(key)) is not None and "step" in row]
        for key in ("loss", "eval_loss")
    )
    return {
        "loss_plot": plots.loss_curve(training, held_out) if training else None,
        "has_held_out": bool(held_out),
    }


def _lengths(run_dir: Path) -> dict[str, Any]:
    summary = _read_json(run_dir / "token_lengths.json")
    return {"lengths": summary, "length_plot": length_histogram(summary) if summary else None}


def _evaluations(run_dir: Path, scores: Mapping[str, Any]) -> dict[str, Any]:
    """A table of the evaluations while training that had scores: held-out loss and what the run's scores are called."""
    path = run_dir / "training_log.jsonl"
    rows = [row for row in (read_jsonl(path) if path.exists() else []) if "eval_generation_seconds" in row]
    rows = [rows[index] for index in evenly_spaced(range(len(rows)), _MAX_EVALUATIONS)]
    labels = {name: entry["label"] for name, entry in scores.items() if any(f"eval_{name}" in row for row in rows)}
    return {
        "evaluation_columns": list(labels.values()),
        "evaluations": [
            {"step": row["step"], "values": [_four_places(row.get(f"eval_{name}")) for name in labels]} for row in rows
        ],
    }


def _four_places(value: Any) -> str:
    return "" if finite(value) is None else f"{value:.4f}"


def _common_prompt(gallery: list[GalleryRow]) -> str | None:
    prompts = {row.prompt for row in gallery}
    return prompts.pop() if len(prompts) == 1 else None


def _readable_segments(example: dict[str, Any]) -> dict[str, Any]:
    """Writes the hundreds of placeholders of a picture as one and their count."""
    segments = [
        {**segment, "text": _REPEATED_SPECIAL_TOKEN.sub(_counted, segment["text"])} for segment in example["segments"]
    ]
    return {**example, "segments": segments}


def _counted(match: re.Match[str]) -> str:
    return f"{match[1]} × {len(match[0]) // len(match[1])} "


def _pictures(ids: list[str], open_image: OpenImage, max_bytes: int) -> dict[str, str]:
    """Data URIs of the examples' pictures, of at most `max_bytes` characters in all where that is possible.

    An id that the page shows twice stands twice in `ids`, and its picture twice in the page.
    """
    if not ids:
        return {}
    share = int(max_bytes / len(ids) * 3 / 4) - 120  # base64 makes 4 characters of 3 bytes; the tag around it
    share = min(max(share, _MIN_THUMBNAIL_BYTES), _MAX_THUMBNAIL_BYTES)
    pictures = {}
    for example_id in dict.fromkeys(ids):
        image = open_image(example_id)
        if image is not None:
            encoded = base64.b64encode(_thumbnail(image, share)).decode()
            pictures[example_id] = f"data:image/jpeg;base64,{encoded}"
    return pictures


def _thumbnail(image: Image.Image, max_bytes: int) -> bytes:
    """The best JPEG of `_THUMBNAIL_STEPS` that fits, or the smallest of them; never enlarged."""
    image = image.convert("RGB")
    image.thumbnail((_THUMBNAIL_STEPS[0][0],) * 2, Image.Resampling.BILINEAR)
    last = len(_THUMBNAIL_STEPS) - 1
    best = bisect.bisect_left(range(last), True, key=lambda step: len(_jpeg(image, step)) <= max_bytes)
    return _jpeg(image, best)


def _jpeg(image: Image.Image, step: int) -> bytes:
    longest_side, quality = _THUMBNAIL_STEPS[step]
    small = image.copy()
    small.thumbnail((longest_side, longest_side), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _resource(name: str) -> str:
    return resources.files("qvl").joinpath(name).read_text(encoding="utf-8")


def _csp_hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
