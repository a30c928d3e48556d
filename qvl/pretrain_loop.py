"""The loop that trains an embedded model from scratch, the same for all of them."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import transformers
from torch.utils.data import DataLoader

# A model's inputs and what they are to be turned into, to the loss.
LossOf = Callable[[Any, dict[str, torch.Tensor], torch.Tensor], torch.Tensor]


class Steps(Protocol):
    """What each step learns from: inputs by name, and a target."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]: ...


def train_from_scratch(
    name: str, model: Any, steps: Steps, loss_of: LossOf, learning_rate: float, num_workers: int
) -> dict[str, float | str]:
    """Trains a model in place.

    Args:
        name: for the screen.
        model: fp32, on its device, in training mode.
        steps: taken one after the other.
        loss_of: model, inputs and target -> the loss in nats; all on the device.
        learning_rate: the peak, after 100 steps; it falls to 0 as a cosine.
        num_workers: processes that draw ahead; the result does not depend on them.

    Returns:
        What is recorded beside the weights: final loss (mean of the last 100 steps), device, seconds, number of steps
        and of parameters.
    """
    device, num_steps = model.device, len(steps)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 100, num_steps)
    batches: DataLoader[Any] = DataLoader(steps, batch_size=None, num_workers=num_workers)  # type: ignore[arg-type]
    started, losses = time.monotonic(), []
    for step, (inputs, target) in enumerate(batches, start=1):
        loss = loss_of(model, {key: value.to(device) for key, value in inputs.items()}, target.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"{name} step {step}/{num_steps} loss {_recent(losses):.4f} {seconds:.0f} s", flush=True)
    return {
        "final_loss": round(_recent(losses), 4),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "seconds": round(time.monotonic() - started),
        "num_steps": num_steps,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _recent(losses: list[torch.Tensor]) -> float:
    return float(torch.stack(losses[-100:]).mean())
