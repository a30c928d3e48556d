"""Where a run writes: which folder, what earlier stages left in it, and whether it will hold what comes."""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from qvl.errors import UserError
from qvl.files import read_jsonl, write_json_atomically
from qvl.processes import num_processes

OUTPUTS = Path("outputs")
SAMPLES_FILE = "training_samples.jsonl"
SAMPLES_FOLDER = "samples"
_NO_METRICS: dict[str, Any] = {
    "scores": {},
    "baseline": None,
    "finetuned": None,
    "difference": {},
    "train": {"samples_per_second": None, "seconds": None, "peak_gib": None, "final_loss": None},
    "cost": {},
}
# fp32 weight and two fp32 moments of AdamW for every trained parameter.
_CHECKPOINT_BYTES_PER_PARAMETER = 12
_SPARE_BYTES = 256 * 2**20


def choose_run_folder(recipe: str, output_dir: str | None, run_name: str | None, continues: bool) -> Path:
    """The folder of this invocation.

    Args:
        recipe: the recipe's name.
        output_dir: what the user named; taken as it is.
        run_name: name below outputs/<recipe>/, by default the time.
        continues: the first stage asked for needs what an earlier one left, so the newest run is meant.

    Raises:
        UserError: there is no run to continue.
    """
    if output_dir is not None:
        return Path(output_dir)
    parent = OUTPUTS / recipe
    if run_name is not None:
        return parent / run_name
    if not continues:
        return _unused(parent / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    runs = [path for path in parent.glob("*/") if (path / "settings.yaml").is_file() and path.name != "dry_run"]
    if not runs:
        raise UserError(
            f"There is no earlier run in {parent} to continue: run the stages before it too, or name the run's folder "
            "with --output_dir."
        )
    return max(runs, key=lambda path: (path / "settings.yaml").stat().st_mtime)


def _unused(folder: Path) -> Path:
    """`folder`, or the same name with a number: two runs may start in one second."""
    number = 2
    candidate = folder
    while candidate.exists():
        candidate = folder.with_name(f"{folder.name}_{number}")
        number += 1
    return candidate


def rows_before_checkpoint(path: Path, checkpoint: Path | None) -> list[dict[str, Any]]:
    """What a training has logged up to the checkpoint that it goes on from; what was logged behind it comes again.

    Args:
        path: JSON lines with a `step` each.
        checkpoint: folder of the checkpoint; None for a training that begins.
    """
    if checkpoint is None or not path.is_file():
        return []
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return [row for row in read_jsonl(path) if row["step"] <= state["global_step"]]


def prepare(folder: Path) -> None:
    """Makes the folder and proves that it can be written to, before anything long starts.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe") as probe:
            probe.write(b"\0" * 2**20)
            probe.flush()
    except OSError as error:
        raise UserError(
            f"The run folder {folder} cannot be written to ({error.strerror}): free some space or name another with "
            "--output_dir."
        ) from error


def remove_if_empty(folder: Path) -> None:
    """Takes back the folder of a run that ended before it wrote anything."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def require_space(folder: Path, num_trainable: int, num_checkpoints: int) -> None:
    """Stops a run whose checkpoints would not fit on the disk.

    Args:
        folder: the run folder.
        num_trainable: trained parameters.
        num_checkpoints: how many will lie there at the same time, the adapter counted in.

    Raises:
        UserError: too little space.
    """
    needed = num_trainable * _CHECKPOINT_BYTES_PER_PARAMETER * num_checkpoints + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB free; the adapter and {num_checkpoints} checkpoints need "
            f"{needed / 2**30:.1f} GiB. Free some, set --save_total_limit 1, or name another disk with --output_dir."
        )


def find_checkpoint(folder: Path, wanted: str) -> Path:
    """The checkpoint to resume from.

    Args:
        folder: the run folder.
        wanted: "true" for its newest complete checkpoint, or a checkpoint's path.

    Raises:
        UserError: there is none, it lacks the optimizer's state, or another number of processes has saved it.
    """
    if wanted.lower() != "true":
        if not (Path(wanted) / "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {wanted} is no complete checkpoint (no trainer_state.json).")
        return _resumable(Path(wanted))
    found = _complete_checkpoints(folder)
    if not found:
        raise UserError(
            f"{folder} holds no checkpoint to resume from: name the run with --output_dir, or start afresh without "
            "--resume_from_checkpoint. (They are removed once training is done, unless --keep_checkpoints.)"
        )
    return _resumable(found[max(found)])


def require_no_checkpoint(folder: Path) -> None:
    """Stops a training that begins where another one has left checkpoints: it would be mistaken for the other.

    Raises:
        UserError: names the newest one.
    """
    if found := _complete_checkpoints(folder):
        raise UserError(
            f"{found[max(found)]} is of an earlier training: go on with that by --resume_from_checkpoint true, or "
            f"remove {folder / 'checkpoints'}, or name another folder with --output_dir."
        )


def _complete_checkpoints(folder: Path) -> dict[int, Path]:
    """By their step."""
    return {
        int(match[1]): path
        for path in (folder / "checkpoints").glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "trainer_state.json").is_file()
    }


def _resumable(checkpoint: Path) -> Path:
    """The checkpoint, if all of it is there and as many processes have saved it as there are now.

    Upstream goes on with others all the same, and with an optimizer that begins anew. It counts in batches what was
    trained on, and theirs were of another size; each process has its own random numbers.
    """
    num_saved = len(list(checkpoint.glob("rng_state_*.pth"))) or int((checkpoint / "rng_state.pth").is_file())
    if num_saved == 0:
        raise UserError(
            f"{checkpoint} was saved with --save_only_model, without the optimizer's state: a training cannot go on "
            f"from it. Train its adapter further in another folder: --adapter {checkpoint}."
        )
    if num_saved != num_processes():
        raise UserError(
            f"{checkpoint} was saved by {num_saved} process(es), and this run has {num_processes()}: other rows would "
            f"be skipped than those that were trained on. Resume it with {num_saved}."
        )
    return checkpoint


def update_metrics(folder: Path, part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Puts one stage's numbers into metrics.json, which has all its keys from the start.

    Args:
        folder: the run folder.
        part: "scores" (what they are called and which way is better), "baseline", "finetuned", "difference", "train"
            or "cost" (seconds and memory of the evaluations).
        values: what the part becomes.

    Returns:
        The whole content.
    """
    path = folder / "metrics.json"
    metrics = {**_NO_METRICS, **(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})}
    metrics[part] = {**(metrics[part] or {}), **values} if part in ("train", "cost") else dict(values)
    write_json_atomically(path, metrics)
    return metrics


def forget_adapter(folder: Path, keeps_samples: bool) -> None:
    """Takes away what was made with an earlier training's adapter, and the adapter: a new one is about to be trained.

    Args:
        folder: the run folder.
        keeps_samples: the training is resumed, and answers that it gave on its way are its own.
    """
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    for name in ("finetuned_predictions.jsonl", "report.html"):
        (folder / name).unlink(missing_ok=True)
    if not keeps_samples:
        (folder / SAMPLES_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / SAMPLES_FOLDER, ignore_errors=True)
    path = folder / "metrics.json"
    if path.is_file():
        metrics = json.loads(path.read_text(encoding="utf-8"))
        metrics |= {key: _NO_METRICS[key] for key in ("finetuned", "difference", "train")}
        metrics["cost"].pop("finetuned", None)
        write_json_atomically(path, metrics)


def update_checks(folder: Path, checks: Sequence[Mapping[str, Any]]) -> None:
    """Adds checks to checks.json; a check of the same name is replaced."""
    path = folder / "checks.json"
    known = {check["name"]: check for check in json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}
    write_json_atomically(path, list({**known, **{check["name"]: dict(check) for check in checks}}.values()))


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """metrics.json as MLflow metrics: `baseline_bleu4`, `difference_bleu4_mean`, `train_seconds`, ..."""
    flat: dict[str, float] = {}

    def add(prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{key}_", value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                flat[f"{prefix}{key}"] = float(value)

    add("", {key: value for key, value in metrics.items() if value})
    return flat
