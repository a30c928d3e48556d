"""The recipe `qwen2_5_vl` by one loader, measured in this process; `loaders.py` starts it, and says what for.

    python tests/gpu/one_loader.py transformers --model FOLDER --out FOLDER --work FOLDER

Loading, 12 steps of training and 6 answers are a run of the recipe as it is. The stage check is cut to 20 steps over 4
rows and to the checks that apply to random weights, which learn nothing by heart. OUT/LOADER.json is written after
every step, check and stage. Unsloth has to be imported before transformers: this file imports both inside functions.
"""

import argparse
import functools
import importlib
import json
import os
import runpy
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from qvl import recipe, unsloth_import
from qvl.errors import FailedCheckError
from qvl.files import read_jsonl, write_json_atomically

if TYPE_CHECKING:
    from transformers import TrainerCallback

RECIPE_FILE = Path(__file__).resolve().parents[2] / "recipes" / "qwen2_5_vl.py"
LOADERS = ("unsloth", "transformers")
NUM_STEPS = 12
# Compiling, and what else the first steps wait for.
NUM_FIRST_STEPS = 4
_NUM_OVERFIT_STEPS, _NUM_LEARNED_ROWS = 20, 4
_VERSIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")


def recipe_words(loader: str, model: str, more: Sequence[str]) -> list[str]:
    """The recipe's flags: its own settings but for images of 1,024 visual tokens, batch 1 and no dropout."""
    flags = {
        "loader": loader,
        "model_name_or_path": model,
        "dataset_name": "qvl/scenes",
        "dataset_test_split": "test",
        "min_pixels": 1024 * 28 * 28,
        "num_train_examples": 16,
        "num_eval_examples": 6,
        "max_steps": NUM_STEPS,
        "gradient_accumulation_steps": 1,
        "lora_dropout": 0,
        "max_new_tokens": 16,
        "logging_steps": 1,
        "ignore_memory_plan": "true",
    }
    return [*(word for key, value in flags.items() for word in (f"--{key}", str(value))), *more]


class Record:
    """What is known so far, on disk after every change: a killed process leaves what it had."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time.perf_counter()
        self.stage = ""
        # When the check before was over, or the stage began.
        self.check_start = self.start
        self.found: dict[str, Any] = {"loads": [], "step_seconds": [], "checks": [], "stages": {}}

    def put(self, **values: Any) -> None:
        self.found |= values
        write_json_atomically(self.path, self.found)

    def add(self, key: str, value: Any) -> None:
        self.found[key].append(value)
        print(f"[{time.perf_counter() - self.start:.1f} s] {key}: {value}", flush=True)
        self.put()


def synchronize() -> float:
    """The time once the GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def import_libraries(record: Record, recipe_defaults: dict[str, Any], words: Sequence[str]) -> None:
    """Imports what a run needs, Unsloth first if it is asked for, and notes seconds and versions."""
    start = time.perf_counter()
    recipe.quieten_and_tame_libraries()
    unsloth_import.import_if_asked(recipe_defaults, words, {})
    for module in ("check_stage", "evaluate_stages", "train_stage"):
        importlib.import_module(f"qvl.{module}")
    import torch

    seconds = time.perf_counter() - start
    names = [*_VERSIONS, *(["unsloth"] if "unsloth" in sys.modules else [])]
    record.put(
        import_seconds=seconds,
        versions={name: importlib.import_module(name).__version__ for name in names},
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


@contextmanager
def measured(record: Record) -> Iterator[None]:
    """Runs of the recipe inside are measured, and their stage check is cut."""
    from qvl import check_rows, check_stage, evaluate_stages, models, run_folder, train_stage

    all_checks = functools.partial(check_stage.all_checks, has_learned=False)
    with ExitStack() as stack:
        for module, name, value in (
            (models, "load_base", timed_load(record, models.load_base)),
            (run_folder, "update_checks", timed_checks(record, run_folder.update_checks)),
            (train_stage, "train_adapter", timed_stage(record, "train", train_stage.train_adapter)),
            (evaluate_stages, "evaluate", timed_stage(record, "evaluate", evaluate_stages.evaluate)),
            (check_stage, "check", timed_stage(record, "check", check_stage.check)),
            (check_stage, "all_checks", all_checks),
            (check_stage, "_MOST_OVERFIT_STEPS", _NUM_OVERFIT_STEPS),
            (check_rows, "_NUM_LEARNED", _NUM_LEARNED_ROWS),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield


def timed_load(record: Record, load_base: Callable[..., Any]) -> Callable[..., Any]:
    """Notes seconds and peak of each loading."""
    from qvl.memory_use import give_back_unused, peak_gib, reset_peak

    def load(*args: Any, **kwargs: Any) -> Any:
        give_back_unused()
        reset_peak()
        start = synchronize()
        model = load_base(*args, **kwargs)
        seconds = synchronize() - start
        kind = f"{type(model).__module__}.{type(model).__name__}"
        record.add("loads", {"seconds": seconds, "peak_gib": peak_gib(), "class": kind})
        return model

    return load


def timed_checks(record: Record, update_checks: Callable[..., None]) -> Callable[..., None]:
    """Notes each check with the seconds since the one before it (the first: since the stage began)."""
    from qvl.memory_use import peak_gib

    def update(folder: Path, checks: Sequence[dict[str, Any]]) -> None:
        update_checks(folder, checks)
        now = synchronize()
        seconds, record.check_start = now - record.check_start, now
        for check in checks:
            record.add("checks", {**check, "stage": record.stage, "seconds_of_group": seconds, "peak_gib": peak_gib()})
            seconds = 0.0

    return update


def timed_stage(record: Record, name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
    """Notes a stage's seconds, and what it has left in the run's folder."""
    from qvl.memory_use import reset_peak

    def run_stage(run: Any, *args: Any) -> Any:
        record.stage = f"{name}_of_adapter" if run.settings.recipe.adapter else name
        reset_peak()
        record.check_start = start = synchronize()
        try:
            return stage(run, *args)
        finally:
            left = {"seconds": synchronize() - start, **of_folder(run.folder, name)}
            record.found["stages"][record.stage] = left
            record.put()

    return run_stage


def of_folder(folder: Path, stage: str) -> dict[str, Any]:
    """A stage's numbers and answers."""
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if stage == "train":
        log = folder / "training_log.jsonl"
        losses = [row["loss"] for row in (read_jsonl(log) if log.is_file() else []) if "loss" in row]
        return {"peak_gib": (metrics.get("train") or {}).get("peak_gib"), "losses": losses}
    predictions = folder / "finetuned_predictions.jsonl"
    if stage == "evaluate" and predictions.is_file():
        keys = ("id", "prediction", "answer_loss", "answer_tokens")
        answers = [{key: row.get(key) for key in keys} for row in read_jsonl(predictions)]
        return {"answers": answers, "cost": metrics.get("cost", {}).get("finetuned")}
    return {}


def step_timer(record: Record) -> "TrainerCallback":
    """Seconds of each step, the GPU waited for."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = synchronize()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            record.add("step_seconds", synchronize() - self.start)

    return StepTimer()


def attempt(record: Record, label: str, run: Callable[[], Any]) -> None:
    """A run that fails is noted and does not keep the next one from being measured."""
    try:
        run()
    except Exception as error:
        if not isinstance(error, FailedCheckError):
            traceback.print_exc()
        record.put(errors={**record.found.get("errors", {}), label: f"{type(error).__name__}: {error}"[:2000]})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("loader", choices=LOADERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    options, more = parser.parse_known_args()
    # Before torch is imported: with a GPU that is pinned in no other way Unsloth compiles with one worker.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    words = recipe_words(options.loader, options.model, more)
    definition = runpy.run_path(str(RECIPE_FILE))["RECIPE"]
    record = Record(options.out / f"{options.loader}.json")
    import_libraries(record, dict(definition.defaults), words)

    def run(label: str, *flags: str, callbacks: Sequence["TrainerCallback"] = ()) -> None:
        folder = options.work / f"{options.loader}-{label}"
        shutil.rmtree(folder, ignore_errors=True)
        argv = [*words, "--output_dir", str(folder), *flags]
        attempt(record, label, lambda: recipe.run(definition, argv=argv, callbacks=callbacks))

    with measured(record):
        run("train", "--stages", "train", "evaluate", callbacks=[step_timer(record)])
        run("check", "--stages", "check")
        trained = options.work / "unsloth-train" / "adapter"
        if options.loader == "transformers" and trained.is_dir():
            run("adapter_of_unsloth", "--stages", "evaluate", "--adapter", str(trained))
    print("All measured.", flush=True)


if __name__ == "__main__":
    main()
