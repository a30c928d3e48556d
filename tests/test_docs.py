"""The documents say what the code does: flags, files, commands, data formats, links."""

import ast
import dataclasses
import functools
import itertools
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

PROJECT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
RECIPES = sorted(path.name for path in (PROJECT / "recipes").glob("*.py"))
# What the README's table of renamed flags says beyond the flags.
RENAMED_FILES = {"configs/*.yaml", "lora_predictions.jsonl", "metrics_lora.json"}


def read(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


def docstring(recipe: str) -> str:
    return ast.get_docstring(ast.parse(read(f"recipes/{recipe}"))) or ""


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, indented ones (in lists) too."""
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{match[1]}", "", match[2], flags=re.MULTILINE) for match in found]


def without_code_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", without_code_blocks(text), re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def recipe_commands() -> list[str]:
    """Every command line of a recipe in the documents and the recipes' docstrings: its file and arguments."""
    lines = [line for name in DOCUMENTS for block in code_blocks(read(name), "bash") for line in block.splitlines()]
    lines += [span for name in DOCUMENTS for span in inline_code(read(name))]
    lines += [line for recipe in RECIPES for line in docstring(recipe).splitlines()]
    found = [match[1] for line in lines if (match := re.search(r"\bpython recipes/(\w+\.py.*)", line))]
    return list(dict.fromkeys(shlex.join(shlex.split(command, comments=True)) for command in found))


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_code_blocks(text))


@functools.cache
def known_flags() -> set[str]:
    from trl import ModelConfig, SFTConfig

    from qvl.flags import RecipeArguments

    fields = [field for part in (RecipeArguments, ModelConfig, SFTConfig) for field in dataclasses.fields(part)]
    # The parser's own way to switch off what is on.
    negated = {f"no_{field.name}" for field in fields if field.default is True}
    return {*(field.name for field in fields), *negated, "config", "help"}


def test_the_rename_table_is_that_of_the_code() -> None:
    from qvl.flags import RENAMED

    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)`.*\|$", read("README.md").split("| old | now |")[1], re.MULTILINE)
    table = dict(itertools.takewhile(lambda row: row[0] != "flickr8k.py", rows))
    flags = {old: new for old, new in table.items() if old not in RENAMED_FILES}
    written = {"USE_MOCK": "USE_MOCK=True"}
    assert flags == {written.get(old, f"--{old}"): f"--{new}" for old, new in RENAMED.items()}
    assert table.keys() - flags.keys() == RENAMED_FILES
    assert table["configs/*.yaml"] == "--config"
    for new in (table["lora_predictions.jsonl"], "metrics.json"):
        writers = read("qvl/run_folder.py") + read("qvl/evaluate_stages.py")
        assert f'"{new}"' in writers.replace("{part}", "finetuned")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_flags_in_the_text_exist(name: str) -> None:
    from qvl.flags import RENAMED

    spans = [span for span in inline_code(read(name)) if span.startswith("--")]
    flags = {flag for span in spans for flag in re.findall(r"(?<![\w-])--(\w[\w-]*)", span)}
    assert flags - known_flags() - RENAMED.keys() == set()


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_in_a_recipes_docstring_exist(recipe: str) -> None:
    assert set(re.findall(r"(?<![\w-])--(\w[\w-]*)", docstring(recipe))) - known_flags() == set()


@pytest.mark.parametrize("command", recipe_commands())
def test_command_lines_are_accepted(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvl.settings import parse_settings

    recipe, *words = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    for flag, value in itertools.pairwise(words):
        if flag == "--config":
            (tmp_path / value).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / value).write_text("seed: 7\n", encoding="utf-8")
    definition = runpy.run_path(str(PROJECT / "recipes" / recipe))["RECIPE"]
    if "--help" in words:
        return  # prints and exits
    settings = parse_settings(definition.defaults, definition.smoke, words)
    assert settings.recipe.dataset_name
    if "none" in words:
        assert None in (settings.recipe.num_train_examples, settings.recipe.num_eval_examples)


def tree() -> list[str]:
    """Paths of the README's tree of the repository, folders with a slash at the end."""
    block = next(block for block in code_blocks(read("README.md"), "text") if block.startswith("README.md\n"))
    paths, folder = [], ""
    for line in block.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        paths.append(name if name == folder or not line.startswith(" ") else folder + name)
    return paths


def test_the_tree_is_the_repositorys() -> None:
    listed = tree()
    assert len(listed) == len(set(listed))
    assert [path for path in listed if not (PROJECT / path).exists()] == []
    held = {
        str(path.relative_to(PROJECT))
        for folder in ("qvl", "recipes", "ray_jobs", "environments")
        for path in (PROJECT / folder).iterdir()
        if path.is_file() and path.name != "__init__.py" and not path.name.startswith(".")
    }
    assert held - set(listed) == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_files_named_in_the_text_exist(name: str) -> None:
    text = read(name)
    for target in re.findall(r"\]\(([^)]+)\)", without_code_blocks(text)):
        path, _, fragment = target.partition("#")
        if path.startswith("https://"):
            continue
        assert not path or (PROJECT / path).exists(), target
        if fragment:
            assert fragment in map(anchor, headings(read(path or name))), target
    files = re.findall(r"`((?:qvl|recipes|tests|environments)/[\w./-]+)`", text)
    embedded = {"qvl/scenes", "qvl/chats", *(f"qvl/{path.name}" for path in (PROJECT / "qvl" / "assets").iterdir())}
    assert [file for file in files if file not in embedded and not (PROJECT / file).exists()] == []


def test_headings_that_messages_point_to_exist() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((PROJECT / "qvl").glob("*.py")))
    pointed_to = re.findall(r"README, '([^']+)'", text)
    assert pointed_to
    assert set(pointed_to) - set(headings(read("README.md"))) == set()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    named = {target for name in DOCUMENTS for target in re.findall(r"(?:^|`)make ([a-z]+)", read(name), re.MULTILINE)}
    assert {"demo", "test"} <= named
    assert named - targets == set()


def test_the_published_scores_are_those_of_the_recipe() -> None:
    (row,) = re.findall(r"^\| `flickr8k\.py` \|.*$", read("README.md"), re.MULTILINE)
    scores = re.findall(r"\b0\.\d{4}\b", row)
    assert len(scores) == 2
    assert all(score in docstring("flickr8k.py") for score in scores)


def test_documents_name_no_path_of_one_machine() -> None:
    paths = [PROJECT / name for name in DOCUMENTS] + [
        path for folder in ("recipes", "environments") for path in (PROJECT / folder).iterdir() if path.is_file()
    ]
    offenders = {
        path.name: found
        for path in paths
        if (found := re.findall(r"(?<![\w./])/(?:work|tmp|root)\b\S*", path.read_text(encoding="utf-8")))
    }
    assert offenders == {}


EXAMPLES = code_blocks(read("README.md"), "jsonl")


def image_paths(value: Any) -> Iterator[str]:
    """Strings of a JSON value that end as image files do."""
    if isinstance(value, str) and value.endswith((".jpg", ".png")):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from image_paths(child)


def test_the_readme_has_an_example_of_each_format() -> None:
    keys = [set(json.loads(line)) for block in EXAMPLES for line in block.splitlines()]
    for key in ("captions", "instruction", "messages", "conversations"):
        assert any(key in row for row in keys), key


@pytest.mark.parametrize("block", EXAMPLES)
def test_data_examples_are_accepted(block: str, tmp_path: Path) -> None:
    from qvl.data import DataConfig, load_examples

    rows = [json.loads(line) for line in block.splitlines()]
    for shade, name in enumerate(image_paths(rows)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), (shade, 0, 0)).save(tmp_path / name)
    if all("split" in row for row in rows):
        (tmp_path / "captions.jsonl").write_text(block, encoding="utf-8")
    else:
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").write_text(block, encoding="utf-8")
    data = load_examples(DataConfig(str(tmp_path)))
    loaded = [*data.train, *data.evaluation]
    assert len(loaded) == len(rows) if "split" in rows[0] else 2 * len(rows)
    for example in loaded:
        parts = [part for message in example.get("messages") or example["prompt"] for part in message["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(example["images"])
        assert not any("<image>" in part.get("text", "") for part in parts)
        assert example["references"]
