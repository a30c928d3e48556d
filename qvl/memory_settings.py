"""From a run's settings and rows to what decides its memory; reads a configuration, no weights."""

import dataclasses
import heapq
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from transformers import PretrainedConfig, PreTrainedModel
from transformers.trainer_utils import IntervalStrategy

from qvl.activations import Format, Mode
from qvl.adapters import lora_config
from qvl.data import LoadedData, image_sizes, separate_completions
from qvl.encode import ProcessingClass
from qvl.examples import joined_completions
from qvl.generate import bytes_per_prompt
from qvl.image_words import images_as_words
from qvl.memory_needs import LongestRows, Needs
from qvl.memory_shapes import decoder_shape, tower_shape
from qvl.memory_weights import Packing, count_trained, largest_packed_layer, weight_parts
from qvl.models import own_quantization, skeleton
from qvl.settings import Settings
from qvl.survey import RowLength, num_visual_tokens, prompt_lengths, training_lengths
from qvl.trained_parts import trained_parts
from qvl.training_form import trains_compiled, wants_compiled
from qvl.training_rows import LENGTH_MULTIPLE_TOKENS, joined_lengths, row_sharing_refusal

# Of each side: few enough to take a second.
_MOST_ROWS_LOOKED_AT = 2000
_DEFAULT_MAX_LENGTH = 1024


def find_needs(settings: Settings, config: PretrainedConfig, rows: LongestRows, for_gpu: bool) -> Needs | None:
    """Puts together what decides the memory of a run.

    Args:
        settings: of the run.
        config: of its model.
        rows: the longest ones.
        for_gpu: plan for a GPU although this process may have none: precision and compiled layers are then those that
            a GPU of compute capability 8.0 would get, unless flags say otherwise.

    Returns:
        None for a model whose layers the formulas do not know.
    """
    if _quantization_method(config) not in (None, "bitsandbytes"):
        return None
    empty = skeleton(config)
    lora = _lora_of(empty, settings)
    shape = decoder_shape(empty, lora)
    if shape is None:
        return None
    is_elsewhere = for_gpu and settings.training.device.type == "cpu"
    training_format, dtype = _formats(settings, config, is_elsewhere)
    packing = packing_of(settings, config)
    packings: set[Packing] = {packing, "nested 4-bit"}
    recipe, training = settings.recipe, settings.training
    return Needs(
        weights={kind: tuple(weight_parts(empty, dtype, kind)) for kind in packings},
        packing=packing,
        trained=count_trained(empty, lora),
        optim=str(getattr(training.optim, "value", training.optim)),
        shape=shape,
        tower=tower_shape(config) if rows.image else None,
        training_format=training_format,
        base_bytes=dtype.itemsize,
        mode=_mode(settings, is_elsewhere),
        largest_layer=largest_packed_layer(empty),
        rows=rows,
        batch_size=training.per_device_train_batch_size,
        num_accumulated=training.gradient_accumulation_steps,
        eval_batch_size=training.per_device_eval_batch_size,
        max_new_tokens=recipe.max_new_tokens,
        generation_batch_size=recipe.generation_batch_size,
        bytes_per_prompt=bytes_per_prompt(config, dtype.itemsize, rows.prompt + recipe.max_new_tokens),
        has_mask=_has_mask(settings, config, for_gpu),
        has_cached_features=recipe.cache_vision_features,
        trains_tower=recipe.train_vision_tower,
        evaluates_while_training=training.eval_strategy != IntervalStrategy.NO or training.eval_on_start,
        num_eval_generations=recipe.eval_generations,
    )


def longest_rows(
    settings: Settings, config: PretrainedConfig, data: LoadedData, processing_class: ProcessingClass, for_gpu: bool
) -> LongestRows:
    """Looks at up to 2,000 rows of each side, those with the most text and the largest images among them.

    Args:
        settings: of the run.
        config: of its model.
        data: its rows.
        processing_class: its processor or tokenizer.
        for_gpu: rows that know their segments are padded as on a GPU.

    Raises:
        UserError: rows that cannot be trained on.
    """
    recipe, training = settings.recipe, settings.training
    # Packed rows are as long as is allowed, and full of what is usual.
    usual = data.train.select(_spread_evenly(len(data.train), _MOST_ROWS_LOOKED_AT))
    trained = usual if training.packing else _with_the_longest(data.train)
    evaluated = _with_the_longest(data.evaluation)
    if recipe.vision_mode == "text":
        # Tags are not counted: what finds them is not loaded yet.
        trained, evaluated = images_as_words(trained, {}), images_as_words(evaluated, {})
    separate = separate_completions(trained)
    lengths = [_capped(row, training.max_length) for row in training_lengths(separate, processing_class)]
    refusal = row_sharing_refusal(settings, config)
    if refusal is None and recipe.shared_prefix:
        lengths = joined_lengths(joined_completions(separate, recipe.captions_per_step), lengths)
    if refusal is None and training.packing and training.max_length is not None:
        lengths = [_packed(lengths, training.max_length)]
    multiple = LENGTH_MULTIPLE_TOKENS if refusal is None and for_gpu else 1
    answers = training_lengths(separate_completions(evaluated), processing_class)
    return LongestRows(
        train=-(-max(row.num_tokens for row in lengths) // multiple) * multiple,
        train_visual=max(row.num_visual_tokens for row in lengths),
        train_targets=max(row.num_target_tokens for row in lengths),
        prompt=max(prompt_lengths(evaluated, processing_class), default=0),
        prompt_visual=max((row.num_visual_tokens for row in answers), default=0),
        answered=max((row.num_tokens for row in answers), default=0),
        answered_targets=max((row.num_target_tokens for row in answers), default=0),
        image=_largest_image(separate, processing_class),
        num_prompts=len(data.evaluation),
    )


def rows_as_long_as_allowed(settings: Settings) -> LongestRows:
    """In place of rows that cannot be looked at: text of `--max_length` tokens, all of them trained on."""
    longest = settings.training.max_length or _DEFAULT_MAX_LENGTH
    return LongestRows(longest, 0, longest, longest, 0, longest, longest)


def packing_of(settings: Settings, config: PretrainedConfig) -> Packing:
    """How the language model's linear layers lie in memory while training: by a flag, or as the checkpoint comes."""
    own, options = own_quantization(config), settings.model
    if options.load_in_4bit or own.get("load_in_4bit"):
        nested = options.use_bnb_nested_quant if options.load_in_4bit else own.get("bnb_4bit_use_double_quant")
        return "nested 4-bit" if nested else "4-bit"
    if options.load_in_8bit or own.get("load_in_8bit"):
        return "8-bit"
    return "fp8" if settings.recipe.base_precision == "fp8" else "none"


def _quantization_method(config: PretrainedConfig) -> str | None:
    """Upstream's name of what has quantized a checkpoint, such as "awq"; None for one in 16 or 32 bits."""
    own = own_quantization(config)
    if not own:
        return None
    # Files of bitsandbytes' first days name no method.
    method = own.get("quant_method") or "bitsandbytes"
    return str(getattr(method, "value", method))


def _lora_of(empty: PreTrainedModel, settings: Settings) -> LoraConfig:
    """Of the adapter that is put on: a fresh one, or the one in `--adapter`."""
    if settings.recipe.adapter is not None and (Path(settings.recipe.adapter) / "adapter_config.json").is_file():
        found = PeftConfig.from_pretrained(settings.recipe.adapter)
        if isinstance(found, LoraConfig):
            return found
    return lora_config(empty, settings, trained_parts(empty, settings))


def _formats(settings: Settings, config: PretrainedConfig, is_elsewhere: bool) -> tuple[Format, torch.dtype]:
    """What the training computes in, and the base's dtype."""
    chosen = {"dtype", "bf16", "fp16"} & settings.given.keys()
    if is_elsewhere and not chosen:
        return Format(2, has_autocast=True), torch.bfloat16
    name = settings.model.dtype
    dtype = (config.dtype or torch.float32) if name in (None, "auto") else getattr(torch, name)
    has_autocast = bool(settings.training.bf16 or settings.training.fp16)
    return Format(2 if has_autocast else dtype.itemsize, has_autocast), dtype


def _mode(settings: Settings, is_elsewhere: bool) -> Mode:
    is_compiled = wants_compiled(settings) if is_elsewhere else trains_compiled(settings)
    if settings.training.gradient_checkpointing:
        return "compiled checkpointed" if is_compiled else "checkpointed"
    return "compiled" if is_compiled else "kept"


def _has_mask(settings: Settings, config: PretrainedConfig, for_gpu: bool) -> bool:
    """Whether attention gets a dense mask: always where rows know segments, else where rows are padded."""
    if row_sharing_refusal(settings, config) is None:
        return not (for_gpu and (settings.training.padding_free or settings.training.packing))
    return settings.training.per_device_train_batch_size > 1


def _capped(row: RowLength, max_length: int | None) -> RowLength:
    """Rows that are longer are dropped, cut or stop the run."""
    if max_length is None or row.num_tokens <= max_length:
        return row
    return dataclasses.replace(
        row,
        num_tokens=max_length,
        num_visual_tokens=min(row.num_visual_tokens, max_length),
        num_target_tokens=min(row.num_target_tokens, max_length),
    )


def _packed(rows: Sequence[RowLength], max_length: int) -> RowLength:
    """A row that is full of rows as they are on average."""
    num_tokens = sum(row.num_tokens for row in rows)
    return dataclasses.replace(
        rows[0],
        num_tokens=max_length,
        num_visual_tokens=max_length * sum(row.num_visual_tokens for row in rows) // num_tokens,
        num_target_tokens=max_length * sum(row.num_target_tokens for row in rows) // num_tokens,
    )


def _spread_evenly(num_rows: int, most: int) -> range:
    return range(0, num_rows, math.ceil(num_rows / most))


def _with_the_longest(rows: Dataset) -> Dataset:
    """All rows where they are few, else some spread evenly, those with the most text, and those with the most pixels.

    Tokens are what counts, but to count them all takes as long as the training's own look at its rows.
    """
    if len(rows) <= _MOST_ROWS_LOOKED_AT:
        return rows
    texts = [len(text) for text in rows.with_format(None)["conversation"]]
    pixels = [sum(width * height for width, height in sizes) for sizes in image_sizes(rows)]
    chosen = set(_spread_evenly(len(rows), _MOST_ROWS_LOOKED_AT // 2))
    for sizes in (texts, pixels):
        chosen |= set(heapq.nlargest(_MOST_ROWS_LOOKED_AT // 4, range(len(rows)), sizes.__getitem__))
    return rows.select(sorted(chosen))


def _largest_image(rows: Dataset, processing_class: ProcessingClass) -> int:
    sizes = {tuple(size) for row in image_sizes(rows) for size in row}
    return max((num_visual_tokens(processing_class, height, width) for width, height in sizes), default=0)
