"""How the answers change while training: a fixed few evaluation prompts, answered and scored at each evaluation."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from qvl.active_run import Run
from qvl.answers import answer_prompts
from qvl.files import write_jsonl_atomically
from qvl.metrics import score
from qvl.picture_grid import Card, picture_grid
from qvl.processes import is_main
from qvl.run_folder import SAMPLES_FILE, SAMPLES_FOLDER, rows_before_checkpoint

_NUM_PICTURES = 8


class EvalGenerations:
    """Answers `--eval_generations` prompts, the same ones each time, with the model as the trainer has it.

    The answers are those that the stage evaluate would give to the same prompts: what the trainer puts around the
    model is taken off meanwhile.

    Attributes:
        seconds: spent so far.
    """

    def __init__(self, run: Run, model: PeftModel, resume_from: Path | None) -> None:
        """Chooses the prompts.

        Args:
            run: of the training.
            model: before the trainer has seen it.
            resume_from: checkpoint that the training goes on from; what was answered behind it is dropped.
        """
        self.run = run
        self.model = model
        self.seconds = 0.0
        self._forward = model.get_base_model().__dict__.get("forward")
        examples = run.data.evaluation
        number = min(run.settings.recipe.eval_generations, len(examples))
        chosen = random.Random(run.settings.training.seed).sample(range(len(examples)), number)
        self.examples = examples.select(sorted(chosen))
        self._path = run.folder / SAMPLES_FILE
        self._rows = rows_before_checkpoint(self._path, resume_from)

    def __call__(self, step: int) -> dict[str, float]:
        """Answers, records and scores.

        Args:
            step: of the training.

        Returns:
            The scores of --scores on these prompts (CIDEr with their own document frequencies), and
            `generation_seconds`.
        """
        start = time.perf_counter()
        with _as_in_evaluation(self.model, self._forward):
            rows = answer_prompts(self.run, self.model, self.examples, label=f"step {step}")
        self._rows = [row for row in self._rows if row["step"] < step] + [{"step": step, **row} for row in rows]
        if is_main():
            write_jsonl_atomically(self._path, self._rows)
        scores = score(
            {row["id"]: row["prediction"] for row in rows},
            {row["id"]: row["references"] for row in rows},
            self.run.settings.recipe.scores,
            self.run.own_scores,
        )
        if is_main():
            self._show(rows, step, ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        seconds = time.perf_counter() - start
        self.seconds += seconds
        return {**scores, "generation_seconds": seconds}

    def _show(self, rows: list[dict[str, Any]], step: int, scores: str) -> None:
        """Puts the first answers with their pictures into samples/ and into MLflow, where a slider shows the steps."""
        cards = []
        for index, row in enumerate(rows[:_NUM_PICTURES]):
            images = self.examples[index]["images"]
            reference = row["references"][0] if row["references"] else ""
            cards.append(Card(images[0] if images else None, row["prompt"], reference, row["prediction"]))
        grid = picture_grid(cards, f"step {step}   {scores}")
        folder = self.run.folder / SAMPLES_FOLDER
        folder.mkdir(exist_ok=True)
        in_writing = folder / ".step.png"
        grid.save(in_writing)
        in_writing.replace(folder / f"step-{step:06d}.png")
        self.run.record.log_picture(grid, "samples", step)


@contextmanager
def _as_in_evaluation(model: PeftModel, forward: Any) -> Iterator[None]:
    """Takes the trainer's forward (its fused head, its autocast) off the base model for a while.

    Its attention stays: without segments `qvl.segment_attention` is what SDPA does.
    """
    base = model.get_base_model()
    trainers, had_cache = base.__dict__.pop("forward", None), base.config.use_cache
    if forward is not None:
        base.forward = forward
    base.config.use_cache = True
    try:
        yield
    finally:
        base.__dict__.pop("forward", None)
        if trainers is not None:
            base.forward = trainers
        base.config.use_cache = had_cache
