"""The first pass: reads every row that will be used, looks at its images' headers, and collects what is wrong."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tqdm import tqdm

from qvl.data_config import DataConfig
from qvl.errors import UserError
from qvl.image_refs import ImageRef, LineImage, TableImage, data_urls, locate_path, open_image, shortened
from qvl.images import ImageError, ImageHeader, read_header
from qvl.rows import ColumnError, Record, RowToExample, read_row
from qvl.sources import RawRow, Source

NUM_ERRORS_SHOWN = 20
_ROWS_AT_A_TIME = 512


@dataclass(frozen=True)
class GoodRow:
    """A row that can be used: its record, where its images lie, and their headers (in the same order)."""

    id: str
    where: str
    kind: str
    record: Record
    refs: list[ImageRef]
    headers: list[ImageHeader]


@dataclass
class CheckedRows:
    """What the first pass found in one split.

    Attributes:
        split: its name in the source.
        good: rows that can be used, in file order.
        errors: "file:line: what is wrong and what to do", one for each bad row.
        num_left_out: rows for which the recipe's piece returned None.
    """

    split: str
    good: list[GoodRow] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_left_out: int = 0


def check_rows(
    source: Source, split: str, config: DataConfig, row_to_example: RowToExample, limit: int | None
) -> CheckedRows:
    """Checks rows in file order until `limit` good ones are found.

    Raises:
        UserError: a column that the settings name is missing from a table, thus from all of its rows.
    """
    checked = CheckedRows(split)
    captions_kind: dict[str, str] = {}
    rows = source.rows_of(split)
    num_rows = source.splits[split]
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool, _progress(split, num_rows, limit) as bar:
        while limit is None or len(checked.good) < limit:
            missing = _ROWS_AT_A_TIME if limit is None else min(_ROWS_AT_A_TIME, limit - len(checked.good))
            batch = list(islice(rows, missing))
            if not batch:
                break
            results = pool.map(lambda raw: _try_row(raw, source, config, row_to_example), batch)
            for raw, result in zip(batch, results, strict=True):
                _file_result(raw, result, checked, captions_kind)
                bar.update()
    return checked


def _progress(split: str, num_rows: int, limit: int | None) -> Any:
    return tqdm(total=min(num_rows, limit or num_rows), desc=f"checking {split or 'rows'}", unit="row", delay=2)


def _file_result(
    raw: RawRow, result: GoodRow | UserError | None, checked: CheckedRows, captions_kind: dict[str, str]
) -> None:
    if isinstance(result, ColumnError) and raw.path is None:
        raise UserError(f"{raw.where}: {result}.")
    if isinstance(result, GoodRow) and result.kind.startswith("caption"):
        first = captions_kind.setdefault("kind", result.kind)
        captions_kind.setdefault("where", raw.where)
        if first != result.kind:
            result = UserError(
                f"has its captions as {_KIND_WORDS[result.kind]}, {captions_kind['where']} as {_KIND_WORDS[first]}:"
                " write all rows of the file in one kind"
            )
    if result is None:
        checked.num_left_out += 1
    elif isinstance(result, GoodRow):
        checked.good.append(result)
    else:
        # A message may quote half of a surrogate pair, which no terminal can print.
        checked.errors.append(f"{raw.where}: {result}.".encode(errors="backslashreplace").decode())


_KIND_WORDS = {"captions list": 'a list "captions"', "caption columns": "single keys"}


def _try_row(
    raw: RawRow, source: Source, config: DataConfig, row_to_example: RowToExample
) -> GoodRow | UserError | None:
    try:
        row = raw.load()
        record = read_row(row, config, row_to_example)
        if record is None:
            return None
        own_id = row.get("id")
        row_id = str(own_id) if isinstance(own_id, str | int) and own_id != "" else raw.default_id
        _refuse_half_characters(record, row_id)
        refs = [_locate(value, row, raw, config) for value in record.images]
        headers = [_header(ref, source.tables, config) for ref in refs]
    except UserError as error:
        return error
    except Exception as error:  # a fault in the recipe's piece: keep the traceback, add the row
        error.add_note(f"while reading {raw.where}")
        raise
    return GoodRow(row_id, raw.where, record.kind, record, refs, headers)


def _refuse_half_characters(record: Record, row_id: str) -> None:
    """JSON can spell what UTF-8, and so Arrow and every tokenizer, cannot hold."""
    paths = [image for image in record.images if isinstance(image, str)]
    texts = [row_id, paths, record.prompt, record.completions, record.messages, record.references, record.tools]
    try:
        json.dumps(texts, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(r"holds half of a surrogate pair (\ud83d or the like): write the whole character") from error


def _locate(value: Any, row: dict[str, Any], raw: RawRow, config: DataConfig) -> ImageRef:
    if isinstance(value, TableImage):
        return value
    if not isinstance(value, str):
        raise UserError(f"names an image by a {type(value).__name__}: write a path or URL")
    if value[:5].lower() == "data:":
        index = list(data_urls(row)).index(value)
        if raw.path is None:
            return TableImage(f"{raw.where} data URL {index}", raw.split, raw.row, None, index)
        return LineImage(f"{raw.where} data URL {index}", str(raw.path), raw.offset, raw.num_bytes, index)
    folder = raw.path.parent if raw.path else None
    try:
        return locate_path(value, folder, config.allow_remote_images, config.allow_outside_images)
    except ImageError as error:
        raise ImageError(f'image "{shortened(value)}" {error}') from error


def _header(ref: ImageRef, tables: Mapping[str, Any], config: DataConfig) -> ImageHeader:
    try:
        with open_image(ref, tables) as file:
            header = read_header(file)
        _refuse_size(header, config)
        return header
    except ImageError as error:
        raise ImageError(f'image "{shortened(ref.name)}" {error}') from error


def _refuse_size(header: ImageHeader, config: DataConfig) -> None:
    refusal = config.size_refusal and config.size_refusal(header.width, header.height)
    if refusal:
        raise ImageError(
            f"is {header.width} x {header.height} pixels, which the model's processor refuses ({refusal}): crop it or "
            "remove the row"
        )


def refuse_bad_rows(splits: list[CheckedRows], config: DataConfig) -> None:
    """Stops on bad rows, the first 20 and their number in the message, unless they may be skipped.

    Raises:
        UserError: there are bad rows and they may not be skipped, or a split has no good row.
    """
    errors = list(dict.fromkeys(error for checked in splits for error in checked.errors))
    if errors and (not config.skip_bad_rows or not all(checked.good for checked in splits)):
        shown = "\n".join(f"  {error}" for error in errors[:NUM_ERRORS_SHOWN])
        more = f"\n  ... and {len(errors) - NUM_ERRORS_SHOWN:,} more" if len(errors) > NUM_ERRORS_SHOWN else ""
        remedy = (
            "No good row is left."
            if config.skip_bad_rows
            else "Correct them, or pass --skip_bad_rows to go on without them."
        )
        raise UserError(f"{config.dataset_name}: {len(errors):,} bad row(s):\n{shown}{more}\n{remedy}")
    for checked in splits:
        if not checked.good:
            raise UserError(f"{config.dataset_name}: split {checked.split!r} has no rows left to use.")


def image_keys(rows: list[GoodRow], tables: Mapping[str, Any]) -> list[list[str]]:
    """For each row the identities of its images (same bytes, same identity), or of its text if it has none.

    Only images of equal byte counts and sizes can be the same, so only those are read and hashed.
    """
    count: dict[ImageHeader, set[str]] = {}
    for row in rows:
        for ref, header in zip(row.refs, row.headers, strict=True):
            count.setdefault(header, set()).add(_place(ref))
    return [_row_keys(row, count, tables) for row in rows]


def _row_keys(row: GoodRow, places: dict[ImageHeader, set[str]], tables: Mapping[str, Any]) -> list[str]:
    if not row.refs:
        return [f"text {json.dumps([row.record.prompt, row.record.messages])}"]
    return [
        _place(ref) if len(places[header]) == 1 else _content_hash(ref, tables)
        for ref, header in zip(row.refs, row.headers, strict=True)
    ]


def _place(ref: ImageRef) -> str:
    fields = dataclasses.asdict(ref)
    fields.pop("name")
    if "path" in fields:
        fields["path"] = os.path.realpath(fields["path"])
    return json.dumps(fields, sort_keys=True)


def _content_hash(ref: ImageRef, tables: Mapping[str, Any]) -> str:
    with open_image(ref, tables) as file:
        return hashlib.sha256(file.read()).hexdigest()
