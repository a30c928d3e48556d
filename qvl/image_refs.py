"""Where an image lies: references that stay small in a table, cross process borders, and are read when needed."""

import base64
import binascii
import hashlib
import http.client
import io
import json
import os
import re
import stat
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qvl.images import ImageError, read_header

REMOTE_TIMEOUT_SECONDS = 30
REMOTE_LIMIT_BYTES = 100 * 2**20
_VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_DATA_URL = re.compile(r"data:image/[A-Za-z0-9.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class FileImage:
    """An image file; `name` is what people are shown."""

    name: str
    path: str


@dataclass(frozen=True)
class LineImage:
    """The `index`-th `data:` URL of the row of `num_bytes` that starts at byte `offset` of the JSON file `path`."""

    name: str
    path: str
    offset: int
    num_bytes: int
    index: int


@dataclass(frozen=True)
class TableImage:
    """An image in row `row` of a hub table.

    With `column` it is that column's image (its `index`-th, if the column holds lists); without `column` the
    `index`-th `data:` URL among the row's strings.
    """

    name: str
    split: str
    row: int
    column: str | None
    index: int | None


ImageRef = FileImage | LineImage | TableImage
_KINDS: dict[str, type[FileImage] | type[LineImage] | type[TableImage]] = {
    "file": FileImage,
    "line": LineImage,
    "table": TableImage,
}


def dump_refs(refs: list[ImageRef]) -> str:
    """References as one JSON string, for a table column."""
    kinds = {cls: kind for kind, cls in _KINDS.items()}
    return json.dumps([{"kind": kinds[type(ref)], **asdict(ref)} for ref in refs])


def load_refs(text: str) -> list[ImageRef]:
    """The inverse of `dump_refs`."""
    return [_KINDS[fields.pop("kind")](**fields) for fields in json.loads(text)]


def data_urls(value: Any) -> Iterator[str]:
    """All strings that begin with `data:` in a JSON value, depth first."""
    if isinstance(value, str):
        if value[:5].lower() == "data:":
            yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from data_urls(child)
    elif isinstance(value, list):
        for child in value:
            yield from data_urls(child)


def locate_path(value: str, folder: Path | None, allow_remote: bool, allow_outside: bool) -> FileImage:
    """Turns a path or URL as written in a row into a file on this disk; fetches an http(s) URL if allowed.

    Args:
        value: path or URL; absolute paths are taken as written, relative ones from `folder`.
        folder: the data file's folder, absolute and without `..`; None for hub tables, which have none.
        allow_remote: fetch http(s) URLs.
        allow_outside: accept relative paths that leave `folder`.

    Raises:
        ImageError: not there, a folder, a video, outside of the data folder, remote without leave, unreachable.
    """
    scheme = _SCHEME.match(value)
    if scheme and scheme[1].lower() in ("http", "https"):
        if not allow_remote:
            raise ImageError("is a URL, and URLs are not fetched: download it, or pass --allow_remote_images")
        return FileImage(value, str(_fetch(value)))
    if scheme and scheme[1].lower() != "file":
        raise ImageError(f"has the scheme {scheme[1]}://, which cannot be read: copy it to a local file")
    written = urllib.parse.unquote(urllib.parse.urlsplit(value).path) if scheme else value
    if written.lower().endswith(_VIDEO_SUFFIXES):
        raise ImageError("is a video, and videos are not supported: extract frames and list them under `images`")
    path = _absolute(written, folder, allow_outside)
    try:
        mode = os.stat(path).st_mode
    except PermissionError as error:
        raise ImageError("cannot be read (permission denied): change its or its folder's mode") from error
    except (OSError, ValueError) as error:
        missing = f"is missing: there is no file {shortened(path)}; correct the path or put the image there"
        raise ImageError(missing) from error
    if stat.S_ISDIR(mode):
        raise ImageError("is a directory: name a file in it")
    if not stat.S_ISREG(mode):
        raise ImageError("is no regular file: name an image file")
    return FileImage(value, path)


def shortened(text: str) -> str:
    """At most 100 characters, so that a message stays readable."""
    return text if len(text) <= 100 else f"{text[:60]}...{text[-30:]}"


def _absolute(written: str, folder: Path | None, allow_outside: bool) -> str:
    if "\0" in written or len(written) > 4000:
        raise ImageError("is no path: give a path, an http(s) URL or `data:image/png;base64,...`")
    if os.path.isabs(written):
        return written
    if folder is None:
        raise ImageError(
            "is a relative path, which means nothing in a hub data set: download the images and give a local JSONL file"
        )
    # Lexical on purpose: a link inside of the data folder was put there by its owner.
    path = os.path.normpath(os.path.join(folder, written))
    if ".." in written and not allow_outside and os.path.commonpath([path, folder]) != str(folder):
        raise ImageError(f"leaves the data folder {folder}: move it inside, or pass --allow_outside_images")
    return path


def cache_folder() -> Path:
    """The package's own cache, `$XDG_CACHE_HOME/qvl` or `~/.cache/qvl`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qvl"


def _fetch(url: str) -> Path:
    """Downloads once; later runs read the cached file."""
    target = cache_folder() / "remote-images" / hashlib.sha256(url.encode()).hexdigest()
    if target.exists():
        return target
    request = urllib.request.Request(url, headers={"User-Agent": "qvl"})
    try:
        with urllib.request.urlopen(request, timeout=REMOTE_TIMEOUT_SECONDS) as response:
            data = response.read(REMOTE_LIMIT_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise ImageError(f"could not be fetched ({error}): check the URL, or download it and give its path") from error
    if len(data) > REMOTE_LIMIT_BYTES:
        raise ImageError(f"is larger than {REMOTE_LIMIT_BYTES // 2**20} MiB: download it and scale it down")
    read_header(io.BytesIO(data))  # an error page or half an image must not enter the cache
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(temporary, target)
    return target


def decode_data_url(url: str) -> bytes:
    """The bytes of a `data:image/...;base64,` URL.

    Raises:
        ImageError: another kind of `data:` URL, or broken base64.
    """
    if url[:11].lower() == "data:video/":
        raise ImageError("is a video, and videos are not supported: extract frames and list them under `images`")
    start = _DATA_URL.match(url)
    if not start:
        raise ImageError(f"begins with {url[:30]!r}: write it as `data:image/png;base64,...`")
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"is broken base64 ({error}): encode the file again") from error


def open_image(ref: ImageRef, tables: Mapping[str, Any]) -> BinaryIO:
    """Opens the encoded image for reading.

    Args:
        ref: where it lies.
        tables: hub tables by split, opened with `decode=False`.

    Raises:
        ImageError: it is gone, unreadable, or no base64.
    """
    try:
        if isinstance(ref, FileImage):
            return open(ref.path, "rb")
        return io.BytesIO(_line_bytes(ref) if isinstance(ref, LineImage) else _table_bytes(ref, tables))
    except ImageError:
        raise
    except (OSError, ValueError, LookupError) as error:
        raise ImageError(f"cannot be read ({error}): check that the data are still as they were") from error


def _line_bytes(ref: LineImage) -> bytes:
    with open(ref.path, "rb") as file:
        file.seek(ref.offset)
        row = json.loads(file.read(ref.num_bytes).removeprefix(b"\xef\xbb\xbf"))
    return decode_data_url(list(data_urls(row))[ref.index])


def _table_bytes(ref: TableImage, tables: Mapping[str, Any]) -> bytes:
    row = tables[ref.split][ref.row]
    if ref.column is None:
        return decode_data_url(list(data_urls(row))[ref.index or 0])
    image = row[ref.column] if ref.index is None else row[ref.column][ref.index]
    if image["bytes"] is not None:
        return bytes(image["bytes"])
    return Path(image["path"]).read_bytes()
