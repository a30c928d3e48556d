"""Batches for training, made from decoded examples in the data loader's workers."""

from typing import Any

import torch

from qvl.encode import IGNORED_LABEL, ProcessingClass, segments, tokenize, tokenizer_of
from qvl.errors import UserError


class CompletionCollator:
    """Pads separate examples into a batch whose labels are the answers and nothing else.

    What TRL's `DataCollatorForVisionLanguageModeling` lacks: it cuts at `max_length` without looking, so image tokens
    or every label can go; it learns the newline behind the end token; for `messages` it needs transformers 5.18 and
    otherwise trains on the prompt too; and its errors do not name the row. On rows that fit, labels, loss and gradients
    are those of TRL's collator but for that newline (`tests/test_collators.py`).

    Example, right-padded::

        input_ids       <image> <image> Describe A dog <end> <pad>
        attention_mask     1       1        1    1  1    1     0
        labels           -100    -100     -100   A dog <end> -100

    Args:
        processing_class: processor of a vision-language model, or tokenizer of a text-only one.
        max_length: longest row in tokens, visual ones included; None for no limit.
        truncate: cut the text of a row behind `max_length` (image tokens never) instead of raising.
    """

    def __init__(self, processing_class: ProcessingClass, max_length: int | None, truncate: bool = False) -> None:
        self.processing_class = processing_class
        self.max_length = max_length
        self.truncate = truncate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collates examples of `data.py`'s shape.

        Returns:
            `input_ids`, `attention_mask`, `labels` (all int64, shape (batch, longest row)), `mm_token_type_ids` of the
            same shape for models that know it (1 at image tokens), and the processor's image inputs.

        Raises:
            UserError: a row without a target, or longer than `max_length`; the row is named.
        """
        marked = [segments(example, self.processing_class) for example in examples]
        images = [image for example in examples for image in example.get("images", ())]
        token_ids, image_inputs = tokenize(
            [segment.text for row in marked for segment in row], images, self.processing_class
        )
        remaining = iter(token_ids)
        rows = []
        for example, row in zip(examples, marked, strict=True):
            ids: list[int] = []
            labels: list[int] = []
            for segment in row:
                piece = next(remaining)
                ids += piece
                labels += piece if segment.is_target else [IGNORED_LABEL] * len(piece)
            rows.append(fit_row(ids, labels, self.max_length, self.truncate, self._image_token_id, example["where"]))
        return {**self._pad(rows), **image_inputs}

    def _pad(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        pad_id = tokenizer_of(self.processing_class).pad_token_id
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), width), pad_id)
        labels = torch.full((len(rows), width), IGNORED_LABEL)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, (ids, row_labels) in enumerate(rows):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            labels[index, : len(ids)] = torch.tensor(row_labels)
            attention_mask[index, : len(ids)] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if self._image_token_id is not None and "mm_token_type_ids" in self.processing_class.model_input_names:
            batch["mm_token_type_ids"] = (input_ids == self._image_token_id).long()
        return batch

    @property
    def _image_token_id(self) -> int | None:
        return getattr(self.processing_class, "image_token_id", None)


def fit_row(
    ids: list[int],
    labels: list[int],
    max_length: int | None,
    truncate: bool,
    image_token_id: int | None,
    where: str,
) -> tuple[list[int], list[int]]:
    """Cuts a row to `max_length` where that is wanted and safe; raises where it is not.

    Raises:
        UserError: the row is too long, would lose image tokens, or has no target left.
    """
    if max_length is not None and len(ids) > max_length:
        if not truncate:
            raise UserError(
                f"{where}: {len(ids)} tokens, max_length is {max_length}. Raise --max_length, lower "
                "--max_pixels, or choose --overlong drop or truncate_text."
            )
        if image_token_id in ids[max_length:]:
            raise UserError(
                f"{where}: --overlong truncate_text would cut image tokens at max_length {max_length}. Lower "
                "--max_pixels or raise --max_length."
            )
        ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORED_LABEL for label in labels):
        raise UserError(
            f"{where}: no token of the answer is left to train on (the prompt alone fills {len(ids)} tokens). "
            "Raise --max_length or use --overlong drop."
        )
    return ids, labels
