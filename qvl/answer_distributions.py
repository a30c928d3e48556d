"""What a model would say at every token of given answers: the one thing that the checks of its behaviour compare."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qvl.collators import CompletionCollator
from qvl.encode import IGNORED_LABEL
from qvl.features import encoder_inputs
from qvl.models import without_adapter

# Of a long answer the beginning tells enough: 8 answers x 64 tokens x 151,936 words x 4 bytes are 0.3 GiB.
_MOST_TOKENS = 64

# `answer_distributions` of whichever model, on rows that are chosen already.
Distributions: TypeAlias = Callable[[PreTrainedModel | PeftModel], list[torch.Tensor]]


def answer_distributions(
    model: PreTrainedModel | PeftModel, examples: Sequence[Mapping[str, Any]], collator: CompletionCollator
) -> list[torch.Tensor]:
    """Runs examples as one batch, in evaluation mode and without gradients.

    Args:
        model: base or adapter on it; is left in the mode it was in.
        examples: rows that the collator takes.
        collator: makes the batch.

    Returns:
        For each example its log-probabilities, fp32 (answer tokens, 64 at most, vocabulary), on the model's device.
    """
    return batch_distributions(model, collator([dict(example) for example in examples]))


def batch_distributions(model: PreTrainedModel | PeftModel, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """`answer_distributions` of a batch with `labels` (int64, (rows, length)); the token at t is predicted at t - 1."""
    base = without_adapter(model)
    labels = batch["labels"]
    inputs = {key: value.to(base.device) for key, value in batch.items() if key != "labels"}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden = base.base_model(**encoder_inputs(inputs, base), use_cache=False).last_hidden_state
            return [_log_probs(base, row, targets) for row, targets in zip(hidden, labels[:, 1:], strict=True)]
    finally:
        model.train(was_training)


def _log_probs(base: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary] fp32; only where there is a target, the head's output is large."""
    places = (targets != IGNORED_LABEL).nonzero()[:_MOST_TOKENS, 0].to(hidden.device)
    return base.get_output_embeddings()(hidden[places]).float().log_softmax(dim=-1)


def divergences(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> list[float]:
    """Kullback-Leibler divergence of the second from the first, for each example the mean over its answer's tokens.

    Args:
        first: fp32 (tokens, vocabulary) each, log-probabilities of the same answers as `second`.
        second: like `first`.

    Returns:
        Nats, infinite or NaN where the numbers are.
    """
    return [float((a.exp() * (a - b)).sum(dim=-1).mean().clamp(min=0)) for a, b in zip(first, second, strict=True)]


def mean_divergence(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """The mean of `divergences` over the examples, in nats."""
    found = divergences(first, second)
    return sum(found) / len(found)


def largest_difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Largest difference of any log-probability, in nats; 0 only where all numbers are equal, NaN where one is."""
    return max(float((a - b).abs().max()) if len(a) else 0.0 for a, b in zip(first, second, strict=True))
