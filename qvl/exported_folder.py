"""An adapter as a folder for others, merged or as it is, compared with what was trained before it gets its name."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel

from qvl.active_run import load_data
from qvl.adapter_origin import TRAINED_WITH, read_trained_with
from qvl.adapters import require_adapter
from qvl.answers import Prompts
from qvl.checks import Check, require_passed, table
from qvl.clip_llm import needs_qvl
from qvl.data import LoadedData
from qvl.errors import FailedCheckError, UserError
from qvl.files import write_json_atomically, write_text_atomically
from qvl.given_prompts import read_prompts
from qvl.memory_use import give_back_unused
from qvl.model_card import Exported, model_card
from qvl.parity import NUM_PROMPTS, NUM_TOKENS, Said, check_parity, describe_difference, listen
from qvl.settings import parse_settings
from qvl.trained_model import TrainedModel, load_trained, own_processing_class

_GREEDY = {"max_new_tokens": NUM_TOKENS}
_IN_FULL = {"load_in_4bit": False, "load_in_8bit": False}
# Measured with the shape of an 8B model in bf16: 0.0007, and 3.7 where the adapter is lost.
_MOST_NATS = 0.01
_SPARE_BYTES = 256 * 2**20
# All that an adapter is. Beside it may lie what a training or a download has left: optimizer states, caches, a card.
_COPIED = ("adapter_config.json", "adapter_model.safetensors", TRAINED_WITH)


def require_exportable(adapter: Path, out: Path) -> None:
    """Stops before anything is loaded where the result would have no place or no origin.

    Raises:
        UserError: no adapter there, or `out` exists.
    """
    require_adapter(adapter)
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or name another folder with --out.")


def export_adapter(adapter: Path, out: Path, merge: bool, prompts_file: Path | None) -> None:
    """Writes `out`, whole and compared with the adapter, or not at all.

    Args:
        adapter: folder of the adapter.
        out: folder to make.
        merge: write a whole model; else the adapter as it is.
        prompts_file: see `qvl.given_prompts.read_prompts`; None for the evaluation prompts of the adapter's run.

    Raises:
        UserError: no prompts, a base that cannot be loaded or merged into, no space.
        FailedCheckError: what was written does not say what the adapter says.
    """
    metrics, settings = _left_by_run(adapter)
    data = _data_of_run(adapter, settings) if prompts_file is None else None
    prompts = _first_prompts(data) if data else read_prompts(Path(str(prompts_file)), NUM_PROMPTS)
    beside = out.with_name(f".{out.name}-in-writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        # Before minutes of work that would have no place.
        beside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): name another folder with --out.") from error
    try:
        verdicts, notes, sees_images = (_write_merged if merge else _write_adapter)(adapter, beside, prompts)
        print("\n".join([*notes, *table(verdicts)]), flush=True)
        _require_parity(verdicts, merge)
        write_json_atomically(beside / "parity.json", [check.as_dict() for check in verdicts])
        summary = data.summary if data else None
        card = model_card(Exported(adapter, merge, sees_images, verdicts, notes, metrics, settings, summary))
        write_text_atomically(beside / "README.md", card)
        for path in beside.rglob("*"):
            # Weights are written for their owner only; what is exported is for others.
            path.chmod(0o755 if path.is_dir() else 0o644)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_merged(adapter: Path, folder: Path, prompts: list[dict[str, Any]]) -> tuple[list[Check], list[str], bool]:
    trained = read_trained_with(adapter) or {}
    is_quantized = bool(trained.get("load_in_4bit") or trained.get("load_in_8bit"))
    as_trained = _ask(load_trained(adapter, False, _GREEDY), prompts) if is_quantized else None
    give_back_unused()
    whole = load_trained(adapter, False, {**_GREEDY, **_IN_FULL})
    _require_mergeable(whole)
    print(f"Merging in {whole.name} ...", flush=True)
    said = _ask(whole, prompts)
    notes = _notes(whole, trained, is_merged=True)
    if as_trained is not None:
        kind = "4-bit" if trained.get("load_in_4bit") else "8-bit"
        distance = describe_difference(as_trained, listen(whole, prompts, as_trained.answers))
        notes.append(f"It was trained on {kind} weights and is merged into the full ones. That moves it: {distance}.")
    sees_images = whole.sees_images
    _save_merged(whole, folder, trained)
    del whole
    give_back_unused()
    again = listen(load_trained(folder, False, _GREEDY), prompts, said.answers)
    return check_parity(said, again, _MOST_NATS), notes, sees_images


def _write_adapter(adapter: Path, folder: Path, prompts: list[dict[str, Any]]) -> tuple[list[Check], list[str], bool]:
    first = load_trained(adapter, False, _GREEDY)
    said, sees_images = _ask(first, prompts), first.sees_images
    notes = _notes(first, read_trained_with(adapter) or {}, is_merged=False)
    # The base may be part of qvl or a folder of this machine, and the processor need not have been saved beside it.
    for name in _COPIED:
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, folder / name)
    first.processing_class.save_pretrained(folder)
    del first
    give_back_unused()
    again = listen(load_trained(folder, False, _GREEDY), prompts, said.answers)
    return check_parity(said, again, most_nats=0.0, most_tie_nats=0.0), notes, sees_images


def _require_parity(verdicts: list[Check], is_merged: bool) -> None:
    try:
        require_passed(verdicts)
    except FailedCheckError as error:
        if not is_merged:
            raise
        advice = (
            "16 bits do not hold every change of a weight, least of all those of a very short training: "
            "export with --format adapter."
        )
        raise FailedCheckError(f"{error}\n{advice}") from error


def _notes(partner: TrainedModel, trained: Mapping[str, Any], is_merged: bool) -> list[str]:
    """What its user has to know: another base than that of the training, and what a composition asks of a server."""
    says_serving = "serving" in trained and (not is_merged or needs_qvl(trained))
    return [*partner.warnings, *([f"Serving it: {trained['serving']}."] if says_serving else [])]


def _save_merged(whole: TrainedModel, folder: Path, trained: Mapping[str, Any]) -> None:
    """Merges in the format that the model is loaded in, and rounds to 16 bits once."""
    assert isinstance(whole.model, PeftModel)
    try:
        merged = whole.model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise FailedCheckError(f"The adapter cannot be merged: {error}") from error
    merged.to(torch.float16 if merged.dtype == torch.float16 else torch.bfloat16)
    for part in merged.config.sub_configs:
        # Only the whole's own is set when it is saved, and loading asks the parts too.
        getattr(merged.config, part).dtype = merged.dtype
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in merged.parameters())
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _SPARE_BYTES:
        raise UserError(
            f"{folder.parent} has {free / 2**30:.1f} GiB free, the merged model takes {num_bytes / 2**30:.1f} GiB: "
            "free some, or name another disk with --out."
        )
    merged.save_pretrained(folder)
    whole.processing_class.save_pretrained(folder)
    write_json_atomically(folder / TRAINED_WITH, {**trained, "merged": True})


def _require_mergeable(whole: TrainedModel) -> None:
    if getattr(whole.model.get_base_model(), "hf_quantizer", None) is not None:
        raise UserError(
            f"The base {whole.model.config._name_or_path} comes quantized: what is merged into it would be rounded "
            "again and be another model. Export with --format adapter, or train on the checkpoint in 16 bits."
        )


def _ask(partner: TrainedModel, prompts: list[dict[str, Any]]) -> Said:
    if not partner.sees_images and any(prompt["images"] for prompt in prompts):
        raise UserError("The prompts show images and this model takes text only: name others with --prompts.")
    return listen(partner, prompts)


def _data_of_run(adapter: Path, own: Mapping[str, Any]) -> LoadedData:
    """The rows of the run that the adapter lies in."""
    if not own:
        raise UserError(f"{adapter} lies in no run folder: name prompts to compare on with --prompts FILE.")
    try:
        # Only the data matter here: the precision of the run need not be one of this machine.
        settings = parse_settings({}, {}, [], {"bf16": False, "fp16": False, "dtype": "float32"}, continued=own)
        return load_data(settings, None, own_processing_class(settings, adapter))
    except UserError as error:
        raise UserError(f"The run's data cannot be read here: {error} Name prompts with --prompts FILE.") from error


def _first_prompts(data: LoadedData) -> list[dict[str, Any]]:
    prompts = Prompts(data.evaluation)
    return [prompts[index] for index in range(min(NUM_PROMPTS, len(prompts)))]


def _left_by_run(adapter: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """metrics.json and settings.yaml of the run that an adapter lies in; empty where there are none."""
    run = adapter.absolute().parent
    metrics, settings = run / "metrics.json", run / "settings.yaml"
    return (
        json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {},
        yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.is_file() else {},
    )
