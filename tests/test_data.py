"""Rows in every accepted format become examples; every wrong row is named with file, line and remedy."""

import base64
import functools
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import datasets
import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from qvl.data import (
    DataConfig,
    LoadedData,
    caption_row,
    image_sizes,
    load_examples,
    prompt_messages,
    separate_completions,
)
from qvl.errors import UserError
from qvl.examples import undecoded_examples
from qvl.sources import table_source, undecoded
from qvl.splits import Undivided, split_by_image

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@functools.cache
def picture(shade: int, image_format: str = "PNG", width: int = 8) -> bytes:
    """A small picture; another shade, another content."""
    pixels = np.random.default_rng(shade).integers(0, 256, (6, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def data_url(shade: int) -> str:
    return "data:image/png;base64," + base64.b64encode(picture(shade)).decode()


def pixels_of(image: Image.Image) -> list[Any]:
    return np.asarray(image).tolist()


def shows(image: Image.Image, shade: int) -> bool:
    return pixels_of(image) == pixels_of(Image.open(io.BytesIO(picture(shade))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with images 0.png ... 9.png in images/."""
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for shade in range(10):
        (data / "images" / f"{shade}.png").write_bytes(picture(shade))
    return data


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Objects are written as JSON, strings and bytes as they are."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def load(folder: Path, train: list[Any], file: str = "train.jsonl", **settings: Any) -> LoadedData:
    """Loads `train` as the training split; the evaluation split is one good row."""
    write_rows(folder / file, train)
    write_rows(folder / "test.jsonl", [caption(9)])
    return load_examples(DataConfig(str(folder), **settings))


def caption(shade: int, **others: Any) -> dict[str, Any]:
    return {"image": f"images/{shade}.png", "captions": [f"picture {shade}", f"number {shade}"], **others}


def chat(content: Any, answer: Any = "An answer.", **others: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **others}


# --- accepted formats ---------------------------------------------------------------------------------------------


def test_caption_rows_keep_their_captions_together(folder: Path) -> None:
    data = load(folder, [caption(0), caption(1)], captions_per_image=2, instruction="Say what you see.")
    example = data.train[1]
    assert example["id"] == "train-2"
    assert example["where"] == "train.jsonl:2"
    assert example["image_names"] == ["images/1.png"]
    assert shows(example["images"][0], 1)
    assert example["prompt"] == [{"role": "user", "content": [IMAGE, text("Say what you see.")]}]
    assert example["completions"] == example["references"] == ["picture 1", "number 1"]
    assert "messages" not in example


def test_references_are_all_captions_whatever_is_trained_on(folder: Path) -> None:
    example = load(folder, [caption(0)], captions_per_image=1).train[0]
    assert example["completions"] == ["picture 0"]
    assert example["references"] == ["picture 0", "number 0"]


def test_caption_columns(folder: Path) -> None:
    row = {"photo": "images/3.png", "short": "a", "long": "b"}
    write_rows(folder / "test.jsonl", [row])
    write_rows(folder / "train.jsonl", [row])
    settings = DataConfig(str(folder), image_column="photo", caption_columns=("long", "short"), captions_per_image=2)
    assert load_examples(settings).train[0]["completions"] == ["b", "a"]


def test_instruction_rows(folder: Path) -> None:
    rows = [
        {"image": "images/0.png", "instruction": "What?", "response": "This."},
        {"images": ["images/1.png", "images/2.png"], "instruction": "Is <image> like <image>?", "response": "No."},
        {"images": [], "instruction": "Only text?", "response": "Yes."},
    ]
    train = load(folder, rows).train
    assert train[0]["prompt"] == [{"role": "user", "content": [IMAGE, text("What?")]}]
    assert train[0]["completions"] == train[0]["references"] == ["This."]
    assert train[1]["prompt"][0]["content"] == [text("Is "), IMAGE, text(" like "), IMAGE, text("?")]
    assert shows(train[1]["images"][0], 1)
    assert shows(train[1]["images"][1], 2)
    assert train[2]["prompt"] == [{"role": "user", "content": [text("Only text?")]}]
    assert train[2]["images"] == []


@pytest.mark.parametrize(
    ("content", "others", "parts", "shades"),
    [
        pytest.param("Hello", {}, [text("Hello")], [], id="text only"),
        pytest.param("Hello", {"image": "images/1.png"}, [IMAGE, text("Hello")], [1], id="image first"),
        pytest.param("A <image> b", {"image": "images/1.png"}, [text("A "), IMAGE, text(" b")], [1], id="mark"),
        pytest.param([text("x"), IMAGE], {"images": ["images/2.png"]}, [text("x"), IMAGE], [2], id="bare part"),
        pytest.param([text("x <image>")], {"images": ["images/2.png"]}, [text("x "), IMAGE], [2], id="mark in a part"),
        pytest.param(
            [{"type": "image_url", "image_url": {"url": data_url(3)}}, text("x")],
            {},
            [IMAGE, text("x")],
            [3],
            id="data",
        ),
        pytest.param(
            [{"type": "image_url", "image_url": "images/4.png"}], {}, [IMAGE], [4], id="image_url as a string"
        ),
        pytest.param([{"type": "image", "image": "images/4.png"}], {}, [IMAGE], [4], id="image part with a path"),
        pytest.param(
            [{"type": "image", "image": None, "text": None}], {"image": data_url(5)}, [IMAGE], [5], id="nulls"
        ),
        pytest.param(
            [{"type": "image", "image": "images/4.png"}, text("<image>")],
            {"images": ["images/6.png"]},
            [IMAGE, IMAGE],
            [4, 6],
            id="both ways",
        ),
        pytest.param(
            [{"type": "image", "image": data_url(7)}, {"type": "image", "image": data_url(8)}],
            {},
            [IMAGE, IMAGE],
            [7, 8],
            id="two data URLs",
        ),
    ],
)
def test_messages(folder: Path, content: Any, others: dict[str, Any], parts: list[Any], shades: list[int]) -> None:
    example = load(folder, [chat(content, **others)]).train[0]
    assert example["messages"] == [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [text("An answer.")]},
    ]
    assert example["references"] == ["An answer."]
    assert [shows(image, shade) for image, shade in zip(example["images"], shades, strict=True)] == [True] * len(shades)
    assert "prompt" not in example


def test_mixed_contents_in_one_file_share_a_batch(folder: Path) -> None:
    rows = [chat("plain"), chat([text("typed")], [text("typed answer")]), chat("image", image=data_url(1))]
    rows.append({"instruction": "What?", "response": "This.", "image": "images/2.png"})
    train = load(folder, rows).train
    batch = train[0:4]
    assert [len(images) for images in batch["images"]] == [0, 0, 1, 1]
    assert [messages[-1]["content"][0]["text"] for messages in batch["messages"]] == [
        "An answer.",
        "typed answer",
        "An answer.",
        "This.",
    ]
    # The evaluation rows are captions; one run has one kind of row.
    assert "messages" in load(folder, rows).evaluation[0]


def test_the_image_goes_before_the_first_user_text_and_not_into_the_system_turn(folder: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, *chat("Look.")["messages"]]
    example = load(folder, [{"messages": messages, "image": "images/1.png"}]).train[0]
    assert example["messages"][0] == {"role": "system", "content": [text("Be kind.")]}
    assert example["messages"][1] == {"role": "user", "content": [IMAGE, text("Look.")]}


def test_tool_turns_and_tools_pass_through(folder: Path) -> None:
    call = [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]
    messages = [
        {"role": "user", "content": "Look it up."},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "It is 4.", "tool_call_id": "1"},
        {"role": "assistant", "content": "Four."},
    ]
    train = load(folder, [{"messages": messages, "tools": [{"type": "function"}]}, chat("Hello")]).train
    assert train[0]["messages"][1] == {"role": "assistant", "content": [], "tool_calls": call}
    assert train[0]["messages"][2] == {"role": "tool", "content": [text("It is 4.")], "tool_call_id": "1"}
    assert [row["tools"] for row in (train[0], train[1])] == [[{"type": "function"}], None]
    assert prompt_messages(train[0]) == train[0]["messages"][:3]


def test_llava_conversations(folder: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A picture."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    example = load(folder, [{"id": "000123", "image": "images/2.png", "conversations": turns}]).train[0]
    assert example["id"] == "000123"
    assert example["messages"][0] == {"role": "user", "content": [IMAGE, text("\nWhat is it?")]}
    assert [message["role"] for message in example["messages"]] == ["user", "assistant"] * 2
    assert example["references"] == ["Yes."]
    assert len(prompt_messages(example)) == 3


def test_an_array_of_rows_as_llava_publishes_them(folder: Path) -> None:
    def row(number: int, answer: str, image: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "chatgpt", "value": answer}]
        return {"id": f"{number}", "image": image, "conversations": turns}

    rows = [row(1, "ünïcode 犬, [brackets]", "images/1.png"), row(2, "No.", data_url(2))]
    for indent, ensure_ascii in [(None, True), (2, False)]:
        array = folder / "rows.json"
        array.write_text(json.dumps(rows, indent=indent, ensure_ascii=ensure_ascii), encoding="utf-8")
        train = load_examples(DataConfig(str(array), num_eval_examples=1)).train
        held_out = load_examples(DataConfig(str(array), num_eval_examples=1)).evaluation
        examples = sorted([*train, *held_out], key=lambda example: example["id"])
        assert [example["references"] for example in examples] == [["ünïcode 犬, [brackets]"], ["No."]]
        assert [len(example["images"]) for example in examples] == [1, 1]
    array.write_text(json.dumps([*rows, row(3, "And?", "images/99.png")], indent=2), encoding="utf-8")
    with pytest.raises(UserError, match=r'rows\.json\[2\]: image "images/99\.png" is missing'):
        load_examples(DataConfig(str(array)))


def test_openai_messages_may_stand_under_conversations(folder: Path) -> None:
    turns = chat("Hello")["messages"]
    system = {"role": "system", "content": "Be kind."}
    rows = [{"conversations": turns, "system": "Be kind."}, {"messages": [system, *turns]}]
    first, second = load(folder, rows).train
    assert first["messages"] == second["messages"]


def test_a_sharegpt_row_may_have_its_system_prompt_and_tools_beside_the_turns(folder: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    tool = {"type": "function", "function": {"name": "look"}}
    rows = [
        {"conversations": turns, "system": "Be kind.", "tools": json.dumps([tool])},
        {"conversations": turns, "system": "", "tools": ""},
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns]},
    ]
    train = load(folder, rows).train
    systems = [[m["content"] for m in row["messages"] if m["role"] == "system"] for row in train]
    assert systems == [[[text("Be kind.")]], [], [[text("Be brief.")]]]
    assert [row["tools"] for row in train] == [[tool], None, None]


def test_absolute_and_file_url_paths_are_taken_as_written(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside picture.png"
    outside.write_bytes(picture(42))
    url = "file://" + str(outside).replace(" ", "%20")
    train = load(folder, [caption(0, image=str(outside)), caption(1, image=url)]).train
    assert train[0]["image_names"] == [str(outside)]
    assert shows(train[0]["images"][0], 42)
    assert shows(train[1]["images"][0], 42)


def test_outside_images_with_leave(folder: Path) -> None:
    (folder.parent / "outside.png").write_bytes(picture(42))
    data = load(folder, [caption(0, image="../outside.png")], allow_outside_images=True)
    assert shows(data.train[0]["images"][0], 42)
    assert shows(load(folder, [caption(0, image="images/../images/1.png")]).train[0]["images"][0], 1)


def test_bom_crlf_and_blank_lines(folder: Path) -> None:
    lines = b"\r\n".join([b"\xef\xbb\xbf" + json.dumps(chat("one", image=data_url(1))).encode(), b"", b"  "])
    (folder / "train.jsonl").write_bytes(lines + b"\r\n" + json.dumps(caption(2)).encode())
    write_rows(folder / "test.jsonl", [caption(9)])
    train = load_examples(DataConfig(str(folder))).train
    assert [row["where"] for row in train] == ["train.jsonl:1", "train.jsonl:4"]
    assert shows(train[0]["images"][0], 1)


def test_repeated_ids_are_told_apart(folder: Path) -> None:
    data = load(folder, [caption(0, id=7), caption(1, id=7)])
    assert [row["id"] for row in data.train] == ["7", "7 (train.jsonl:2)"]
    assert any("1 ids occur again" in line for line in data.summary.lines())


# --- hub tables ---------------------------------------------------------------------------------------------------


def hub_table(columns: dict[str, Any], images: tuple[str, ...] = ("image",)) -> datasets.Dataset:
    table = datasets.Dataset.from_dict(columns)
    for name in images:
        listed = isinstance(columns[name][0], list)
        table = table.cast_column(name, datasets.List(datasets.Image()) if listed else datasets.Image())
    return table


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Serves tables as if `datasets.load_dataset` had fetched them."""

    def serve(**tables: datasets.Dataset) -> DataConfig:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(tables))
        return DataConfig("someone/photos", caption_columns=("caption_0", "caption_1"))

    return serve


def stored(shade: int) -> dict[str, Any]:
    return {"bytes": picture(shade), "path": None}


def flickr_like(shades: list[int]) -> datasets.Dataset:
    captions = {f"caption_{k}": [f"{k} of {shade}" for shade in shades] for k in range(2)}
    return hub_table({"image": [stored(shade) for shade in shades], **captions})


def test_hub_caption_rows(hub: Any) -> None:
    config = hub(train=flickr_like([1, 2, 3]), test=flickr_like([4]))
    data = load_examples(replace(config, num_train_examples=2), caption_row)
    assert len(data.train) == 2
    example = data.train[1]
    assert (example["id"], example["where"]) == ("train-1", "someone/photos train row 1")
    assert example["image_names"] == ["someone/photos train/1"]
    assert shows(example["images"][0], 2)
    assert example["references"] == ["0 of 2", "1 of 2"]
    assert shows(data.evaluation[0]["images"][0], 4)


def test_hub_messages_with_an_images_column_and_null_keys(hub: Any) -> None:
    part = {"type": "image", "text": None, "index": 0}
    words = {"type": "text", "text": "Look.", "index": None}
    answer = {"type": "text", "text": "Seen.", "index": None}
    messages = [{"role": "user", "content": [words, part]}, {"role": "assistant", "content": [answer]}]
    table = hub_table({"messages": [messages], "images": [[stored(6)]]}, images=("images",))
    example = load_examples(hub(train=table, test=table)).train[0]
    assert example["messages"][0]["content"] == [text("Look."), IMAGE]
    assert shows(example["images"][0], 6)


def test_hub_images_are_not_copied_into_our_table(hub: Any) -> None:
    train = load_examples(hub(train=flickr_like(list(range(50))), test=flickr_like([60]))).train
    assert train.data.nbytes < 50 * 1000
    assert picture(0)[:20] not in b"".join(
        buffer.to_pybytes()
        for column in train.data.columns
        for chunk in column.chunks
        for buffer in chunk.buffers()
        if buffer
    )


def test_hub_unknown_column_stops_at_once_and_names_the_nearest(hub: Any) -> None:
    config = hub(train=flickr_like([1, 2]), test=flickr_like([3]))
    with pytest.raises(UserError) as caught:
        load_examples(replace(config, caption_columns=("capton_0",)))
    message = str(caught.value)
    assert 'has no key "capton_0" (did you mean "caption_0"?)' in message
    assert "it has: image, caption_0, caption_1" in message
    assert "--caption_columns" in message
    assert "\n" not in message


def test_hub_single_split_is_divided_by_image_when_named_twice(hub: Any) -> None:
    config = hub(train=flickr_like(list(range(20))))
    with pytest.raises(UserError, match=r'no split "test"; it has train \(20 rows\).*--dataset_test_split'):
        load_examples(config)
    data = load_examples(replace(config, dataset_test_split="train", num_eval_examples=5))
    assert (len(data.train), len(data.evaluation)) == (15, 5)


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a gated, a missing and a private data set."""

    requested: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.requested.append(self.path)
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Any]:
    servers = []

    def start(handler: type[http.server.BaseHTTPRequestHandler]) -> str:
        servers.append(http.server.HTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# The endpoint is settled when the libraries are imported, hence a process of its own.
HUB_SCRIPT = """
import sys
from qvl.data import DataConfig, load_examples
for name in sys.argv[1:]:
    try:
        load_examples(DataConfig(name))
    except ValueError as error:
        print(type(error).__name__, error)
"""


def test_gated_and_missing_data_sets_end_in_one_line(serve: Any, tmp_path: Path) -> None:
    names = ["someone/gated", "someone/missing"]
    hub = {"HF_ENDPOINT": serve(FakeHub), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "no_proxy": "127.0.0.1"}
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", HUB_SCRIPT, *names]
    result = subprocess.run(
        command, env=os.environ | hub, cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert all(any(name in path for path in FakeHub.requested) for name in names)
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"HubError data set {name} could not be loaded")
        for remedy in ("check the name", "`hf auth login`", "HF_TOKEN", "HF_ENDPOINT to a mirror"):
            assert remedy in line


def test_unreachable_hub_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^data set someone/photos could not be loaded .*HF_ENDPOINT to a mirror.*$"):
        load_examples(DataConfig("someone/photos"))


# --- rejected rows ------------------------------------------------------------------------------------------------

REJECTED = [
    ("invalid JSON", '{"image": ', "is no valid JSON", "correct the line"),
    ("not UTF-8", b'{"image": "caf\xe9"}', "is not UTF-8", "iconv -f latin1 -t utf-8"),
    ("half a character", '{"image": "images/0.png", "captions": ["\\ud83d"]}', "surrogate", "write the whole"),
    ("not an object", "[1]", "is a list", "write one {...} a line"),
    ("null", "null", "is null", "write one {...} a line"),
    ("deep nesting", "[" * 100_000, "nested too deeply", "plain row"),
    ("missing image key", {"imge": "x", "captions": ["a"]}, 'no key "image" (did you mean "imge"?)', "--image_column"),
    ("missing captions", {"image": "images/0.png"}, 'no key "caption_0"', "it has: image"),
    ("missing response", {"image": "images/0.png", "instruction": "a"}, 'no key "response"', "add it"),
    ("missing instruction", {"image": "images/0.png", "response": "a"}, 'no key "instruction"', "add it"),
    ("no image key", {"instruction": "a", "response": "b"}, 'no key "image"', '"images": []'),
    ("captions no list", {"image": "images/0.png", "captions": "a"}, '"captions" is a string', 'write ["...'),
    ("captions empty", {"image": "images/0.png", "captions": []}, "an empty list", "at least one"),
    ("caption a number", {"image": "images/0.png", "captions": ["a", 3]}, "caption 1 is a number", "in quotes"),
    ("caption null", {"image": "images/0.png", "captions": [None]}, "caption 0 is null", "in quotes"),
    ("caption empty", {"image": "images/0.png", "captions": ["a", " "]}, "caption 1 is empty", "write it or remove it"),
    ("image a number", {"image": 3, "captions": ["a"]}, '"image" holds a number', 'write "images/name.jpg"'),
    ("image an object", {"image": {"a": 1}, "captions": ["a"]}, '"image" holds an object', "write"),
    ("image empty", {"image": "", "captions": ["a"]}, "an empty string", "write a path"),
    ("image null", {"image": None, "captions": ["a"]}, "has 0", "one row per image"),
    ("both image keys", caption(0, images=["images/1.png"]), 'both "image" and "images"', "keep one"),
    ("response no string", {"image": "images/0.png", "instruction": "a", "response": 3}, "a number", "in quotes"),
    ("response empty", {"image": "images/0.png", "instruction": "a", "response": " "}, "an empty response", "write it"),
    ("two kinds of captions", caption(0, caption_0="b"), "captions of two kinds", "keep one of them"),
    ("missing image", caption(0, image="images/no.png"), 'image "images/no.png" is missing', "correct the path"),
    ("directory", caption(0, image="images"), 'image "images" is a directory', "name a file in it"),
    ("URL", caption(0, image="https://x.org/a.png"), "URLs are not fetched", "--allow_remote_images"),
    ("other scheme", caption(0, image="s3://bucket/a.png"), "scheme s3://", "local file"),
    ("outside", caption(0, image="../data.png"), "leaves the data folder", "--allow_outside_images"),
    ("outside by detour", caption(0, image="images/../../data2/a.png"), "leaves the data folder", "--allow_outside"),
    ("NUL in the path", caption(0, image="a\0b.png"), "is no path", "give a path"),
    ("video file", caption(0, image="images/clip.MP4"), "is a video", "extract frames"),
    ("video key", {"video": "clip.mp4", "captions": ["a"]}, 'has a "video"', "extract frames"),
    ("videos key", chat("a", videos=["clip.mp4"]), 'has a "videos"', "ffmpeg"),
    ("video part", chat([{"type": "video", "video": "a.mp4"}]), 'type "video"', "use frames"),
    ("video_url part", chat([{"type": "video_url", "video_url": {"url": "a"}}]), 'type "video_url"', "use frames"),
    ("video mark", chat("<video> what?"), "<video> mark", "extract frames"),
    ("video data URL", chat("a", image="data:video/mp4;base64,AAAA"), "is a video", "extract frames"),
    ("broken base64", chat("a", image="data:image/png;base64,@@@@"), "broken base64", "encode the file again"),
    ("base64 of no image", chat("a", image="data:image/png;base64,aGVsbG8="), "no image", "replace it"),
    ("base64 of nothing", chat("a", image="data:image/png;base64,"), "is empty (0 bytes)", "again"),
    ("data URL, no base64", chat("a", image="data:image/png,abc"), "begins with 'data:image/png", "write it as"),
    ("bare base64", chat("a", image=base64.b64encode(bytes(6000)).decode()), "is no path", "base64"),
    ("no assistant", {"messages": [{"role": "user", "content": "a"}]}, "no assistant turn", '"assistant"'),
    ("no messages", {"messages": []}, '"messages" is empty', "at least a user"),
    ("messages null", {"messages": None}, '"messages" is not a list', "write ["),
    ("messages a string", {"messages": "hello"}, '"messages" is not a list', "write ["),
    ("message a string", {"messages": ["hello"]}, "message 0 is no object", "write {"),
    ("unknown role", {"messages": [{"role": "bot", "content": "a"}]}, 'unknown role "bot"', "system, user, assistant"),
    ("no content", {"messages": [{"role": "user"}]}, 'no key "content"', "add it"),
    ("content a number", chat(3), '"content" has to be a string', "list of typed parts"),
    ("answer null", chat("a", None), '"content" has to be', "string"),
    ("part without type", chat([{"text": "a"}]), 'has no "type"', '{"type": "text"'),
    ("part a string", chat(["a"]), 'has no "type"', '{"type": "text"'),
    ("unknown part", chat([{"type": "audio", "audio": "a"}]), 'unknown part type "audio"', "known are text, image"),
    ("text part null", chat([{"type": "text", "text": None}]), 'no string under "text"', "add it"),
    ("image_url without URL", chat([{"type": "image_url", "image_url": {}}]), "names no URL", "write"),
    ("image part a number", chat([{"type": "image", "image": 5}]), "no path or URL but 5", "write a string"),
    ("empty answer", chat("a", "  "), "an empty response", "write it or remove the row"),
    ("empty typed answer", chat("a", []), "an empty response", "write it or remove the row"),
    (
        "image in an answer",
        chat("a", [IMAGE, text("b")], image="images/0.png"),
        "(assistant) holds an image",
        "move it",
    ),
    ("mark in an answer", chat("a", "see <image>"), "(assistant) holds an image", "user turns"),
    ("mark without image", chat("<image> a"), "has 1 <image> mark(s) but 0 image(s)", "equal"),
    ("two marks, one image", chat("<image><image>", image="images/0.png"), "2 <image> mark(s) but 1", "equal"),
    (
        "one mark, two images",
        chat("<image>", images=["images/0.png", "images/1.png"]),
        "1 <image> mark(s) but 2",
        "equal",
    ),
    (
        "no user turn for the image",
        {"messages": [{"role": "assistant", "content": "a"}], "image": "images/0.png"},
        "no user turn",
        "add a user turn",
    ),
    ("conversations empty", {"conversations": []}, '"conversations" is no filled list', "write ["),
    ("turn without value", {"conversations": [{"from": "human"}]}, "turn 0", '{"from": ..., "value": ...}'),
    (
        "answer that is not to be trained on",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
        'message 1 has "weight": 0',
        "remove the key",
    ),
    ("misspelt format", {"mesages": []}, 'is "mesages" meant to be "messages"?', "add it"),
    (
        "two system prompts",
        {"conversations": [{"from": "system", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
        "a system prompt under",
        "keep one",
    ),
    ("system is no text", {"conversations": [{"from": "gpt", "value": "b"}], "system": 3}, '"system" is no', "quotes"),
    ("tools are no JSON", chat("a") | {"tools": "look"}, '"tools" is text that is no JSON', "tool definitions"),
    ("tools are no list", chat("a") | {"tools": '{"type": "function"}'}, '"tools" is an object', "write ["),
    ("unknown from", {"conversations": [{"from": "me", "value": "a"}]}, 'from "me"', "known are human"),
]


@pytest.mark.parametrize(("row", "wrong", "remedy"), [pytest.param(*case[1:], id=case[0]) for case in REJECTED])
def test_rejected_row(folder: Path, row: Any, wrong: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        load(folder, [caption(0), "", row])
    message = str(caught.value)
    assert "train.jsonl:3: " in message
    assert "1 bad row(s)" in message
    assert wrong in message
    assert remedy in message.split("train.jsonl:3: ")[1]
    message.encode()  # printable


def broken_files() -> dict[str, tuple[bytes, str, str]]:
    jpeg, png = picture(1, "JPEG", width=200), picture(1)
    return {
        "zero bytes": (b"", "is empty (0 bytes)", "copy or download it again"),
        "truncated JPEG": (jpeg[:-300], "is truncated or corrupt", "copy or download it again"),
        "truncated PNG": (png[:-30], "is truncated or corrupt", "copy or download it again"),
        "no image": (b"hello", "is no image", "replace it"),
    }


@pytest.mark.parametrize("case", broken_files())
def test_rejected_image_file(folder: Path, case: str) -> None:
    content, wrong, remedy = broken_files()[case]
    (folder / "images" / "broken").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(folder, [caption(0), caption(1, image="images/broken")])
    message = str(caught.value)
    assert f'train.jsonl:2: image "images/broken" {wrong}' in message
    assert remedy in message


def test_rejected_row_of_another_captions_kind(folder: Path) -> None:
    columns = {"image": "images/1.png", "caption_0": "a"}
    with pytest.raises(UserError) as caught:
        load(folder, [caption(0), columns], caption_columns=("caption_0",))
    assert 'train.jsonl:2: has its captions as single keys, train.jsonl:1 as a list "captions"' in str(caught.value)
    assert "write all rows of the file in one kind" in str(caught.value)


@pytest.mark.parametrize("row", [caption(1), {"image": "images/1.png", "instruction": "a", "response": "b"}, chat("a")])
def test_too_few_captions(folder: Path, row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl:1: .*--captions_per_image is 3"):
        load(folder, [row], captions_per_image=3)


def test_all_bad_rows_are_listed_twenty_shown(folder: Path) -> None:
    rows = [caption(0, image=f"images/no{number}.png") for number in range(27)]
    with pytest.raises(UserError) as caught:
        load(folder, [caption(0), *rows])
    message = str(caught.value)
    assert "27 bad row(s)" in message
    assert sum(line.startswith("  train.jsonl:") for line in message.splitlines()) == 20
    assert "... and 7 more" in message
    assert "--skip_bad_rows" in message


def test_skip_bad_rows_goes_on_and_records_them(folder: Path) -> None:
    rows = ["{", caption(0), caption(1, image="images/no.png"), caption(2)]
    data = load(folder, rows, skip_bad_rows=True, num_train_examples=2)
    assert [row["where"] for row in data.train] == ["train.jsonl:2", "train.jsonl:4"]
    assert data.summary.num_skipped == 2
    assert data.summary.train.skipped[0].startswith("train.jsonl:1: is no valid JSON")
    assert any("2 bad rows skipped" in line for line in data.summary.lines())


def test_skip_bad_rows_of_a_wholly_bad_file_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)2 bad row\(s\).*No good row is left"):
        load(folder, ["{", "}"], skip_bad_rows=True)


def test_a_split_without_rows_is_named(folder: Path) -> None:
    write_rows(folder / "train.jsonl", [caption(0)])
    write_rows(folder / "test.jsonl", [caption(1, test=True)])
    with pytest.raises(UserError, match="split 'test' has no rows left to use"):
        load_examples(DataConfig(str(folder)), lambda row, config: None if "test" in row else caption_row(row, config))


def test_a_fault_in_the_recipes_piece_keeps_its_kind_and_names_the_row(folder: Path) -> None:
    def piece(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
        return {"images": [], "prompt": row["captions"][7], "completions": []}

    write_rows(folder / "train.jsonl", [caption(0)])
    with pytest.raises(IndexError) as caught:
        load_examples(DataConfig(str(folder)), piece)
    assert caught.value.__notes__ == ["while reading train.jsonl:1"]


def test_a_broken_image_found_while_training_names_the_row(folder: Path) -> None:
    data = load(folder, [caption(0), caption(1)])
    (folder / "images" / "1.png").write_bytes(picture(1)[:60])
    assert data.train[0]["images"]
    with pytest.raises(UserError, match=r'train\.jsonl:2: image "images/1\.png" (is truncated|has a corrupt)'):
        data.train[1]
    (folder / "images" / "1.png").unlink()
    with pytest.raises(UserError, match=r"train\.jsonl:2: .*cannot be read"):
        data.train[1]


# --- rejected files, splits and settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "the file is empty; write one JSON object a line"),
        (b"\n \r\n", "the file is empty"),
        ("hello".encode("utf-16"), r"train\.jsonl:1: is UTF-16; save it as UTF-8"),
        (b"[]", "the file is empty"),
        (
            b'[{"image": "a"},\n{"image": "b"]',
            r"train\.jsonl:2: element \[1\] of the array is no valid JSON .*: correct",
        ),
        (b'[{"image": "a"} {"image": "b"}]', r"train\.jsonl:1: element \[1\] of the array.*Expecting ','"),
        (b'[{"image": "a"},', r"train\.jsonl:1: element \[1\] of the array.*Expecting '\]'"),
    ],
)
def test_rejected_file(folder: Path, content: bytes, wrong: str) -> None:
    (folder / "train.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=wrong):
        load_examples(DataConfig(str(folder)))


def test_rejected_json_file_missing_file_and_folder_without_rows(folder: Path) -> None:
    (folder / "data.json").write_text('{\n"image": 1}')
    with pytest.raises(UserError, match=r"data\.json:1: is neither an array of rows nor JSON lines"):
        load_examples(DataConfig(str(folder / "data.json")))
    with pytest.raises(UserError, match="no such file or folder"):
        load_examples(DataConfig(str(folder / "missing.jsonl")))
    with pytest.raises(UserError, match=r"no captions\.jsonl and no <split>\.jsonl; it holds data\.json, images"):
        load_examples(DataConfig(str(folder)))


@pytest.mark.parametrize("name", ["captions_per_image", "num_train_examples", "num_eval_examples"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name} 0: has to be 1 or more"):
        DataConfig("somewhere", **{name: 0})


def test_unknown_split_lists_those_there_are(folder: Path) -> None:
    rows = [caption(0, split="train"), caption(1, split="train"), caption(2, split="validation")]
    write_rows(folder / "captions.jsonl", rows)
    with pytest.raises(UserError) as caught:
        load_examples(DataConfig(str(folder), dataset_test_split="valid"))
    assert 'no split "valid"; it has train (2 rows), validation (1 rows)' in str(caught.value)
    assert 'Did you mean "validation"?' in str(caught.value)
    assert "--dataset_test_split" in str(caught.value)


@pytest.mark.parametrize("bad", ["{", caption(3), caption(3, split=1)])
def test_a_line_that_names_no_split_is_a_bad_row(folder: Path, bad: Any) -> None:
    write_rows(folder / "captions.jsonl", [caption(0, split="train"), bad, caption(1, split="test")])
    with pytest.raises(UserError, match=r"(?s)1 bad row\(s\).*captions\.jsonl:2: (is no valid JSON|has no text under)"):
        load_examples(DataConfig(str(folder)))
    data = load_examples(DataConfig(str(folder), skip_bad_rows=True))
    assert (len(data.train), len(data.evaluation), data.summary.num_skipped) == (1, 1, 1)


# --- splits -------------------------------------------------------------------------------------------------------


def test_named_splits_take_the_first_rows_in_file_order(folder: Path) -> None:
    rows = [caption(shade, split="test" if shade > 6 else "train") for shade in range(10)]
    write_rows(folder / "captions.jsonl", rows)
    data = load_examples(DataConfig(str(folder), num_train_examples=3, num_eval_examples=2))
    assert [row["where"] for row in data.train] == [f"captions.jsonl:{line}" for line in (1, 2, 3)]
    assert [row["where"] for row in data.evaluation] == [f"captions.jsonl:{line}" for line in (8, 9)]


def test_a_folder_with_one_file_is_that_file(folder: Path) -> None:
    write_rows(folder / "train.jsonl", [caption(shade) for shade in range(10)])
    data = load_examples(DataConfig(str(folder)))
    assert (len(data.train), len(data.evaluation)) == (9, 1)


def test_more_rows_asked_for_than_there_are_is_noted(folder: Path) -> None:
    data = load(folder, [caption(0)], num_train_examples=5)
    assert any("--num_train_examples asks for 5, there are 1" in line for line in data.summary.lines())


def test_images_in_both_named_splits_are_noted(folder: Path) -> None:
    (folder / "images" / "copy.png").write_bytes(picture(9))
    data = load(folder, [caption(0), caption(1, image="images/copy.png")])
    assert any("1 evaluation rows show an image (or text) that is also trained on" in x for x in data.summary.lines())
    assert not any("also trained on" in line for line in load(folder, [caption(0), caption(1)]).summary.lines())


def test_split_by_image_keeps_equal_bytes_together(folder: Path) -> None:
    for shade in range(10):
        (folder / "images" / f"copy{shade}.png").write_bytes(picture(shade))
    rows = [caption(shade) for shade in range(10)] + [caption(s, image=f"images/copy{s}.png") for s in range(10)]
    path = write_rows(folder / "rows.jsonl", rows)
    for seed in range(5):
        data = load_examples(DataConfig(str(path), num_eval_examples=6, seed=seed))
        sides = [{row["references"][0] for row in side} for side in (data.train, data.evaluation)]
        assert not sides[0] & sides[1]
        assert (len(data.train), len(data.evaluation)) == (14, 6)


def test_split_by_image_depends_on_the_seed_only(folder: Path) -> None:
    path = write_rows(folder / "rows.jsonl", [caption(shade) for shade in range(10)])

    def held_out(seed: int) -> list[str]:
        config = DataConfig(str(path), num_eval_examples=3, seed=seed)
        return [row["image_names"][0] for row in load_examples(config).evaluation]

    assert held_out(1) == held_out(1)
    assert len({tuple(held_out(seed)) for seed in range(8)}) > 1


def test_too_many_evaluation_rows_asked_for_holds_out_a_tenth(folder: Path) -> None:
    path = write_rows(folder / "rows.jsonl", [caption(shade) for shade in range(10)])
    data = load_examples(DataConfig(str(path), num_eval_examples=500))
    assert (len(data.train), len(data.evaluation)) == (9, 1)
    assert any("10 rows cannot spare 500" in line for line in data.summary.lines())


def test_rows_of_one_image_cannot_be_divided(folder: Path) -> None:
    path = write_rows(folder / "rows.jsonl", [caption(1), caption(1)])
    with pytest.raises(UserError, match="without showing an image on both sides; add images"):
        load_examples(DataConfig(str(path)))


@settings(max_examples=200, deadline=None)
@given(
    keys=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3), min_size=1, max_size=30),
    wanted=st.integers(1, 15),
    seed=st.integers(0, 3),
)
def test_no_key_is_on_both_sides(keys: list[list[int]], wanted: int, seed: int) -> None:
    names = [str(row) for row in range(len(keys))]
    [(train, evaluation)] = split_by_image([Undivided(keys, names, wanted)], seed)
    assert sorted(train + evaluation) == list(range(len(keys)))
    assert train == sorted(train) and evaluation == sorted(evaluation)
    assert not {k for row in train for k in keys[row]} & {k for row in evaluation for k in keys[row]}
    assert len(evaluation) <= wanted
    assert train
    assert [(train, evaluation)] == split_by_image([Undivided(keys, names, wanted)], seed)


@given(extra=st.integers(1, 50), seed=st.integers(0, 3))
def test_added_rows_do_not_reshuffle_the_others(extra: int, seed: int) -> None:
    def held_out(count: int) -> set[int]:
        rows = Undivided([[row] for row in range(count)], [str(row) for row in range(count)], 10)
        return set(split_by_image([rows], seed)[0][1])

    # A new row may push an old one out of the evaluation side, but never bring another old one in.
    assert held_out(50 + extra) & set(range(50)) <= held_out(50)


# --- remote images ------------------------------------------------------------------------------------------------


class PictureServer(http.server.BaseHTTPRequestHandler):
    num_requests = 0

    def do_GET(self) -> None:
        type(self).num_requests += 1
        body = {"/5.png": picture(5), "/page.png": b"<html>Not for you</html>"}.get(self.path, b"no")
        self.send_response(404 if body == b"no" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_remote_images_with_leave(folder: Path, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = serve(PictureServer)
    PictureServer.num_requests = 0
    for _ in range(2):
        data = load(folder, [caption(0, image=f"{url}/5.png")], allow_remote_images=True)
        assert shows(data.train[0]["images"][0], 5)
        assert data.train[0]["image_names"] == [f"{url}/5.png"]
    assert PictureServer.num_requests == 1
    with pytest.raises(UserError, match=r"train\.jsonl:1: .*could not be fetched \(HTTP Error 404"):
        load(folder, [caption(0, image=f"{url}/no.png")], allow_remote_images=True)
    for _ in range(2):
        with pytest.raises(UserError, match=r"train\.jsonl:1: .*it is a web page"):
            load(folder, [caption(0, image=f"{url}/page.png")], allow_remote_images=True)
    assert len(list((tmp_path / "cache" / "qvl" / "remote-images").iterdir())) == 1


def test_remote_images_too_large(folder: Path, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("qvl.image_refs.REMOTE_LIMIT_BYTES", 10)
    with pytest.raises(UserError, match=r"train\.jsonl:1: .*is larger than"):
        load(folder, [caption(0, image=f"{serve(PictureServer)}/5.png")], allow_remote_images=True)
    assert not (tmp_path / "cache").exists()


# --- the data sets ------------------------------------------------------------------------------------------------


def test_building_decodes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    load_pixels = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self) or load_pixels(self))
    data = load(folder, [caption(shade) for shade in range(9)])
    separate = separate_completions(data.train)
    assert image_sizes(data.train) == [[(8, 6)]] * 9
    rows = list(undecoded_examples(data.train))
    assert (rows[3]["id"], rows[3]["image_sizes"], rows[3]["completions"]) == ("train-4", [[8, 6]], ["picture 3"])
    assert data.train.with_format(None)["id"][3] == "train-4"
    assert not decoded
    data.train[2]
    separate[2]
    assert len(decoded) >= 2


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(folder: Path, context: str) -> None:
    rows = [caption(0), chat("a", image=data_url(1)), chat("b", image="images/2.png"), chat("c")]
    train = load(folder, rows).train
    loader = DataLoader(train, batch_size=2, num_workers=1, multiprocessing_context=context, collate_fn=list)
    examples = [example for batch in loader for example in batch]
    assert [example["id"] for example in examples] == [f"train-{line}" for line in (1, 2, 3, 4)]
    assert [shows(examples[row]["images"][0], row) for row in range(3)] == [True] * 3


def test_hub_rows_in_a_worker_and_a_broken_one(hub: Any) -> None:
    png = bytearray(picture(2))
    png[60:90] = bytes(30)
    images = [stored(1), {"bytes": bytes(png), "path": None}]
    broken = hub_table({"image": images, "caption_0": ["a", "b"], "caption_1": ["c", "d"]})
    train = load_examples(hub(train=broken, test=flickr_like([3]))).train
    loader = DataLoader(train.select([0]), num_workers=1, collate_fn=list, multiprocessing_context="fork")
    assert [shows(batch[0]["images"][0], 1) for batch in loader] == [True]
    with pytest.raises(UserError, match="someone/photos train row 1: image") as caught:
        train[1]
    # The loader builds a worker's exception anew from its text.
    assert isinstance(type(caught.value)("text"), UserError)


def test_separate_completions(folder: Path) -> None:
    train = load(folder, [caption(0), caption(1)], captions_per_image=2).train
    separate = separate_completions(train)
    assert [row["id"] for row in separate] == ["train-1/0", "train-1/1", "train-2/0", "train-2/1"]
    example = separate[3]
    assert example["completion"] == [{"role": "assistant", "content": [text("number 1")]}]
    assert example["prompt"] == train[1]["prompt"]
    assert shows(example["images"][0], 1)
    assert "completions" not in example
    chats = load(folder, [chat("a")]).train
    assert separate_completions(chats) is chats


def test_one_picture_under_several_names_has_one_key(folder: Path) -> None:
    shades = (1, 2, 1)
    rows = [*(chat(f"Question {shade}?", image=data_url(shade)) for shade in shades), chat("No picture?")]
    load(folder, [caption(0)])
    write_rows(folder / "test.jsonl", rows)
    found = [row["image_keys"] for row in load_examples(DataConfig(str(folder))).evaluation]
    assert found[0] == found[2] != found[1]
    assert len(found[0]) == 1 and found[3] == []


def test_prompt_messages_of_a_prompt_row(folder: Path) -> None:
    example = load(folder, [caption(0)]).train[0]
    assert prompt_messages(example) == example["prompt"]


def test_own_piece_reads_other_rows_and_may_leave_some_out(folder: Path) -> None:
    def piece(row: dict[str, Any], config: DataConfig) -> dict[str, Any] | None:
        if row["grade"] < 3:
            return None
        prompt = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"{config.instruction} <image>"},
        ]
        return {"images": [row["file"]], "prompt": prompt, "completions": [row["title"]], "references": ["x", "y"]}

    rows = [{"file": f"images/{grade}.png", "title": "t", "grade": grade} for grade in (1, 3, 5)]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", rows[1:])
    data = load_examples(DataConfig(str(folder), instruction="What?"), piece)
    assert [row["where"] for row in data.train] == ["train.jsonl:2", "train.jsonl:3"]
    assert data.train[0]["prompt"][1]["content"] == [text("What? "), IMAGE]
    assert data.train[0]["references"] == ["x", "y"]
    assert data.summary.train.num_left_out == 1
    write_rows(folder / "train.jsonl", [{"file": "images/1.png", "title": "t"}])
    with pytest.raises(UserError, match=r'train\.jsonl:1: has no key "grade"'):
        load_examples(DataConfig(str(folder)), piece)


# --- the summary --------------------------------------------------------------------------------------------------


def test_summary_counts_and_sizes(folder: Path) -> None:
    Image.new("RGB", (30, 40)).save(folder / "images" / "large.png")
    Image.new("RGB", (2, 3)).save(folder / "images" / "small.png")
    rows = [caption(0), caption(0, image="images/large.png"), caption(0, image="images/small.png"), chat("no image")]
    summary = load(folder, rows).summary
    assert (summary.train.num_examples, summary.train.num_images) == (4, 3)
    assert (summary.train.smallest, summary.train.median, summary.train.largest) == ((2, 3), (8, 6), (30, 40))
    assert summary.revision is None
    lines = "\n".join(summary.lines())
    assert "train: 4 examples, 3 images (smallest 2x3, median 8x6, largest 30x40)" in lines
    assert summary.fingerprint[:16] in lines


def test_fingerprint_changes_with_texts_images_and_order_only(folder: Path) -> None:
    def fingerprint(rows: list[Any], **settings: Any) -> str:
        return load(folder, rows, **settings).summary.fingerprint

    rows = [caption(0), caption(1)]
    first = fingerprint(rows)
    assert fingerprint(rows) == first
    seen = {
        first,
        fingerprint([caption(0), caption(1, captions=["picture 1", "number one"])]),
        fingerprint([caption(1), caption(0)]),
        fingerprint([caption(0), caption(2)]),
        fingerprint(rows, instruction="Another."),
        fingerprint(rows, captions_per_image=2),
    }
    Image.new("RGB", (30, 40)).save(folder / "images" / "1.png")
    seen.add(fingerprint(rows))
    assert len(seen) == 7


def test_hub_revision_is_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    table = flickr_like([1])
    commit = "0123456789abcdef0123456789abcdef01234567"
    table.info.download_checksums = {f"hf://datasets/someone/photos@{commit}/data/train.parquet": {}}
    assert table_source("someone/photos", {"train": undecoded(table)}).revision == commit


# --- real photos and the embedded scenes --------------------------------------------------------------------------


def shared_folder(name: str) -> Path:
    path = Path(os.environ.get("QVL_SHARED", Path(__file__).parents[2] / "shared")) / name
    if not path.is_dir():
        pytest.skip(f"no {name} beside the project")
    return path


def test_real_photos() -> None:
    data = load_examples(DataConfig(str(shared_folder("flickr8k")), captions_per_image=5))
    assert (len(data.train), len(data.evaluation)) == (247, 429)
    example = data.train[100]
    assert example["images"][0].size == image_sizes(data.train)[100][0]
    assert len(example["completions"]) == 5
    assert max(example["images"][0].size) == 384


def test_embedded_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = DataConfig("qvl/scenes", num_train_examples=4, num_eval_examples=2, captions_per_image=5)
    data = load_examples(config)
    assert (len(data.train), len(data.evaluation)) == (4, 2)
    assert len(data.train[0]["completions"]) == 5
    assert data.train[0]["images"][0].mode == "RGB"
    assert load_examples(config).summary.fingerprint == data.summary.fingerprint
    assert load_examples(replace(config, seed=7)).summary.fingerprint != data.summary.fingerprint
    assert list((tmp_path / "qvl").iterdir())
