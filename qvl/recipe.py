"""What a recipe is, and what happens when its file is run.

A recipe names its defaults and says how a row becomes an example; this module resolves the settings, opens the run
record, runs the stages and prints the outcome. Heavy imports wait until a run is certain, so that importing a recipe
costs nothing.
"""

import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from qvl import ending_signals, processes, unsloth_import
from qvl.errors import FailedCheckError, Terminated, UserError
from qvl.text_scores import TextScore

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from qvl.active_run import Run
    from qvl.data import LoadedData
    from qvl.data_config import DataConfig
    from qvl.kept_base import KeptBase
    from qvl.settings import Settings

# Set by a recipe, but without a say in what comes out.
_BOOKKEEPING = (
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "keep_checkpoints",
    "stages",
)

RowToExample = Callable[[dict[str, Any], "DataConfig"], dict[str, Any] | None]


@dataclass(frozen=True)
class Recipe:
    """An experiment.

    Attributes:
        name: names the folder of its runs and its MLflow experiment.
        defaults: flags by name; everything that decides the result.
        smoke: flags that --smoke puts over them: a tiny model and data, nothing else.
        row_to_example: how a row of its data set becomes an example; None where the rows are of a standard format.
        scores: its own scores by name, to be chosen by --scores beside those of qvl; see `qvl.text_scores.TextScore`.
    """

    name: str
    defaults: Mapping[str, Any]
    smoke: Mapping[str, Any] = field(default_factory=dict)
    row_to_example: RowToExample | None = None
    scores: Mapping[str, TextScore] = field(default_factory=dict)


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a recipe from the command line and exits.

    0 done, 1 a check failed, 2 a mistake to mend, 130 Ctrl-C, 143 SIGTERM. Of several processes one says why.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    ending_signals.outlive_terminal()
    try:
        if _is_ray_job_without_gpu():
            _become_ray_task(words)
        run(recipe, argv=words)
        processes.leave()
    except UserError as error:
        if processes.speaks_first():
            print(f"\n{error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FailedCheckError) else 2)
    except KeyboardInterrupt:
        if processes.speaks_first():
            print("\nInterrupted; an MLflow run that was open is marked KILLED.", file=sys.stderr)
        sys.exit(130)
    except Exception:
        if processes.speaks_first():
            raise
        sys.exit(1)
    sys.exit(0)


def _is_ray_job_without_gpu() -> bool:
    """Whether `ray job submit` has started this process and reserved no GPU for it: two jobs would share one.

    Ray hides the GPUs that a job has not reserved, or (the second variable) leaves what the head node has visible.
    """
    is_reserved = os.environ.get("CUDA_VISIBLE_DEVICES") and not os.environ.get(
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
    )
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not is_reserved


def _become_ray_task(words: Sequence[str]) -> NoReturn:
    """Puts `python -m ray_jobs.task FILE ARGS` in this process's place, which asks Ray for a GPU."""
    file = Path(sys.argv[0]).resolve()
    root = file.parents[1]
    if not (root / "ray_jobs" / "task.py").is_file():
        raise UserError(
            f"This Ray job runs {file}, and {root} holds no ray_jobs/ to ask for a GPU with: submit the whole "
            "repository, from its root, with `ray job submit --working-dir . -- python recipes/...`."
        )
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    os.execv(sys.executable, [sys.executable, "-m", "ray_jobs.task", str(file), *words])


def run(
    recipe: Recipe,
    overrides: Mapping[str, Any] | None = None,
    argv: Sequence[str] = (),
    kept: "KeptBase | None" = None,
    callbacks: "Sequence[TrainerCallback]" = (),
    adds_to_run: str | None = None,
) -> dict[str, float]:
    """Runs a recipe; the one entry that the command line and a sweep share.

    Args:
        recipe: the experiment.
        overrides: flags by name, above everything else.
        argv: command line without the program's name.
        kept: what runs of one process share.
        callbacks: of the trainer, for whoever follows the training from outside.
        adds_to_run: id of an MLflow run that has ended and gets the numbers and files of this one, which then has no
            MLflow run of its own. That run and its folder, which is this one's, keep their duration and settings.

    Returns:
        The run's numbers by their MLflow names, such as `finetuned_bleu4`; empty for --dry_run.

    Raises:
        UserError: something the user has to change.
        Terminated: SIGTERM came; what was open has been saved and closed.
    """
    start = time.perf_counter()
    quieten_and_tame_libraries()
    processes.keep_others_quiet()
    print(f"{recipe.name}: loading torch, transformers and trl ...", flush=True)
    processes.take_first_gpu()
    unsloth_import.import_if_asked(recipe.defaults, argv, overrides or {})
    from qvl import run_folder

    settings, folder, own = _resolve(recipe, overrides or {}, argv)
    unsloth_import.require_usable(settings, is_base_kept=kept is not None)
    if settings.recipe.dry_run:
        from qvl.dry_run import dry_run

        place = folder if settings.output_dir else folder.parent / "dry_run"
        processes.on_main(lambda: dry_run(settings, recipe.row_to_example, place))
        return {}
    processes.on_main(lambda: run_folder.prepare(folder))
    # Only a process's main thread gets signals; a trial of a sweep runs in another one.
    gets_signals = threading.current_thread() is threading.main_thread()
    previous = ending_signals.take_over(_terminate) if gets_signals else {}
    try:
        return _run_stages(recipe, settings, own, folder, start, kept, callbacks, adds_to_run)
    finally:
        ending_signals.give_back(previous)
        if processes.is_main():
            run_folder.remove_if_empty(folder)


def _resolve(
    recipe: Recipe, overrides: Mapping[str, Any], argv: Sequence[str]
) -> tuple["Settings", Path, dict[str, Any] | None]:
    """Settings, run folder, and the settings.yaml that a run to continue has left: its settings are started from."""
    import yaml

    from qvl.adapter_flags import settle_lora_flags
    from qvl.best_checkpoint import settle_best_checkpoint
    from qvl.continued_run import continued
    from qvl.metrics import choose_scores
    from qvl.run_folder import choose_run_folder
    from qvl.settings import parse_settings
    from qvl.sharding import sharding

    sharding()  # stops now where the launcher asks for what is not there
    prog = Path(sys.argv[0]).name
    settings = parse_settings(recipe.defaults, recipe.smoke, argv, overrides, prog)
    first = settings.recipe.stages[0] if settings.recipe.stages else None
    resumes = settings.training.resume_from_checkpoint
    continues = bool(resumes) or first == "report" or (first == "evaluate" and settings.recipe.adapter is None)
    output_dir = settings.output_dir
    if resumes and resumes.lower() != "true" and output_dir is None:
        # RUN/checkpoints/checkpoint-7
        output_dir = str(Path(resumes).parent.parent)
    # One clock and one disk decide for all processes.
    folder = processes.on_main(
        lambda: choose_run_folder(recipe.name, output_dir, settings.training.run_name, continues)
    )
    left = folder / "settings.yaml"
    text = processes.on_main(lambda: left.read_text(encoding="utf-8") if left.is_file() else None)
    own = None
    if continues and text is not None and not settings.recipe.dry_run:
        print(f"Continuing {folder} with its settings.yaml; flags given now go above it.")
        own = yaml.safe_load(text)
        settings = parse_settings(recipe.defaults, recipe.smoke, argv, overrides, prog, continued=own)
        settings = continued(settings, own, folder, overrides)
    settings.recipe.scores = choose_scores(settings.recipe.scores, recipe.scores)
    settle_best_checkpoint(settings, recipe.scores)
    settle_lora_flags(settings)
    return settings, folder, own


def _run_stages(
    recipe: Recipe,
    settings: "Settings",
    own: dict[str, Any] | None,
    folder: Path,
    start: float,
    kept: "KeptBase | None",
    callbacks: "Sequence[TrainerCallback]",
    adds_to_run: str | None,
) -> dict[str, float]:
    from qvl import run_folder
    from qvl.active_run import Run, load_data
    from qvl.adapter_origin import other_origin
    from qvl.adapters import require_adapter, require_modules_in_language_model
    from qvl.continued_run import of_the_whole_run
    from qvl.files import write_text_atomically
    from qvl.fp8 import require_fp8
    from qvl.memory import memory_for_run
    from qvl.models import load_config, load_processing_class, skeleton
    from qvl.precision import find_device
    from qvl.score_table import comparison_table
    from qvl.sharding import load_whole_models, require_shardable
    from qvl.tracking import add_to_run, open_run
    from qvl.trained_parts import names_of_trained_parts, trained_parts
    from qvl.trainer import require_loss_for

    resumes = settings.training.resume_from_checkpoint
    resume_from = run_folder.find_checkpoint(folder, resumes) if resumes else None
    if "train" in settings.recipe.stages and not resumes:
        processes.on_main(lambda: run_folder.require_no_checkpoint(folder))
    require_shardable(settings)
    load_whole_models()
    if "train" in settings.recipe.stages:
        require_loss_for(settings.training.device)
        require_fp8(find_device(settings.training.use_cpu), settings)
    config = load_config(settings)
    if names_of_trained_parts(settings):
        trained_parts(skeleton(config), settings)  # stops now where there is no such part
    if "train" in settings.recipe.stages and settings.model.lora_modules_to_save:
        require_modules_in_language_model(skeleton(config), settings)
    adapter = _adapter_to_use(settings, folder)
    if "evaluate" in settings.recipe.stages and "train" not in settings.recipe.stages and adapter is None:
        raise UserError(f"{folder} holds no adapter yet: run --stages train first, or name one with --adapter DIR.")
    if adapter is not None:
        require_adapter(adapter)
    processing_class = load_processing_class(settings, adapter)
    if adapter is not None:
        for difference in other_origin(adapter, settings, processing_class, getattr(config, "_commit_hash", None)):
            print(f"Warning, {adapter}: {difference}", flush=True)
    data = load_data(settings, recipe.row_to_example, processing_class)
    print("\n".join(data.summary.lines()), flush=True)
    memory = memory_for_run(settings, config, data, processing_class)
    print(f"Run folder: {folder}", flush=True)
    params = _params(settings, data, getattr(config, "_commit_hash", None))
    store_dir = _store_dir(folder)
    opened = (
        open_run(recipe.name, folder, params, store_dir)
        if adds_to_run is None
        else add_to_run(adds_to_run, params, store_dir)
    )
    with opened as record:
        # Not before MLflow is reached: a run that never began should not be the newest one to continue.
        if processes.is_main() and adds_to_run is None:
            whole = of_the_whole_run(settings, own) if own is not None else settings
            write_text_atomically(folder / "settings.yaml", whole.to_yaml())
        active = Run(recipe.name, settings, folder, data, processing_class, record, recipe.scores)
        active.kept, active.callbacks = kept, callbacks
        active.predicted_gib = memory.peaks_gib() if memory else {}
        try:
            for stage in settings.recipe.stages:
                _run_stage(active, stage, resume_from)
        finally:
            if adds_to_run is None:
                record.log_metrics({"total_seconds": time.perf_counter() - start})
            record.log_files(folder)
        metrics_file = folder / "metrics.json"
        metrics = json.loads(metrics_file.read_text(encoding="utf-8")) if metrics_file.is_file() else {}
    print("\n" + comparison_table(metrics))
    print(f"\nRun folder:  {folder}")
    if (folder / "report.html").is_file():
        print(f"Report:      {folder / 'report.html'}")
    print(f"MLflow UI:   {record.ui_command}")
    print(f"Took {time.perf_counter() - start:.0f} s")
    return run_folder.flat_metrics(metrics)


def _run_stage(active: "Run", stage: str, resume_from: Path | None) -> None:
    from qvl import evaluate_stages, train_stage

    print(f"\n== {stage} ==", flush=True)
    if stage == "check":
        # Imported here: it brings the checks of a whole training, which other stages do not need.
        from qvl.check_stage import check

        check(active)
    elif stage == "baseline":
        if resume_from is not None and (active.folder / "baseline_predictions.jsonl").is_file():
            print("Kept: baseline_predictions.jsonl is there from before the interruption.")
            return
        evaluate_stages.baseline(active)
    elif stage == "train":
        train_stage.train_adapter(active, resume_from)
    elif stage == "evaluate":
        evaluate_stages.evaluate(active)
    else:
        evaluate_stages.report(active)


def _adapter_to_use(settings: "Settings", folder: Path) -> Path | None:
    """An adapter that exists before this run; its processor has the template and pixel budget to go on with."""
    if settings.recipe.adapter is not None:
        return Path(settings.recipe.adapter)
    own = folder / "adapter"
    return own if own.is_dir() and "train" not in settings.recipe.stages else None


def _store_dir(folder: Path) -> Path:
    """MLflow's default store: outputs/ for outputs/<recipe>/<run>, else the folder beside the run's own."""
    from qvl.run_folder import OUTPUTS

    absolute, outputs = folder.absolute(), OUTPUTS.absolute()
    return outputs if absolute.is_relative_to(outputs) else absolute.parent


def _params(settings: "Settings", data: "LoadedData", model_commit: str | None) -> dict[str, Any]:
    """What defines the experiment, about thirty values: the compare view has to stay readable."""
    import peft
    import torch
    import transformers
    import trl

    import qvl

    known = settings.as_dict()
    defining = {key: known[key] for key in settings.given if key in known and key not in _BOOKKEEPING}
    params = {
        **defining,
        **{key: known[key] for key in ("dtype", "bf16", "fp16")},
        "model_commit": model_commit,
        "data_revision": data.summary.revision,
        "data_fingerprint": data.summary.fingerprint[:16],
        "data_sources": "; ".join(part.source() for part in data.summary.parts) or None,
        "num_train_images": len(data.train),
        "num_eval_images": len(data.evaluation),
        "qvl_version": qvl.__version__,
        **{f"{module.__name__}_version": module.__version__ for module in (torch, transformers, trl, peft)},
    }
    return {key: value for key, value in params.items() if value is not None}


def quieten_and_tame_libraries() -> None:
    """Settings that have to be made before the libraries are imported; the user's own values stay."""
    # Thread pools inside forked data loader workers deadlock; the tokenizers library warns on every fork otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP threads spin while they wait. With anything else on the cores (workers, a browser) a CPU step of a small
    # model then takes ten times as long: 4 s against 0.4 s for the smoke model on two busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # bitsandbytes asks at every import for an optional package that only speeds up 4-bit on a CPU.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # And its 8-bit layers tell at every call that they round fp16 copies of what is not fp16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # Raised inside transformers by calls of peft and trl, which follow the renaming in their own time.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*gradient_checkpointing.* is deprecated")


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
