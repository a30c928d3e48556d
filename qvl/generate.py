"""Answers for many prompts, batched: the one way baseline, fine-tuned model and checks generate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from qvl.encode import ProcessingClass, prompt_text, tokenize, tokenizer_of


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded; names and meaning are those of `transformers.GenerationConfig`.

    Attributes:
        batch_size: prompts decoded together.
        seed: seeds the sampling, once a call.
        num_workers: processes that decode images and tokenize ahead of the model.
    """

    max_new_tokens: int
    batch_size: int
    seed: int
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    num_workers: int = 0

    def config(self, processing_class: ProcessingClass) -> GenerationConfig:
        """The generation settings, complete: the model's own (often sampling) defaults must not leak in."""
        tokenizer = tokenizer_of(processing_class)
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k} if self.do_sample else {}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.do_sample,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )


class PromptCollator:
    """Left-padded prompt batches: every row's last token is its own, where generation goes on."""

    def __init__(self, processing_class: ProcessingClass) -> None:
        self.processing_class = processing_class

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collates prompts.

        Args:
            examples: `prompt` (messages), `images` and, where a template knows them, `tools` of each.

        Returns:
            `input_ids` and `attention_mask` (int64, (batch, longest prompt)), `mm_token_type_ids` where the model
            knows it, and the processor's image inputs.
        """
        texts = [prompt_text(row["prompt"], self.processing_class, row.get("tools")) for row in examples]
        images = [image for example in examples for image in example["images"]]
        token_ids, image_inputs = tokenize(texts, images, self.processing_class)
        padded = tokenizer_of(self.processing_class).pad(
            {"input_ids": token_ids}, padding=True, padding_side="left", return_tensors="pt"
        )
        batch = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}
        image_token_id = getattr(self.processing_class, "image_token_id", None)
        if image_token_id is not None and "mm_token_type_ids" in self.processing_class.model_input_names:
            batch["mm_token_type_ids"] = (batch["input_ids"] == image_token_id).long()
        return {**batch, **{key: torch.as_tensor(value) for key, value in image_inputs.items()}}


def generate(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    examples: Dataset | Sequence[dict[str, Any]],
    decoding: Decoding,
    lengths: Sequence[int] | None = None,
    label: str = "generating",
) -> list[str]:
    """Answers every prompt.

    Args:
        model: base model or adapter on it, on its device.
        processing_class: processor or tokenizer it was trained with.
        examples: map-style; each gives `prompt`, `images` and perhaps `tools`.
        decoding: how to decode.
        lengths: tokens of each prompt; prompts of like length are then decoded together, longest first, so that a batch
            that does not fit fails at once.
        label: of the progress bar.

    Returns:
        The answers in the order of `examples`, without special tokens, stripped.
    """
    order = sorted(range(len(examples)), key=lambda i: -lengths[i]) if lengths else list(range(len(examples)))
    loader = DataLoader(
        examples,  # type: ignore[arg-type]
        batch_sampler=[order[i : i + decoding.batch_size] for i in range(0, len(order), decoding.batch_size)],
        collate_fn=PromptCollator(processing_class),
        num_workers=decoding.num_workers,
        pin_memory=model.device.type == "cuda",
    )
    config = decoding.config(processing_class)
    tokenizer = tokenizer_of(processing_class)
    was_training = model.training
    model.eval()
    torch.manual_seed(decoding.seed)
    answers: list[str] = []
    with torch.inference_mode(), tqdm(total=len(order), desc=label, unit="answer") as bar:
        for batch in loader:
            batch = {key: value.to(model.device, non_blocking=True) for key, value in batch.items()}
            tokens = model.generate(**batch, generation_config=config)
            new_tokens = tokens[:, batch["input_ids"].shape[1] :]
            answers += [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
            bar.update(len(new_tokens))
    model.train(was_training)
    in_order = [""] * len(order)
    for position, answer in zip(order, answers, strict=True):
        in_order[position] = answer
    return in_order
