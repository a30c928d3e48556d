"""What an adapter was made of, written beside it; and what is different where it is loaded."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, cached_file

import qvl
from qvl.encode import ProcessingClass
from qvl.model_names import model_source
from qvl.settings import Settings

TRAINED_WITH = "trained_with.json"
_PINNED = ("torch", "transformers", "peft", "trl")
# Written by whoever saved the model last; none says what the model is.
_NOT_THE_MODEL = ("_name_or_path", "_commit_hash", "transformers_version")
_DIGITS_SHOWN = 12


def origin(settings: Settings, processing_class: ProcessingClass, commit: str | None) -> dict[str, Any]:
    """What trained_with.json says about the base, the template and the packages.

    Args:
        settings: name the base.
        processing_class: the processor or tokenizer that was trained with.
        commit: the base's, where a hub told it.

    Returns:
        JSON-able; None for what cannot be known, such as the hash of a configuration that is in no file.
    """
    return {
        "base_model_name_or_path": settings.model.model_name_or_path,
        "revision": settings.model.model_revision,
        "commit": commit,
        "config_sha256": _config_sha256(settings, commit),
        "chat_template_sha256": _sha256(processing_class.chat_template),
        "versions": {"qvl": qvl.__version__, **{name: version(name) for name in _PINNED}},
    }


def read_trained_with(folder: Path) -> dict[str, Any] | None:
    """What is known of an adapter's training; None for one that another program trained."""
    path = folder / TRAINED_WITH
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def other_origin(adapter: Path, settings: Settings, processing_class: ProcessingClass, commit: str | None) -> list[str]:
    """What an adapter is loaded on that is not what it was trained on.

    Args:
        adapter: its folder; nothing is known of one without trained_with.json.
        settings: name the base it is loaded on.
        processing_class: what it will be used with.
        commit: of the base it is loaded on, where a hub told it.

    Returns:
        A sentence for each difference, which names both.
    """
    trained = read_trained_with(adapter)
    return [] if trained is None else _differences(trained, origin(settings, processing_class, commit))


def _differences(trained: dict[str, Any], here: dict[str, Any]) -> list[str]:
    def differs(key: str) -> bool:
        # What one side does not know (an older file, a local folder) is no difference.
        return None not in (trained.get(key), here[key]) and trained[key] != here[key]

    lines = []
    if differs("base_model_name_or_path"):
        names = f"{trained['base_model_name_or_path']}, and is loaded on {here['base_model_name_or_path']}"
        lines.append(f"It was trained on {names}.")
    # Where both commits are known, a branch by another name may still be the same model.
    key = "revision" if None in (trained.get("commit"), here["commit"]) else "commit"
    if differs(key):
        lines.append(f"It was trained on the base's {key} {trained[key]}, and is loaded on {here[key]}.")
    if differs("config_sha256"):
        lines.append(f"It was trained on a base whose {CONFIG_NAME} {_both(trained, here, 'config_sha256')}.")
    if differs("chat_template_sha256"):
        hashes = _both(trained, here, "chat_template_sha256")
        lines.append(
            f"It was trained with a chat template that {hashes}: answers may differ from those of the training."
        )
    return lines


def _both(trained: dict[str, Any], here: dict[str, Any], key: str) -> str:
    return f"has the SHA-256 {trained[key][:_DIGITS_SHOWN]}, the one here has {here[key][:_DIGITS_SHOWN]}"


def _config_sha256(settings: Settings, commit: str | None) -> str | None:
    """Hash of the base's config.json, apart from who wrote it; None where there is no such file.

    Of the file and not of the configuration in memory, which has other defaults with other versions of transformers.
    """
    try:
        path = cached_file(
            model_source(str(settings.model.model_name_or_path)),
            CONFIG_NAME,
            revision=commit or settings.model.model_revision,
            # It was read a moment ago, or hours: no network may fail a run at its end.
            local_files_only=True,
        )
    except OSError:
        return None
    if path is None:
        return None
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    return _sha256({key: value for key, value in config.items() if key not in _NOT_THE_MODEL})


def _sha256(value: Any) -> str | None:
    return None if value is None else hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
