"""A recipe as a Ray job: waits for a GPU, runs on it, ends as the recipe ends.

    python -m ray_jobs.task recipes/flickr8k.py --learning_rate 1e-4

`qvl.recipe` puts this in its own place when `ray job submit` has started a recipe without a GPU (Ray gives the command
of a job none). An actor with `num_gpus=1` (`--ray_num_gpus`) then runs the recipe where Ray finds a free one.
"""

import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from qvl.errors import Terminated, UserError
from ray_jobs.body import Body
from ray_jobs.environment import code_for_workers, has_travelled, travelling_variables

if TYPE_CHECKING:
    from qvl.settings import Settings

_FIRST_WORD_SECONDS = 5
_NEXT_WORD_SECONDS = 600


def main(file: str, words: Sequence[str]) -> NoReturn:
    """Runs a recipe on a GPU of the cluster and exits with its status; 2 for a mistake to mend."""
    try:
        status = run_on_gpu(Path(file), words)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        status = 2
    sys.exit(status)


def run_on_gpu(file: Path, words: Sequence[str]) -> int:
    """Runs a recipe where a GPU is free, and prints what it prints.

    Args:
        file: the recipe.
        words: its command line.

    Returns:
        The recipe's exit status, 1 if its node was lost.

    Raises:
        UserError: a flag that the recipe would not take, found before a GPU is waited for; a recipe that is not there.
    """
    flags = checked_settings(file, words).recipe
    num_gpus = 0 if flags.dry_run else flags.ray_num_gpus
    import ray

    folder, travels, path = Path.cwd().resolve(), has_travelled(), file.resolve()
    ray.init(log_to_driver=False, logging_level="WARNING", runtime_env=code_for_workers(path.parents[1]))
    relative = str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
    body = (
        ray.remote(Body)
        .options(num_gpus=num_gpus, num_cpus=1, max_restarts=0, max_concurrency=2)
        .remote(relative, str(folder), travels)
    )

    def stop(number: int, frame: FrameType | None) -> None:
        print("Stopping: the recipe finishes its step and saves a checkpoint.", flush=True)
        # Not from the signal handler itself, which may have interrupted Ray.
        threading.Thread(target=body.stop.remote, daemon=True).start()

    signal.signal(signal.SIGTERM, _leave)
    try:
        node = _wait_for_node(body, num_gpus)
        signal.signal(signal.SIGTERM, stop)
        print(f"Running on {node} with {num_gpus:g} GPU.", flush=True)
        if travels:
            print(
                "This checkout is a copy that Ray removes some time after the job. What is to last goes to an "
                "--output_dir on shared storage and to the server of MLFLOW_TRACKING_URI.",
                flush=True,
            )
        return _pass_on(body.run.options(num_returns="streaming").remote(list(words), travelling_variables()))
    except ray.exceptions.RayTaskError as error:
        raise UserError(str(error.cause)) from error
    except ray.exceptions.RayActorError as error:
        if isinstance(error.__cause__, FileNotFoundError) or "FileNotFoundError" in str(error):
            raise UserError(str(error).strip().rpartition("FileNotFoundError: ")[2]) from error
        print(
            f"\nThe node or process that ran the recipe is gone: {str(error).strip().splitlines()[0]}\nIf its run "
            "folder is on shared storage: submit again with --resume_from_checkpoint true --output_dir FOLDER.",
            file=sys.stderr,
        )
        return 1


def checked_settings(file: Path, words: Sequence[str], overrides: dict[str, Any] | None = None) -> "Settings":
    """A recipe's settings as far as they can be known without the GPU that it will run on.

    Raises:
        UserError: there is no such recipe; a flag or value that the recipe would not take.
    """
    if not file.is_file():
        raise UserError(f"There is no recipe {file} in {Path.cwd()}: run from the repository, or --working-dir .")
    recipe = runpy.run_path(str(file))["RECIPE"]
    from qvl.recipe import quieten_and_tame_libraries

    quieten_and_tame_libraries()
    from qvl.settings import parse_settings

    # What precision can be trained in depends on the GPU, which this machine may not have.
    anywhere = {"bf16": False, "fp16": False}
    return parse_settings(recipe.defaults, recipe.smoke, words, {**anywhere, **(overrides or {})}, file.name)


def _leave(number: int, frame: FrameType | None) -> None:
    """Nothing has begun yet."""
    raise Terminated


def _wait_for_node(body: Any, num_gpus: float) -> str:
    """Waits until Ray has placed the actor, and says so where that takes time."""
    import ray

    placed, wait_seconds, start = body.node.remote(), _FIRST_WORD_SECONDS, time.monotonic()
    while not ray.wait([placed], timeout=wait_seconds)[0]:
        total = ray.cluster_resources().get("GPU", 0)
        free = ray.available_resources().get("GPU", 0)
        if total < num_gpus:
            place = f"the cluster has {total:g} GPU now and gets more only from its autoscaler or by hand"
        else:
            place = f"{free:g} of {total:g} free; `ray status` shows what is used"
        waited = time.monotonic() - start
        print(f"Waiting for {num_gpus:g} GPU since {waited:.0f} s ({place}).", flush=True)
        wait_seconds = _NEXT_WORD_SECONDS
    return str(ray.get(placed))


def _pass_on(output: Any) -> int:
    import ray

    status = 1
    for reference in output:
        part = ray.get(reference)
        if isinstance(part, int):
            status = part
        else:
            print(part, end="", flush=True)
    return status


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
