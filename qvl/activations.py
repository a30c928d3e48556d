"""Bytes that a step keeps for its backward, and those it needs for a moment: formulas from what the layers do.

Each term names the tensor it stands for. They are those that autograd saves in transformers' decoder layers of the
Llama kind (Qwen2, Qwen2.5, Qwen3, also inside Qwen-VL and LLaVA) with PEFT's LoRA on CUDA: `tests/test_memory.py`
counts the saved tensors of such layers and holds the formulas to them. Of compiled layers, where a partitioner decides
what is computed again, the formula says what was seen there: see `_compiled_bytes`.
"""

from dataclasses import dataclass
from typing import Literal

from qvl.memory_shapes import PROJECTION_INPUTS, DecoderShape, TowerShape

# What a layer keeps: all that its backward needs; its input alone (activation checkpointing); what the partitioner of a
# compiled layer leaves; and its input alone, the rest computed again by compiled code.
Mode = Literal["kept", "checkpointed", "compiled", "compiled checkpointed"]

_FP32 = 4
# Layers that read the same tensor save it once, where no cast and no dropout makes each a copy of its own.
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Of a patch in one block of the tower without gradients, in its hidden size: rotary embeddings of queries and keys in
# fp32, their halves and products (Qwen3-VL 37, Qwen2.5-VL 35, CLIP 30, counted by fake tensors).
_TOWER_BYTES_PER_HIDDEN = 37
# Of a number that bitsandbytes rounds to 8 bits: in fp16, its absolute value, whether it is an outlier.
_ROUNDING_BYTES = 5
# TRL's tile of logits: 4,096 targets and 32,768 tokens of the vocabulary at most.
_TILE_TARGETS, _TILE_VOCABULARY = 4096, 32768
# Of the held-out loss, see `qvl.held_out`: logits in fp32, their exponential, the product of both.
_LOSS_CHUNK_TARGETS, _LOSS_CHUNK_BYTES = 1024, 12


@dataclass(frozen=True)
class Format:
    """How a step computes.

    Attributes:
        compute_bytes: of a number in a matrix product.
        has_autocast: whether PEFT's fp32 adapters compute in the same format.
        casts_inputs: whether PEFT casts what a layer reads to the adapter's fp32. Its layers over 4-bit and 8-bit ones
            leave that to autocast.
        holds_inputs: whether what a layer reads stays as long as the graph does: bitsandbytes' 8-bit layers keep it.
    """

    compute_bytes: int
    has_autocast: bool
    casts_inputs: bool = True
    holds_inputs: bool = False


def saved_bytes(shape: DecoderShape, form: Format, mask_tokens: int) -> int:
    """What one layer saves of one token for its backward.

    Args:
        shape: of the layer.
        form: how it computes.
        mask_tokens: length of a row whose attention has a dense mask (padding, segments): the mask is saved as numbers,
            and heads of keys and values are repeated to those of the queries; 0 without a mask.
    """
    c = form.compute_bytes
    key_value = shape.query if mask_tokens else shape.key_value
    attention = c * (2 * shape.query + 2 * key_value + mask_tokens) + _FP32 * shape.num_heads
    mlp = 3 * c * shape.intermediate  # gate, its SiLU, up
    held = _held_bytes(shape, form) if form.holds_inputs else 0
    return _norm_bytes(shape) + attention + mlp + _lora_bytes(shape, form) + held


def kept_bytes(shape: DecoderShape, form: Format, mode: Mode, mask_tokens: int) -> int:
    """What all layers together keep of one token until their backward."""
    if mode in ("checkpointed", "compiled checkpointed"):
        one = form.compute_bytes * shape.hidden
    elif mode == "compiled":
        one = _compiled_bytes(shape, form)
    else:
        one = saved_bytes(shape, form, mask_tokens)
    return shape.num_layers * one


def passing_bytes(
    shape: DecoderShape, form: Format, mode: Mode, num_tokens: int, mask_tokens: int, unpacked_bytes: int
) -> int:
    """What a batch needs on top of `kept_bytes` at the worst moment, in the last layer's MLP.

    With checkpointing that layer's own saved tensors come to it, and the gradients of its input and output.

    Args:
        shape: of the layer.
        form: how it computes.
        mode: what layers keep.
        num_tokens: of the batch.
        mask_tokens: as `saved_bytes` takes it.
        unpacked_bytes: of the largest layer's weight, unpacked for its product; 0 for a base that is not packed so.
    """
    c, intermediate = form.compute_bytes, shape.intermediate
    if mode == "compiled":
        # Gradients of gate and up, from that of their product; two of the three take the place of what was kept.
        return num_tokens * c * intermediate + unpacked_bytes
    if mode == "compiled checkpointed":
        # What a compiled layer would have kept, the inputs of LoRA's matrices, and those gradients.
        one = _compiled_bytes(shape, form) + c * (_adapted_inputs(shape) + 3 * intermediate)
        return num_tokens * one + unpacked_bytes
    saved = num_tokens * saved_bytes(shape, form, mask_tokens) if mode == "checkpointed" else 0
    least = num_tokens * max(_adapting_bytes(shape, form, mode), _activating_bytes(shape, form, mode))
    if form.holds_inputs:
        least = max(least, num_tokens * _rounding_bytes(shape, form, mode))
    if form.casts_inputs:
        return saved + least + unpacked_bytes
    # The unpacked weight is gone when LoRA's matrices have their turn.
    return saved + max(least, num_tokens * _multiplying_bytes(shape, form, mode) + unpacked_bytes)


def loss_bytes(shape: DecoderShape, form: Format, num_tokens: int, num_targets: int) -> int:
    """What the loss holds: the last norm with its gradient, and the targets' hidden states and TRL's tile of logits."""
    c = form.compute_bytes
    tile = min(num_targets, _TILE_TARGETS) * min(shape.vocabulary, _TILE_VOCABULARY) * c
    targets = num_targets * shape.hidden * (2 * c + _FP32)
    return num_tokens * shape.hidden * (_FP32 + 3 * c) + targets + tile


def held_out_bytes(
    shape: DecoderShape, compute_bytes: int, has_adapter: bool, num_tokens: int, num_targets: int
) -> int:
    """What the held-out loss of a batch needs beside the weights."""
    chunk = min(num_targets, _LOSS_CHUNK_TARGETS) * shape.vocabulary * _LOSS_CHUNK_BYTES
    layer = num_tokens * reading_bytes(shape, compute_bytes, has_adapter)
    return max(layer, num_tokens * shape.hidden * compute_bytes + chunk)


def reading_bytes(shape: DecoderShape, compute_bytes: int, has_adapter: bool) -> int:
    """What one token needs for a moment in a layer's MLP where nothing is kept for a backward and nothing autocast.

    With an adapter: LoRA's output in fp32, the same scaled, and the sum with the base's output.
    """
    c = compute_bytes
    if not has_adapter:
        return c * (3 * shape.intermediate + 3 * shape.hidden)
    return (2 * c + 2 * _FP32) * shape.intermediate + (3 * c + _FP32) * shape.hidden


def cache_bytes(shape: DecoderShape, compute_bytes: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.num_layers * shape.key_value * compute_bytes


def feature_bytes(tower: TowerShape, shape: DecoderShape, compute_bytes: int) -> int:
    """What the tower gives for one visual token."""
    return tower.num_features * shape.hidden * compute_bytes


def tower_bytes(tower: TowerShape, form: Format) -> int:
    """What a frozen tower needs of one patch for a moment, its pixels not counted."""
    # Under autocast CUDA's layer norm gives fp32, and CLIP begins with one.
    kept = tower.num_kept * (_FP32 if form.has_autocast else form.compute_bytes)
    return (_TOWER_BYTES_PER_HIDDEN + kept) * tower.hidden


def trained_tower_bytes(tower: TowerShape, form: Format, mode: Mode) -> int:
    """What a tower that is trained keeps of one patch; an estimate: its blocks differ between families."""
    c = form.compute_bytes
    block = 12 * c * tower.hidden + 2 * c * tower.intermediate
    if mode in ("checkpointed", "compiled checkpointed"):
        return tower.num_blocks * c * tower.hidden + block
    return tower.num_blocks * block


def _adapting_bytes(shape: DecoderShape, form: Format, mode: Mode) -> int:
    """What one token needs while LoRA's matrices of the last projection work, in the forward pass."""
    c, is_adapted = form.compute_bytes, "down_proj" in shape.adapted
    cast = _FP32 * shape.intermediate if is_adapted and c < _FP32 and form.casts_inputs else 0
    dropped = _FP32 * shape.intermediate if cast and shape.dropout else 0
    # The projection's input, where it is not what LoRA has saved.
    is_saved = form.holds_inputs or (is_adapted and not cast and not shape.dropout)
    read = 0 if is_saved else c * shape.intermediate
    if mode == "checkpointed":
        # Computing again ends with the last saved tensor. Residual, norm, the base's output, and the two gradients.
        return read + cast + dropped + 5 * c * shape.hidden
    # Residual, norm and the base's output; then LoRA's output and the same scaled.
    return read + cast + max(dropped + 3 * c * shape.hidden, 5 * c * shape.hidden)


def _multiplying_bytes(shape: DecoderShape, form: Format, mode: Mode) -> int:
    """What one token needs beside an unpacked weight, in the last projection's products without casts.

    In the forward pass LoRA has not saved anything of the projection yet. In the backward pass it is done, and the
    gradient that comes through it waits for the base's.
    """
    c, is_adapted = form.compute_bytes, "down_proj" in shape.adapted
    again = 2 if mode == "checkpointed" else 0
    wide = c * shape.intermediate
    mask = shape.intermediate if is_adapted and shape.dropout else 0
    forward = (0 if is_adapted else wide) + (3 + again) * c * shape.hidden
    backward = wide + (1 if again else 2) * c * shape.hidden
    return max(forward, backward) - mask


def _rounding_bytes(shape: DecoderShape, form: Format, mode: Mode) -> int:
    """What one token needs while the last projection's input is rounded to 8 bits, in the forward pass.

    A copy in fp16, its absolute values, and which of them are outliers. LoRA has not saved anything of the projection.
    """
    c, again = form.compute_bytes, 2 if mode == "checkpointed" else 0
    unsaved = c + 1 if "down_proj" in shape.adapted and shape.dropout else 0
    return (_ROUNDING_BYTES - unsaved) * shape.intermediate + (3 + again) * c * shape.hidden


def _activating_bytes(shape: DecoderShape, form: Format, mode: Mode) -> int:
    """What one token needs in the backward pass of the activation: gradients of its product, of gate and of up.

    The last projection is done by then, and what LoRA has saved of it is gone.
    """
    c, is_adapted = form.compute_bytes, "down_proj" in shape.adapted
    done = (c + (1 if shape.dropout else 0)) * shape.intermediate if is_adapted else 0
    return 3 * c * shape.intermediate + (1 if mode == "checkpointed" else 2) * c * shape.hidden - done


def _norm_bytes(shape: DecoderShape) -> int:
    """RMSNorm computes in fp32 and saves its input so, and the reciprocal root of each mean."""
    heads = shape.query + shape.key_value + shape.num_heads + shape.num_key_value_heads
    return 2 * _FP32 * (shape.hidden + 1) + (_FP32 * heads if shape.has_head_norms else 0)


def _lora_bytes(shape: DecoderShape, form: Format) -> int:
    """LoRA saves the input of each of its matrices, and a mask of a byte for what dropout leaves."""
    # Where PEFT casts a layer's input to the adapter's fp32, autocast casts it back: a copy for each projection.
    width = form.compute_bytes if form.has_autocast else _FP32
    total = sum(width * shape.rank for _ in shape.adapted)
    sizes = {name: getattr(shape, PROJECTION_INPUTS[name]) for name in shape.adapted}
    if shape.dropout:
        return total + sum((width + 1) * size for size in sizes.values())
    if form.casts_inputs and (form.has_autocast or form.compute_bytes != _FP32):
        return total + sum(width * size for size in sizes.values())
    # No casts: the tensors themselves, which attention has saved already in the case of `o_proj`.
    shared = sum(width * shape.hidden for group in _SHARED_INPUTS if shape.adapted.intersection(group))
    return total + shared + (width * shape.intermediate if "down_proj" in shape.adapted else 0)


def _held_bytes(shape: DecoderShape, form: Format) -> int:
    """What the projections read, as far as nobody else saves it: `o_proj` reads what attention has saved."""
    sizes = [(group, shape.hidden) for group in _SHARED_INPUTS] + [(("down_proj",), shape.intermediate)]
    held = sum(size for group, size in sizes if shape.dropout or not shape.adapted.intersection(group))
    return form.compute_bytes * held


def _adapted_inputs(shape: DecoderShape) -> int:
    return sum(getattr(shape, PROJECTION_INPUTS[name]) for name in shape.adapted)


def _compiled_bytes(shape: DecoderShape, form: Format) -> int:
    """What a compiled layer keeps with an activation memory budget of 0.5 (`qvl.compiled_layers`).

    torch's partitioner computes norms, rotary embeddings, activations and dropout again and keeps what the matrix
    products and attention give: the outputs of the seven projections (two of them as the residual stream), attention's
    output, and LoRA's narrow ones; with dropout also what attention reads. Seen in the saved tensors of a layer on a
    CPU; on one H100 the 8B shape with dropout keeps 3.6 MB a token (32 images 53.9 GiB), and this says so.
    """
    c = form.compute_bytes
    wide = 2 * shape.hidden + 2 * shape.query + 2 * shape.key_value + 2 * shape.intermediate
    if shape.dropout:
        wide += shape.query + 2 * shape.key_value
    return c * (wide + len(shape.adapted) * shape.rank) + _FP32 * shape.num_heads
