"""Batches in which the answers to one prompt share it, and samples may lie behind each other without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from qvl.collators import fit_row
from qvl.conversations import assistant_message
from qvl.encode import IGNORED_LABEL, ProcessingClass, Segment, segments, tokenize, tokenizer_of
from qvl.errors import UserError
from qvl.positions import Positions, split_grids
from qvl.segment_attention import PADDING_SEGMENT, SEGMENTS_PER_SAMPLE

# Families whose loss and gradients a test holds to those of separate samples (tests/test_shared_prefix.py), each with
# its language models. Another family around the same language model may place images in another way.
_PROVEN = {
    "qwen3_vl": ("qwen3_vl_text",),
    "qwen2_5_vl": ("qwen2_5_vl_text",),
    "llava": ("qwen3", "qwen2"),
    "qwen3": ("qwen3",),
    "qwen2": ("qwen2",),
}


def segment_refusal(config: PretrainedConfig, attn_implementation: str | None) -> str | None:
    """Why a model cannot train on samples that share a row; None if it can."""
    text = config.get_text_config(decoder=True)
    if text.model_type not in _PROVEN.get(config.model_type, ()):
        inside = f" with {text.model_type}" if text is not config else ""
        return f"it is not proven for models of type {config.model_type}{inside}"
    if any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ()):
        return "some layers of this model do not attend to the whole row"
    if attn_implementation not in (None, "sdpa"):
        return f"--attn_implementation {attn_implementation} knows no segments"
    return None


@dataclass(frozen=True)
class _Row:
    """Tokens of one sample, a prefix with its branches behind it.

    Attributes:
        ids: token ids.
        labels: the same where a token is trained on, else `IGNORED_LABEL`.
        branches: 0 for the prefix, then 1, 2, ...
        positions: int64 (dimensions, length).
        num_answers: answers in it that separate rows would hold.
    """

    ids: list[int]
    labels: list[int]
    branches: list[int]
    positions: torch.Tensor
    num_answers: int


class SharedPrefixCollator:
    """Makes one sequence of an image, its prompt and all its answers, and of a batch rows of such sequences.

    What TRL lacks: its vision collator computes image and prompt again for every answer, pads, and refuses packing.
    Here every answer is a branch that sees the prefix and itself only, numbered as if it followed the prefix directly.
    A branch begins with a copy of the prefix's last token, so that its first label hangs where the usual shift expects
    it. Loss and gradients are those of separate samples, each answer token counting the same.

    The answers of one image then share an optimizer step: a step sees fewer images for the same number of answers, so
    its gradient varies more than that of as many answers of different images. `--captions_per_step` spreads them.

    Example, a prompt of three tokens, the last one `>`, with the answers `A dog` and `Dog`::

        input_ids       <image> ?   >   A   dog <end> >   Dog <end>
                        is really: <image> ? | > A dog <end> | > Dog <end>
        segment_ids        0    0   1   1   1   1     2   2   2
        position_ids       0    1   2   3   4   5     2   3   4
        labels             -    -   -   A  dog <end>  -  Dog <end>

    Args:
        processing_class: processor of a vision-language model, or tokenizer of a text-only one.
        positions: how the model numbers tokens, from `positions_of`.
        max_length: longest prompt with one answer in tokens, visual ones included; None for no limit.
        truncate: cut the text of an answer behind `max_length` (image tokens never) instead of raising.
        padding_free: all samples in one row behind each other, instead of a padded row each.
        pad_to_multiple_of: round the length of the rows up, so that few different ones occur.
    """

    def __init__(
        self,
        processing_class: ProcessingClass,
        positions: Positions,
        max_length: int | None,
        truncate: bool = False,
        padding_free: bool = False,
        pad_to_multiple_of: int = 1,
    ) -> None:
        self.processing_class = processing_class
        self.positions = positions
        self.max_length = max_length
        self.truncate = truncate
        self.padding_free = padding_free
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates examples with `prompt` and `completions` (or `completion`), or with `messages`, or packs of them.

        Returns:
            `input_ids`, `attention_mask`, `labels`, `segment_ids` (int64, (rows, length)), `position_ids` (int64,
            (rows, length), for Qwen-VL (3, rows, length)), `num_answers` (int), and the processor's image inputs.

        Raises:
            UserError: an answer without a target, or longer than `max_length` with its prompt, or more answers to one
                prompt than segment ids have room for; the row is named.
        """
        examples = [example for row in examples for example in row.get("pack", [row])]
        marked = [marked_parts(example, self.processing_class) for example in examples]
        images = [image for example in examples for image in example.get("images", ())]
        token_ids, image_inputs = tokenize(
            [part.text for parts in marked for part in parts], images, self.processing_class
        )
        remaining, grids = iter(token_ids), split_grids(image_inputs.get("image_grid_thw"), examples)
        rows = []
        for example, parts, grid in zip(examples, marked, grids, strict=True):
            pieces = [(next(remaining), part.is_target) for part in parts]
            rows.append(self._row(example, pieces, grid))
        batch = self._side_by_side(rows) if self.padding_free else self._padded(rows)
        # A plain number: a tensor would go to the device, and to read it there is to wait for all that the device does.
        return {**batch, **image_inputs, "num_answers": sum(row.num_answers for row in rows)}

    def _row(self, example: dict[str, Any], pieces: list[tuple[list[int], bool]], grid: torch.Tensor | None) -> _Row:
        """One sample: a prefix and branches where there are several answers, else as it stands."""
        if len(example.get("completions", ())) < 2:
            ids = [token for piece, _ in pieces for token in piece]
            labels = [token if target else IGNORED_LABEL for piece, target in pieces for token in piece]
            ids, labels = self._fit(ids, labels, example)
            return _Row(ids, labels, [0] * len(ids), self.positions(ids, grid), 1)
        (prompt, _), *answers = pieces
        _require_room(len(answers), example["where"])
        whole = self.positions(prompt, grid)
        ids, labels = prompt[:-1], [IGNORED_LABEL] * (len(prompt) - 1)
        branches, positions = [0] * len(ids), [whole[:, :-1]]
        for number, (answer, _) in enumerate(answers, start=1):
            row_ids, row_labels = self._fit([*prompt, *answer], [IGNORED_LABEL] * len(prompt) + answer, example)
            branch, targets = row_ids[len(prompt) - 1 :], row_labels[len(prompt) - 1 :]
            ids, labels = ids + branch, labels + targets
            branches += [number] * len(branch)
            positions.append(whole[:, -1:] + torch.arange(len(branch)))
        return _Row(ids, labels, branches, torch.cat(positions, dim=1), len(answers))

    def _fit(self, ids: list[int], labels: list[int], example: dict[str, Any]) -> tuple[list[int], list[int]]:
        image_token_id = getattr(self.processing_class, "image_token_id", None)
        return fit_row(ids, labels, self.max_length, self.truncate, image_token_id, example["where"])

    def _padded(self, rows: Sequence[_Row]) -> dict[str, torch.Tensor]:
        width = self._rounded(max(len(row.ids) for row in rows))
        made = [self._tensors([row], width) for row in rows]
        return {key: torch.cat([row[key] for row in made], dim=1 if made[0][key].dim() == 3 else 0) for key in made[0]}

    def _side_by_side(self, rows: Sequence[_Row]) -> dict[str, torch.Tensor]:
        return self._tensors(rows, self._rounded(sum(len(row.ids) for row in rows)))

    def _tensors(self, rows: Sequence[_Row], width: int) -> dict[str, torch.Tensor]:
        """Samples behind each other in one row, padded to a width."""
        pad_id = tokenizer_of(self.processing_class).pad_token_id
        ids = [token for row in rows for token in row.ids]
        labels = [label for row in rows for label in row.labels]
        numbers = [sample * SEGMENTS_PER_SAMPLE + number for sample, row in enumerate(rows) for number in row.branches]
        missing = width - len(ids)
        positions = torch.cat(
            [*(row.positions for row in rows), rows[0].positions.new_zeros(len(rows[0].positions), missing)], dim=1
        )
        return {
            "input_ids": torch.tensor([ids + [pad_id] * missing]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * missing]),
            "labels": torch.tensor([labels + [IGNORED_LABEL] * missing]),
            "segment_ids": torch.tensor([numbers + [PADDING_SEGMENT] * missing]),
            # Three dimensions stand in front of the rows, the only one does not.
            "position_ids": positions.unsqueeze(1) if len(positions) > 1 else positions,
        }

    def _rounded(self, length: int) -> int:
        return -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of


def _require_room(num_answers: int, where: str) -> None:
    """Stops where the branches of a tree would be numbered into the next sample.

    Raises:
        UserError: more answers than a sample has numbers for.
    """
    most = SEGMENTS_PER_SAMPLE - 1
    if num_answers > most:
        raise UserError(
            f"{where}: {num_answers} answers to one prompt, and at most {most} can share it. Spread them with "
            f"--captions_per_step {most} or less, or train each in a row of its own with --no_shared_prefix."
        )


def marked_parts(example: dict[str, Any], processing_class: ProcessingClass) -> list[Segment]:
    """`segments` of an example that may have several answers: the prompt stands once, in front of all of them."""
    if "completions" not in example:
        return segments(example, processing_class)
    result: list[Segment] = []
    for text in example["completions"]:
        prompt, target = segments({**example, "completion": [assistant_message(text)]}, processing_class)
        result = [*(result or [prompt]), target]
    return result
