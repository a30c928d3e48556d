"""From what decides a run's memory to the most that each of its stages holds: arithmetic, no model and no device.

The terms come from `qvl.memory_weights` (what lies there all through) and `qvl.activations` (what a batch adds). All
that PyTorch allocates is counted, as `torch.cuda.max_memory_allocated` does; the CUDA context and what the allocator
holds back are not, see `qvl.memory`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qvl import activations
from qvl.activations import Format, Mode
from qvl.graphed_decoding import CACHE_MULTIPLE_TOKENS
from qvl.memory_shapes import DecoderShape, TowerShape
from qvl.memory_weights import Packing, TrainedCounts, WeightPart

_PACKED_BY_BITSANDBYTES = ("4-bit", "nested 4-bit", "8-bit")
# Of cuBLAS, on GPUs of compute capability 9.0; a quarter of it below.
_WORKSPACE_BYTES = 32 * 2**20
_PIXEL_BYTES_TRAINING = 4


@dataclass(frozen=True)
class LongestRows:
    """The longest rows of a run, in tokens: memory has to suffice for these.

    Attributes:
        train: of a training row as the trainer gets it, answers that share a prompt in one row.
        train_visual: visual tokens in it.
        train_targets: tokens in it that are trained on.
        prompt: of an evaluation prompt.
        prompt_visual: visual tokens in it.
        answered: of an evaluation prompt with one of its answers.
        answered_targets: tokens of that answer.
        image: visual tokens of the largest image.
        num_prompts: evaluation prompts.
    """

    train: int
    train_visual: int
    train_targets: int
    prompt: int = 0
    prompt_visual: int = 0
    answered: int = 0
    answered_targets: int = 0
    image: int = 0
    num_prompts: int = 0


@dataclass(frozen=True)
class Needs:
    """All that decides how much memory a run needs.

    Attributes:
        weights: parts of the base by how its linear layers are packed, for the packings that are looked at.
        packing: the run's.
        trained: what the adapter trains.
        optim: upstream's name of the optimizer.
        shape: of the decoder's layers.
        tower: of the vision part, None for a text-only model.
        training_format: in which the training computes.
        base_bytes: of a number in the base's own dtype, in which it is evaluated.
        mode: what layers keep for their backward.
        largest_layer: weights of the largest packed layer, which is unpacked for its product.
        rows: the longest.
        batch_size: `--per_device_train_batch_size`.
        num_accumulated: `--gradient_accumulation_steps`: all their batches are on the device at the step's beginning.
        eval_batch_size: `--per_device_eval_batch_size`.
        max_new_tokens: of an answer.
        generation_batch_size: prompts answered at a time; None for what fits a GPU.
        bytes_per_prompt: by which `qvl.generate` decides how many fit.
        has_mask: whether attention gets a dense mask.
        has_cached_features: whether features are read in place of pixels.
        trains_tower: whether the vision tower is trained.
        evaluates_while_training: whether there is a held-out loss between steps.
        num_eval_generations: prompts that are answered then; 0 for none.
    """

    weights: Mapping[Packing, tuple[WeightPart, ...]]
    packing: Packing
    trained: TrainedCounts
    optim: str
    shape: DecoderShape
    tower: TowerShape | None
    training_format: Format
    base_bytes: int
    mode: Mode
    largest_layer: int
    rows: LongestRows
    batch_size: int
    num_accumulated: int
    eval_batch_size: int
    max_new_tokens: int
    generation_batch_size: int | None
    bytes_per_prompt: int
    has_mask: bool
    has_cached_features: bool
    trains_tower: bool
    evaluates_while_training: bool
    num_eval_generations: int

    @property
    def weight_bytes(self) -> int:
        """Of the base as the run packs it."""
        return sum(part.num_bytes for part in self.weights[self.packing])

    @property
    def layer_format(self) -> Format:
        """In which the decoder's layers train as the run packs them."""
        leaves_casts = self.training_format.has_autocast and self.packing in _PACKED_BY_BITSANDBYTES
        return replace(self.training_format, casts_inputs=not leaves_casts, holds_inputs=self.packing == "8-bit")

    def with_batch_size(self, batch_size: int) -> "Needs":
        """The same with another training batch."""
        return replace(self, batch_size=batch_size)


def training_parts(needs: Needs) -> dict[str, int]:
    """The most that the training holds, by what holds it, in bytes; the values add up to the peak."""
    trained, form, shape, rows = needs.trained, needs.layer_format, needs.shape, needs.rows
    num_tokens = needs.batch_size * rows.train
    mask = rows.train if needs.has_mask else 0
    kept = num_tokens * activations.kept_bytes(shape, form, needs.mode, mask) + _kept_of_tower(needs)
    unpacked = needs.largest_layer * form.compute_bytes if needs.packing in _PACKED_BY_BITSANDBYTES else 0
    passing = activations.passing_bytes(shape, form, needs.mode, num_tokens, mask, unpacked)
    loss = activations.loss_bytes(shape, form, num_tokens, needs.batch_size * rows.train_targets)
    features = needs.batch_size * rows.train_visual * _feature_bytes(needs, form.compute_bytes)
    # The tower runs before there is anything to keep.
    tower = _tower_passing(needs, needs.batch_size * rows.train_visual, form)
    parts = {
        "weights": needs.weight_bytes,
        "adapter": trained.weight_bytes + (trained.num_trained * form.compute_bytes if form.has_autocast else 0),
        "gradients": trained.weight_bytes,
        "optimizer": trained.optimizer_bytes(needs.optim),
        "inputs": _training_inputs(needs) + features + _WORKSPACE_BYTES,
    }
    if tower > kept + max(passing, loss):
        return {**parts, "vision tower": tower}
    if loss > passing:
        return {**parts, "activations": kept, "loss": loss}
    return {**parts, "activations": kept, "the layer at work": passing}


def answering_parts(needs: Needs, batch_size: int, has_adapter: bool = True) -> dict[str, int]:
    """The most that answering evaluation prompts holds, in bytes, a batch of prompts at a time.

    Args:
        needs: of the run.
        batch_size: prompts at a time.
        has_adapter: whether it is the fine-tuned model that answers.
    """
    c, shape, rows = needs.base_bytes, needs.shape, needs.rows
    form = Format(c, has_autocast=False)
    visual = batch_size * rows.prompt_visual
    cached = -(-(rows.prompt + needs.max_new_tokens) // CACHE_MULTIPLE_TOKENS) * CACHE_MULTIPLE_TOKENS
    reading = batch_size * rows.prompt * activations.reading_bytes(shape, c, has_adapter)
    reading += visual * _feature_bytes(needs, c)
    return {
        "weights": needs.weight_bytes,
        "adapter": needs.trained.weight_bytes if has_adapter else 0,
        "keys and values": batch_size * cached * activations.cache_bytes(shape, c),
        # In the model's dtype, in fp32, and their scores.
        "logits": batch_size * shape.vocabulary * (c + 8),
        "inputs": _pixel_bytes(needs, visual, c) + _WORKSPACE_BYTES,
        "reading prompts": max(reading, _tower_passing(needs, visual, form)),
    }


def held_out_parts(needs: Needs, has_adapter: bool = True) -> dict[str, int]:
    """The most that the held-out loss holds, in bytes."""
    c, rows, size = needs.base_bytes, needs.rows, needs.eval_batch_size
    form = Format(c, has_autocast=False)
    visual = size * rows.prompt_visual
    reading = activations.held_out_bytes(
        needs.shape, c, has_adapter, size * rows.answered, size * rows.answered_targets
    )
    return {
        "weights": needs.weight_bytes,
        "adapter": needs.trained.weight_bytes if has_adapter else 0,
        "inputs": _pixel_bytes(needs, visual, _PIXEL_BYTES_TRAINING) + _WORKSPACE_BYTES,
        "reading answers": max(
            reading + visual * _feature_bytes(needs, c),
            _tower_passing(needs, visual, form),
        ),
    }


def _training_inputs(needs: Needs) -> int:
    visual = needs.batch_size * needs.rows.train_visual
    if needs.has_cached_features:
        return needs.num_accumulated * visual * _feature_bytes(needs, needs.training_format.compute_bytes)
    return needs.num_accumulated * _pixel_bytes(needs, visual, _PIXEL_BYTES_TRAINING)


def _pixel_bytes(needs: Needs, num_visual_tokens: int, value_bytes: int) -> int:
    if needs.tower is None:
        return 0
    return num_visual_tokens * needs.tower.patches_per_token * needs.tower.patch_values * value_bytes


def _feature_bytes(needs: Needs, value_bytes: int) -> int:
    return activations.feature_bytes(needs.tower, needs.shape, value_bytes) if needs.tower is not None else 0


def _tower_passing(needs: Needs, num_visual_tokens: int, form: Format) -> int:
    if needs.tower is None or needs.has_cached_features:
        return 0
    return num_visual_tokens * needs.tower.patches_per_token * activations.tower_bytes(needs.tower, form)


def _kept_of_tower(needs: Needs) -> int:
    if needs.tower is None or not needs.trains_tower:
        return 0
    num_patches = needs.batch_size * needs.rows.train_visual * needs.tower.patches_per_token
    return num_patches * activations.trained_tower_bytes(needs.tower, needs.training_format, needs.mode)
