"""Sweeps over recipes: what one is, its command line, and its course from the first check to the winner's report.

A sweep's file names a recipe, what is varied, what counts and how much may be spent; everything else is the recipe's,
whose other flags also stand on the sweep's command line.
"""

import argparse
import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from qvl.errors import Terminated, UserError, first_line
from ray_jobs.axes import Axis, example_of
from ray_jobs.environment import code_for_workers, has_travelled, travelling_variables
from ray_jobs.storage import make_sweep_folder, note_sweep, storage_address, sweep_folder

if TYPE_CHECKING:
    from ray.tune import Tuner

    from qvl.flags import RecipeArguments
    from qvl.mlflow_store import Store
    from ray_jobs.outcome import Outcome
    from ray_jobs.sweep_record import SweepRecord
    from ray_jobs.trial import Plan

ROOT = Path(__file__).resolve().parents[1]
STORAGE = Path("outputs/sweeps")
# What a driver needs to know of the sweep that it resumes; the rest is in Ray's own record.
_KEPT = ("scheduler", "cpus_per_trial")
# What Ray says again and again, and at length; a sweep has its own lines and its own table.
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    # Paths on the command line are those of the driver's folder.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(frozen=True)
class Sweep:
    """What a sweep varies, and by what it is judged.

    Attributes:
        recipe: its file, from the root of the repository.
        axes: flags of the recipe by name, each with its values or its range.
        metric: of the recipe's metrics, by its MLflow name; a trial's last word.
        mode: "max" or "min".
        num_samples: trials, unless the command line says otherwise.
        first_rung_steps: optimizer steps before asha may end a trial, and between changes of pbt.
    """

    recipe: str
    axes: Mapping[str, Axis]
    metric: str
    mode: str
    num_samples: int
    first_rung_steps: int


def main(sweep: Sweep) -> NoReturn:
    """Runs a sweep from the command line and exits.

    0 done, 1 no trial finished, 2 a mistake to mend, 130 Ctrl-C, 143 SIGTERM.
    """
    name = Path(sys.argv[0]).stem
    try:
        sys.exit(0 if run_sweep(sweep, name, sys.argv[1:]) else 1)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted; go on with --resume.", file=sys.stderr)
        sys.exit(130)


def run_sweep(sweep: Sweep, name: str, argv: Sequence[str]) -> bool:
    """Runs or resumes a sweep.

    Args:
        sweep: what to do.
        name: begins the name of its folder and of its MLflow run.
        argv: command line without the program's name: the sweep's own flags, and those of the recipe that are no axes.

    Returns:
        Whether a trial has finished.

    Raises:
        UserError: something to mend; an unknown axis or flag, or a flag that is an axis, stops here, before a GPU is
            asked for.
    """
    options, words = _parse(sweep, name, argv)
    storage = storage_address(options.storage_path)
    folder_name, left = sweep_folder(storage, name, options.resume)
    words = left.get("words", words)
    from ray_jobs.task import checked_settings
    from ray_jobs.trial import DEFAULT_STAGES, Plan

    _go_on_as_before(options, left)
    axes = _axes_of(sweep, options.scheduler)
    if not left:
        _refuse_flags_of_axes(words, axes, f"{name}.py")
    if options.scheduler == "pbt" and not left:
        # What is copied from a better trial is its checkpoint, so there has to be one whenever trials are compared.
        words = ["--save_steps", str(sweep.first_rung_steps), *words]
    settings = checked_settings(ROOT / sweep.recipe, [*DEFAULT_STAGES, *words], example_of(axes))
    _require_metric(sweep, settings.recipe.scores)
    _require_stages(sweep, settings.recipe)
    environment = _connect(storage)
    from ray_jobs.children import open_store, require_reachable_by_all

    store = open_store()
    require_reachable_by_all(store, _machines())
    environment["MLFLOW_TRACKING_URI"] = store.uri
    if not left:
        make_sweep_folder(storage, folder_name)
    signal.signal(signal.SIGTERM, _terminate)
    record = _open_record(sweep, store, folder_name, options, words, left.get("parent_id"))
    try:
        folder = None if has_travelled() else str(Path.cwd())
        recipe = Path(sweep.recipe).stem
        plan = Plan(sweep.recipe, recipe, tuple(words), folder, record.run_id, options.scheduler == "pbt")
        if not left:
            kept = {name: getattr(options, name) for name in _KEPT}
            note_sweep(storage, folder_name, {"words": words, **kept, "parent_id": record.run_id})
        print(f"Sweep {folder_name} in {storage}; MLflow: {record.where_to_look}", flush=True)
        tuner = _tuner(sweep, options, axes, plan, environment, settings, storage, folder_name, bool(left))
        trials = _run_trials(tuner, sweep, storage)
        best = next((trial for trial in trials if trial.score is not None), None)
        _settle(record, trials, sweep.metric)
        if best is not None:
            _report_winner(plan, best, environment, settings.recipe.ray_num_gpus, options.cpus_per_trial)
    except BaseException as error:
        with contextlib.suppress(Exception):
            record.kill_running_children()
            record.end("KILLED" if isinstance(error, KeyboardInterrupt | Terminated) else "FAILED")
        raise
    with contextlib.suppress(Exception):  # said by _settle already
        record.end("FINISHED" if best is not None else "FAILED")
    _print_outcome(sweep, trials, best, record.where_to_look)
    return best is not None


def _parse(sweep: Sweep, name: str, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog=f"{name}.py",
        allow_abbrev=False,
        description=f"Sweep over {sweep.recipe}: {', '.join(sweep.axes)}. Every other flag of the recipe is taken.",
    )
    add = parser.add_argument
    add("--num_samples", type=int, default=sweep.num_samples, help="Trials (a grid has as many as points).")
    add("--max_concurrent", type=int, default=None, help="Most trials at a time; none: as many as fit.")
    add("--scheduler", choices=["asha", "fifo", "pbt"], default="asha", help="Who ends trials early.")
    add("--search", choices=["random", "grid", "optuna"], default="random", help="Who chooses the points.")
    add("--cpus_per_trial", type=float, default=1, help="CPUs that Ray keeps for a trial.")
    add("--storage_path", default=str(STORAGE), help="Folder, NFS folder or s3://bucket/folder of the sweep.")
    add("--time_budget", type=float, default=None, help="Seconds after which no trial goes on.")
    add("--max_failures", type=int, default=3, help="Retries of a trial whose process or node is lost.")
    add("--resume", nargs="?", const="newest", default=None, help="Go on with the newest sweep, or the one named.")
    options, words = parser.parse_known_args(list(argv))
    for flag in ("--output_dir", "--resume_from_checkpoint", "--run_name"):
        if any(word.partition("=")[0] == flag for word in words):
            raise UserError(f"{flag} is each trial's own: a sweep's place is --storage_path, and --resume resumes it.")
    others = [f"--{name}" for name in _given(parser, options) if name not in ("resume", "storage_path")]
    if options.resume and (words or others):
        raise UserError(f"--resume goes on with the sweep's own flags: leave out {' '.join([*others, *words])}.")
    if options.num_samples < 1:
        raise UserError(f"--num_samples {options.num_samples}: it has to be at least 1.")
    return options, words


def _go_on_as_before(options: argparse.Namespace, left: Mapping[str, Any]) -> None:
    """Puts what the sweep's first driver noted in the place of defaults; without notes nothing changes."""
    for name in _KEPT:
        setattr(options, name, left.get(name, getattr(options, name)))


def _given(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Names of the options that differ from their defaults."""
    return [name for name, value in vars(options).items() if value != parser.get_default(name)]


def _axes_of(sweep: Sweep, scheduler: str) -> dict[str, Axis]:
    from ray_jobs.search import axes_for

    axes = axes_for(scheduler, sweep.axes)
    if not axes:
        raise UserError("--scheduler pbt changes learning_rate on the way, which is no range among this sweep's axes.")
    if len(axes) < len(sweep.axes):
        fixed = ", ".join(name for name in sweep.axes if name not in axes)
        print(f"pbt varies learning_rate; {fixed} cannot change in a training and stays as the recipe has it.")
    return axes


def _refuse_flags_of_axes(words: Sequence[str], axes: Mapping[str, Axis], file: str) -> None:
    """Stops at a flag that would change no trial and yet stand among the flags that MLflow has of the sweep.

    `--lora-r` and `--no_packing` are flags of `lora_r` and `packing` too.
    """
    for word in words:
        flag = word.partition("=")[0]
        plain = flag.removeprefix("--").replace("-", "_")
        for name in (plain, plain.removeprefix("no_")):
            if flag.startswith("--") and name in axes:
                raise UserError(
                    f"{flag}: this sweep varies {name} over {axes[name]}, and each trial would take that and not the "
                    f"flag. Leave the flag out, or change the axis in {file}."
                )


def _require_metric(sweep: Sweep, scores: Sequence[str]) -> None:
    """Stops a sweep whose trials would end without what they are judged by."""
    computed = {f"finetuned_{name}" for name in (*scores, "bleu4_first_reference", "loss", "perplexity")}
    if sweep.metric.startswith("finetuned_") and sweep.metric not in computed:
        raise UserError(
            f"This sweep is judged by {sweep.metric}, which --scores {' '.join(scores)} does not compute: add "
            f"{sweep.metric.removeprefix('finetuned_')}, or change the metric in the sweep's file."
        )


def _require_stages(sweep: Sweep, flags: "RecipeArguments") -> None:
    """Stops a sweep whose trials would not come to what they are judged by, and take GPUs for it."""
    if flags.dry_run:
        raise UserError(
            f"--dry_run trains nothing, so that no trial could be judged by {sweep.metric}: give it to the recipe, "
            f"`python {sweep.recipe} --dry_run`, with the flags of this sweep and one value of each axis."
        )
    is_of_answers = sweep.metric.startswith("finetuned_")
    is_made_elsewhere = is_of_answers and flags.adapter is not None
    needed = [*([] if is_made_elsewhere else ["train"]), *(["evaluate"] if is_of_answers else [])]
    missing = [stage for stage in needed if stage not in flags.stages]
    if missing:
        raise UserError(
            f"--stages {' '.join(flags.stages)} gives no trial {sweep.metric}, which this sweep is judged by: add "
            f"{' and '.join(missing)}, or leave --stages out, for a trial's own are train and evaluate."
        )


def _connect(storage: str) -> dict[str, str]:
    """Joins the cluster of RAY_ADDRESS or of this machine, or starts Ray here; returns what trials' workers get."""
    os.environ |= {name: value for name, value in _QUIET.items() if name not in os.environ}
    import ray

    from ray_jobs.narrator import shorten_ray

    shorten_ray()
    ray.init(log_to_driver=False, logging_level="WARNING", runtime_env=code_for_workers(ROOT))
    if has_travelled() and "://" not in storage:
        _say_what_lasts(Path(storage), len(_machines()))
    return travelling_variables()


def _say_what_lasts(storage: Path, num_machines: int) -> None:
    """In a checkout that Ray has brought, what is written is lost unless it lies elsewhere."""
    if num_machines > 1:
        print(f"Trials run on several machines: {storage} has to be a folder that all of them share, such as NFS.")
    if storage.is_relative_to(Path.cwd()):
        print(
            "This checkout is a copy that Ray removes some time after the job, and the sweep's storage and MLflow's "
            "default file lie in it: what is to last goes to a --storage_path elsewhere and to the server of "
            "MLFLOW_TRACKING_URI.",
            flush=True,
        )


def _machines() -> set[str]:
    import ray

    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _open_record(
    sweep: Sweep,
    store: "Store",
    name: str,
    options: argparse.Namespace,
    words: Sequence[str],
    run_id: str | None,
) -> "SweepRecord":
    from ray_jobs.sweep_record import SweepRecord

    asked = {key: value for key, value in vars(options).items() if value is not None and key != "resume"}
    params = {"metric": sweep.metric, "mode": sweep.mode, **asked, "recipe_flags": " ".join(words) or "none"}
    params |= {f"axis_{key}": axis for key, axis in sweep.axes.items()}
    return SweepRecord(store, Path(sweep.recipe).stem, name, run_id, params)


def _tuner(
    sweep: Sweep,
    options: argparse.Namespace,
    axes: Mapping[str, Axis],
    plan: "Plan",
    environment: Mapping[str, str],
    settings: Any,
    storage: str,
    name: str,
    resumes: bool,
) -> "Tuner":
    from ray import tune
    from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner

    from ray_jobs.narrator import Narrator
    from ray_jobs.search import make_scheduler, make_search
    from ray_jobs.trial import RecipeTrial

    resources = {"cpu": options.cpus_per_trial, "gpu": settings.recipe.ray_num_gpus}
    trial = tune.with_resources(tune.with_parameters(RecipeTrial, plan=plan, environment=dict(environment)), resources)
    if resumes:
        return Tuner.restore(f"{storage.rstrip('/')}/{name}", trial, resume_unfinished=True, resume_errored=True)
    space, search, num_samples = make_search(
        options.search,
        axes,
        sweep.metric,
        sweep.mode,
        settings.training.seed,
        options.num_samples,
        options.max_concurrent,
    )
    return Tuner(
        trial,
        param_space=space,
        tune_config=TuneConfig(
            search_alg=search,
            scheduler=make_scheduler(options.scheduler, sweep.first_rung_steps, axes),
            num_samples=num_samples,
            time_budget_s=options.time_budget,
            reuse_actors=True,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=options.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=3, checkpoint_at_end=True),
            callbacks=[Narrator(sweep.metric)],
            verbose=0,
        ),
    )


def _run_trials(tuner: "Tuner", sweep: Sweep, storage: str) -> list["Outcome"]:
    """Runs all trials to their end.

    Raises:
        UserError: the storage took no more of what Ray keeps there, and now it cannot read it back.
    """
    from ray_jobs.outcome import outcomes

    try:
        grid = tuner.fit()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"Ray's record of the trials in {storage} cannot be read ({type(error).__name__}: {first_line(error)}): is "
            "the disk full? Finished trials are kept there and in MLflow. Make room; --resume then says what is left."
        ) from error
    return outcomes(grid, sweep.metric, sweep.mode)


def _settle(record: "SweepRecord", trials: Sequence["Outcome"], metric: str) -> None:
    """Brings MLflow up to date; where it does not answer for a minute, the sweep has its results all the same."""
    try:
        record.settle(trials, metric)
    except Exception as error:
        print(
            f"MLflow took no table of this sweep ({first_line(error)}). `--resume` sends it what is missing.",
            flush=True,
        )


def _report_winner(
    plan: "Plan", best: "Outcome", environment: Mapping[str, str], num_gpus: float, num_cpus: float
) -> None:
    """Lets the best trial be compared with the base model; a failure here takes nothing from the sweep."""
    import ray

    from ray_jobs.winner import report_winner

    print(f"Best trial {best.trial_id}: the base model's baseline and the report are made now.", flush=True)
    task = ray.remote(report_winner).options(num_gpus=num_gpus, num_cpus=num_cpus)
    assert best.result is not None
    try:
        ray.get(task.remote(plan, best.trial_id, best.axes, best.result.checkpoint, dict(environment)))
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1]
        print(f"The report of the best trial failed ({last}); its adapter lies in {best.result.path}.", flush=True)


def _print_outcome(sweep: Sweep, trials: Sequence["Outcome"], best: "Outcome | None", where_to_look: str) -> None:
    from ray_jobs.outcome import table_lines

    print("\n" + "\n".join(table_lines(trials, sweep.metric)))
    if best is not None and best.result is not None:
        print(f"\nBest trial:  {best.trial_id}, {sweep.metric} {best.score:.4f}")
        print(f"Adapter:     {best.result.checkpoint.path}/adapter")
    print(f"MLflow UI:   {where_to_look}")


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
