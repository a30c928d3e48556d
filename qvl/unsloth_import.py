"""Whether a run may use `--loader unsloth`, and Unsloth's import in time.

Importing Unsloth patches torch, transformers, peft and trl for the whole process, and has to come before all but the
first of them. So a recipe asks for it before it imports anything else, and this module imports none of them outside of
functions. A process that has imported Unsloth stays with it.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl.errors import UserError
from qvl.flags import TRAINABLE_PARTS
from qvl.processes import num_processes

if TYPE_CHECKING:
    from qvl.settings import Settings

NAME = "unsloth"
_PATCHED = ("transformers", "trl", "peft")
# As the command line's parser, which is trl's, reads a boolean.
_FALSE = ("false", "f", "no", "n", "0")
_INSTALL = (
    "install the versions that go together into an environment of their own, `pip install --no-deps -r "
    "environments/unsloth.txt && pip install --no-deps --editable .`, or leave --loader out"
)


def import_if_asked(defaults: Mapping[str, Any], argv: Sequence[str], overrides: Mapping[str, Any]) -> None:
    """Imports Unsloth where a run asks for it, before transformers, trl and peft are; a dry run needs none of it.

    The flags are not parsed yet, since their parser is trl's: this looks at two of them only, and what is wrong with
    the others is said later.

    Args:
        defaults: of the recipe.
        argv: command line without the program's name.
        overrides: flags by name, above everything else.

    Raises:
        UserError: Unsloth is asked for and cannot be imported here.
    """
    asked = {**defaults, **_typed(argv), **overrides}
    is_dry_run = str(asked.get("dry_run", False)).lower() not in _FALSE
    if asked.get("loader") == NAME and not is_dry_run:
        _import()


def _typed(argv: Sequence[str]) -> dict[str, Any]:
    """`loader` and `dry_run` as the command line and its settings file have them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--loader", nargs="?")
    parser.add_argument("--dry_run", "--dry-run", nargs="?", const="true")
    parser.add_argument("--config", nargs="?")
    typed = vars(parser.parse_known_args(list(argv))[0])
    path = typed.pop("config", None)
    return {**_read(path), **typed} if path else typed


def _read(path: str) -> dict[str, Any]:
    """A settings file; one that cannot be read is for `parse_settings` to complain about."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _import() -> None:
    if NAME in sys.modules:
        return
    early = [name for name in _PATCHED if name in sys.modules]
    if early:
        raise UserError(
            f"--loader unsloth: this process has imported {' and '.join(early)} already, which Unsloth patches when it "
            "is imported. Start the run in a process of its own, such as `python recipes/flickr8k.py --loader unsloth`."
        )
    if importlib.util.find_spec(NAME) is None:
        raise UserError(f"--loader unsloth: Unsloth is not installed: {_INSTALL}.")
    import torch

    if not torch.cuda.is_available():
        raise UserError("--loader unsloth needs an NVIDIA GPU, and there is none here: leave --loader out.")
    _set_environment()
    with quiet():
        try:
            importlib.import_module(NAME)
        except (ImportError, RuntimeError, NotImplementedError) as error:
            raise UserError(f"--loader unsloth: Unsloth cannot be imported ({error}): {_INSTALL}.") from error


def _set_environment() -> None:
    """What Unsloth reads as it is imported; the user's own values stay."""
    from qvl.image_refs import cache_folder

    # Code that it generates, in place of a folder wherever the run was started.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth_compiled_cache"))
    # It would count each load on the hub.
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Unsloth's banners off the screen; where it fails, what it has said is shown."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except Exception:
        print(said.getvalue(), file=sys.stderr, flush=True)
        raise


def require_usable(settings: "Settings", is_base_kept: bool) -> None:
    """Stops a run whose flags do not go with Unsloth; needs no weights, no GPU and no Unsloth.

    Args:
        settings: of the run.
        is_base_kept: several runs of this process share a base.

    Raises:
        UserError: says which flag and what to do.
    """
    if settings.recipe.loader != NAME:
        if NAME in sys.modules:
            raise UserError(
                "This process has imported Unsloth, which has patched transformers, trl and peft: a run with --loader "
                "transformers would not be one. Start it in a process of its own."
            )
        return
    for is_asked, problem in _refusals(settings, is_base_kept):
        if is_asked:
            raise UserError(f"{problem}, or go without --loader unsloth.")
    if not settings.recipe.dry_run and NAME not in sys.modules:
        raise UserError(
            "--loader unsloth comes from the settings of the run that is gone on with, too late to import Unsloth: "
            "give it on the command line too, or --loader transformers."
        )


def _refusals(settings: "Settings", is_base_kept: bool) -> Iterator[tuple[bool, str]]:
    """Whether each thing that Unsloth does not go with is asked for, and what to do about it."""
    recipe, model = settings.recipe, settings.model
    yield num_processes() > 1, "--loader unsloth trains in one process: start it without a launcher"
    yield is_base_kept, "A sweep keeps one base for its trials, and --loader unsloth changes it: start a run for each"
    # Not what it was settled to: a dry run may be made where there is no GPU.
    yield bool(settings.given.get("use_cpu")), "--loader unsloth needs an NVIDIA GPU: leave --use_cpu out"
    yield (
        recipe.base_precision is not None,
        f"--base_precision {recipe.base_precision} replaces the layers that Unsloth patches: leave it out",
    )
    yield (
        recipe.vision_encoder is not None,
        "--vision_encoder composes a model that Unsloth does not know: leave it out",
    )
    yield model.load_in_8bit, "--load_in_8bit with --loader unsloth has not been measured: use --load_in_4bit"
    yield (
        model.attn_implementation is not None,
        "--attn_implementation is Unsloth's own choice with --loader unsloth: leave it out",
    )
    yield (
        recipe.cache_vision_features,
        "--cache_vision_features goes around the model's forward code, which Unsloth patches: leave it out",
    )
    yield (
        bool(settings.training.gradient_checkpointing_kwargs),
        "--gradient_checkpointing_kwargs is for torch's checkpointing, and Unsloth has its own: leave it out",
    )
    yield (
        settings.training.padding_free,
        "--padding_free puts samples into one row, which Unsloth's attention would mix: leave it out",
    )
    whole = [f"train_{part}" for part in TRAINABLE_PARTS if getattr(recipe, f"train_{part}")]
    whole += ["lora_modules_to_save"] if model.lora_modules_to_save else []
    yield bool(whole), f"--{', --'.join(whole)}: with --loader unsloth LoRA alone is trained: leave it out"
