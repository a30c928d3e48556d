"""From a recipe's defaults, a YAML file and a command line to one set of typed settings, or to an error worth reading.

Precedence: command line > --config file > smoke defaults > recipe defaults > upstream defaults.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import os
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.integrations import INTEGRATION_TO_CALLBACK
from trl import ModelConfig, SFTConfig, TrlParser

from qvl.errors import UserError
from qvl.flags import REFUSED, REFUSED_VALUES, RENAMED, RecipeArguments
from qvl.precision import choose_precision, find_device

_PRECISION_KEYS = ("bf16", "fp16", "dtype", "use_cpu")
# Where a run writes is not part of the experiment: a settings.yaml that named its own folder would overwrite it.
# And an adapter is always trained.
_UNWRITTEN_KEYS = (
    "output_dir",
    "run_name",
    "resume_from_checkpoint",
    "dry_run",
    "local_rank",
    "use_peft",
    "ray_num_gpus",
)
# Upstream fills these in from the machine: a file made on a laptop should not keep a GPU idle.
_DERIVED_KEYS = ("use_cpu", "dataloader_pin_memory", "disable_tqdm", "accelerator_config", "debug", "report_to")
_SECRET_KEYS = ("hub_token",)
_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_length",
)
_JSON_KEYS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "model_init_kwargs")
# argparse would make objects of these from a word, and fail before their refusal can be read.
_OBJECT_KEYS = ("liger_kernel_config", "parallelism_config")
# transformers 5.23 renamed these and warns at the old name, which is SFTConfig's own default; older versions know
# the old name only, so settings keep it.
_NEW_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Defaults of a recipe that would contradict what the user asks for, with the flag and the value that switch them off.
_YIELDING_DEFAULTS: dict[str, tuple[str, Any]] = {
    "load_in_4bit": ("load_in_8bit", True),
    "load_in_8bit": ("load_in_4bit", True),
    "cache_vision_features": ("vision_mode", "text"),
}


@dataclasses.dataclass
class Settings:
    """Everything a run is determined by.

    Attributes:
        recipe: qvl's own flags.
        training: upstream's trainer arguments; `output_dir` is what the user gave or None.
        model: upstream's model, quantization and LoRA arguments.
        given: flags that the recipe, a file or the command line set, by name: the ones that define the experiment.
        output_dir: run folder the user asked for, None to make one.
        by_user: names of the flags that the user typed, or that --config has with another value than the recipe: a
            settings.yaml fed back repeats the others.
    """

    recipe: RecipeArguments
    training: SFTConfig
    model: ModelConfig
    given: dict[str, Any]
    output_dir: str | None
    by_user: frozenset[str] = frozenset()

    def as_dict(self) -> dict[str, Any]:
        """Every setting by flag name, JSON-able, fit to be fed back through --config; secrets and places left out."""
        values: dict[str, Any] = {}
        for part in (self.recipe, self.model, self.training):
            for item in dataclasses.fields(part):
                skipped = item.name in (*REFUSED, *_UNWRITTEN_KEYS, *_SECRET_KEYS, *_NEW_NAMES.values())
                skipped |= item.name in _DERIVED_KEYS and item.name not in self.given
                # None too: `max_length: null` says something else than no line, for which the recipe has a default.
                if item.init and not skipped:
                    values[item.name] = _plain(getattr(part, item.name))
        return values

    def to_yaml(self, for_any_machine: bool = False) -> str:
        """`as_dict` as YAML, the flags that define the experiment first.

        Args:
            for_any_machine: leave out the precision that was chosen for this one.
        """
        chosen_here = [key for key in _PRECISION_KEYS if for_any_machine and key not in self.given]
        values = {key: value for key, value in self.as_dict().items() if key not in chosen_here}
        defining = {key: values[key] for key in values if key in self.given}
        rest = {key: value for key, value in values.items() if key not in defining}
        sections = {
            "# What defines this run. Feed the file back with --config, or edit it first.\n": defining,
            "# Defaults of trl, transformers and qvl that it ran with.\n": dict(sorted(rest.items())),
        }
        return "\n".join(
            title + yaml.safe_dump(section, sort_keys=False, allow_unicode=True)
            for title, section in sections.items()
            if section
        )


class _Parser(TrlParser):
    """TrlParser that raises UserError in place of printing 200 lines of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message[0].upper() + message[1:] + f". `{self.prog} --help` lists every flag.")


def parse_settings(
    defaults: Mapping[str, Any],
    smoke_defaults: Mapping[str, Any],
    argv: Sequence[str],
    overrides: Mapping[str, Any] | None = None,
    prog: str | None = None,
    continued: Mapping[str, Any] | None = None,
) -> Settings:
    """Resolves the settings of one run.

    Args:
        defaults: the recipe's defaults by flag name.
        smoke_defaults: what --smoke puts over them.
        argv: command line without the program's name.
        overrides: flags by name that go above everything (what a sweep passes).
        prog: name for messages, the recipe's file.
        continued: settings.yaml of the run that is gone on with; counts like a --config file below the one given.

    Raises:
        UserError: a key or flag that does not exist, is refused, has a value of the wrong type, or contradicts another.
    """
    parser = _make_parser(prog)
    # The first of a name: upstream's `--no_flag` has the same one as `--flag`, and no type.
    actions = {action.dest: action for action in reversed(parser._actions)}
    arguments, config = _take_config(list(argv))
    arguments += _as_arguments(overrides or {}, actions)
    _refuse_unknown(arguments, parser)
    typed = _typed_flags(arguments, prog)
    upstream = {dest: _plain(parser.get_default(dest)) for dest in actions}

    in_file = set(config)
    config = _checked({**(continued or {}), **config}, actions, "--config key")
    smoke = smoke_defaults if typed.get("smoke", config.get("smoke")) else {}
    own = {**_checked(defaults, actions, "recipe default"), **_checked(smoke, actions, "smoke default")}
    own = _without_contradictions(own, {**config, **typed})
    for values in (own, config):
        parser.set_defaults_with_config(**values)
    namespace = vars(parser.parse_args(arguments))
    mentioned = {key: namespace[key] for key in {**own, **config, **typed}}
    changed = {key: value for key, value in mentioned.items() if _plain(value) != upstream[key]}
    _refuse(changed, mentioned)
    if namespace["load_in_4bit"] and namespace["load_in_8bit"]:
        raise UserError(
            "--load_in_4bit or --load_in_8bit, not both: switch the other one off, such as `--load_in_4bit false`."
        )
    # A settings.yaml fed back mentions everything; of a file, what differs from upstream's default defines the run.
    given = {key: value for key, value in mentioned.items() if key in {**own, **typed, **changed}}
    by_user = {key for key in in_file if _plain(config[key]) != _plain(own.get(key, upstream[key]))} | typed.keys()

    precision_given = {key: mentioned[key] for key in _PRECISION_KEYS if key in mentioned}
    precision = choose_precision(find_device(bool(precision_given.get("use_cpu"))), precision_given)
    renamed = {new: namespace[old] for old, new in _NEW_NAMES.items() if namespace.get(new, ...) is None}
    # Not for the user to choose: the trainer gets an adapter, and a data set with lazy columns.
    parser.set_defaults(**precision, **renamed, remove_unused_columns=False, use_peft=True)
    output_dir = namespace["output_dir"]
    try:
        recipe, model, training = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except UserError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(f"These settings do not go together: {error}") from error
    _require_sane_values(model, training)
    return Settings(recipe, training, model, given, output_dir, frozenset(by_user))


def _without_contradictions(defaults: Mapping[str, Any], asked_for: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's defaults, those switched off that what the user asks for contradicts."""
    off = {key: False for key, (flag, value) in _YIELDING_DEFAULTS.items() if asked_for.get(flag) == value}
    return {key: off.get(key, value) for key, value in defaults.items()}


def _require_sane_values(model: ModelConfig, training: SFTConfig) -> None:
    """Stops at values that upstream would find out after the model is loaded."""
    for part, name in [(model, "lora_r"), *((training, name) for name in _AT_LEAST_ONE)]:
        value = getattr(part, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it has to be at least 1.")
    if not 0 <= model.lora_dropout < 1:
        raise UserError(f"--lora_dropout {model.lora_dropout}: it has to be at least 0 and below 1.")
    for tracker in training.report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"--report_to {tracker} is none of {', '.join(sorted(INTEGRATION_TO_CALLBACK))} or none.")
    for name in _JSON_KEYS:
        if isinstance(getattr(training, name), str):
            raise UserError(f"--{name} takes a JSON object such as '{{\"key\": 1}}', found {getattr(training, name)}.")
    if "token" in (training.model_init_kwargs or {}):
        raise UserError(f"--model_init_kwargs holds a token: {REFUSED['hub_token']}.")


def _make_parser(prog: str | None) -> _Parser:
    parser = _Parser([RecipeArguments, ModelConfig, _upstream(SFTConfig)], allow_abbrev=False, prog=prog)
    for action in parser._actions:
        # Upstream's optional booleans want a value (`--bf16 true`); the others take `--flag` alone. All do here.
        if getattr(action.type, "__name__", "") == "string_to_bool":
            action.nargs, action.const = "?", True
        if action.dest in _OBJECT_KEYS:
            action.type = str
    return parser


def _upstream(config: type[SFTConfig]) -> type[SFTConfig]:
    """TRL's own class, where Unsloth has put a subclass in its place, whose further fields are no flags of qvl."""
    return next(kind for kind in config.__mro__ if "_unsloth_patched_rl_config" not in vars(kind))


def _typed_flags(arguments: list[str], prog: str | None) -> dict[str, Any]:
    """The flags that stand on the command line, also those typed with their default value."""
    parser = _make_parser(prog)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(arguments))


def _take_config(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Removes `--config FILE` or `--config=FILE` from the arguments and reads the file."""
    rest: list[str] = []
    path: str | None = None
    queue = iter(arguments)
    for argument in queue:
        if argument == "--config":
            path = next(queue, None)
            if path is None:
                raise UserError("--config needs a file: --config FILE or --config=FILE.")
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
        elif not argument.startswith("-") and argument.endswith((".yaml", ".yml")) and (not rest or "=" in rest[-1]):
            raise UserError(f"A settings file is named by a flag: --config {argument}")
        else:
            rest.append(argument)
    return rest, _read_config(Path(path)) if path is not None else {}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold `flag: value` lines, found {type(values).__name__}.")
    return values


def _checked(values: Mapping[str, Any], actions: Mapping[str, argparse.Action], origin: str) -> dict[str, Any]:
    """The values of a file or a recipe, which have to be flags and of the type that the command line would take."""
    hints = {key: hint for part in (RecipeArguments, ModelConfig, SFTConfig) for key, hint in _hints(part).items()}
    result = {}
    for key, value in values.items():
        _require_known(key, actions, origin)
        if key in _SECRET_KEYS and value:
            raise UserError(f"{origin} `{key}`: {REFUSED[key]}.")
        result[key] = _as_type(key, value, actions[key], hints[key], origin)
    return result


_hints = functools.cache(typing.get_type_hints)


def _require_known(key: str, known: Mapping[str, Any], origin: str) -> None:
    if key in known and key != "help":
        return
    if key in RENAMED:
        raise UserError(f"{origin} `{key}` is now called `{RENAMED[key]}`.")
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
    raise UserError(f"{origin} `{key}` is no flag.{hint}")


def _as_type(key: str, value: Any, action: argparse.Action, hint: Any, origin: str) -> Any:
    """A value from a file as the command line would have given it; where upstream takes several types, as it is."""
    accepted = typing.get_args(hint) or (hint,)
    if value is None:
        if type(None) not in accepted:
            raise UserError(f"{origin} `{key}` needs a value: leave the line out to get the default.")
        return None
    if isinstance(value, dict):
        if key not in (*SFTConfig._VALID_DICT_FIELDS, *REFUSED):
            raise UserError(f"{origin} `{key}` takes one value, found a mapping.")
        return value
    if isinstance(value, list):
        if action.nargs != "+" and not any(typing.get_origin(kind) is list for kind in accepted):
            raise UserError(f"{origin} `{key}` takes one value, found the list {value}.")
        return [_item_as_type(key, item, action, origin) for item in value]
    # YAML reads `yes` and `1.0` as something else than text.
    converted = _item_as_type(key, value, action, origin)
    return converted if len(set(accepted) - {type(None)}) == 1 else value


def _item_as_type(key: str, item: Any, action: argparse.Action, origin: str) -> Any:
    word = str(item).lower() if isinstance(item, bool) else json.dumps(item) if isinstance(item, dict) else str(item)
    try:
        converted = action.type(word) if callable(action.type) else item
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{origin} `{key}`: {item!r} is not a valid {_type_name(action)}.") from error
    if action.choices is not None and converted not in action.choices:
        raise UserError(f"{origin} `{key}`: {item!r} is none of {', '.join(map(str, action.choices))}.")
    return converted


def _type_name(action: argparse.Action) -> str:
    name = getattr(action.type, "__name__", "value")
    return {"string_to_bool": "true or false", "int": "whole number", "float": "number"}.get(name, name)


def _as_arguments(overrides: Mapping[str, Any], actions: Mapping[str, argparse.Action]) -> list[str]:
    """Overrides by name as command-line words, so that they pass the same checks."""
    words: list[str] = []
    for key, value in overrides.items():
        _require_known(key, actions, "override")
        if isinstance(value, list | tuple):
            words += [f"--{key}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)]
        else:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def _refuse_unknown(arguments: list[str], parser: _Parser) -> None:
    """Stops at the first word that looks like a flag and is none, with the nearest valid one."""
    known = {option for action in parser._actions for option in action.option_strings}
    for word in arguments:
        name = word.partition("=")[0]
        if name == "USE_MOCK":
            raise UserError("USE_MOCK=True is now --smoke.")
        if not name.startswith("--") or name in known:
            continue
        plain = name[2:].replace("-", "_")
        if plain in RENAMED:
            raise UserError(f"{name} is now called --{RENAMED[plain]}.")
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else f" `{parser.prog} --help` lists every flag."
        raise UserError(f"There is no flag {name}.{hint}")
    if os.environ.get("USE_MOCK", "").lower() in ("1", "true"):
        raise UserError("The environment variable USE_MOCK is not read any more: use --smoke, and unset it.")


def _refuse(changed: Mapping[str, Any], mentioned: Mapping[str, Any]) -> None:
    reasons = {key: REFUSED[key] for key in changed if key in REFUSED}
    # These also where they are upstream's default: typed, they ask for what a run here does not do.
    reasons |= {key: reason for (key, value), reason in REFUSED_VALUES.items() if mentioned.get(key) == value}
    for key, reason in reasons.items():
        value = "" if key in _SECRET_KEYS else f" {mentioned[key]}"
        raise UserError(f"--{key}{value} is refused: {reason}.")


def _plain(value: Any) -> Any:
    """Enums as their values, tuples as lists, config objects as dicts: what YAML and a comparison need."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    return value
