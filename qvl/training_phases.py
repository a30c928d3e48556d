"""The phases of a training with a projector: `align` moves the projector alone, `instruct` the LoRA layers too.

Both are one training with one schedule and one chain of checkpoints, in which LoRA is switched on at a step: resuming,
stopping early and choosing the best checkpoint go as in any other training. Before, fresh LoRA layers compute nothing
and have no gradients; those of `--adapter` compute, as the projector will be used with them, and stay as they are.
"""

from collections.abc import Sequence

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qvl.checks import Check, tensor_hash
from qvl.settings import Settings
from qvl.trained_parts import TrainedPart, is_trained_whole


class PhaseSwitch(TrainerCallback):
    """Switches LoRA on where `align` ends, and sees what moved in which phase.

    Args:
        model: adapter on its base.
        parts: what is trained whole beside it.
        phases: of `--phase`, in their order.
        align_share: share of the optimizer steps that `align` takes where both run.
        has_learned_lora: whether the adapter was trained before: `align` then freezes LoRA and leaves it on.
    """

    def __init__(
        self,
        model: PeftModel,
        parts: Sequence[TrainedPart],
        phases: Sequence[str],
        align_share: float,
        has_learned_lora: bool = False,
    ) -> None:
        self.model = model
        self.parts = parts
        self.phases = tuple(phases)
        self.align_share = align_share
        self.has_learned_lora = has_learned_lora
        self._starts: dict[str, dict[str, int]] = {}
        self._ends: dict[str, dict[str, int]] = {}
        self._phase = self.phases[0]
        if self.phases == ("align",):
            # Before an optimizer is made: LoRA has no place in it.
            self._hold_lora()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Takes up the phase that the step belongs to, also in the midst of a training that is resumed."""
        starts = (0, self.first_instruct_step(state.max_steps))
        self._enter(self._phase_of(state), at_its_start=state.global_step in starts)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Goes over to the next phase."""
        phase = self._phase_of(state)
        if phase != self._phase:
            self._ends[self._phase] = self._hashes()
            print(f"Step {state.global_step}: the projector is aligned, LoRA is trained from here on.", flush=True)
            self._enter(phase, at_its_start=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Looks at what the last phase has moved."""
        self._ends[self._phase] = self._hashes()

    def first_instruct_step(self, num_steps: int) -> int:
        """How many optimizer steps `align` takes of a training."""
        if len(self.phases) == 1:
            return num_steps if self.phases == ("align",) else 0
        return min(max(1, round(self.align_share * num_steps)), num_steps - 1)

    def verdicts(self) -> list[Check]:
        """What moved in each phase that was seen from its start to its end."""
        return [
            check
            for phase, end in self._ends.items()
            if phase in self._starts
            for check in self._verdicts_of(phase, self._starts[phase], end)
        ]

    def _phase_of(self, state: TrainerState) -> str:
        return "align" if state.global_step < self.first_instruct_step(state.max_steps) else self.phases[-1]

    def _enter(self, phase: str, at_its_start: bool) -> None:
        self._phase = phase
        if phase == "instruct":
            switch_lora(self.model, on=True)
        else:
            self._hold_lora()
            # A batch without an image goes past the projector: its loss would depend on nothing that trains, and have
            # no backward pass.
            base = self.model.get_base_model()
            base.disable_input_require_grads()
            base.enable_input_require_grads()
        if at_its_start:
            self._starts[phase] = self._hashes()

    def _hold_lora(self) -> None:
        switch_lora(self.model, on=self.has_learned_lora)
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(False)

    def _hashes(self) -> dict[str, int]:
        """Of LoRA and of what is trained whole, whether it is being trained now or not."""
        return {
            name: tensor_hash(parameter)
            for name, parameter in self.model.named_parameters()
            if ".lora_" in name or (is_trained_whole(name, self.parts) and ".modules_to_save." in name)
        }

    def _verdicts_of(self, phase: str, start: dict[str, int], end: dict[str, int]) -> list[Check]:
        whole = [name for name in start if is_trained_whole(name, self.parts)]
        lora = [name for name in start if ".lora_" in name]
        still = [name for name in whole if start[name] == end[name]]
        moved = [name for name in lora if start[name] != end[name]]
        verdicts = []
        if whole:
            verdicts.append(
                Check(
                    f"projector_moved_in_{phase}",
                    len(still),
                    f"0 of {len(whole)} tensors still",
                    not still,
                    ", ".join(still[:3]),
                )
            )
        if phase == "align":
            verdicts.append(
                Check(
                    "lora_still_in_align",
                    len(moved),
                    f"0 of {len(lora)} tensors moved",
                    not moved,
                    ", ".join(moved[:3]),
                )
            )
        else:
            verdicts.append(Check("lora_moved_in_instruct", len(moved), f"above 0 of {len(lora)} tensors", bool(moved)))
        return verdicts


def phase_switches(settings: Settings, model: PeftModel, parts: Sequence[TrainedPart]) -> list[PhaseSwitch]:
    """The switch between the run's phases; none where no projector is trained, and so nothing to align."""
    recipe = settings.recipe
    aligns = any(part.name == "projector" for part in parts)
    has_learned_lora = recipe.adapter is not None
    return [PhaseSwitch(model, parts, recipe.phase, recipe.align_share, has_learned_lora)] if aligns else []


def switch_lora(model: PeftModel, on: bool) -> None:
    """Switches all LoRA layers on or off; what is trained whole stays as it is."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(on)
