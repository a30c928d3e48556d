"""How often a training step asks the device for a number: each time the host waits for all that the device does."""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import TrainerCallback

from qvl.adapters import add_adapter
from qvl.bench_cases import Case, open_run, prepare
from qvl.train_stage import trainer_arguments
from qvl.trainer import build_trainer
from qvl.trainer_callbacks import DivergenceWatchdog
from qvl.training_form import training_form
from qvl.training_rows import packed_if_wanted, prepare_training_rows
from recipes.qwen_chat import RECIPE

_ASKING = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}
_WATCHED_STEP = 3


class Questions(TorchFunctionMode):
    """Counts what reads numbers out of tensors, by the file that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # A mask as an index has to be counted before the result has a shape.
        is_mask = name == "__getitem__" and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool
        if name in _ASKING or is_mask:
            files = [frame.filename for frame in traceback.extract_stack()[:-1]]
            asking = next(file for file in reversed(files) if "/torch/" not in file)
            self.found[asking.rpartition("site-packages/")[2]] += 1
        return func(*args, **(kwargs or {}))


class DuringOneStep(TrainerCallback):
    """From the beginning of one step to that of the next: the batch's arrival belongs to it."""

    def __init__(self) -> None:
        self.questions = Questions()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == _WATCHED_STEP:
            self.questions.__enter__()
        elif state.global_step == _WATCHED_STEP + 1:
            self.questions.__exit__(None, None, None)


def test_a_step_without_a_log_asks_nothing_but_what_upstream_counts(tmp_path: Path) -> None:
    flags = ["--smoke", "--num_train_examples", "40", "--max_length", "128", "--max_steps", "6"]
    prepared = prepare(Case("waits"), RECIPE, flags, 1, tmp_path, False)
    trial = open_run(prepared, prepared.settings)
    rows, collator = prepare_training_rows(trial)
    base, watch = trial.load_base(), DuringOneStep()
    with training_form(trial, base, collator):
        model = add_adapter(base, trial.settings)
        packed = packed_if_wanted(trial, rows, collator)
        trainer = build_trainer(model, trial.processing_class, packed, None, trainer_arguments(trial), collator)
        trainer.add_callback(DivergenceWatchdog(trainer.model, lambda: None))
        trainer.add_callback(watch)
        trainer.train()
    ours = {
        file: count for file, count in watch.questions.found.items() if "site-packages" not in file and "/qvl/" in file
    }
    # The watchdog reads what a copy has brought to the host while the step ran.
    assert {Path(file).name: count for file, count in ours.items()} == {"trainer_callbacks.py": 1}
    # Entropy, accuracy (each a number and whether there are tokens at all) and the count of tokens.
    assert watch.questions.found["trl/trainer/sft_trainer.py"] == 5
    assert sum(watch.questions.found.values()) == 6, watch.questions.found
