"""Makes an adapter ready for others: `python -m qvl.export --adapter DIR --format merged|adapter`.

`merged` writes a whole model in 16 bits, which plain transformers and serving programs load without qvl; `adapter` the
adapter for PEFT. Either is compared with what was trained, on prompts, before its folder gets its name, and has a model
card with data, settings, scores, base and licence:

    python -m qvl.export --adapter RUN/adapter --format merged                       # RUN/adapter-merged
    python -m qvl.export --adapter RUN/adapter --format adapter --out published      # a folder of your choice
    python -m qvl.export --adapter DIR --format merged --prompts questions.jsonl     # prompts of your own
    python -m qvl.export --adapter RUN/adapter --format merged --push_to_hub someone/model

Prompts are the run's own evaluation prompts, or those of a file: rows as data have them, or lines of text.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from qvl.errors import FailedCheckError, UserError

FORMATS = ("merged", "adapter")
_SUFFIXES = {"merged": "-merged", "adapter": "-exported"}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command and exits: 0 done, 1 a check failed, 2 a mistake to mend, 130 Ctrl-C."""
    try:
        _export(parse_arguments(argv))
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FailedCheckError) else 2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _export(arguments: argparse.Namespace) -> None:
    # Slow to import, and --help needs none of it.
    from qvl.recipe import quieten_and_tame_libraries

    quieten_and_tame_libraries()
    from qvl.exported_folder import export_adapter, require_exportable
    from qvl.hub_upload import push, require_hub

    adapter = Path(arguments.adapter)
    # Not with_suffix and the like: a folder may be called run.1
    out = (
        Path(arguments.out)
        if arguments.out
        else adapter.absolute().with_name(adapter.absolute().name + _SUFFIXES[arguments.format])
    )
    require_exportable(adapter, out)
    if arguments.push_to_hub:
        require_hub(arguments.push_to_hub)
    export_adapter(adapter, out, arguments.format == "merged", Path(arguments.prompts) if arguments.prompts else None)
    print(f"Complete: {out}", flush=True)
    if arguments.push_to_hub:
        print(f"Uploaded: {push(out, arguments.push_to_hub)}", flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; exits with 0 for --help and with 2 for what it does not know."""
    description, _, commands = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m qvl.export",
        description=description,
        epilog=commands,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--adapter", required=True, help="The adapter/ folder of a run, or any PEFT adapter.")
    parser.add_argument("--format", required=True, choices=FORMATS, help="A whole model, or the adapter.")
    parser.add_argument("--out", help="Folder to make. Default: beside the adapter, with -merged or -exported behind.")
    text = "File of prompts to compare on: .jsonl with rows as data have them, else lines of text. Default: the run's."
    parser.add_argument("--prompts", help=text)
    text = "Also upload it to this repository (owner/name), which is made, private, if it is not there."
    parser.add_argument("--push_to_hub", help=text)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
