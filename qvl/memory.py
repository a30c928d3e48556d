"""The memory plan: what a run will hold at most, whether a card has room for it, and what would make it less.

Predicted is what PyTorch allocates (`torch.cuda.max_memory_allocated`); `tests/test_memory.py` holds the formulas to
measured runs. Beside it a card needs room for the CUDA context and for what the allocator holds back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from qvl.data import LoadedData
from qvl.encode import ProcessingClass
from qvl.errors import UserError
from qvl.generate import evenly_filled, prompts_at_a_time
from qvl.memory_needs import Needs, answering_parts, held_out_parts, training_parts
from qvl.memory_remedies import Remedy, largest_batch_size, remedies
from qvl.memory_settings import find_needs, longest_rows, rows_as_long_as_allowed
from qvl.settings import Settings
from qvl.sharding import sharding

GIB = 2**30
# One H100, torch 2.11: the driver showed 1.1 to 1.2 GiB more than PyTorch had allocated at most (20.2 against 19.0,
# 10.9 against 9.8): the context, and blocks that the allocator keeps and cannot use.
_CONTEXT_BYTES = int(0.6 * GIB)
_LEAST_HELD_BACK_BYTES = int(0.5 * GIB)
# Of what is allocated anew at every step, what the allocator loses between blocks.
_SHARE_HELD_BACK = 0.03
_EVALUATIONS = ("baseline", "evaluate")
_MODES = {
    "kept": "layers keep all that their backward needs",
    "checkpointed": "layers keep their input and compute the rest again",
    "compiled": "compiled layers keep what matrix products gave",
    "compiled checkpointed": "compiled layers keep their input and compute the rest again",
}
_LEAST_SHOWN_BYTES = 2**20


@dataclass(frozen=True)
class Card:
    """Where a run is to find room.

    Attributes:
        name: for the reader.
        free_bytes: what this process may use, its CUDA context not counted.
    """

    name: str
    free_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will need.

    Attributes:
        needs: what decides it.
        stages: of the run.
        card: where it is to fit; None where there is no card to ask about.
        may_stop: whether a plan that does not fit stops the run.
        trained_in_pieces: whether the training shares the base out, and so holds less than a plan for all of it says.
    """

    needs: Needs
    stages: Sequence[str]
    card: Card | None
    may_stop: bool
    trained_in_pieces: bool = False

    def training_gib(self) -> float:
        """The predicted peak of the training in GiB, to be compared with what PyTorch will have allocated."""
        return _training_bytes(self.needs, min(self._num_prompts_at_a_time(), self.needs.num_eval_generations)) / GIB

    def evaluation_gib(self, has_adapter: bool) -> float:
        """The predicted peak of an evaluation in GiB, answers and held-out loss."""
        answering = answering_parts(self.needs, self._num_prompts_at_a_time(), has_adapter)
        return max(sum(answering.values()), sum(held_out_parts(self.needs, has_adapter).values())) / GIB

    def peaks_gib(self) -> dict[str, float]:
        """Predicted peaks in GiB by part of a run; a training in pieces is not among them."""
        evaluations = {"baseline": self.evaluation_gib(False), "finetuned": self.evaluation_gib(True)}
        return evaluations if self.trained_in_pieces else {**evaluations, "train": self.training_gib()}

    def fits(self) -> bool:
        """Whether the card has room; a run without a card always fits."""
        return self.card is None or self.needed_bytes() <= self.card.free_bytes

    def needed_bytes(self) -> int:
        """The most that the run needs on a card: the peak of its stages, and what the allocator holds back."""
        return _on_card(self.needs, self.stages)

    def remedies(self) -> list[Remedy]:
        """What would make it less, the greatest saving first."""
        return remedies(self.needs, lambda needs: _on_card(needs, self.stages))

    def lines(self) -> list[str]:
        """The plan as text lines."""
        needs = self.needs
        weights = ", ".join(
            f"{part.name} {_gib(part.num_bytes)} in {part.kept_as}" for part in needs.weights[needs.packing]
        )
        where = f" for {self.card.name}, {_gib(self.card.free_bytes)} GiB free" if self.card is not None else ""
        lines = [f"memory plan in GiB{where}", f"  weights: {weights}"]
        if "train" in self.stages:
            rows = needs.rows
            visual = f", {rows.train_visual} of them visual" if rows.train_visual else ""
            lines += [
                f"  training: {_sum(training_parts(needs))}",
                f"    {needs.batch_size} rows of up to {rows.train} tokens{visual}; {_MODES[needs.mode]}",
            ]
            if self.trained_in_pieces:
                lines.append(
                    "    that is for the whole base: with a piece of it a GPU holds less, by how much is not known"
                )
        evaluates = bool(set(_EVALUATIONS) & set(self.stages))
        while_training = "train" in self.stages and needs.evaluates_while_training
        if evaluates or (while_training and needs.num_eval_generations):
            at_a_time = self._num_prompts_at_a_time()
            at_a_time = at_a_time if evaluates else min(at_a_time, needs.num_eval_generations)
            lines.append(f"  answering, {at_a_time} prompts at a time: {_sum(answering_parts(needs, at_a_time))}")
        if evaluates or while_training:
            lines.append(f"  held-out loss, {needs.eval_batch_size} answers at a time: {_sum(held_out_parts(needs))}")
        if while_training:
            optimizer = needs.trained.optimizer_bytes(needs.optim)
            lines.append(f"  while training, {_gib(optimizer)} of the optimizer come on top")
        return [*lines, *self._verdict()]

    def _verdict(self) -> Iterator[str]:
        if self.card is None:
            yield "  no GPU here: --gpu_memory_gib 24 tells whether a card of that size has room"
            return
        needed = self.needed_bytes()
        room = f"{_gib(needed)} of {_gib(self.card.free_bytes)} GiB, what the allocator holds back counted in"
        if self.fits():
            yield f"  it fits: {room}"
            if "train" in self.stages:
                yield f"  the largest --per_device_train_batch_size that fits is {self._largest_batch_size()}"
            return
        yield f"  it does not fit: {room}"
        for remedy in self.remedies():
            enough = ", and fits" if remedy.peak_bytes <= self.card.free_bytes else ""
            yield f"  {remedy.flags}: {_gib(remedy.saved_bytes)} less{enough}"

    def _largest_batch_size(self) -> int:
        card = self.card
        assert card is not None
        return largest_batch_size(self.needs, lambda needs: _on_card(needs, self.stages) <= card.free_bytes)

    def _num_prompts_at_a_time(self) -> int:
        """As `qvl.generate` chooses it where no flag does: on a GPU by what is free beside the model."""
        needs = self.needs
        num_prompts = max(1, needs.rows.num_prompts)
        if needs.generation_batch_size is not None:
            return min(needs.generation_batch_size, num_prompts)
        if self.card is None:
            return min(needs.eval_batch_size, num_prompts)
        free = self.card.free_bytes - needs.weight_bytes - needs.trained.weight_bytes
        return evenly_filled(num_prompts, prompts_at_a_time(free, needs.bytes_per_prompt))


def plan_memory(
    settings: Settings, config: PretrainedConfig, data: LoadedData | None, processing_class: ProcessingClass
) -> MemoryPlan | None:
    """Predicts what a run will hold.

    Args:
        settings: of the run.
        config: of its model.
        data: its rows; None where they cannot be looked at: then text as long as `--max_length`.
        processing_class: its processor or tokenizer.

    Returns:
        None for a model whose layers the formulas do not know.

    Raises:
        UserError: rows that cannot be trained on.
    """
    card = find_card(settings)
    rows = (
        longest_rows(settings, config, data, processing_class, for_gpu=card is not None)
        if data is not None and len(data.train)
        else rows_as_long_as_allowed(settings)
    )
    needs = find_needs(settings, config, rows, for_gpu=card is not None)
    if needs is None:
        return None
    in_pieces = sharding().in_pieces
    may_stop = not settings.recipe.ignore_memory_plan and not in_pieces
    return MemoryPlan(needs, tuple(settings.recipe.stages), card, may_stop, in_pieces)


def find_card(settings: Settings) -> Card | None:
    """The card that `--gpu_memory_gib` describes, else the GPU of this process; None without either."""
    asked = settings.recipe.gpu_memory_gib
    if asked is not None:
        return Card(f"a card with {asked:g} GiB", int(asked * GIB) - _CONTEXT_BYTES)
    device = settings.training.device
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What this process holds already is what the allocator keeps, and a base that the run goes on with.
    return Card(torch.cuda.get_device_name(device), free + torch.cuda.memory_reserved(device))


def memory_for_run(
    settings: Settings, config: PretrainedConfig, data: LoadedData, processing_class: ProcessingClass
) -> MemoryPlan | None:
    """Plans, shows the plan, and stops a run that does not fit before anything is loaded.

    Args:
        settings: of the run.
        config: of its model.
        data: its rows.
        processing_class: its processor or tokenizer.

    Returns:
        None for a run that loads no model, or one whose layers the formulas do not know.

    Raises:
        UserError: it does not fit, and `--ignore_memory_plan` is not given.
    """
    if set(settings.recipe.stages) == {"report"}:
        return None
    plan = plan_memory(settings, config, data, processing_class)
    if plan is None:
        print("No memory plan: the layers of this model are none that the formulas know.", flush=True)
        return None
    if plan.may_stop and not plan.fits():
        advice = "Change the flags, or pass --ignore_memory_plan to try it all the same."
        raise UserError("\n".join([*plan.lines(), advice]))
    print("\n".join(plan.lines()), flush=True)
    return plan


def _on_card(needs: Needs, stages: Sequence[str]) -> int:
    """The most that a run needs on a card, in bytes: the peak of its stages, and what the allocator holds back.

    Prompts count one at a time: a batch of them that does not fit is halved by itself.
    """
    peaks = [needs.weight_bytes]
    if "train" in stages:
        peaks.append(_training_bytes(needs, min(1, needs.num_eval_generations)))
    if set(_EVALUATIONS) & set(stages):
        has_adapter = "evaluate" in stages
        peaks += [
            sum(answering_parts(needs, 1, has_adapter).values()),
            sum(held_out_parts(needs, has_adapter).values()),
        ]
    peak = max(peaks)
    return peak + max(_LEAST_HELD_BACK_BYTES, int(_SHARE_HELD_BACK * (peak - needs.weight_bytes)))


def _training_bytes(needs: Needs, num_prompts: int) -> int:
    """The peak of a training: of its steps, or of the evaluations between them, beside the optimizer's states.

    Args:
        needs: of the run.
        num_prompts: answered at a time in those evaluations; 0 for none.
    """
    peaks = [sum(training_parts(needs).values())]
    beside = needs.trained.optimizer_bytes(needs.optim)
    if needs.evaluates_while_training:
        peaks.append(sum(held_out_parts(needs).values()) + beside)
        if num_prompts:
            peaks.append(sum(answering_parts(needs, num_prompts).values()) + beside)
    return max(peaks)


def _sum(parts: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size >= _LEAST_SHOWN_BYTES)
    return f"{_gib(sum(parts.values()))}: {shown}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}" if num_bytes < GIB else f"{num_bytes / GIB:.1f}"
