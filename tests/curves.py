"""The loss curve of a short training, without the stages and records around it."""

from pathlib import Path

import torch

from qvl.adapters import add_adapter
from qvl.bench_cases import Case, open_run, prepare
from qvl.recipe import Recipe
from qvl.train_stage import trainer_arguments
from qvl.trainer import build_trainer
from qvl.training_form import ready_for_compiling, training_form
from qvl.training_rows import packed_if_wanted, prepare_training_rows

KEYS = ("loss", "grad_norm", "num_tokens")


def training_curve(recipe: Recipe, folder: Path, *flags: str) -> dict[str, list[float]]:
    """What is logged at each step of a smoke run without dropout, by `KEYS`; and the compilations."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    prepared = prepare(Case("curve"), recipe, ["--smoke", "--lora_dropout", "0", *flags], 1, folder, False)
    trial = open_run(prepared, prepared.settings)
    trial.settings.training.logging_strategy = "steps"
    trial.settings.training.logging_steps = 1
    rows, collator = prepare_training_rows(trial)
    base = trial.load_base()
    with training_form(trial, base, collator):
        model = add_adapter(base, trial.settings)
        ready_for_compiling(trial, model)
        packed = packed_if_wanted(trial, rows, collator)
        trainer = build_trainer(model, trial.processing_class, packed, None, trainer_arguments(trial), collator)
        trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    compilations = [float(row.get("num_compilations", 0)) for row in logs]
    return {**{key: [float(row[key]) for row in logs] for key in KEYS}, "num_compilations": compilations}
