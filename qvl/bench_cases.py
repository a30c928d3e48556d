"""What is compared: plain TRL, its best batch size, and qvl, each with flags of its own."""

import copy
import dataclasses
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin
from trl import SFTConfig, SFTTrainer

from qvl import adapters
from qvl.active_run import Run, load_data
from qvl.data import LoadedData, separate_completions
from qvl.encode import ProcessingClass
from qvl.errors import Terminated, UserError
from qvl.examples import undecoded_examples
from qvl.models import load_processing_class
from qvl.random_weights import build_with_random_weights
from qvl.recipe import Recipe
from qvl.settings import Settings, parse_settings
from qvl.survey import fit_rows, training_lengths
from qvl.tracking import RunRecord
from qvl.train_stage import trainer_arguments
from qvl.trained_parts import trained_parts
from qvl.trainer import build_trainer, train
from qvl.training_form import lower_base_precision, ready_for_compiling, training_form
from qvl.training_rows import packed_if_wanted, prepare_training_rows

TRL_DEFAULTS, TRL_BEST, QVL = "TRL, its defaults", "TRL, its best batch", "qvl"
DEFAULT_CASES = (TRL_DEFAULTS, TRL_BEST, QVL)
# What decides TRL's speed, and is TRL's own default there unless a case says otherwise.
_TRL_SPEED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "train_sampling_strategy",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the comparison.

    Attributes:
        name: as the table shows it; one that begins with "TRL" is run by TRL's own trainer and collator.
        flags: of a recipe's command line, above those that all cases share.
        searches_batch_size: find the batch size first that is fastest.
    """

    name: str
    flags: tuple[str, ...] = ()
    searches_batch_size: bool = False

    @property
    def is_trl(self) -> bool:
        """Whether plain TRL runs it."""
        return self.name.startswith("TRL")

    def with_batch_size(self, batch_size: int) -> "Case":
        """The same with another batch size."""
        flags = (*self.flags, "--per_device_train_batch_size", str(batch_size))
        return dataclasses.replace(self, flags=flags, searches_batch_size=False)


def read_case(text: str) -> Case:
    """Reads `NAME: --flag value ...`, or the name of one of the default cases.

    Raises:
        UserError: neither.
    """
    name, colon, flags = text.partition(":")
    name = name.strip()
    if not colon and name not in DEFAULT_CASES:
        raise UserError(f'--case "{text}" is no `NAME: --flag value ...`, and none of: {"; ".join(DEFAULT_CASES)}.')
    if not name:
        raise UserError(f'--case "{text}" has no name in front of the colon.')
    return Case(name, tuple(shlex.split(flags)), searches_batch_size=name == TRL_BEST)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case whose settings are resolved and whose rows are opened.

    Attributes:
        case: the case.
        settings: of its run.
        processing_class: its processor, or tokenizer.
        data: its rows, before they are repeated.
        folder: a folder of its own for what a trainer may write.
        has_random_weights: whether the base model is made instead of loaded.
    """

    case: Case
    settings: Settings
    processing_class: ProcessingClass
    data: LoadedData
    folder: Path
    has_random_weights: bool

    @property
    def num_rows_per_step(self) -> int:
        """Rows that an optimizer step takes."""
        training = self.settings.training
        return int(training.per_device_train_batch_size * training.gradient_accumulation_steps)


def prepare(
    case: Case, recipe: Recipe, argv: Sequence[str], trl_batch_size: int, folder: Path, has_random_weights: bool
) -> Prepared:
    """Resolves the settings of a case and opens its rows.

    Args:
        case: the case.
        recipe: whose defaults count.
        argv: flags that all cases share.
        trl_batch_size: of a TRL case that names none.
        folder: for what a trainer may write.
        has_random_weights: make the base model instead of loading it.

    Raises:
        UserError: bad flags or rows.
    """
    overrides: dict[str, Any] = {
        "output_dir": str(folder),
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if case.is_trl:
        own = {item.name: item.default for item in dataclasses.fields(SFTConfig) if item.name in _TRL_SPEED}
        own["per_device_train_batch_size"] = trl_batch_size
        mentioned = {match[1] for flag in case.flags if (match := re.match(r"--(\w+)", flag))}
        overrides |= {name: value for name, value in own.items() if name not in mentioned}
    try:
        settings = parse_settings(
            recipe.defaults, recipe.smoke, [*argv, *case.flags], overrides, "python -m qvl.bench RECIPE"
        )
    except UserError as error:
        raise UserError(f"{case.name}: {error}") from error
    processing_class = load_processing_class(settings)
    data = load_data(settings, recipe.row_to_example, processing_class)
    return Prepared(case, settings, processing_class, data, folder, has_random_weights)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A trainer that is ready, and how it is run.

    Attributes:
        trainer: an `SFTTrainer`.
        train: runs it to its last step.
    """

    trainer: Any
    train: Callable[[], Any]


@contextmanager
def contestant(prepared: Prepared, num_steps: int) -> Iterator[Contestant]:
    """Loads the base model and makes the trainer of a case for a number of optimizer steps, rows repeated to suffice.

    Raises:
        UserError: what the settings ask for cannot be done here.
    """
    settings = copy.copy(prepared.settings)
    settings.training = copy.copy(settings.training)
    settings.training.max_steps = num_steps
    num_rows = num_steps * prepared.num_rows_per_step
    run = open_run(prepared, settings)
    if prepared.case.is_trl:
        yield _plain_trl(run, num_rows)
    else:
        with _qvl(run, num_rows) as made:
            yield made


def open_run(prepared: Prepared, settings: Settings) -> Run:
    """A run that is recorded nowhere, with its base where that is made instead of loaded."""
    run = Run("bench", settings, prepared.folder, prepared.data, prepared.processing_class, _NoRecord())
    if prepared.has_random_weights:
        run.base = build_with_random_weights(settings, run.device)
    return run


class _NoRecord(RunRecord):
    """In place of the MLflow run: a measurement is none."""

    def __init__(self) -> None:
        """Opens nothing."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Drops the numbers."""


@contextmanager
def _qvl(run: Run, num_rows: int) -> Iterator[Contestant]:
    """What the stage `train` runs, without `--phase`: all that is trained is so from the first step, as TRL does it."""
    rows, collator = prepare_training_rows(run)
    base = run.load_base()
    parts = trained_parts(base, run.settings)
    with training_form(run, base, collator):
        model = adapters.add_adapter(base, run.settings)
        lower_base_precision(run, model)
        ready_for_compiling(run, model)
        repeated = _repeated(packed_if_wanted(run, rows, collator), num_rows)
        trainer = build_trainer(
            model, run.processing_class, repeated, None, trainer_arguments(run), collator, parts=parts
        )

        def run_it() -> None:
            if train(trainer, lambda logs, step: None, None).terminated:
                raise Terminated

        yield Contestant(trainer, run_it)


def _plain_trl(run: Run, num_rows: int) -> Contestant:
    """TRL as its documentation has it: a row per answer, TRL's collator, TRL's arguments, PEFT through TRL.

    It trains the same parts as qvl, those beside LoRA as PEFT's `modules_to_save`, all at its one learning rate.
    """
    recipe, max_length = run.settings.recipe, run.settings.training.max_length
    rows = separate_completions(run.data.train)
    rows = fit_rows(rows, training_lengths(rows, run.processing_class), max_length, recipe.overlong)
    first = next(undecoded_examples(rows))
    arguments = copy.copy(run.settings.training)
    arguments.output_dir = str(run.folder / "trl")
    # Already applied: the model is loaded and the template is set.
    arguments.model_init_kwargs = arguments.chat_template_path = None
    arguments.padding_free = False  # TRL refuses it for images
    arguments.packing = False  # its default, whatever a recipe's is
    # Only answers are trained on, as qvl does it.
    arguments.assistant_only_loss = "messages" in first
    arguments.completion_only_loss = None
    if not isinstance(run.processing_class, ProcessorMixin):
        rows = _text_rows(rows)
    base = run.load_base()
    base.set_attn_implementation("sdpa")  # as TRL would load it, the vision tower too
    trainer = SFTTrainer(
        model=base,
        args=arguments,
        train_dataset=_repeated(rows, num_rows),
        processing_class=run.processing_class,
        peft_config=adapters.lora_config(base, run.settings, trained_parts(base, run.settings)),
    )
    return Contestant(trainer, trainer.train)


def _text_rows(rows: Dataset) -> Dataset:
    """Rows without a column of images, which TRL would take for a vision data set, and with texts as plain strings.

    Templates of text-only models drop typed parts without a word.
    """
    result = []
    for row in undecoded_examples(rows):
        plain = {key: _plain_messages(row[key]) for key in ("messages", "prompt", "completion") if key in row}
        result.append(plain | ({"tools": row["tools"]} if "tools" in row else {}))
    return Dataset.from_list(result)


def _plain_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": "".join(part["text"] for part in message["content"])}
        for message in messages
    ]


def _repeated(rows: Dataset, num_rows: int) -> Dataset:
    """The rows again and again until there are enough for one epoch: its end would stop the data loader's workers."""
    if len(rows) >= num_rows:
        return rows
    return rows.select([index % len(rows) for index in range(num_rows)])
