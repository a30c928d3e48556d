"""The held-out loss as sums over tokens, so that neither batch size nor number of processes moves it.

transformers averages the averages of batches, which weighs a token by the company it is in: plain SFTTrainer's held-out
loss moved from 6.354 to 6.272 with the batch size alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from qvl.collators import CompletionCollator
from qvl.encode import IGNORED_LABEL
from qvl.features import encoder_inputs
from qvl.models import without_adapter
from qvl.processes import gathered, own_batches
from qvl.segment_attention import SEGMENTS_PER_SAMPLE

# Rows of logits at a time: 1,024 of 151,936 fp32 numbers are 0.6 GiB.
_TOKENS_PER_CHUNK = 1024


@dataclass(frozen=True)
class TokenSums:
    """Sums over the target tokens of each sample of a batch, in its order; rows without segments hold one each.

    Attributes:
        losses: [N] float64, negative log-likelihood in nats.
        num_tokens: [N] int64, how many targets there are.
        num_correct: [N] int64, those that the model gives the highest probability.
        entropies: [N] float64, of the model's distribution at each target, in nats.
    """

    losses: torch.Tensor
    num_tokens: torch.Tensor
    num_correct: torch.Tensor
    entropies: torch.Tensor

    def stacked(self) -> torch.Tensor:
        """[N, 4] float64 in the order of the attributes, for gathering over processes."""
        return torch.stack([self.losses, self.num_tokens.double(), self.num_correct.double(), self.entropies], dim=1)


def token_sums(model: PreTrainedModel | PeftModel, batch: dict[str, torch.Tensor]) -> TokenSums:
    """Runs a batch of one of qvl's collators and sums over its labels; the token at t is predicted at t - 1.

    The head computes the logits of targets only, and few at a time: those of every token of a batch would need more
    memory than the model.

    Args:
        model: base or adapter on it, on the batch's device.
        batch: model inputs, or features in place of pixels, and `labels` (int64, (B, T)); `segment_ids` tell samples
            of one row apart.
    """
    base = without_adapter(model)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = base.base_model(**encoder_inputs(inputs, base), use_cache=False).last_hidden_state
    targets = batch["labels"][:, 1:]
    rows, places = torch.nonzero(targets != IGNORED_LABEL, as_tuple=True)
    numbers = [_of_chunk(base, hidden[row, place], targets[row, place]) for row, place in _chunks(rows, places)]
    per_token = torch.cat(numbers) if numbers else torch.zeros(0, 3, dtype=torch.float64, device=hidden.device)
    numbers_of_samples, num_samples = _samples(batch)
    samples = numbers_of_samples[rows, places + 1]
    sums = torch.zeros(num_samples, 3, dtype=torch.float64, device=hidden.device).index_add_(0, samples, per_token)
    num_tokens = torch.bincount(samples, minlength=num_samples)
    return TokenSums(sums[:, 0], num_tokens, sums[:, 1].long(), sums[:, 2])


def held_out_losses(
    model: PreTrainedModel | PeftModel,
    dataset: Dataset,
    collator: CompletionCollator,
    batch_size: int,
    num_workers: int,
) -> tuple[list[float], list[int]]:
    """The loss of every row of a data set; several processes share the batches, and all get what each has found.

    Args:
        model: base or adapter on it; is left in the mode it was in.
        dataset: rows that the collator takes.
        collator: the training collator, so that what is a target is the same.
        batch_size: rows at a time; decides about speed and memory only.
        num_workers: processes that decode images and tokenize ahead of the model.

    Returns:
        For each row its loss in nats, summed over its target tokens, and how many those are.
    """
    batches = own_batches(range(len(dataset)), batch_size)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=model.device.type == "cuda",
    )
    found: dict[int, tuple[float, int]] = {}
    was_training = model.training
    model.eval()
    with torch.inference_mode(), tqdm(total=sum(map(len, batches)), desc="held-out loss", unit="answer") as bar:
        for indices, batch in zip(batches, loader, strict=True):
            sums = token_sums(model, {key: value.to(model.device, non_blocking=True) for key, value in batch.items()})
            numbers = zip(sums.losses.tolist(), sums.num_tokens.tolist(), strict=True)
            found |= dict(zip(indices, numbers, strict=True))
            bar.update(len(indices))
    model.train(was_training)
    everywhere = {index: numbers for part in gathered(found) for index, numbers in part.items()}
    in_order = [everywhere[index] for index in range(len(dataset))]
    return [loss for loss, _ in in_order], [number for _, number in in_order]


def means(sums: Sequence[float]) -> dict[str, float]:
    """What `TokenSums.stacked`, added up over a set, says of the set: names are those of SFTTrainer's logs.

    Returns:
        `loss`, `perplexity`, `mean_token_accuracy` and `entropy`; nothing where there are no tokens.
    """
    loss, num_tokens, num_correct, entropy = sums
    if not num_tokens:
        return {}
    return {
        "loss": loss / num_tokens,
        "perplexity": perplexity(loss / num_tokens),
        "mean_token_accuracy": num_correct / num_tokens,
        "entropy": entropy / num_tokens,
    }


def perplexity(loss: float) -> float:
    """Of a loss in nats its exponential; infinite where that is no double any more."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _samples(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The number of each token's sample in the batch, int64 (B, T), and how many samples there are.

    Example, a padding-free row of two samples, one with two answers, and padding::

        segment_ids   0 0 1 1 2 2 4096 4096 -1
        samples       0 0 0 0 0 0    1    1 -1

    Args:
        batch: with `labels`; without `segment_ids` each row is a sample.
    """
    labels = batch["labels"]
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    if "segment_ids" not in batch:
        return rows.expand_as(labels), len(labels)
    in_row = batch["segment_ids"].div(SEGMENTS_PER_SAMPLE, rounding_mode="floor")
    # Rows of several samples have no other rows beside them, and other rows hold one sample each.
    num_in_row = int(in_row.max()) + 1
    return rows * num_in_row + in_row, len(labels) * num_in_row


def _chunks(rows: torch.Tensor, places: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(rows.split(_TOKENS_PER_CHUNK), places.split(_TOKENS_PER_CHUNK), strict=True))


def _of_chunk(base: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[tokens, 3] float64: loss, whether the target is the likeliest token, entropy."""
    log_probs = base.get_output_embeddings()(hidden).float().log_softmax(dim=-1)
    losses = -log_probs.gather(1, targets[:, None])[:, 0]
    entropies = -(log_probs.exp() * log_probs).sum(dim=-1)
    return torch.stack([losses, log_probs.argmax(dim=-1) == targets, entropies], dim=1).double()
