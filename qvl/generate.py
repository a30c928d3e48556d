"""Answers for many prompts, batched: the one way baseline, fine-tuned model and checks generate."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from qvl import unsloth_loader
from qvl.compiled_layers import can_compile, compiled_generation, plain_layers
from qvl.encode import ProcessingClass, prompt_text, tokenize, tokenizer_of
from qvl.errors import UserError
from qvl.features import encoder_inputs
from qvl.graphed_decoding import GraphedDecoding
from qvl.models import without_adapter
from qvl.positions import Positions, positions_of, split_grids
from qvl.processes import gathered, num_processes, own_batches

# 128 prompts were no slower than 170 (8B shape, one H100), and more take memory.
_MOST_AUTOMATIC = 128
# Of the free memory, what automatic batches may plan with: the rest is for fragments and the allocator.
_SHARE_PLANNED = 0.8
# Prompts that a worker decodes and tokenizes at a time, and how many such parts it works ahead.
_PART_SIZE = 8
_PARTS_AHEAD = 8


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded; names and meaning are those of `transformers.GenerationConfig`.

    Attributes:
        batch_size: prompts decoded together; None chooses by the free memory of a CUDA device.
        seed: seeds the sampling, for each batch anew, so that the number of processes does not matter; another batch
            size draws other answers.
        num_workers: processes that decode images and tokenize ahead of the model.
        compile_layers: on CUDA, compile what can be, which takes a sixth less time and some seconds once.
    """

    max_new_tokens: int
    batch_size: int | None
    seed: int
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    num_workers: int = 0
    compile_layers: bool = False

    def config(self, processing_class: ProcessingClass, model: PreTrainedModel) -> GenerationConfig:
        """The generation settings, complete: of the model's own (often sampling) defaults only its end tokens count."""
        tokenizer = tokenizer_of(processing_class)
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k} if self.do_sample else {}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.do_sample,
            eos_token_id=end_tokens(processing_class, model),
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )

    def summary(self) -> str:
        """What decides the answers, in a few words."""
        sampled = f"temperature {self.temperature:g}, top_p {self.top_p:g}, top_k {self.top_k}"
        return f"{sampled if self.do_sample else 'greedy'}, at most {self.max_new_tokens} new tokens"


def end_tokens(processing_class: ProcessingClass, model: PreTrainedModel) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and what generation_config.json has beside it (Qwen has two)."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = own if isinstance(own, list) else [own]
    found = dict.fromkeys([tokenizer_of(processing_class).eos_token_id, *own])
    return [token for token in found if token is not None]


class PromptCollator:
    """Left-padded prompt batches: every row's last token is its own, where generation goes on.

    Args:
        processing_class: processor or tokenizer of the model.
        dtype: of the pixels; the model's own halves what goes to the device, where it would be cast anyway.
        positions: how a model with positions in three dimensions numbers tokens, from `positions_of`: made here, they
            spare the model to ask the device for the size of every image. None leaves them to the model.
    """

    def __init__(
        self,
        processing_class: ProcessingClass,
        dtype: torch.dtype = torch.float32,
        positions: Positions | None = None,
    ) -> None:
        self.processing_class = processing_class
        self.dtype = dtype
        self.positions = positions

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collates prompts.

        Args:
            examples: `prompt` (messages), `images` and, where a template knows them, `tools` of each.

        Returns:
            `input_ids` and `attention_mask` (int64, (batch, longest prompt)), `mm_token_type_ids` where the model
            knows it, `position_ids` (int64, (1 + 3, batch, longest prompt), the first for the mask) with `positions`,
            and the processor's image inputs.
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
        if self.positions is not None:
            grids = split_grids(image_inputs.get("image_grid_thw"), examples)
            batch["position_ids"] = self._position_ids(self.positions, token_ids, grids)
        if "pixel_values" in image_inputs:
            image_inputs["pixel_values"] = image_inputs["pixel_values"].to(self.dtype)
        return {**batch, **image_inputs}

    def _position_ids(
        self, positions: Positions, token_ids: Sequence[Sequence[int]], grids: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        """Padded on the left with zeros, which the mask hides."""
        width = max(len(ids) for ids in token_ids)
        rows = []
        for ids, grid in zip(token_ids, grids, strict=True):
            with_text = torch.cat([torch.arange(len(ids)).unsqueeze(0), positions(ids, grid)])
            rows.append(torch.nn.functional.pad(with_text, (width - len(ids), 0)))
        return torch.stack(rows, dim=1)


def generate(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    examples: Dataset | Sequence[dict[str, Any]],
    decoding: Decoding,
    lengths: Sequence[int] | None = None,
    label: str = "generating",
) -> list[str]:
    """Answers every prompt.

    On CUDA, with `lengths`, a step of decoding is one captured graph; the vision tower attends to all images at once. A
    batch that does not fit into memory is halved and tried again. Several processes share the batches, and all of them
    get all answers.

    Args:
        model: base model or adapter on it, on its device.
        processing_class: processor or tokenizer it was trained with.
        examples: map-style; each gives `prompt`, `images` and perhaps `tools`.
        decoding: how to decode.
        lengths: tokens of each prompt, visual ones included; prompts of like length are then decoded together, longest
            first, so that memory that does not suffice shows at once.
        label: of the progress bar.

    Returns:
        The answers in the order of `examples`, without special tokens, stripped.

    Raises:
        UserError: not even one prompt fits into the device's memory.
    """
    base = without_adapter(model)
    was_training = model.training
    model.eval()
    most = max(lengths) + decoding.max_new_tokens if lengths and base.device.type == "cuda" else None
    batch_size = _agreed_batch_size(base, decoding, most, len(examples))
    order = sorted(range(len(examples)), key=lambda i: -lengths[i]) if lengths else list(range(len(examples)))
    waiting = [index for batch in own_batches(order, batch_size) for index in batch]
    answers: dict[int, str] = {}
    # Layers that training has compiled whole would compile anew, each for its own keys and values.
    with torch.inference_mode(), plain_layers(base), tqdm(total=len(waiting), desc=label, unit="answer") as bar:
        while waiting:
            try:
                for indices, texts in _batches(model, processing_class, examples, waiting, batch_size, decoding, most):
                    answers.update(zip(indices, texts, strict=True))
                    bar.update(len(answers) - bar.n)
            except torch.OutOfMemoryError as error:
                if batch_size == 1:
                    raise UserError(
                        "Not even one prompt fits into the device's memory beside the model: lower --max_pixels or "
                        "--max_new_tokens, or use --load_in_4bit."
                    ) from error
                batch_size //= 2
                bar.write(f"Out of memory: going on with {batch_size} prompts at a time.")
            waiting = [index for index in waiting if index not in answers]
            if base.device.type == "cuda":
                torch.cuda.empty_cache()
    model.train(was_training)
    if was_training and unsloth_loader.is_patched(base):
        unsloth_loader.resume_training(model)
    everywhere = {index: answer for part in gathered(answers) for index, answer in part.items()}
    return [everywhere[index] for index in range(len(examples))]


def _agreed_batch_size(base: PreTrainedModel, decoding: Decoding, most_tokens: int | None, num_prompts: int) -> int:
    """Prompts that each process decodes at a time. With graphs, which want batches of one size, the last one is full.

    Where memory decides, the scarcest does, and all processes get as many batches.
    """
    size = decoding.batch_size or (min(gathered(fitting_batch_size(base, most_tokens))) if most_tokens else 1)
    if most_tokens is None:
        return size
    share = 1 if decoding.batch_size else num_processes()
    return evenly_filled(num_prompts, size, share)


def evenly_filled(num_prompts: int, most: int, num_shares: int = 1) -> int:
    """Prompts at a time, at most so many, where all batches are nearly as full and each share has as many of them."""
    num_batches = math.ceil(num_prompts / most / num_shares) * num_shares
    return math.ceil(num_prompts / num_batches)


def fitting_batch_size(model: PreTrainedModel, most_tokens: int) -> int:
    """Prompts that fit at a time beside what the CUDA device already holds.

    Args:
        model: on its device.
        most_tokens: longest prompt and answer together.
    """
    free, _ = torch.cuda.mem_get_info(model.device)
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return prompts_at_a_time(free + unused, bytes_per_prompt(model.config, model.dtype.itemsize, most_tokens))


def prompts_at_a_time(free_bytes: int, bytes_each: int) -> int:
    """Prompts that are answered together in so much free memory."""
    return max(1, min(_MOST_AUTOMATIC, int(_SHARE_PLANNED * free_bytes / bytes_each)))


def bytes_per_prompt(config: PretrainedConfig, value_bytes: int, most_tokens: int) -> int:
    """A rough upper bound of the memory that answering one prompt takes.

    Args:
        config: of the model.
        value_bytes: of a number in its dtype.
        most_tokens: longest prompt and answer together.
    """
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim
    # Of one layer at a time: gate, up, their product and its copy; a dozen hidden states, the rotary ones in fp32.
    prefill = 4 * text.intermediate_size + 12 * text.hidden_size
    logits = 5 * text.vocab_size  # in the model's dtype, in fp32, and their scores
    return int(value_bytes * (most_tokens * (cache + prefill) + logits))


def _batches(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    examples: Dataset | Sequence[dict[str, Any]],
    order: Sequence[int],
    batch_size: int,
    decoding: Decoding,
    most_tokens: int | None,
) -> Iterator[tuple[list[int], list[str]]]:
    """Decodes batch by batch; with `most_tokens` by a captured graph, which wants batches of one size."""
    base = without_adapter(model)
    graphed = GraphedDecoding(most_tokens) if most_tokens and not unsloth_loader.is_patched(base) else None
    batches = [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    if graphed:
        # The last batch is filled up with its last prompt; the same answer comes again.
        batches[-1] += [batches[-1][-1]] * (batch_size - len(batches[-1]))
    config = decoding.config(processing_class, model)
    compiles = decoding.compile_layers and graphed is not None and can_compile(base.device)
    # Models that number tokens in one dimension do it faster than it takes to send the numbers.
    positions = positions_of(base.config) if hasattr(base.base_model, "get_rope_index") else None
    collated = _collated(
        PromptCollator(processing_class, base.dtype, positions), examples, batches, decoding.num_workers, base.device
    )
    with compiled_generation(base) if compiles else nullcontext():
        for indices, inputs in zip(batches, collated, strict=True):
            num_prompt_tokens = inputs["input_ids"].shape[1]
            torch.manual_seed(decoding.seed + indices[0])
            loop = {"custom_generate": graphed, "past_key_values": graphed.empty_cache(base)} if graphed else {}
            tokens = model.generate(**encoder_inputs(inputs, base), **loop, generation_config=config)
            new_tokens = tokens[:, num_prompt_tokens:]
            texts = tokenizer_of(processing_class).batch_decode(new_tokens, skip_special_tokens=True)
            yield indices, [text.strip() for text in texts]


def _collated(
    collator: PromptCollator,
    examples: Dataset | Sequence[dict[str, Any]],
    batches: Sequence[Sequence[int]],
    num_workers: int,
    device: torch.device,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of prompts on the device, each made by several workers: one alone takes seconds for a hundred photos.

    The workers begin at once, not when the first batch is asked for.
    """
    parts = [list(batch[start : start + _PART_SIZE]) for batch in batches for start in range(0, len(batch), _PART_SIZE)]
    loader = DataLoader(
        examples,  # type: ignore[arg-type]
        batch_sampler=parts,
        collate_fn=collator,
        num_workers=num_workers,
        prefetch_factor=_PARTS_AHEAD if num_workers else None,
        pin_memory=device.type == "cuda",
    )
    remaining = iter(loader)
    pad_id = tokenizer_of(collator.processing_class).pad_token_id

    def made(num_parts: int) -> dict[str, torch.Tensor]:
        parts = [next(remaining) for _ in range(num_parts)]
        return _joined(
            [{key: value.to(device, non_blocking=True) for key, value in part.items()} for part in parts], pad_id
        )

    return (made(math.ceil(len(batch) / _PART_SIZE)) for batch in batches)


def _joined(parts: Sequence[dict[str, torch.Tensor]], pad_id: int) -> dict[str, torch.Tensor]:
    """One batch of several, padded on the left to the longest."""
    width = max(part["input_ids"].shape[1] for part in parts)
    padding = {"input_ids": pad_id, "attention_mask": 0, "mm_token_type_ids": 0, "position_ids": 0}
    keys = {key for part in parts for key in part}
    return {
        key: torch.cat(
            [
                torch.nn.functional.pad(part[key], (width - part[key].shape[-1], 0), value=padding[key])
                if key in padding
                else part[key]
                for part in parts
                if key in part
            ],
            dim=1 if key == "position_ids" else 0,
        )
        for key in keys
    }
