"""Is it faster here? Trains the same rows with plain TRL and with qvl, in turns, and says by how much.

    python -m qvl.bench recipes/flickr8k.py
    python -m qvl.bench recipes/flickr8k.py --case "TRL, its defaults" --case "4-bit: --load_in_4bit"
    python -m qvl.bench recipes/flickr8k.py --smoke

Flags of the recipe's command line count for all cases. A case, given with --case, is a name and flags of its own; one
whose name begins with TRL is run by TRL's SFTTrainer and collator, the others by qvl. TRL's batch size, accumulation
and checkpointing are its defaults unless its case names them. Both train the same parts of the model; a part's own
learning rate is known to qvl alone, and --phase to neither. Without --case there are three: "TRL, its defaults",
"TRL, its best batch" (doubles the batch until that is slower or out of memory) and "qvl", which takes the recipe's own
settings. Nothing of the user's is written but bench.json and bench.png.
"""

import argparse
import dataclasses
import math
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qvl.errors import UserError
from qvl.recipe import Recipe, quieten_and_tame_libraries

if TYPE_CHECKING:
    from qvl.bench_cases import Case
    from qvl.bench_rounds import Plan


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Command line; exits with 0 if every case was measured or is a finding (out of memory, no time), else with 1."""
    quieten_and_tame_libraries()
    try:
        code = bench(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted; bench.json has what was measured.", file=sys.stderr)
        sys.exit(130)
    sys.exit(code)


def bench(argv: Sequence[str]) -> int:
    """Runs the comparison.

    Args:
        argv: command line without the program's name.

    Returns:
        0, or 1 if a case failed or left memory behind.

    Raises:
        UserError: something the user has to change.
    """
    start = time.perf_counter()
    options, recipe_argv = _parser().parse_known_args(argv)
    recipe = load_recipe(options.recipe)
    plan = _plan(options, recipe_argv)
    from qvl.bench_cases import DEFAULT_CASES, prepare, read_case
    from qvl.bench_rounds import Rounds

    cases = [read_case(text) for text in options.case or DEFAULT_CASES]
    _require_different_names(cases)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".bench-", dir=folder))
    try:
        prepared = [
            prepare(case, recipe, recipe_argv, options.trl_batch_size, scratch, options.random_weights)
            for case in cases
        ]
        rounds = Rounds(plan, folder, prepared, start + options.max_seconds)
        rounds.run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return rounds.report()


def load_recipe(name: str) -> Recipe:
    """The RECIPE of a recipe's file.

    Raises:
        UserError: no such file, or no recipe in it.
    """
    if not Path(name).is_file():
        raise UserError(f"{name} is no file: name a recipe first, python -m qvl.bench recipes/NAME.py [flags].")
    recipe = runpy.run_path(name).get("RECIPE")
    if not isinstance(recipe, Recipe):
        raise UserError(f"{name} holds no RECIPE: name a recipe's file.")
    return recipe


def _require_different_names(cases: Sequence["Case"]) -> None:
    names = [case.name for case in cases]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f'--case: two cases are called "{name}", so their rows could not be told apart.')


def _plan(options: argparse.Namespace, recipe_argv: Sequence[str]) -> "Plan":
    """The plan; under the recipe's --smoke everything not given is as small as can be."""
    from qvl.bench_rounds import Plan

    full, small = Plan(2, 10, 3, 40, False, (8, 16, 32, 64)), Plan(1, 1, 2, 2, False, (4, 8))
    defaults = small if "--smoke" in recipe_argv else full
    given = {item.name: getattr(options, item.name, None) for item in dataclasses.fields(Plan)}
    plan = dataclasses.replace(defaults, **{name: value for name, value in given.items() if value is not None})
    for name in ("num_rounds", "num_warmup_steps", "num_blocks", "num_block_steps"):
        if getattr(plan, name) < 1:
            raise UserError(f"--{name} {getattr(plan, name)}: it has to be at least 1.")
    if not options.max_seconds > 0:
        raise UserError(f"--max_seconds {options.max_seconds:g}: it has to be above 0; leave it out for no limit.")
    return plan


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message[0].upper() + message[1:] + ". `python -m qvl.bench --help` lists every flag.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m qvl.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="file of a recipe")
    parser.add_argument("--case", action="append", metavar="'NAME: --flag value ...'", help="a row; can be repeated")
    parser.add_argument("--num_rounds", type=int, help="every round runs each case once (2)")
    parser.add_argument("--num_warmup_steps", type=int, help="steps before the first block, reported apart (10)")
    parser.add_argument("--num_blocks", type=int, help="timed blocks of a case in a round (3)")
    parser.add_argument("--num_block_steps", type=int, help="optimizer steps of a block (40)")
    parser.add_argument("--trl_once", action="store_true", help="run TRL's cases in the first round only")
    parser.add_argument("--trl_batch_size", type=int, default=8, help="of TRL's cases that name none (8)")
    parser.add_argument(
        "--max_seconds", type=float, default=math.inf, help="then stop; cases without a turn are reported as not run"
    )
    parser.add_argument("--random_weights", action="store_true", help="make the model from its configuration alone")
    parser.add_argument("--output_dir", default="outputs/bench", help="gets bench.json and bench.png")
    return parser


if __name__ == "__main__":
    main()
