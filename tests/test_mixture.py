"""Several data sets mixed by weight: TRL's list, TRL's arithmetic, a fingerprint for each."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import picture
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

import qvl.sources
from qvl.data import DataConfig, load_examples
from qvl.data_config import MixedSet
from qvl.errors import UserError
from qvl.examples import undecoded_examples
from qvl.mixture import mixture_counts, read_mixture
from qvl.settings import parse_settings
from qvl.splits import Undivided, split_by_image


def write_chats(path: Path, num_rows: int, word: str, split: str | None = None) -> str:
    rows = []
    for number in range(num_rows):
        turns = [{"role": "user", "content": f"{word} {number}?"}, {"role": "assistant", "content": f"{word}!"}]
        rows.append({"messages": turns} | ({"split": split} if split else {}))
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Forty and ten training rows, eight and four evaluation rows; both files have the same name."""
    paths = []
    for word, num_train, num_eval in (("much", 40, 8), ("little", 10, 4)):
        folder = tmp_path / word
        folder.mkdir()
        path = write_chats(folder / "chats.jsonl", num_train, word, "train")
        paths.append(write_chats(folder / "chats.jsonl", num_eval, word, "test") and path)
    return paths[0], paths[1]


def mixed(files: tuple[str, str], fractions: Any = (None, None), **settings: Any) -> Any:
    sets = read_mixture([{"path": p, "fraction": f} for p, f in zip(files, fractions, strict=True)])
    return load_examples(DataConfig("unused", datasets=sets, **settings))


def words(dataset: Any) -> list[str]:
    return [row["references"][0] for row in undecoded_examples(dataset)]


def test_without_fractions_every_row_is_used(files: tuple[str, str]) -> None:
    data = mixed(files)
    assert words(data.train) == ["much!"] * 40 + ["little!"] * 10
    assert words(data.evaluation) == ["much!"] * 8 + ["little!"] * 4


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (7, 7)])
def test_fractions_are_shares_and_no_row_is_used_twice(files: tuple[str, str], fractions: tuple[float, float]) -> None:
    data = mixed(files, fractions)
    assert words(data.train) == ["much!"] * 10 + ["little!"] * 10
    assert words(data.evaluation) == ["much!"] * 4 + ["little!"] * 4


def test_a_limit_keeps_the_shares(files: tuple[str, str]) -> None:
    data = mixed(files, (0.75, 0.25), num_train_examples=8, num_eval_examples=4)
    assert words(data.train) == ["much!"] * 6 + ["little!"] * 2
    assert words(data.evaluation) == ["much!"] * 3 + ["little!"]
    assert words(mixed(files, num_train_examples=10).train) == ["much!"] * 8 + ["little!"] * 2


def test_the_first_rows_of_each_are_taken_and_named_by_their_file(files: tuple[str, str]) -> None:
    rows = list(undecoded_examples(mixed(files, (0.5, 0.5)).train))
    assert rows[0]["where"] == f"{files[0]} (chats.jsonl:1)"
    assert rows[10]["where"] == f"{files[1]} (chats.jsonl:1)"
    assert rows[19]["messages"][0]["content"] == [{"type": "text", "text": "little 9?"}]
    assert len({row["id"] for row in rows}) == 20


def test_each_source_has_its_fingerprint(files: tuple[str, str]) -> None:
    summary = mixed(files, (0.5, 0.5)).summary
    alone = load_examples(DataConfig(files[1])).summary
    assert [part.dataset_name for part in summary.parts] == list(files)
    assert summary.parts[1].fingerprint == alone.fingerprint
    for part in summary.parts:
        assert f"of {part.dataset_name}, fingerprint {part.fingerprint[:16]}: 10 to train" in "\n".join(summary.lines())
    write_chats(Path(files[0]), 1, "late", "test")
    again = mixed(files).summary
    assert again.parts[0].fingerprint != mixed((files[1], files[1])).summary.parts[0].fingerprint
    assert again.parts[1].fingerprint == alone.fingerprint


def test_a_set_without_splits_is_divided_and_bad_rows_name_their_set(tmp_path: Path, files: tuple[str, str]) -> None:
    plain = write_chats(tmp_path / "plain.jsonl", 20, "plain")
    data = mixed((files[1], plain))
    assert words(data.train).count("plain!") == 18
    assert words(data.evaluation).count("plain!") == 2
    Path(plain).write_text('{"messages": []}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"plain\.jsonl: 1 bad row"):
        mixed((files[1], plain))


def test_hub_tables_with_the_same_split_names_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def table(colour: str) -> Any:
        pictures = [Image.new("RGB", (8 + number, 8), colour) for number in range(3)]
        columns = {"image": pictures, "caption": [f"{colour} {number}" for number in range(3)]}
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        return datasets.Dataset.from_dict(columns, features=features)

    def load(config: DataConfig) -> dict[str, Any]:
        colour = config.dataset_name.partition("/")[2]
        return {"train": table(colour), "test": table(colour).select([0])}

    monkeypatch.setattr(qvl.sources, "_load_from_hub", load)
    data = load_examples(
        DataConfig("", caption_columns=("caption",), datasets=read_mixture([{"path": "a/red"}, {"path": "a/blue"}]))
    )
    colours = [row["images"][0].getpixel((0, 0)) for row in data.train]
    assert colours == [(255, 0, 0)] * 3 + [(0, 0, 255)] * 3
    assert len(data.evaluation) == 2


@given(
    st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.01, 100)), min_size=1, max_size=5),
    st.none() | st.integers(1, 20_000),
    st.booleans(),
)
def test_counts_are_shares_of_what_there_is(sets: list[tuple[int, float]], limit: int | None, weighted: bool) -> None:
    sizes = [size for size, _ in sets]
    fractions = [fraction if weighted else None for _, fraction in sets]
    counts = mixture_counts(sizes, fractions, limit)
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    if limit is not None:
        assert sum(counts) <= limit + len(sets) / 2
    elif not weighted:
        assert counts == sizes
    else:
        assert any(count == size for count, size in zip(counts, sizes, strict=True)), "larger would still fit"
    weights = [fraction if fraction is not None else size for size, fraction in zip(sizes, fractions, strict=True)]
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - weight / sum(weights) * sum(counts)) <= 1 + len(sets) / 2


def test_counts_are_trls(tmp_path: Path) -> None:
    from trl.scripts.utils import get_dataset

    sizes, fractions = [40, 10, 25], [0.2, 0.5, 0.3]
    if "fraction" not in {field.name for field in dataclasses.fields(DatasetConfig)}:
        pytest.skip("this TRL has no fractions yet")
    paths = [write_chats(tmp_path / f"{size}.jsonl", size, str(size)) for size in sizes]
    entries = [
        DatasetConfig(path="json", data_files=path, fraction=fraction)
        for path, fraction in zip(paths, fractions, strict=True)
    ]
    theirs = get_dataset(DatasetMixtureConfig(datasets=entries))["train"]
    answers = [row["messages"][1]["content"] for row in theirs]
    assert [answers.count(f"{size}!") for size in sizes] == mixture_counts(sizes, fractions, None)


def test_names_are_upstreams() -> None:
    upstream = {field.name for field in dataclasses.fields(DatasetConfig)} | {"fraction"}
    assert {field.name for field in dataclasses.fields(MixedSet)} <= upstream


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{"name": "a"}], r"entry 1 needs a `path`"),
        ([{"path": "a"}, {"path": "b", "fractoin": 1}], r"entry 2 has the unknown key `fractoin`: known are path"),
        ([{"path": "a", "columns": ["x"]}], r"`columns` is refused: rows are read"),
        ([{"path": "a", "data_files": "x"}], r"`data_files` is refused: name the file as `path`"),
        ([{"path": "a", "fraction": 0}], r"`fraction: 0` has to be a number above 0"),
        ([{"path": "a", "fraction": 1}, {"path": "b"}], r"entry 2 has no `fraction`"),
        ([{"path": "a", "split": 3}], r"`split: 3` has to be text"),
    ],
)
def test_a_wrong_list_is_refused(entries: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_mixture(entries)


def test_the_list_comes_from_yaml_or_the_command_line_and_goes_back(tmp_path: Path) -> None:
    entries = [{"path": "a.jsonl", "fraction": 0.7}, {"path": "b/c", "name": "d", "split": "e", "fraction": 0.3}]
    config = tmp_path / "mix.yaml"
    config.write_text(json.dumps({"datasets": entries}), encoding="utf-8")
    words = ["--datasets", *map(json.dumps, entries)]
    first = parse_settings({}, {}, ["--config", str(config)])
    second = parse_settings({}, {}, words)
    third = parse_settings({}, {}, [], {"datasets": entries})
    config.write_text(first.to_yaml(), encoding="utf-8")
    again = parse_settings({}, {}, ["--config", str(config)])
    assert [s.recipe.datasets for s in (first, second, third, again)] == [entries] * 4
    assert parse_settings({}, {}, ["--datasets", "a.jsonl", "b.jsonl"]).recipe.datasets == [
        {"path": "a.jsonl"},
        {"path": "b.jsonl"},
    ]
    with pytest.raises(UserError, match="is no JSON"):
        parse_settings({}, {}, ["--datasets", "{path: a}"])


# --- one picture in several sets


NUM_PICTURES = 60


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Pictures of one size each beside a copy in another folder."""
    for folder in ("captions", "copies"):
        (tmp_path / folder).mkdir()
        for number in range(NUM_PICTURES):
            picture(8, 8, seed=number).save(tmp_path / folder / f"{number}.png")
    return [tmp_path / "captions" / f"{number}.png" for number in range(NUM_PICTURES)]


def write_captions(pictures: list[Path], num_test: int | None = None) -> str:
    """A row for each picture, by its name; without splits, or with the last pictures in `test`."""
    rows: list[dict[str, Any]] = [{"image": path.name, "captions": [f"Number {path.stem}."]} for path in pictures]
    if num_test is not None:
        first_test = len(rows) - num_test
        rows = [{**row, "split": "test" if number >= first_test else "train"} for number, row in enumerate(rows)]
    return write_rows(pictures[0].parent / "captions.jsonl", rows)


def write_questions(pictures: list[Path], num_questions: int = 2, split: Any = None) -> str:
    """Rows for each picture, by its absolute path, in a folder of their own."""
    rows = []
    for path in pictures:
        for number in range(num_questions):
            row = {"image": str(path), "instruction": f"{number}?", "response": f"{number}!"}
            rows.append(row | ({"split": split(int(path.stem))} if split else {}))
    return write_rows(pictures[0].parents[1] / "questions.jsonl", rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def num_shared(data: Any) -> int:
    """Evaluation rows whose picture is trained on, by what it shows."""
    trained_on = {image.tobytes() for row in data.train for image in row["images"]}
    return sum(any(image.tobytes() in trained_on for image in row["images"]) for row in data.evaluation)


def counts(data: Any) -> list[tuple[int, int]]:
    return [(part.train.num_examples, part.evaluation.num_examples) for part in data.summary.parts]


def screen(data: Any) -> str:
    return "\n".join(data.summary.lines())


@pytest.mark.parametrize("folder", ["captions", "copies"])
def test_a_picture_of_two_undivided_sets_is_on_one_side(pictures: list[Path], folder: str) -> None:
    shown_again = [path.parents[1] / folder / path.name for path in pictures]
    for seed in range(3):
        data = mixed((write_captions(pictures), write_questions(shown_again)), seed=seed)
        assert num_shared(data) == 0
        assert counts(data) == [(54, 6), (108, 12)]
    assert "WARNING" not in screen(data)


def test_rows_follow_the_splits_that_another_set_names(pictures: list[Path]) -> None:
    captions, questions = write_captions(pictures, num_test=10), write_questions(pictures)
    for files in ((captions, questions), (questions, captions)):
        data = mixed(files)
        assert num_shared(data) == 0
        assert sorted(counts(data)) == [(50, 10), (100, 20)]
        told = f"{questions}: split by image with seed 42: 100 to train, 20 to evaluate (20 show what another set"
        assert told in screen(data)
    less = mixed((captions, questions), (0.5, 0.5), num_eval_examples=8)
    assert (num_shared(less), counts(less)) == (0, [(50, 4), (50, 4)])


def test_a_tenth_is_held_out_beside_what_another_set_says_of_some_pictures(pictures: list[Path]) -> None:
    data = mixed((write_captions(pictures[:20], num_test=2), write_questions(pictures)))
    assert (num_shared(data), counts(data)) == (0, [(18, 2), (108, 12)])


def test_named_splits_of_two_sets_that_overlap_are_noted(pictures: list[Path]) -> None:
    captions = write_captions(pictures, num_test=10)
    questions = write_questions(pictures, split=lambda number: "test" if number < 5 else "train")
    data = mixed((captions, questions))
    assert num_shared(data) == 10 + 2 * 5
    for path in (captions, questions):
        note = f"{path}: WARNING: 10 evaluation rows show an image (or text) that is also trained on"
        assert screen(data).count(note) == 1
    # What is left out of the mixture is not trained on.
    fewer = mixed((captions, questions), num_train_examples=4)
    assert num_shared(fewer) == 2
    assert f"{questions}: WARNING: 2 evaluation rows" in screen(fewer)
    assert f"{captions}: WARNING" not in screen(fewer)


def test_a_set_gets_the_evaluation_rows_asked_for_though_another_has_many_an_image(pictures: list[Path]) -> None:
    files = write_captions(pictures), write_questions(pictures, num_questions=5)
    data = mixed(files, (0.5, 0.5), num_train_examples=40, num_eval_examples=20)
    assert (num_shared(data), counts(data)) == (0, [(20, 10), (20, 10)])


def test_a_set_whose_pictures_are_all_trained_on_in_another_cannot_be_divided(pictures: list[Path]) -> None:
    captions, questions = write_captions(pictures, num_test=10), write_questions(pictures[:50])
    with pytest.raises(
        UserError, match=r"questions\.jsonl: .*both sides of the mixture; add images, or give .* splits"
    ):
        mixed((captions, questions))


def test_sets_without_a_common_picture_are_divided_as_alone(
    pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of hub tables with equal names and row numbers too."""
    files = write_captions(pictures[:30]), write_questions(pictures[30:])
    tables = {}
    for name, some in (("a/first", pictures[:30]), ("a/second", pictures[30:])):
        columns = {"image": [Image.open(path) for path in some], "caption": [f"{name} {path.stem}" for path in some]}
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        tables[name] = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(qvl.sources, "_load_from_hub", lambda config: {"train": tables[config.dataset_name]})
    for paths in (files, tuple(tables)):
        options: dict[str, Any] = {"dataset_test_split": "train"}
        if paths is not files:
            options["caption_columns"] = ("caption",)
        together = mixed((paths[0], paths[1]), **options)
        for part, path in zip(together.summary.parts, paths, strict=True):
            assert part.fingerprint == load_examples(DataConfig(path, **options)).summary.fingerprint


@given(
    sets=st.lists(
        st.tuples(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3), max_size=12), st.integers(1, 8)),
        min_size=1,
        max_size=3,
    ),
    trained_on=st.sets(st.integers(0, 12), max_size=3),
    evaluated_on=st.sets(st.integers(0, 12), max_size=3),
    seed=st.integers(0, 3),
)
def test_no_key_is_on_both_sides_of_any_set(
    sets: list[tuple[list[list[int]], int]], trained_on: set[int], evaluated_on: set[int], seed: int
) -> None:
    undivided = [Undivided(keys, [str(row) for row in range(len(keys))], wanted) for keys, wanted in sets]
    sides = split_by_image(undivided, seed, trained_on, evaluated_on)
    shown: tuple[set[int], set[int]] = (set(), set())
    for (keys, _), (train, evaluation) in zip(sets, sides, strict=True):
        assert sorted(train + evaluation) == list(range(len(keys)))
        for side, rows in zip(shown, (train, evaluation), strict=True):
            side.update(key for row in rows for key in keys[row])
    assert not shown[0] & shown[1]
    assert not shown[1] & trained_on
    # Of the training side only what shares rows with what is trained on anyway.
    assert trained_on & shown[0] or not shown[0] & evaluated_on
