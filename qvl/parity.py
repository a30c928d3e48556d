"""Do two forms of one model say the same? Greedy answers, and the probabilities along them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qvl.answer_distributions import batch_distributions, divergences, mean_divergence
from qvl.checks import Check, at_most
from qvl.encode import IGNORED_LABEL
from qvl.generate import PromptCollator
from qvl.trained_model import TrainedModel

NUM_PROMPTS = 16
# As many as `qvl.answer_distributions` looks at.
NUM_TOKENS = 64
# Two words this near to each other may change places where numbers are rounded: logits of about 20 lie 0.125 apart in
# bf16, and both may move by one step.
MOST_TIE_NATS = 0.25


@dataclass(frozen=True)
class Said:
    """What a model says to prompts.

    Attributes:
        answers: its greedy answers, int64 (new tokens,) each, end token included.
        log_probs: its log-probabilities along a reference's answers, fp32 (tokens, vocabulary) each.
    """

    answers: list[torch.Tensor]
    log_probs: list[torch.Tensor]


def listen(
    partner: TrainedModel, prompts: Sequence[Mapping[str, Any]], along: Sequence[torch.Tensor] | None = None
) -> Said:
    """Asks a model everything, one prompt at a time as `python -m qvl.chat` does.

    Args:
        partner: decodes greedily.
        prompts: `prompt`, `images` and `tools` of each.
        along: answers of a reference to take the probabilities of; None for the model's own.

    Returns:
        Everything on the CPU.
    """
    collate = PromptCollator(partner.processing_class, partner.model.dtype)
    config = partner.decoding.config(partner.processing_class, partner.model)
    said = Said([], [])
    for index, prompt in enumerate(prompts):
        inputs = {key: value.to(partner.model.device) for key, value in collate([dict(prompt)]).items()}
        with torch.inference_mode():
            tokens = partner.model.generate(**inputs, generation_config=config)
        answer = tokens[0, inputs["input_ids"].shape[1] :].cpu()
        said.answers.append(answer)
        batch = _with_answer(inputs, answer if along is None else along[index])
        said.log_probs.append(batch_distributions(partner.model, batch)[0].cpu())
    return said


def _with_answer(inputs: Mapping[str, torch.Tensor], answer: torch.Tensor) -> dict[str, torch.Tensor]:
    """A prompt with an answer behind it, which is what the labels say."""
    ids = inputs["input_ids"]
    behind = answer.to(ids.device).unsqueeze(0)
    longer = {
        "input_ids": torch.cat([ids, behind], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(behind)], dim=1),
        "labels": torch.cat([torch.full_like(ids, IGNORED_LABEL), behind], dim=1),
    }
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(behind)], dim=1)
    return {**inputs, **longer}


def check_parity(reference: Said, other: Said, most_nats: float, most_tie_nats: float = MOST_TIE_NATS) -> list[Check]:
    """Nearly the same probabilities everywhere, and the same answers but for near ties.

    Args:
        reference: what the adapter says beside its base.
        other: what the other form says, its probabilities along the reference's answers.
        most_nats: bound of the Kullback-Leibler divergence, a mean over the tokens of each answer.
        most_tie_nats: how much likelier the reference may find its own word than the other's, where they part.
    """
    distances = divergences(reference.log_probs, other.log_probs)
    gaps = [
        _gap_where_they_part(*parts)
        for parts in zip(reference.answers, other.answers, reference.log_probs, strict=True)
    ]
    apart = [gap for gap in gaps if gap is not None]
    return [
        at_most("divergence_from_the_adapter", max(distances), most_nats, " nats", f"{len(distances)} prompts"),
        at_most(
            "greedy_answers_part_at_near_ties_only",
            max(apart, default=0.0),
            most_tie_nats,
            " nats",
            f"{len(gaps) - len(apart)} of {len(gaps)} answers the same",
        ),
    ]


def describe_difference(reference: Said, other: Said) -> str:
    """The same in words, where it is no one's mistake: `other` is `reference` with weights of another format."""
    mean = mean_divergence(reference.log_probs, other.log_probs)
    same = sum(torch.equal(a, b) for a, b in zip(reference.answers, other.answers, strict=True))
    num_answers = len(reference.answers)
    return f"{mean:.2g} nats a token on average (KL divergence), {same} of {num_answers} greedy answers the same"


def _gap_where_they_part(first: torch.Tensor, second: torch.Tensor, log_probs: torch.Tensor) -> float | None:
    """How much likelier the first finds its own word than the second's at the first difference; None without one."""
    length = min(len(first), len(second))
    places = (first[:length] != second[:length]).nonzero()
    if not len(places):
        return None
    place = int(places[0])
    return float(log_probs[place, first[place]] - log_probs[place, second[place]])
