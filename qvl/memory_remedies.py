"""What a run could do to need less memory, and how much less each would be."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from qvl.memory_needs import LongestRows, Needs

_LARGEST_BATCH = 4096
_LEAST_SAVED_BYTES = 2**26
# Below this a picture shows little.
_LEAST_IMAGE_TOKENS = 32
# Packings that 4-bit can take the place of, and what has to go then.
_SWITCHED_OFF_FOR_4_BIT = {"none": "", "8-bit": " --load_in_8bit false", "fp8": " without --base_precision fp8"}


@dataclass(frozen=True)
class Remedy:
    """A change of flags.

    Attributes:
        flags: to add to the command line.
        saved_bytes: by how much the run's peak falls.
        peak_bytes: what it then is.
    """

    flags: str
    saved_bytes: int
    peak_bytes: int


def remedies(needs: Needs, peak: Callable[[Needs], int]) -> list[Remedy]:
    """What would lower a run's peak, the greatest saving first.

    Args:
        needs: of the run.
        peak: the most that all of its stages hold, in bytes.
    """
    now = peak(needs)
    found = [Remedy(flags, now - peak(changed), peak(changed)) for flags, changed in _changes(needs)]
    return sorted((r for r in found if r.saved_bytes >= _LEAST_SAVED_BYTES), key=lambda r: -r.saved_bytes)


def largest_batch_size(needs: Needs, fits: Callable[[Needs], bool]) -> int:
    """The largest training batch that fits; 0 where not even one row does."""
    if not fits(needs.with_batch_size(1)):
        return 0
    low, high = 1, 2
    while high < _LARGEST_BATCH and fits(needs.with_batch_size(high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(needs.with_batch_size(middle)) else (low, middle)
    return low


def _changes(needs: Needs) -> Iterator[tuple[str, Needs]]:
    rows = needs.rows
    if needs.packing in _SWITCHED_OFF_FOR_4_BIT:
        flags = f"--load_in_4bit --use_bnb_nested_quant{_SWITCHED_OFF_FOR_4_BIT[needs.packing]}"
        yield flags, replace(needs, packing="nested 4-bit")
    if needs.mode == "kept":
        yield "--gradient_checkpointing", replace(needs, mode="checkpointed")
    if needs.mode == "compiled":
        yield "--gradient_checkpointing", replace(needs, mode="compiled checkpointed")
    if needs.batch_size > 1:
        half, accumulated = needs.batch_size // 2, needs.num_accumulated * 2
        smaller = replace(needs, batch_size=half, num_accumulated=accumulated)
        yield f"--per_device_train_batch_size {half} --gradient_accumulation_steps {accumulated}", smaller
    if needs.eval_batch_size > 1:
        half = needs.eval_batch_size // 2
        yield f"--per_device_eval_batch_size {half}", replace(needs, eval_batch_size=half)
    if needs.tower is not None and needs.tower.num_kept == 0 and rows.image >= 2 * _LEAST_IMAGE_TOKENS:
        half = rows.image // 2 * needs.tower.pixels_per_token
        yield f"--max_pixels {half}", replace(needs, rows=_with_half_images(rows))
    num_text_tokens = rows.train - rows.train_visual
    if num_text_tokens > rows.train_visual:
        half = rows.train_visual + num_text_tokens // 2
        shorter = replace(rows, train=half, train_targets=min(rows.train_targets, half))
        yield f"--max_length {half} --overlong truncate_text", replace(needs, rows=shorter)


def _with_half_images(rows: LongestRows) -> LongestRows:
    return replace(
        rows,
        train=rows.train - rows.train_visual // 2,
        train_visual=rows.train_visual // 2,
        prompt=rows.prompt - rows.prompt_visual // 2,
        prompt_visual=rows.prompt_visual // 2,
        answered=rows.answered - rows.prompt_visual // 2,
        image=rows.image // 2,
    )
