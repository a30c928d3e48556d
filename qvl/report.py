"""The comparison page of a run.

`report.html` is one file without outside resources: it opens offline, in light and dark mode, and keeps to
`MAX_PAGE_BYTES` by shrinking the pictures. Its Content-Security-Policy allows only the script and the style written
here, so that markup in a caption would do nothing even if it were not escaped.
"""

import base64
import bisect
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from PIL import Image

from qvl import plots
from qvl.files import read_jsonl, write_text_atomically
from qvl.metrics import sufficient_statistics
from qvl.redaction import redact
from qvl.score_table import finite, score_rows

MAX_PAGE_BYTES = 5_000_000
MAX_GALLERY_EXAMPLES = 500

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
_REPEATED_SPECIAL_TOKEN = re.compile(r"(<\|[^|<>]+\|>)\1{2,}")

OpenImage = Callable[[str], Image.Image | None]


@dataclass
class GalleryRow:
    """One example with both models' predictions; scores are ROUGE-L fractions, None where there is nothing to score."""

    id: str
    image_name: str | None
    prompt: str
    references: list[str]
    baseline: str | None = None
    finetuned: str | None = None
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def gain(self) -> float | None:
        """Fine-tuned minus baseline."""
        if "baseline" in self.scores and "finetuned" in self.scores:
            return self.scores["finetuned"] - self.scores["baseline"]
        return None

    @property
    def sort_value(self) -> float:
        """What the gallery sorts by: the gain, or the only score there is."""
        return self.gain if self.gain is not None else next(iter(self.scores.values()), 0.0)


def write_report(run_dir: Path, open_image: OpenImage, recipe: str | None = None) -> Path:
    """Writes `run_dir/report.html` from the files of the run folder; what is missing is left out of the page.

    Args:
        run_dir: the run folder.
        open_image: gives the first picture of the example with this id, None if it has none.
        recipe: name for the title; by default that of the folder above.

    Returns:
        The page's path.
    """
    gallery = _gallery(run_dir)
    shown = _most_telling(gallery)
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
        **_scores(run_dir),
        **_losses(run_dir),
        "checks": _read_json(run_dir / "checks.json") or [],
        "training_examples": [_readable_segments(example) for example in training_examples],
        "gallery": shown,
        "num_left_out": len(gallery) - len(shown),
        "num_examples": len(gallery),
        "common_prompt": _common_prompt(shown),
        "has_both": any(row.gain is not None for row in shown),
    }
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        _resource("report.html.jinja")
    )
    ids = list(dict.fromkeys([*(example["id"] for example in training_examples), *(row.id for row in shown)]))
    # The text's size is known once the page was rendered without pictures; they share what is left.
    text_bytes = len(template.render(page, pictures={}).encode())
    pictures = _pictures(ids, open_image, MAX_PAGE_BYTES - text_bytes)
    path = run_dir / "report.html"
    write_text_atomically(path, template.render(page, pictures=pictures))
    return path


def _scores(run_dir: Path) -> dict[str, Any]:
    metrics = _read_json(run_dir / "metrics.json") or {}
    stages = (("baseline", "baseline"), ("fine-tuned", "finetuned"))
    bars = [(label, key, finite((metrics.get(key) or {}).get("bleu4"))) for label, key in stages]
    known = [(label, key, value) for label, key, value in bars if value is not None]
    return {
        "scores": score_rows(metrics),
        "bleu_plot": plots.score_bars("BLEU-4", known) if known else None,
        "training": {
            key: f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
            for key, value in (metrics.get("train") or {}).items()
            if finite(value) is not None
        },
    }


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


def _gallery(run_dir: Path) -> list[GalleryRow]:
    rows: dict[str, GalleryRow] = {}
    for stage in ("baseline", "finetuned"):
        path = run_dir / f"{stage}_predictions.jsonl"
        predictions = read_jsonl(path) if path.exists() else []
        for item in predictions:
            new_row = GalleryRow(item["id"], item.get("image"), item.get("prompt") or "", item.get("references") or [])
            setattr(rows.setdefault(item["id"], new_row), stage, item["prediction"])
        _add_scores(rows, stage)
    return list(rows.values())


def _add_scores(rows: Mapping[str, GalleryRow], stage: str) -> None:
    scorable = {row.id: row for row in rows.values() if row.references and getattr(row, stage) is not None}
    if not scorable:
        return
    statistics = sufficient_statistics(
        {row.id: getattr(row, stage) for row in scorable.values()},
        {row.id: row.references for row in scorable.values()},
    )
    for row, rouge_l in zip(scorable.values(), statistics.rouge_l, strict=True):
        row.scores[stage] = float(rouge_l)


def _most_telling(gallery: list[GalleryRow]) -> list[GalleryRow]:
    """At most `MAX_GALLERY_EXAMPLES`: a quarter each of the largest losses and gains, evenly spaced ones for the rest.

    More would leave no bytes for pictures, nor patience for looking at them.
    """
    if len(gallery) <= MAX_GALLERY_EXAMPLES:
        return gallery
    ranked = sorted(range(len(gallery)), key=lambda index: gallery[index].sort_value)
    quarter = MAX_GALLERY_EXAMPLES // 4
    middle = ranked[quarter:-quarter]
    num_spaced = MAX_GALLERY_EXAMPLES - 2 * quarter
    spaced = [middle[index * len(middle) // num_spaced] for index in range(num_spaced)]
    return [gallery[index] for index in sorted([*ranked[:quarter], *ranked[-quarter:], *spaced])]


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
    """Data URIs of the examples' pictures, of at most `max_bytes` characters in all where that is possible."""
    if not ids:
        return {}
    share = int(max_bytes / len(ids) * 3 / 4) - 120  # base64 makes 4 characters of 3 bytes; the tag around it
    share = min(max(share, _MIN_THUMBNAIL_BYTES), _MAX_THUMBNAIL_BYTES)
    pictures = {}
    for example_id in ids:
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
