"""The model card of an exported folder: what it is, how it was made, how good it is, how to use it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import OfflineModeIsEnabled as Offline

from qvl.adapter_origin import read_trained_with
from qvl.checks import Check
from qvl.clip_llm import needs_qvl
from qvl.data import DataSummary
from qvl.mixture import read_mixture
from qvl.redaction import redact
from qvl.score_table import score_rows

# What one wants to know of a training, in this order; machines and folders are left out.
_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "min_pixels",
    "max_pixels",
    "captions_per_image",
    "load_in_4bit",
    "load_in_8bit",
    "base_precision",
    "dtype",
    "seed",
)
_DATA = (
    "dataset_config",
    "dataset_revision",
    "dataset_train_split",
    "dataset_test_split",
)
_LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora")


@dataclass(frozen=True)
class Exported:
    """What a card is written about.

    Attributes:
        adapter: the adapter's folder.
        is_merged: a whole model, or the adapter alone.
        sees_images: a vision-language model.
        verdicts: what was checked of the folder.
        notes: what else its user has to know, in sentences.
        metrics: the run's metrics.json, empty where there is none.
        settings: the run's settings.yaml, likewise.
        data: what is known of its rows; None where they were not read.
    """

    adapter: Path
    is_merged: bool
    sees_images: bool
    verdicts: Sequence[Check]
    notes: Sequence[str]
    metrics: Mapping[str, Any]
    settings: Mapping[str, Any]
    data: DataSummary | None


def model_card(exported: Exported) -> str:
    """The text of README.md, with a header as `huggingface_hub.ModelCard` reads it.

    Secrets are taken out, and of local data and models only the last part of the path is named.
    """
    lora = json.loads((exported.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    trained = read_trained_with(exported.adapter) or {}
    base = str(trained.get("base_model_name_or_path") or lora["base_model_name_or_path"])
    licence = base_licence(base)
    header = _header(exported, base, licence).to_yaml()
    title = f"{_shown(base)}, {'fine-tuned' if exported.is_merged else 'a LoRA adapter'}"
    what = "its LoRA adapter merged into the weights" if exported.is_merged else "a LoRA adapter for it"
    lines = [
        "---",
        header,
        "---",
        "",
        f"# {title}",
        "",
        f"{_shown(base)} fine-tuned with [TRL](https://github.com/huggingface/trl) and qvl: {what}.",
        *exported.notes,
        "",
        *_section("Scores", _score_lines(exported.metrics)),
        *_section("Data", _table(_data_rows(exported.settings, exported.data))),
        *_section("Training", _table(_training_rows(exported.settings, lora))),
        *_section("Base", _table(_base_rows(base, trained, licence))),
        *_section("Checked before it was saved", _check_lines(exported.verdicts)),
        *_section("Use", _use_lines(exported, base, trained)),
        *_section("Versions", _table(sorted((trained.get("versions") or {}).items()))),
    ]
    return "\n".join(lines).rstrip() + "\n"


def base_licence(base: str) -> str | None:
    """The licence that the base's own card names; None where no card can be read.

    Args:
        base: hub id, folder, or embedded model (which are part of this package).
    """
    if base.startswith("qvl/"):
        return "apache-2.0"
    place = Path(base) / "README.md"
    try:
        card = ModelCard.load(place if place.is_file() else base, ignore_metadata_errors=True)
    except (OSError, ValueError, HfHubHTTPError, Offline):
        return None
    return getattr(card.data, "license", None)


def _header(exported: Exported, base: str, licence: str | None) -> ModelCardData:
    is_on_hub = not base.startswith("qvl/") and not Path(base).exists()
    data_names = [name for name in _data_names(exported.settings) if not name.startswith("qvl/") and _is_hub_id(name)]
    relation: dict[str, Any] = (
        {"base_model_relation": "finetune" if exported.is_merged else "adapter"} if is_on_hub else {}
    )
    task = "image-text-to-text" if exported.sees_images else "text-generation"
    data = ModelCardData(
        base_model=base if is_on_hub else None,
        library_name="transformers" if exported.is_merged else "peft",
        pipeline_tag=task,
        license=licence,
        datasets=data_names or None,
        tags=["qvl", "trl", "sft", "lora"],
        **relation,
    )
    results = exported.metrics.get("finetuned") or {}
    if data_names and results:
        data.model_name = f"{base.rpartition('/')[2]}-{'finetuned' if exported.is_merged else 'lora'}"
        split = exported.settings.get("dataset_test_split")
        data.eval_results = [
            EvalResult(
                task_type=task,
                dataset_type=data_names[0],
                dataset_name=data_names[0],
                dataset_split=split,
                metric_type=row["key"],
                metric_name=row["name"],
                metric_value=results[row["key"]],
            )
            for row in _shown_scores(exported.metrics)
            if row["key"] in results
        ]
    return data


def _shown_scores(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for row in score_rows(metrics) if not row["is_first_reference"]]


def _score_lines(metrics: Mapping[str, Any]) -> list[str]:
    rows = _shown_scores(metrics)
    if not rows:
        return ["Not measured."]
    cells = [[_with_interval(row, key) for key in ("baseline", "finetuned", "difference")] for row in rows]
    lines = ["| score | base | fine-tuned | difference |", "|---|---|---|---|"]
    lines += [f"| {row['name']} | {' | '.join(values)} |" for row, values in zip(rows, cells, strict=True)]
    counts = {part["num_examples"] for part in (metrics.get("baseline"), metrics.get("finetuned")) if part}
    count = " and ".join(f"{count:,}" for count in sorted(counts))
    how = "bootstrap over them, those of one image together"
    return [*lines, "", f"On {count} held-out examples; in brackets 95% intervals ({how})."]


def _with_interval(row: Mapping[str, Any], key: str) -> str:
    interval = row.get(f"{key}_interval")
    return f"{row[key]} ({interval})" if interval else str(row[key])


def _data_rows(settings: Mapping[str, Any], data: DataSummary | None) -> list[tuple[str, Any]]:
    names = ", ".join(_shown(name) for name in _data_names(settings))
    rows = [("data", names or None), *((key, settings.get(key)) for key in _DATA)]
    if data is not None:
        rows += [("commit", data.revision), ("fingerprint (SHA-256)", data.fingerprint)]
        rows += [(f"{side.name} examples", side.num_examples) for side in (data.train, data.evaluation)]
    return rows


def _training_rows(settings: Mapping[str, Any], lora: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [*((key, settings.get(key)) for key in _SETTINGS), *((f"LoRA {key}", lora.get(key)) for key in _LORA)]


def _base_rows(base: str, trained: Mapping[str, Any], licence: str | None) -> list[tuple[str, Any]]:
    return [
        ("model", _shown(base)),
        ("vision encoder", _shown(trained["vision_encoder"]) if "vision_encoder" in trained else None),
        ("revision", trained.get("commit") or trained.get("revision")),
        ("SHA-256 of its config.json", trained.get("config_sha256")),
        ("SHA-256 of the chat template", trained.get("chat_template_sha256")),
        ("licence", licence or "could not be read here: see the base's own page, which also governs this model"),
    ]


def _check_lines(verdicts: Sequence[Check]) -> list[str]:
    rows = [
        (check.name.replace("_", " "), f"{check.value:.2g} ({check.threshold})", check.detail) for check in verdicts
    ]
    return ["| check | value | of |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


def _use_lines(exported: Exported, base: str, trained: Mapping[str, Any]) -> list[str]:
    is_composed = "vision_encoder" in trained
    if is_composed and (needs_qvl(trained) or not exported.is_merged):
        return _use_lines_of_composition(needs_qvl(trained))
    auto = "AutoModelForImageTextToText" if exported.sees_images else "AutoModelForCausalLM"
    processor = "AutoProcessor" if exported.sees_images else "AutoTokenizer"
    if exported.is_merged:
        imports, load = [], [f'model = {auto}.from_pretrained(HERE, dtype="auto", device_map="auto")']
    else:
        imports = ["from peft import PeftModel"]
        load = [
            f'base = {auto}.from_pretrained("{_shown(base)}", dtype="auto", device_map="auto")',
            "model = PeftModel.from_pretrained(base, HERE)",
        ]
    return [
        "```python",
        *imports,
        f"from transformers import {auto}, {processor}",
        "",
        'HERE = "this folder, or its name on the hub"',
        *load,
        f"{'processor' if exported.sees_images else 'tokenizer'} = {processor}.from_pretrained(HERE)",
        "```",
    ]


def _use_lines_of_composition(pools_patches: bool) -> list[str]:
    """No checkpoint holds its base, and only qvl puts that together."""
    chat = ["```bash", "python -m qvl.chat --adapter HERE --image photo.jpg  # HERE: this folder", "```"]
    if pools_patches:
        return chat
    return [
        *chat,
        "",
        "Or as a whole model that plain transformers loads:",
        "",
        "```bash",
        "python -m qvl.export --adapter HERE --format merged --out MERGED --prompts prompts.jsonl",
        "```",
        "",
        "```python",
        "from transformers import AutoProcessor, LlavaForConditionalGeneration",
        "",
        'model = LlavaForConditionalGeneration.from_pretrained("MERGED", dtype="auto", device_map="auto")',
        'processor = AutoProcessor.from_pretrained("MERGED")',
        "```",
    ]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _table(rows: Sequence[tuple[str, Any]]) -> list[str]:
    known = redact({key: value for key, value in rows if value not in (None, "", False)})
    if not known:
        return []
    return ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in known.items())]


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    # A pipe would end the cell, and the pattern of target modules is full of them.
    return f"`{text}`".replace("|", "\\|") if "|" in text else text


def _data_names(settings: Mapping[str, Any]) -> list[str]:
    mixed = [part.path for part in read_mixture(settings.get("datasets") or [])]
    return mixed or [str(name) for name in [settings.get("dataset_name")] if name]


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _shown(name: str) -> str:
    """A hub id as it is; of a path, which may tell about its owner, the last part."""
    return name if name.startswith("qvl/") or _is_hub_id(name) else Path(name).name
