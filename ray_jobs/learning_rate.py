"""Changes the learning rate that a training goes on with from its checkpoint."""

from pathlib import Path

import torch


def set_learning_rate(checkpoints: Path, learning_rate: float) -> None:
    """Puts a new peak learning rate into the schedule and the optimizer of each checkpoint in a folder.

    A resumed training takes both from the checkpoint and does not look at `--learning_rate`. The schedule's shape
    stays: at each step the rate is the peak times what the schedule says.

    Args:
        checkpoints: holds `checkpoint-N` folders of one learning rate for all parameters.
        learning_rate: the new peak.
    """
    for checkpoint in checkpoints.glob("checkpoint-*"):
        schedule = torch.load(checkpoint / "scheduler.pt", weights_only=True)
        ratio = learning_rate / schedule["base_lrs"][0]
        schedule["base_lrs"] = [rate * ratio for rate in schedule["base_lrs"]]
        schedule["_last_lr"] = [rate * ratio for rate in schedule["_last_lr"]]
        torch.save(schedule, checkpoint / "scheduler.pt")
        optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu")
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"]) * ratio
            group["initial_lr"] = float(group["initial_lr"]) * ratio
        torch.save(optimizer, checkpoint / "optimizer.pt")
