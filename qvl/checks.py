"""The invariants a run must keep, each with a value, a threshold and a verdict."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qvl.adapters import ParameterReport
from qvl.encode import IGNORED_LABEL
from qvl.errors import FailedCheckError
from qvl.sharding import sharding, whole
from qvl.trained_parts import TrainedPart

_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Check:
    """One invariant.

    Attributes:
        name: what is checked.
        value: what was measured.
        threshold: what it had to be, in words or as a number.
        passed: the verdict.
        detail: the first offenders, or what was looked at.
    """

    name: str
    value: float
    threshold: str
    passed: bool
    detail: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For checks.json."""
        return asdict(self)


def at_least(name: str, value: float, bound: float, unit: str = "", detail: str = "") -> Check:
    """A check that its value reaches a bound; NaN does not."""
    return Check(name, value, f">= {bound:g}{unit}", value >= bound, detail)


def at_most(name: str, value: float, bound: float, unit: str = "", detail: str = "") -> Check:
    """A check that its value stays below a bound; NaN does not."""
    return Check(name, value, f"<= {bound:g}{unit}", value <= bound, detail)


def none_of(name: str, offenders: Sequence[str], num_looked_at: int) -> Check:
    """A check that none of what was looked at offends, and that there was something to look at."""
    return Check(
        name,
        len(offenders),
        f"0 of {num_looked_at}",
        not offenders and num_looked_at > 0,
        ", ".join(offenders[:3]),
    )


def tensor_hash(tensor: torch.Tensor) -> int:
    """A 64-bit hash of a tensor's bytes, computed where the tensor lives.

    Every byte is multiplied by an odd number that depends on its place and all are summed modulo 2^64, so a changed
    or swapped value changes the sum. An 8B model on a GPU takes seconds; copying it to the host would take minutes.

    Args:
        tensor: any dtype and shape, contiguous or not.
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    padding = -flat.numel() % 4
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    words = flat.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK_ELEMENTS):
        chunk = words[start : start + _CHUNK_ELEMENTS].to(torch.int64)
        place = torch.arange(start, start + chunk.numel(), device=tensor.device, dtype=torch.int64)
        # A Weyl-like sequence of odd multipliers; the shift folds high bits down so that sign flips do not cancel.
        multiplier = (place * 0x5DEECE66D + 0x2545F491) | 1
        mixed = (chunk + 1) * multiplier
        total = total + (mixed ^ (mixed >> 29)).sum()
    return int(total.item())


def hash_parameters(model: nn.Module) -> dict[str, int]:
    """`tensor_hash` of every parameter and persistent buffer, by name.

    Where processes share a model out, all of them have to ask, each tensor is put together for it, on the GPU if there
    is one, and the state of quantized weights beside them is left out.
    """
    if sharding().in_pieces:
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        return {name: tensor_hash(whole(tensor).to(device)) for name, tensor in model.named_parameters()}
    return {
        name: tensor_hash(tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if torch.is_tensor(tensor)
    }


def check_placement(report: ParameterReport) -> Check:
    """LoRA sits in the language model only, and nothing else is trained but the parts that were asked for."""
    return Check(
        "lora_only_in_language_model",
        len(report.outside),
        "0 trainable parameters outside it and the parts asked for",
        not report.outside,
        ", ".join(report.outside[:3]) or f"{sum(report.modules.values())} adapted layers",
    )


def check_parts_trained(model: nn.Module, parts: Sequence[TrainedPart]) -> list[Check]:
    """Every parameter of a part that is to be trained whole may move; no verdict where there is none to train.

    Args:
        model: with its adapter.
        parts: from `trained_parts`.
    """
    verdicts = []
    for part in parts:
        copies = {n: p for n, p in model.named_parameters() if part.holds(n) and ".modules_to_save." in n}
        frozen = [name for name, parameter in copies.items() if not parameter.requires_grad]
        verdicts.append(
            Check(
                f"{part.name}_is_trained_whole",
                len(frozen),
                f"0 of {len(copies)} tensors frozen",
                not frozen and bool(copies),
                ", ".join(frozen[:3]),
            )
        )
    return verdicts


def check_frozen(before: dict[str, int], after: dict[str, int], trainable: set[str]) -> Check:
    """No tensor that is not trained has changed, by hash.

    Args:
        before: `hash_parameters` before training.
        after: the same after it.
        trainable: names of the parameters that were trained.
    """
    frozen = [name for name in before if name not in trainable]
    changed = [name for name in frozen if after.get(name) != before[name]]
    return Check(
        "frozen_tensors_unchanged",
        len(changed),
        f"0 of {len(frozen)} changed",
        not changed and bool(frozen),
        ", ".join(changed[:3]),
    )


def check_adapter_moved(before: dict[str, int], after: dict[str, int], trainable: set[str]) -> Check:
    """Every LoRA pair (A, B) has changed: at least one of the two, since B is zero at first and holds A still."""
    pairs: dict[str, bool] = {}
    for name in trainable:
        layer = name.split(".lora_")[0] if ".lora_" in name else name
        pairs[layer] = pairs.get(layer, False) or after.get(name) != before.get(name)
    still = sorted(layer for layer, moved in pairs.items() if not moved)
    return Check(
        "every_adapter_pair_moved",
        len(still),
        f"0 of {len(pairs)} unmoved",
        not still and bool(pairs),
        ", ".join(still[:3]),
    )


def check_same_everywhere(hashes: Sequence[Mapping[str, int]]) -> list[Check]:
    """After training together, all processes hold the same tensors.

    Args:
        hashes: `hash_parameters` of each process.
    """
    differing = sorted({name for other in hashes for name in other if other[name] != hashes[0].get(name)})
    return [
        Check(
            "same_tensors_in_all_processes",
            len(differing),
            f"0 of {len(hashes[0])} differ",
            not differing,
            ", ".join(differing[:3]) or f"{len(hashes)} processes",
        )
    ]


def check_placeholders(
    batch: dict[str, torch.Tensor], image_token_id: int | None, merge_size: int, tokens_per_image: int | None = None
) -> Check:
    """As many image placeholders in `input_ids` as the vision tower will give features.

    Args:
        batch: a collated batch.
        image_token_id: id of the placeholder, None for text-only models.
        merge_size: patches merged along each side into one visual token.
        tokens_per_image: of a model that gives every image as many.
    """
    placeholders = int((batch["input_ids"] == image_token_id).sum()) if image_token_id is not None else 0
    grid = batch.get("image_grid_thw")
    features = int(grid.prod(dim=1).sum()) // merge_size**2 if grid is not None else 0
    if tokens_per_image is not None:
        features = len(batch.get("image_features", ())) or tokens_per_image * len(batch.get("pixel_values", ()))
    return Check(
        "image_placeholders_equal_features",
        placeholders - features,
        "0 difference",
        placeholders == features,
        f"{placeholders} placeholders, {features} features in the first batch",
    )


def check_labels(batches: Iterable[dict[str, torch.Tensor]], forbidden_ids: dict[str, int]) -> list[Check]:
    """Labels are answers only: no image, padding or masked position is a target, and every row has one.

    Args:
        batches: collated batches.
        forbidden_ids: token ids that may never be a label, by what they are.
    """
    wrong = dict.fromkeys(forbidden_ids, 0)
    num_rows = num_without = num_masked = num_differing = 0
    for batch in batches:
        labels, targets = batch["labels"], batch["labels"] != IGNORED_LABEL
        num_rows += len(labels)
        num_without += int((~targets.any(dim=1)).sum())
        num_masked += int((targets & (batch["attention_mask"] == 0)).sum())
        num_differing += int((targets & (labels != batch["input_ids"])).sum())
        for kind, token_id in forbidden_ids.items():
            wrong[kind] += int((labels == token_id).sum())
    checks = [
        Check(f"no_{kind}_token_is_a_label", count, "0 labels", count == 0, f"{num_rows} rows looked at")
        for kind, count in wrong.items()
    ]
    return [
        *checks,
        Check("every_row_has_a_target", num_without, "0 rows without", num_without == 0 and num_rows > 0),
        Check(
            "labels_are_input_tokens",
            num_differing + num_masked,
            "0 differ or are padding",
            num_differing + num_masked == 0,
        ),
    ]


def require_passed(verdicts: Iterable[Check]) -> None:
    """Stops a run that has broken an invariant.

    Raises:
        FailedCheckError: names the checks that did not pass.
    """
    broken = failed(verdicts)
    if broken:
        raise FailedCheckError("\n".join(["These checks failed, so the result cannot be trusted:", *table(broken)]))


def failed(checks: Iterable[Check]) -> list[Check]:
    """Those that did not pass."""
    return [check for check in checks if not check.passed]


def table(checks: Iterable[Check]) -> list[str]:
    """One line a check."""
    return [_line(check) for check in checks]


def _line(check: Check) -> str:
    verdict = "ok  " if check.passed else "FAIL"
    return f"  {verdict} {check.name}: {check.value:g} ({check.threshold}) {check.detail}".rstrip()
