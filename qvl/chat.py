"""Talks to an adapter: `python -m qvl.chat --adapter DIR`.

Template, precision, quantization, pixel budget and base are those of the training (trained_with.json). Answers go to
stdout, everything else to stderr:

    python -m qvl.chat --adapter RUN/adapter                                   # a conversation; Ctrl-D ends it
    python -m qvl.chat --adapter RUN/adapter --prompt "Why does ice float?"    # one question, one answer
    python -m qvl.chat --adapter RUN/adapter --prompt - < question.txt         # the question is all of stdin
    python -m qvl.chat --adapter RUN/adapter --image dog.jpg --prompt "What is this?"
    python -m qvl.chat --adapter RUN/adapter --base_only                       # the same without the adapter
    python -m qvl.chat --adapter RUN/adapter-merged                            # what qvl.export made of it

In a conversation a line is a turn: `/image PATH` shows an image with the next one, `/new` forgets what was said. Lines
may also come through a pipe.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qvl.conversations import assistant_message
from qvl.errors import UserError
from qvl.flags import RecipeArguments

if TYPE_CHECKING:
    from PIL import Image

    from qvl.trained_model import TrainedModel

_DECODING_FLAGS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k")
_MAX_NEW_TOKENS = 128
_SEED = 42


@dataclass
class Conversation:
    """What was said so far.

    Attributes:
        partner: who answers.
        system: a system prompt, "" for none.
        messages: typed messages, system prompt included.
        images: of all image parts, in their order.
        waiting: images to show with the next turn.
    """

    partner: "TrainedModel"
    system: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list["Image.Image"] = field(default_factory=list)
    waiting: list["Image.Image"] = field(default_factory=list)

    def show(self, path: str) -> None:
        """Takes an image for the next turn.

        Raises:
            UserError: a text-only model, no readable image there, or one of a shape that the processor refuses.
        """
        from qvl.images import ImageError, decode_rgb
        from qvl.survey import size_refusal

        if not self.partner.sees_images:
            raise UserError(f"{path} cannot be shown: this model takes text only.")
        try:
            image = decode_rgb(Path(path).expanduser().read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        except ImageError as error:
            raise UserError(f"{path} {error}.") from error
        if refusal := size_refusal(self.partner.processing_class, image.width, image.height):
            raise UserError(f"{path} cannot be shown: the model's processor refuses its size ({refusal}).")
        self.waiting.append(image)

    def say(self, text: str) -> None:
        """One turn of the user and the answer to it, which is printed as it comes.

        A turn that fails or is interrupted leaves no trace.

        Raises:
            UserError: the text holds what stands for images, or the conversation is too long.
        """
        placeholder = getattr(self.partner.processing_class, "image_token", None)
        if placeholder and placeholder in text:
            raise UserError(f"{placeholder} stands for an image: leave it out and name the image's file.")
        history = self.messages or self._opening()
        question = [{"type": "image"} for _ in self.waiting] + [{"type": "text", "text": text}]
        messages = [*history, {"role": "user", "content": question}]
        images = [*self.images, *self.waiting]
        answer = self.partner.answer(messages, images)
        self.messages = [*messages, assistant_message(answer)]
        self.images, self.waiting = images, []

    def forget(self) -> None:
        """Begins anew."""
        self.messages, self.images, self.waiting = [], [], []

    def _opening(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": [{"type": "text", "text": self.system}]}] if self.system else []


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command and exits: 0 done, 2 a mistake to mend, 130 Ctrl-C."""
    try:
        _chat(parse_arguments(argv))
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _chat(arguments: argparse.Namespace) -> None:
    # Slow to import, and --help needs none of it.
    from qvl.recipe import quieten_and_tame_libraries

    quieten_and_tame_libraries()
    from qvl.trained_model import load_trained

    question = sys.stdin.read().strip() if arguments.prompt == "-" else arguments.prompt
    if question is not None and not question.strip():
        raise UserError("The question is empty: write one behind --prompt, or into what is piped to `--prompt -`.")
    flags = {name: getattr(arguments, name) for name in (*_DECODING_FLAGS, "seed")}
    partner = load_trained(Path(arguments.adapter), arguments.base_only, flags)
    for warning in partner.warnings:
        print(f"Warning, {arguments.adapter}: {warning}", file=sys.stderr)
    conversation = Conversation(partner, arguments.system)
    for path in arguments.image:
        conversation.show(path)
    if question is not None:
        conversation.say(question)
        return
    print(f"{partner.name}. /image PATH, /new, Ctrl-D to end.", file=sys.stderr)
    for line in _lines():
        _take_turn(conversation, line, is_watched=sys.stdin.isatty())


def _lines() -> Iterator[str]:
    """What is typed, or what a pipe gives, line by line; blank lines left out."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401  gives input() a history and the arrow keys

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


def _take_turn(conversation: Conversation, line: str, is_watched: bool) -> None:
    """One line of a conversation. A mistake ends the turn where a user watches, and the command in a pipe."""
    command, _, rest = line.partition(" ")
    try:
        if command == "/image":
            conversation.show(rest.strip())
        elif line == "/new":
            conversation.forget()
        else:
            conversation.say(line)
    except UserError as error:
        if not is_watched:
            raise
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        if not is_watched:
            raise
        print("\n(interrupted; this turn is forgotten)", file=sys.stderr)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; exits with 0 for --help and with 2 for what it does not know."""
    description, _, commands = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m qvl.chat",
        description=description,
        epilog=commands,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    text = "The adapter/ folder of a run, any PEFT adapter, or a merged model."
    parser.add_argument("--adapter", required=True, help=text)
    parser.add_argument("--prompt", help="Answer this and stop; - reads it from stdin.")
    parser.add_argument("--system", default="", help="System prompt.")
    parser.add_argument("--image", action="append", default=[], help="Image to show first; may be given several times.")
    parser.add_argument("--base_only", action="store_true", help="Answer without the adapter, all else as with it.")
    for item in fields(RecipeArguments):
        if item.name in _DECODING_FLAGS:
            _add_decoding_flag(parser, item.name, item.default, item.metadata["help"])
    parser.add_argument("--seed", type=int, default=_SEED, help="Seeds the sampling.")
    return parser.parse_args(argv)


def _add_decoding_flag(parser: argparse.ArgumentParser, name: str, default: Any, text: str) -> None:
    if isinstance(default, bool):
        parser.add_argument(f"--{name}", action="store_true", help=text)
    else:
        default = _MAX_NEW_TOKENS if name == "max_new_tokens" else default
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} Default: {default}.")


if __name__ == "__main__":
    main()
