"""One run in several processes, a GPU each: which one this is, what all agree on, and who writes and speaks.

A launcher (`accelerate launch`, `torchrun`) starts the processes and says in environment variables how many they are.
All of them run the same stages. The main one alone writes the run folder, MLflow and the screen; the others keep quiet.
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from qvl.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_STORE_TIMEOUT = timedelta(seconds=10)


def num_processes() -> int:
    """How many processes the launcher has started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def keep_others_quiet() -> None:
    """Lets the main process alone print and warn; to be called before the libraries are imported.

    Tracebacks of the others are still seen.
    """
    if is_main():
        return
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open for as long as the process lives)
    warnings.simplefilter("ignore")
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}


def take_first_gpu() -> None:
    """Without a launcher, leaves the first of several GPUs to this process and says so: TRL refuses several.

    Raises:
        UserError: several GPUs are in use by this process already.
    """
    import torch

    num_gpus = torch.cuda.device_count()
    if num_processes() > 1 or num_gpus < 2:
        return
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = first
    if torch.cuda.is_initialized() or torch.cuda.device_count() > 1:
        # The driver has read the variable by now.
        raise UserError(
            f"This process sees {num_gpus} GPUs and cannot leave the others any more: set CUDA_VISIBLE_DEVICES to one "
            "before it starts, or start one process a GPU with `accelerate launch`."
        )
    print(
        f"{num_gpus} GPUs are visible, this run takes GPU {first}. All of them: accelerate launch --config_file "
        f"environments/accelerate/ddp.yaml --num_processes {num_gpus} {sys.argv[0]}; another one: "
        "CUDA_VISIBLE_DEVICES.",
        flush=True,
    )


def on_main(make: Callable[[], T]) -> T:
    """What the main process makes, on all processes; they wait for it. A mistake of the user is raised on all.

    Args:
        make: called on the main process only. What it returns is sent to the others, so it should be small.
    """
    if num_processes() == 1:
        return make()
    import torch.distributed as dist

    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    made, mistake = outcome
    if mistake is not None:
        raise mistake
    return made


def gathered(part: T) -> list[T]:
    """What each process has, in the order of their numbers, on all of them."""
    if num_processes() == 1:
        return [part]
    import torch.distributed as dist

    parts: list[Any] = [None] * num_processes()
    dist.all_gather_object(parts, part)
    return parts


def anywhere(flag: bool, device: "torch.device") -> bool:
    """Whether a flag is set on any process.

    Args:
        flag: of this process.
        device: where this process computes.
    """
    return bool(flag_of_all(flag, device)) if num_processes() > 1 else flag


def flag_of_all(flag: bool, device: "torch.device") -> "torch.Tensor":
    """A number on the device, 1 where a flag is set on any of several processes; nobody waits for it here.

    Args:
        flag: of this process.
        device: where this process computes.
    """
    import torch
    import torch.distributed as dist

    found = torch.full((), int(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


def own_batches(items: Sequence[T], batch_size: int) -> list[list[T]]:
    """The batches that fall to this process when they are dealt out in turn: those one process alone would make.

    A batch has the same rows whatever the number of processes, and with them the same rounding.
    """
    batches = [list(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]
    return batches[rank() :: num_processes()]


def speaks_first() -> bool:
    """Whether this process is the first one to report why the run ends; the others are silent then.

    What ends one process (a bad row, memory) ends the others by the connection they lose, or in the same way.
    """
    if num_processes() == 1:
        return True
    from torch.distributed import DistError, TCPStore

    try:
        # The launcher's own: it outlives the processes.
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, _STORE_TIMEOUT)
        return store.add(f"qvl/end/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except (DistError, OSError, RuntimeError):
        return is_main()


def leave() -> None:
    """Says goodbye to the other processes at the end of a run that went well."""
    if num_processes() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        on_main(lambda: None)
        dist.destroy_process_group()
