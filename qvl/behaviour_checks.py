"""Does the model look at what it is shown: the routing of images and text, and captions that belong to their images."""

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from qvl.answer_distributions import answer_distributions, batch_distributions, divergences
from qvl.checks import Check, at_least, at_most
from qvl.collators import CompletionCollator
from qvl.encode import IGNORED_LABEL, tokenizer_of

# Divergences in nats, as measured on both embedded Qwen-VL models in fp32, 4-bit, bf16 and fp16: what has a say moved
# the answer of every row by 0.13 or more (two images swapped; the others by 0.48), rounding to bf16 alone by 0.0013.
LEAST_CHANGE_NATS = 0.01
# What has no say: 2e-8 at most in fp32, 2.4e-4 in bf16 and 1.1e-3 in 8-bit. Deeper models round more often: 2.2e-3 in
# bf16 with Qwen2.5-VL-7B's shape and random weights on a GPU, 3.3e-3 with the 30 trained layers of a SmolLM2.
MOST_NOISE_NATS_FP32 = 1e-6
MOST_NOISE_NATS_COARSE = 5e-3
# Of 32 captions 20 and more: by chance once in 9 times, so the margin is asked too. Measured: 0.69 to 0.84 before
# training and 0.50 to 0.53 with other rows' images.
LEAST_ALIGNED_SHARE = 0.6
# Standard errors of the mean margin: by chance once in 40 times. Measured: 3.5 to 5.0, with other rows' images 0.2.
LEAST_MARGIN_ERRORS = 2.0
# Of 32 captions in 4-bit: three more that are likelier with another image (measured: none more).
MOST_LOST_SHARE = 0.1
MOST_LOST_MARGIN = 0.2
_PADDING_TOKENS = 17

Example = Mapping[str, Any]


def another_image(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Every example with the image of the next one."""
    return [{**row, "images": other["images"]} for row, other in _with_next(examples)]


def two_images(examples: Sequence[Example], swapped: bool) -> list[dict[str, Any]]:
    """Every example with the image of the next one beside its own, behind it or (swapped) before it."""
    result = []
    for row, other in _with_next(examples):
        images = [*row["images"], *other["images"]]
        result.append({**_with_second_image_part(row), "images": images[::-1] if swapped else images})
    return result


def blank_text(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Every example with a full stop in place of what the user says; the images stay."""
    result = []
    for row in examples:
        changed = copy.deepcopy({key: row[key] for key in ("prompt", "messages") if key in row})
        for message in [message for messages in changed.values() for message in messages]:
            if message["role"] == "user":
                for part in message["content"]:
                    part.update({"text": "."} if part["type"] == "text" else {})
        result.append({**row, **changed})
    return result


def _with_next(examples: Sequence[Example]) -> list[tuple[Example, Example]]:
    return list(zip(examples, [*examples[1:], examples[0]], strict=True))


def _with_second_image_part(row: Example) -> dict[str, Any]:
    key = "messages" if "messages" in row else "prompt"
    messages = copy.deepcopy(list(row[key]))
    for message in messages:
        places = [index for index, part in enumerate(message["content"]) if part["type"] == "image"]
        if places:
            message["content"].insert(places[0], {"type": "image"})
            break
    return {**row, key: messages}


def padded(batch: Mapping[str, torch.Tensor], pad_id: int, num_left: int, num_right: int) -> dict[str, torch.Tensor]:
    """A batch with more padding.

    Args:
        batch: from `CompletionCollator`.
        pad_id: token id of padding.
        num_left: columns to add on the left.
        num_right: columns to add on the right.
    """
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED_LABEL, "mm_token_type_ids": 0}
    return {
        key: torch.nn.functional.pad(value, (num_left, num_right), value=fill[key]) if key in fill else value
        for key, value in batch.items()
    }


@dataclass(frozen=True)
class Alignment:
    """How much likelier captions are with their own images than with others.

    Attributes:
        share: of the captions that are likelier with their own image.
        margin: mean difference of log-likelihoods of whole captions, in nats.
        standard_error: of that mean, in nats.
        num_captions: how many were compared.
    """

    share: float
    margin: float
    standard_error: float
    num_captions: int


def measure_alignment(
    model: PreTrainedModel | PeftModel, examples: Sequence[Example], collator: CompletionCollator, batch_size: int
) -> Alignment:
    """Scores every caption with its own image and with the next example's.

    Args:
        model: base or adapter on it.
        examples: rows with one image each; neighbours show different things.
        collator: makes the batches.
        batch_size: rows at a time.
    """
    own = _log_likelihoods(model, examples, collator, batch_size)
    other = _log_likelihoods(model, another_image(examples), collator, batch_size)
    margins = [a - b for a, b in zip(own, other, strict=True)]
    share = sum(margin > 0 for margin in margins) / len(margins)
    error = statistics.stdev(margins) / math.sqrt(len(margins))
    return Alignment(share, statistics.fmean(margins), error, len(margins))


def _log_likelihoods(
    model: PreTrainedModel | PeftModel, examples: Sequence[Example], collator: CompletionCollator, batch_size: int
) -> list[float]:
    result = []
    for start in range(0, len(examples), batch_size):
        batch = collator([dict(example) for example in examples[start : start + batch_size]])
        for log_probs, labels in zip(batch_distributions(model, batch), batch["labels"][:, 1:], strict=True):
            targets = labels[labels != IGNORED_LABEL][: len(log_probs)].to(log_probs.device)
            result.append(float(log_probs.gather(1, targets[:, None]).sum()))
    return result


def check_alignment(found: Alignment, when: str) -> list[Check]:
    """Captions are likelier with their own images than with others, more often and by more than chance.

    Args:
        found: what was measured.
        when: "before_training" or "after_training", for the name.
    """
    detail = f"{found.num_captions} captions, each with its own image and another's"
    errors = found.margin / found.standard_error if found.standard_error > 0 else 0.0
    sizes = f"{found.margin:.2f} nats, standard error {found.standard_error:.2f}"
    return [
        at_least(f"own_image_likelier_share_{when}", found.share, LEAST_ALIGNED_SHARE, "", detail),
        at_least(f"own_image_margin_{when}", errors, LEAST_MARGIN_ERRORS, " standard errors", sizes),
    ]


def check_alignment_kept(quantized: Alignment, full: Alignment, when: str) -> list[Check]:
    """Quantization has not taken the images' say: share and margin stay near those of the 16-bit weights."""
    lost = (full.margin - quantized.margin) / full.margin if full.margin > 0 else math.inf
    return [
        at_most(
            f"own_image_share_lost_to_4bit_{when}",
            full.share - quantized.share,
            MOST_LOST_SHARE,
            "",
            f"{quantized.share:.3f} in 4-bit, {full.share:.3f} with full weights",
        ),
        at_most(
            f"own_image_margin_lost_to_4bit_{when}",
            lost,
            MOST_LOST_MARGIN,
            " of it",
            f"{quantized.margin:.2f} nats in 4-bit, {full.margin:.2f} with full weights",
        ),
    ]


def check_routing(
    model: PreTrainedModel | PeftModel,
    examples: Sequence[Example],
    collator: CompletionCollator,
    has_learned: bool = True,
) -> list[Check]:
    """The answer's distribution follows the row's own images and text, and nothing else in the batch.

    Args:
        model: base or adapter on it.
        examples: rows with one image each, or with none (then what is about images is left out); neighbours differ.
        collator: makes the batches.
        has_learned: False for random weights: what they make of a prompt is less than rounding may be, so only what
            has no say is checked.
    """
    as_they_are = answer_distributions(model, examples, collator)
    changes = {"blanking_the_text_changes_the_answer": (as_they_are, blank_text(examples))} if has_learned else {}
    if has_learned and all(row["images"] for row in examples):
        pairs = answer_distributions(model, two_images(examples, swapped=False), collator)
        changes |= {
            "another_image_changes_the_answer": (as_they_are, another_image(examples)),
            "swapping_two_images_changes_the_answer": (pairs, two_images(examples, swapped=True)),
        }
    checks = []
    for name, (before, changed) in changes.items():
        least = _least(divergences(before, answer_distributions(model, changed, collator)))
        checks.append(at_least(name, least, LEAST_CHANGE_NATS, " nats in every row", f"{len(examples)} rows"))
    tolerance = MOST_NOISE_NATS_COARSE if rounds_coarsely(model) else MOST_NOISE_NATS_FP32
    for name, found in _without_say(model, examples, collator, as_they_are).items():
        checks.append(at_most(name, found, tolerance, " nats in any row", f"{len(examples)} rows, {model.dtype}"))
    return checks


def _without_say(
    model: PreTrainedModel | PeftModel,
    examples: Sequence[Example],
    collator: CompletionCollator,
    together: Sequence[torch.Tensor],
) -> dict[str, float]:
    """The largest divergence caused by what must not matter: the other rows of the batch, and padding."""
    batch = collator([dict(example) for example in examples])
    pad_id = tokenizer_of(collator.processing_class).pad_token_id
    alone = [answer_distributions(model, [example], collator)[0] for example in examples]
    padding = {"left": (_PADDING_TOKENS, 0), "right": (0, _PADDING_TOKENS), "much": (0, 4 * _PADDING_TOKENS)}
    found = {"other_rows_of_the_batch_do_not_matter": _most(divergences(alone, together))}
    for name, (left, right) in padding.items():
        changed = batch_distributions(model, padded(batch, pad_id, left, right))
        found[f"padding_does_not_matter_{name}"] = _most(divergences(together, changed))
    return found


def rounds_coarsely(model: nn.Module) -> bool:
    """Whether the model computes in 16 bits, or in 8: LLM.int8 picks the columns it keeps in 16 bits by the batch."""
    return cast(Any, model).dtype != torch.float32 or any(isinstance(m, bnb.nn.Linear8bitLt) for m in model.modules())


def _least(values: Sequence[float]) -> float:
    return min(values) if all(map(math.isfinite, values)) else math.nan


def _most(values: Sequence[float]) -> float:
    return max(values) if all(map(math.isfinite, values)) else math.nan
