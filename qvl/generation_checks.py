"""Does the model answer soundly: the same twice, the same in a batch, to an end, and without running in circles."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qvl.behaviour_checks import rounds_coarsely
from qvl.checks import Check, at_most
from qvl.encode import ProcessingClass
from qvl.features import encoder_inputs
from qvl.generate import Decoding, PromptCollator, end_tokens
from qvl.models import without_adapter

# Greedy decoding turns a rounding difference into another word where two are about equally likely, and the longer an
# answer is, the surer it meets such a place: 2 of 8 answers of 12 tokens of the embedded model in bf16, none in fp32.
# So in 16 bits only an answer counts whose first other word was less likely by more than this, in nats: logits of 16
# to 32 are an eighth apart in bf16. A model whose rows leak into each other changes nearly all.
MOST_TIE_NATS_COARSE = 0.5
MOST_DIFFERING_SHARE_COARSE = 0.5
# Share of trigrams that repeat an earlier one of the same answer.
MOST_REPETITION = 0.3
_GRAM = 3


def generate_tokens(
    model: PreTrainedModel | PeftModel,
    processing_class: ProcessingClass,
    prompts: Sequence[dict[str, Any]],
    decoding: Decoding,
) -> list[list[int]]:
    """New tokens of each prompt, decoded as one batch, padding behind the end token left out, the end token kept.

    Args:
        model: base or adapter on it.
        processing_class: its processor or tokenizer.
        prompts: `prompt`, `images` and perhaps `tools` of each.
        decoding: how to decode.
    """
    return _generated(model, processing_class, prompts, decoding)[0]


def _generated(
    model: PreTrainedModel | PeftModel,
    processing_class: ProcessingClass,
    prompts: Sequence[dict[str, Any]],
    decoding: Decoding,
    wants_logits: bool = False,
) -> tuple[list[list[int]], Sequence[torch.Tensor]]:
    """`generate_tokens`, and of each step the logits, (prompts, vocabulary), if they are wanted."""
    batch = PromptCollator(processing_class)(list(prompts))
    base = without_adapter(model)
    inputs = encoder_inputs({key: value.to(base.device) for key, value in batch.items()}, base)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            generation_config=decoding.config(processing_class, model),
            return_dict_in_generate=True,
            output_logits=wants_logits,
        )
    model.train(was_training)
    ends = end_tokens(processing_class, model)
    new_tokens = output.sequences[:, batch["input_ids"].shape[1] :]
    return [_up_to(row, ends) for row in new_tokens.tolist()], output.logits or ()


def _up_to(tokens: list[int], ends: Sequence[int]) -> list[int]:
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]


def check_generation(
    model: PreTrainedModel | PeftModel,
    processing_class: ProcessingClass,
    prompts: Sequence[dict[str, Any]],
    decoding: Decoding,
) -> list[Check]:
    """Greedy answers to some prompts, together, together again, and one by one.

    Args:
        model: base or adapter on it.
        processing_class: its processor or tokenizer.
        prompts: as `generate_tokens` takes them.
        decoding: how to decode; greedily.
    """
    together, logits = _generated(model, processing_class, prompts, decoding, wants_logits=True)
    again = generate_tokens(model, processing_class, prompts, decoding)
    alone = [generate_tokens(model, processing_class, [prompt], decoding)[0] for prompt in prompts]
    ends = end_tokens(processing_class, model)
    unended = sum(row[-1] not in ends and len(row) != decoding.max_new_tokens for row in together)
    is_coarse = rounds_coarsely(model)
    share_allowed = MOST_DIFFERING_SHARE_COARSE if is_coarse else 0.0
    differing = [row for row, (a, b) in enumerate(zip(together, alone, strict=True)) if a != b]
    leads = [_lead_over(together[row], alone[row], [step[row] for step in logits]) for row in differing]
    counted = [lead for lead in leads if not (is_coarse and lead <= MOST_TIE_NATS_COARSE)]
    ties = f", {len(differing) - len(counted)} more where two words were as likely" if is_coarse else ""
    rates = [repetition_rate(row) for row in together]
    num_ended = sum(row[-1] in ends for row in together)
    return [
        at_most("answers_that_differ_when_repeated", sum(map(_differ, together, again)), 0, f" of {len(prompts)}"),
        at_most(
            "answers_without_end", unended, 0, f" of {len(prompts)}", f"{num_ended} by end token, others by the limit"
        ),
        at_most(
            "share_of_answers_that_differ_in_a_batch",
            len(counted) / len(prompts),
            share_allowed,
            "",
            f"{len(prompts)} prompts{ties}",
        ),
        at_most("repetition_rate", sum(rates) / len(rates), MOST_REPETITION, " of trigrams", f"worst {max(rates):.2f}"),
    ]


def _lead_over(chosen: Sequence[int], other: Sequence[int], logits: Sequence[torch.Tensor]) -> float:
    """By how many nats the model preferred its own token where another answer first departs from it.

    Args:
        chosen: tokens of the model's greedy answer.
        other: those of another one, not the same.
        logits: (vocabulary) for each token of `chosen`.

    Returns:
        Nats; infinite where one answer merely stops before the other does.
    """
    pairs = enumerate(zip(chosen, other, strict=False))
    place = next((place for place, (a, b) in pairs if a != b), None)
    if place is None:
        return math.inf
    return float(logits[place][chosen[place]].float() - logits[place][other[place]].float())


def _differ(first: list[int], second: list[int]) -> bool:
    return first != second


def repetition_rate(tokens: Sequence[int]) -> float:
    """Share of an answer's trigrams that occurred before in it: 0 for none, towards 1 for a loop.

    Example: ``a b c a b c a b c`` has 7 trigrams, 3 different ones: 4 / 7.
    """
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
