"""Where rows come from: local JSON lines or arrays, the embedded scenes and chats, or a hub data set."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qvl.data_config import DataConfig
from qvl.errors import HubError, UserError
from qvl.image_refs import TableImage, cache_folder
from qvl.rows import RowError

SCENES = "qvl/scenes"
CHATS = "qvl/chats"
# Enough to show a gain from training on a laptop, and drawn in a few seconds.
NUM_SCENES_TO_TRAIN = 1000
NUM_SCENES_TO_EVALUATE = 200
_BOM = b"\xef\xbb\xbf"
_NOT_SPACE = re.compile(r"[^ \t\r\n]")


@dataclass(frozen=True)
class RawRow:
    """A row that has not been read yet.

    Attributes:
        where: file and line, or data set, split and row: for messages.
        default_id: the id of a row that has none of its own.
        load: reads the row; raises RowError when it is no JSON.
        split: the split it belongs to; "" in a source without splits.
        row: its index in a table.
        path: its JSON file, absolute; None in a table.
        offset: the byte where it starts there.
        num_bytes: how long it is.
    """

    where: str
    default_id: str
    load: Callable[[], Any]
    split: str
    row: int = 0
    path: Path | None = None
    offset: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Source:
    """An opened data set.

    Attributes:
        name: as given.
        splits: number of rows of each split; the one name "" when the source has no splits.
        rows_of: the rows of a split, in file order.
        tables: hub tables by split, images undecoded; empty for local files.
        revision: the hub commit, if known.
    """

    name: str
    splits: dict[str, int]
    rows_of: Callable[[str], Iterator[RawRow]]
    tables: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None


def open_source(config: DataConfig) -> Source:
    """Opens `config.dataset_name`; reads no rows beyond what is needed to know the splits.

    Raises:
        UserError: it does not exist, cannot be reached, or holds nothing that looks like rows.
    """
    name = config.dataset_name
    if name in (SCENES, CHATS):
        return _open_files(name, _generated_folder(config))
    path = Path(os.path.abspath(Path(name).expanduser()))
    if path.exists():
        return _open_files(name, path)
    if name.startswith((".", "/", "~")) or name.endswith((".jsonl", ".json")) or name.count("/") > 1:
        raise UserError(f"--dataset_name {name}: there is no such file or folder; correct the path.")
    return _open_hub(config)


def _generated_folder(config: DataConfig) -> Path:
    """Scenes with captions, or chats about scenes, in the cache."""
    import qvl.scenes

    num_train = config.num_train_examples or NUM_SCENES_TO_TRAIN
    num_eval = config.num_eval_examples or NUM_SCENES_TO_EVALUATE
    # Scenes drawn by another version of the generator are other data, so its source is part of the name.
    version = hashlib.sha256(Path(qvl.scenes.__file__).read_bytes()).hexdigest()[:12]
    kind = config.dataset_name.removeprefix("qvl/")
    write = {"scenes": qvl.scenes.write_scenes, "chats": qvl.scenes.write_chats}[kind]
    folder = cache_folder() / f"{kind}-{version}-{num_train}-{num_eval}-{config.seed}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(write(folder, num_train, num_eval, config.seed))
    except OSError as error:
        raise UserError(f"the cache folder cannot be written ({error}): set XDG_CACHE_HOME to one that can.") from error


@dataclass(frozen=True)
class _Place:
    """Where a row stands in a file: a line that is not blank, or an element of an array.

    Attributes:
        path: the file.
        where: file and line, or file and index in the array.
        number: of the line or element, from 1.
        offset: the byte where it starts.
        num_bytes: how long it is.
        split: which it names, if any.
    """

    path: Path
    where: str
    number: int
    offset: int
    num_bytes: int
    split: str | None


def _open_files(name: str, path: Path) -> Source:
    if path.is_dir() and not (path / "captions.jsonl").is_file():
        files = sorted(path.glob("*.jsonl"))
        if len(files) == 1:
            return _open_files(name, files[0])
        if not files:
            held = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
            raise UserError(
                f"--dataset_name {name}: the folder has no captions.jsonl and no <split>.jsonl; it holds {held}."
                " Write one JSON object a line into one of those."
            )
        return _file_source(name, {file.stem: _index(file) for file in files}, named_in_rows=False)
    places = _index(path / "captions.jsonl" if path.is_dir() else path)
    named = list(dict.fromkeys(place.split for place in places if place.split is not None))
    if not named:
        return _file_source(name, {"": places}, named_in_rows=False)
    # A row that names no split is reported whichever split is read.
    by_split = {split: [place for place in places if place.split in (split, None)] for split in named}
    return _file_source(name, by_split, named_in_rows=True)


def _file_source(name: str, places: dict[str, list[_Place]], named_in_rows: bool) -> Source:
    def rows_of(split: str) -> Iterator[RawRow]:
        for place in places[split]:
            yield RawRow(
                where=place.where,
                default_id=f"{place.path.stem}-{place.number}",
                load=partial(_read_row, place, named_in_rows),
                split=split,
                path=place.path,
                offset=place.offset,
                num_bytes=place.num_bytes,
            )

    return Source(name, {split: len(held) for split, held in places.items()}, rows_of)


def _index(path: Path) -> list[_Place]:
    """All rows of a file: its lines, or the elements of the array that it is.

    Raises:
        UserError: the file is empty, UTF-16, JSON of another kind, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            first_line = file.readline()
            _refuse_other_formats(path, first_line)
            is_array = first_line.removeprefix(_BOM).lstrip().startswith(b"[")
            file.seek(0)
            found = _index_array(path, file.read()) if is_array else _index_lines(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    if not found:
        raise UserError(f"{path}: the file is empty; write one JSON object a line.")
    return found


def _index_lines(path: Path, lines: Iterable[bytes]) -> list[_Place]:
    found, offset = [], 0
    for number, text in enumerate(lines, start=1):
        if text.removeprefix(_BOM).strip():
            found.append(_Place(path, f"{path.name}:{number}", number, offset, len(text), _split_of(text)))
        offset += len(text)
    return found


def _index_array(path: Path, content: bytes) -> list[_Place]:
    """Elements of a JSON array, as LLaVA and ShareGPT publish their rows."""
    found: list[_Place] = []
    try:
        # One character a byte, whatever the encoding: what gives an array its structure is ASCII.
        for number, (start, end) in enumerate(_elements(content.decode("latin-1"))):
            split = _split_of(content[start:end])
            found.append(_Place(path, f"{path.name}[{number}]", number + 1, start, end - start, split))
    except json.JSONDecodeError as error:
        where = f"{path.name}:{error.lineno}: element [{len(found)}] of the array"
        raise UserError(f"{where} is no valid JSON ({error.msg}): correct it.") from error
    except RecursionError as error:
        raise UserError(f"{path.name}[{len(found)}]: is nested too deeply: write a plain row.") from error
    return found


def _elements(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each element of the JSON array that a text holds."""
    decoder = json.JSONDecoder()
    position = _next_mark(text, text.index("[") + 1)
    while text[position] != "]":
        _, end = decoder.raw_decode(text, position)
        yield position, end
        position = _next_mark(text, end)
        if text[position] == ",":
            position = _next_mark(text, position + 1)
        elif text[position] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)


def _next_mark(text: str, position: int) -> int:
    """The next character that is no space."""
    found = _NOT_SPACE.search(text, position)
    if found is None:
        raise json.JSONDecodeError("Expecting ']' at the end", text, len(text))
    return found.start()


def _refuse_other_formats(path: Path, first_line: bytes) -> None:
    if first_line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path.name}:1: is UTF-16; save it as UTF-8 (`iconv -f utf-16 -t utf-8`).")
    if path.suffix == ".json" and first_line.removeprefix(_BOM).strip() in (b"{", b""):
        raise UserError(f"{path.name}:1: is neither an array of rows nor JSON lines: write [{{...}}, {{...}}].")


def _split_of(text: bytes) -> str | None:
    if b'"split"' not in text:  # spares most files a second parse of every line
        return None
    try:
        row = json.loads(text.removeprefix(_BOM))
    except (ValueError, RecursionError):
        return None  # reported with its line when the rows are read
    split = row.get("split") if isinstance(row, dict) else None
    return split if isinstance(split, str) else None


def _read_row(place: _Place, needs_split: bool) -> Any:
    with open(place.path, "rb") as file:
        file.seek(place.offset)
        text = file.read(place.num_bytes).removeprefix(_BOM)
    try:
        row = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(
            f"is not UTF-8 (byte {error.start} of the line is {text[error.start]:#x}): save the file as UTF-8"
            " (`iconv -f latin1 -t utf-8`)"
        ) from error
    except json.JSONDecodeError as error:
        raise RowError(f"is no valid JSON ({error.msg} at column {error.colno}): correct the line") from error
    except RecursionError as error:
        raise RowError("is nested too deeply: write a plain row") from error
    if needs_split and place.split is None:
        raise RowError('has no text under "split", other rows of the file have: add it')
    return row


def _open_hub(config: DataConfig) -> Source:
    tables = {split: undecoded(table) for split, table in _load_from_hub(config).items()}
    return table_source(config.dataset_name, tables)


def table_source(name: str, tables: dict[str, Any]) -> Source:
    """A source over `datasets.Dataset` tables by split, opened with `decode=False`."""

    def rows_of(split: str) -> Iterator[RawRow]:
        for row in range(len(tables[split])):
            load = partial(_read_table_row, name, tables[split], split, row)
            yield RawRow(f"{name} {split} row {row}", f"{split}-{row}", load, split, row)

    splits = {split: len(table) for split, table in tables.items()}
    return Source(name, splits, rows_of, tables, _revision(tables))


def undecoded(table: Any) -> Any:
    """The same `datasets.Dataset` with its image columns as stored bytes."""
    import datasets

    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.Video):
            table = table.cast_column(column, datasets.Video(decode=False))
        elif _is_image_list(feature):
            table = table.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return table


def _is_image_list(feature: Any) -> bool:
    import datasets

    return isinstance(getattr(feature, "feature", None), datasets.Image)


def _read_table_row(name: str, table: Any, split: str, row: int) -> dict[str, Any]:
    """A table's row with references in the place of its images."""
    import datasets

    values = dict(table[row])
    label = f"{name} {split}/{row}"
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Video) and values[column] is not None:
            raise RowError(f'column "{column}" holds a video, and videos are not supported: extract frames as images')
        if isinstance(feature, datasets.Image) and values[column] is not None:
            values[column] = TableImage(label, split, row, column, None)
        elif _is_image_list(feature) and values[column] is not None:
            count = len(values[column])
            values[column] = [TableImage(f"{label}#{i}", split, row, column, i) for i in range(count)]
    return values


def _revision(tables: dict[str, Any]) -> str | None:
    for table in tables.values():
        for url in table.info.download_checksums or {}:
            commit = re.search(r"@([0-9a-f]{40})/", url)
            if commit:
                return commit[1]
    return None


def _load_from_hub(config: DataConfig) -> dict[str, Any]:
    import datasets

    name = config.dataset_name
    try:
        loaded = datasets.load_dataset(name, config.dataset_config, revision=config.dataset_revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, ValueError) and "onfig" in reason:  # the message lists the configurations there are
            raise UserError(f"data set {name}: {reason} Choose with --dataset_config.") from error
        raise HubError(
            f"data set {name} could not be loaded ({type(error).__name__}: {reason}): check the name; if it is gated or"
            " private, run `hf auth login` or set HF_TOKEN; if the hub cannot be reached from here, set HF_ENDPOINT to"
            " a mirror or give a local folder."
        ) from error
    return dict(loaded)
