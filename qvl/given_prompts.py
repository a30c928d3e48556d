"""Prompts from a file, to ask two models the same: rows of any accepted shape, or lines of text."""

from pathlib import Path
from typing import Any

from qvl.data_config import DataConfig
from qvl.errors import UserError
from qvl.examples import build_dataset, prompt_messages
from qvl.rows import caption_row
from qvl.sources import open_source
from qvl.validate import NUM_ERRORS_SHOWN, check_rows


def read_prompts(file: Path, limit: int) -> list[dict[str, Any]]:
    """The first prompts of a file.

    Args:
        file: `.jsonl` with rows of any shape that data may have, whose answers are not looked at; any other file is
            text, a question in every line that is not blank.
        limit: at most this many.

    Returns:
        `prompt` (typed messages), `images` (decoded) and `tools` of each.

    Raises:
        UserError: no such file, no prompt in it, or rows that are wrong.
    """
    if not file.is_file():
        raise UserError(f"--prompts {file}: there is no such file.")
    prompts = _rows(file, limit) if file.suffix == ".jsonl" else _lines(file, limit)
    if not prompts:
        raise UserError(f"--prompts {file} holds no prompt.")
    return prompts


def as_prompt(example: dict[str, Any]) -> dict[str, Any]:
    """What a model is asked by an example."""
    return {"prompt": prompt_messages(example), "images": example["images"], "tools": example.get("tools")}


def _lines(file: Path, limit: int) -> list[dict[str, Any]]:
    try:
        questions = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {file} is no text in UTF-8: {error}.") from error
    return [
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": question}]}], "images": [], "tools": None}
        for question in questions[:limit]
    ]


def _rows(file: Path, limit: int) -> list[dict[str, Any]]:
    config = DataConfig(str(file))
    source = open_source(config)
    checked = [check_rows(source, split, config, caption_row, limit) for split in source.splits]
    errors = [error for part in checked for error in part.errors]
    if errors:
        listed = "\n".join(f"  {error}" for error in errors[:NUM_ERRORS_SHOWN])
        raise UserError(f"--prompts {file}: {len(errors):,} bad row(s):\n{listed}")
    good = [row for part in checked for row in part.good][:limit]
    as_messages = any(row.kind == "messages" for row in good)
    with_tools = any(row.record.tools for row in good)
    examples = build_dataset(good, source.tables, as_messages, with_tools)
    return [as_prompt(examples[index]) for index in range(len(examples))]
