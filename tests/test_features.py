"""Cached vision features: equal to fresh ones, never stale, never computed twice, within their limit."""

import base64
import copy
import io
import json
import multiprocessing
import os
import pickle
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from filelock import FileLock
from packaging.version import Version
from PIL import Image
from tiny import CHAT, LLAVA, VISION, base, picture, processing_class, settings_for
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from qvl.adapters import add_adapter
from qvl.collators import CompletionCollator
from qvl.data import DataConfig, load_examples, prompt_messages, separate_completions
from qvl.encode import tokenize
from qvl.errors import UserError
from qvl.feature_store import FeatureStore, ImageFeatures
from qvl.features import (
    FeatureTable,
    cache_features,
    encoder_inputs,
    refuse_uncacheable,
    require_frozen_vision,
    with_cached_features,
)
from qvl.generate import PromptCollator
from qvl.survey import training_lengths
from qvl.turns import truncate_turns

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="models take no features before transformers 5.18"
)
FAMILIES = [*VISION, LLAVA]
SIZES = [(64, 64), (100, 70), (70, 150), (64, 64), (33, 40)]


def write_picture(path: Path, width: int, height: int, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    picture(width, height, seed).save(path)


def caption_data(folder: Path) -> Path:
    """Five images, the fifth under two names, with two captions each."""
    for number, (width, height) in enumerate(SIZES):
        write_picture(folder / "images" / f"{number}.png", width, height, number)
    write_picture(folder / "images" / "4 again.png", *SIZES[4], 4)
    names = [*(f"{number}.png" for number in range(len(SIZES))), "4 again.png"]
    rows = [{"image": f"images/{name}", "captions": [f"It is {name}.", f"A picture, {name}!"]} for name in names]
    lines = [json.dumps({**row, "split": "test" if index in (1, 5) else "train"}) for index, row in enumerate(rows)]
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def conversation_data(folder: Path) -> Path:
    """No image, several, one in a later turn, and one written into the row."""
    file = io.BytesIO()
    picture(90, 60, 7).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    for number, (width, height) in enumerate(SIZES):
        write_picture(folder / "images" / f"{number}.png", width, height, number)
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]},
        {
            "images": ["images/0.png", "images/1.png"],
            "messages": [
                {"role": "user", "content": "Is <image> like <image>?"},
                {"role": "assistant", "content": "No."},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes."},
            ],
        },
        {
            "images": [url],
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": "What is this?<image>"},
                {"role": "assistant", "content": "Noise."},
            ],
        },
        {
            "images": ["images/2.png"],
            "messages": [{"role": "user", "content": "<image>And this?"}, {"role": "assistant", "content": "More."}],
        },
    ]
    lines = [json.dumps({**row, "split": split}) for row in rows for split in ("train", "test")]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "rows.jsonl"


FORMS = {"captions": caption_data, "conversations": conversation_data}


def load(folder: Path, form: str = "captions") -> list[Dataset]:
    folder.mkdir(exist_ok=True)
    config = DataConfig(
        dataset_name=str(FORMS[form](folder)),
        dataset_test_split="test",
        instruction="Describe.",
        captions_per_image=2 if form == "captions" else 1,
    )
    loaded = load_examples(config)
    return [loaded.train, loaded.evaluation]


def cache(
    folder: Path,
    data_sets: list[Dataset],
    name: str = VISION[0],
    model: PreTrainedModel | None = None,
    processor: Any = None,
    max_gib: float = 1.0,
    batch_size: int = 3,
    num_workers: int = 0,
) -> FeatureTable:
    return cache_features(
        base(name) if model is None else model,
        processor or processing_class(name),
        data_sets,
        folder,
        max_gib,
        batch_size,
        num_workers,
    )


@pytest.fixture(autouse=True)
def no_claims_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Claims live as long as the process, which runs other tests too."""
    from qvl.feature_store import Claim

    before = set(Claim._held)
    yield
    for claim in set(Claim._held) - before:
        claim.release()


class TowerCalls:
    """Counts how often the tower runs, in the real model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.count = 0
        core: Any = model.base_model
        tower = core.visual if hasattr(core, "visual") else core.vision_tower
        self.hook = tower.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1

    def __enter__(self) -> "TowerCalls":
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def num_tower_calls(folder: Path, data_sets: list[Dataset], model: PreTrainedModel, **kwargs: Any) -> int:
    with TowerCalls(model) as calls:
        cache(folder, data_sets, model=model, **kwargs)
    return calls.count


def rows_of(dataset: Dataset) -> list[dict[str, Any]]:
    return [dataset[index] for index in range(len(dataset))]


def written(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*.safetensors"))


# Cached features equal fresh ones


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_pixels(name: str, form: str, tmp_path: Path) -> None:
    train, evaluation = load(tmp_path / "data", form)
    table = cache(tmp_path / "cache", [train, evaluation], name)
    rows = separate_completions(train)
    collator = CompletionCollator(processing_class(name), None)
    fresh = collator(rows_of(rows))
    cached = collator(rows_of(with_cached_features(rows, table)))
    assert cached.keys() == fresh.keys() - {"pixel_values"} | {"image_features"}
    for key in cached.keys() & fresh.keys():
        assert torch.equal(cached[key], fresh[key]), key

    options = settings_for(VISION[0], "--lora_dropout", "0")
    model = add_adapter(copy.deepcopy(base(name)), options)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:  # zero at first, which would hide the gradient of A
            torch.nn.init.normal_(parameter, std=0.02)
    losses, gradients = [], []
    for batch in (fresh, encoder_inputs(cached, model)):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert gradients[0].norm() > 0.01
    assert (gradients[1] - gradients[0]).norm() / gradients[0].norm() < 1e-6

    shuffled = {**cached, "image_features": cached["image_features"].flip(0)}
    other = model(**encoder_inputs(shuffled, model)).loss.item()
    assert abs(other - losses[0]) / losses[0] > 1e-5, "the features would not matter, so this would prove nothing"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_generated_tokens_are_those_of_pixels(name: str, form: str, tmp_path: Path) -> None:
    train, evaluation = load(tmp_path / "data", form)
    table = cache(tmp_path / "cache", [train, evaluation], name)
    model, collator = base(name), PromptCollator(processing_class(name))
    answers = []
    for rows in (train, with_cached_features(train, table)):
        prompts = [{"prompt": prompt_messages(row), "images": row["images"]} for row in rows_of(rows)]
        batch = encoder_inputs(collator(prompts), model)
        answers.append(model.generate(**batch, max_new_tokens=12, do_sample=False))
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_the_processor(name: str, tmp_path: Path) -> None:
    train, evaluation = load(tmp_path / "data")
    table = cache(tmp_path / "cache", [train, evaluation], name)
    processor: Any = processing_class(name)
    mark = processor.image_token
    texts = [f"one {mark} two{mark}", "none", f"{mark}", f"{mark}{mark}\nx", "\n ünïcode 犬"]
    images = [image for row in rows_of(train)[:3] for image in row["images"]] * 2
    handles = [image for row in rows_of(with_cached_features(train, table))[:3] for image in row["images"]] * 2
    expected, _ = tokenize(texts, images[:5], processor)
    assert tokenize(texts, handles[:5], processor)[0] == expected
    with pytest.raises(ValueError, match=r"5 image placeholders .* for 4 images"):
        tokenize(texts, handles[:4], processor)


def test_a_batch_without_features_stays_as_it_is() -> None:
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    assert encoder_inputs(batch, base(VISION[0])) == batch


def test_features_may_come_before_the_completions_are_apart(tmp_path: Path) -> None:
    train, evaluation = load(tmp_path / "data")
    table = cache(tmp_path / "cache", [train, evaluation])
    early = separate_completions(with_cached_features(train, table))
    late = with_cached_features(separate_completions(train), table)
    assert rows_of(early) == rows_of(late)
    assert rows_of(with_cached_features(late, table)) == rows_of(late)
    some = late.select([3, 0])
    assert rows_of(with_cached_features(some, table)) == rows_of(some) == [late[3], late[0]]
    together = with_cached_features(train, table)
    assert [row["completions"] for row in rows_of(together)] == [row["completions"] for row in rows_of(train)]


def test_features_go_with_turns_that_are_cut_off(tmp_path: Path) -> None:
    train, evaluation = load(tmp_path / "data", "conversations")
    processor = processing_class(VISION[0])
    table = cache(tmp_path / "cache", [train, evaluation])
    lengths = training_lengths(train, processor)
    # The row whose picture stands in its second turn keeps the first.
    row = [length.where for length in lengths].index("rows.jsonl:5")
    rows = with_cached_features(train, table).select([row])
    cut = truncate_turns(rows, [lengths[row]], lengths[row].num_tokens - 1, processor).dataset
    assert rows[0]["images"] == with_cached_features(train, table)[row]["images"] != []
    assert cut[0]["images"] == []
    assert "image_features" not in CompletionCollator(processor, None)([cut[0]])
    fresh = truncate_turns(train.select([row]), [lengths[row]], lengths[row].num_tokens - 1, processor).dataset
    assert rows_of(with_cached_features(fresh, table)) == rows_of(cut)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_compute_and_read(num_workers: int, tmp_path: Path) -> None:
    train, evaluation = load(tmp_path / "data")
    collator = CompletionCollator(processing_class(VISION[0]), None)
    rows = separate_completions(train)
    alone = with_cached_features(rows, cache(tmp_path / "alone", [train, evaluation]))
    cached = with_cached_features(rows, cache(tmp_path / "cache", [train, evaluation], num_workers=num_workers))
    cached = pickle.loads(pickle.dumps(cached))
    assert all(isinstance(image, ImageFeatures) for row in rows_of(cached) for image in row["images"])
    loader = DataLoader(cached, batch_size=3, collate_fn=collator, num_workers=num_workers)  # type: ignore[arg-type]
    for start, batch in zip(range(0, len(rows), 3), loader, strict=True):
        expected = collator([alone[index] for index in range(start, min(start + 3, len(rows)))])
        assert torch.equal(batch["image_features"], expected["image_features"])


# Computed once, and never stale


def test_a_second_run_computes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_sets, model = load(tmp_path / "data"), copy.deepcopy(base(VISION[0]))
    # Five different pictures, at most three at a time.
    assert num_tower_calls(tmp_path / "cache", data_sets, model) == 2
    assert "5 images need" in (said := capsys.readouterr().out) and "5 of them" in said
    assert len(written(tmp_path / "cache")) == 5, "one picture under two names is one entry"
    assert num_tower_calls(tmp_path / "cache", data_sets, model) == 0
    assert "all are there already" in capsys.readouterr().out
    assert num_tower_calls(tmp_path / "cache", load(tmp_path / "moved"), model) == 0


def test_rows_without_images_need_nothing(tmp_path: Path) -> None:
    train, _ = load(tmp_path / "data", "conversations")
    texts = train.select([0])
    assert texts[0]["images"] == []
    rows = with_cached_features(texts, cache(tmp_path / "cache", [texts]))
    assert rows_of(rows) == rows_of(texts)
    assert "image_features" not in CompletionCollator(processing_class(VISION[0]), None)(rows_of(rows))


def test_many_images_go_through_the_tower_together(tmp_path: Path) -> None:
    data_sets, model = load(tmp_path / "data"), copy.deepcopy(base(VISION[0]))
    assert num_tower_calls(tmp_path / "cache", data_sets, model, batch_size=64) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_tower_is_seen(name: str, tmp_path: Path) -> None:
    data_sets, model = load(tmp_path / "data"), copy.deepcopy(base(name))
    core: Any = model.base_model
    # What is kept of a CLIP is what its projector is given, which may change.
    parts = {core.visual: 2} if hasattr(core, "visual") else {core.vision_tower: 2, core.multi_modal_projector: 0}
    assert num_tower_calls(tmp_path / "cache", data_sets, model, name=name) == 2
    for part, num_calls in parts.items():
        last = list(part.parameters())[-1]
        with torch.no_grad():
            last.view(-1)[0] += 1e-3
        assert num_tower_calls(tmp_path / "cache", data_sets, model, name=name) == num_calls
    assert num_tower_calls(tmp_path / "cache", data_sets, model.to(torch.bfloat16), name=name) == 2


def test_what_does_not_matter_to_images_is_not_looked_at(tmp_path: Path) -> None:
    data_sets, model = load(tmp_path / "data"), copy.deepcopy(base(VISION[0]))
    assert num_tower_calls(tmp_path / "cache", data_sets, model) == 2
    with torch.no_grad():
        next(model.get_decoder().parameters()).add_(1)
    model.config._name_or_path = "another place"
    model.set_attn_implementation({"vision_config": "eager"})
    processor = copy.deepcopy(processing_class(VISION[0]))
    processor.chat_template += " "
    assert num_tower_calls(tmp_path / "cache", data_sets, model, processor=processor) == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", {"shortest_edge": 1024, "longest_edge": 2048}),
        ("image_mean", [0.4, 0.5, 0.5]),
        ("resample", Image.Resampling.NEAREST),
        ("do_normalize", False),
    ],
)
def test_a_changed_processor_setting_is_seen(key: str, value: Any, tmp_path: Path) -> None:
    data_sets, model = load(tmp_path / "data"), copy.deepcopy(base(VISION[0]))
    assert num_tower_calls(tmp_path / "cache", data_sets, model) == 2
    processor = copy.deepcopy(processing_class(VISION[0]))
    setattr(processor.image_processor, key, value)
    assert num_tower_calls(tmp_path / "cache", data_sets, model, processor=processor) == 2


def test_a_changed_library_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_sets, model = load(tmp_path / "data"), copy.deepcopy(base(VISION[0]))
    assert num_tower_calls(tmp_path / "cache", data_sets, model) == 2
    monkeypatch.setattr("importlib.metadata.version", lambda name: "another")
    assert num_tower_calls(tmp_path / "cache", data_sets, model) == 2


def test_a_changed_image_is_seen(tmp_path: Path) -> None:
    data_sets, model = load(tmp_path / "data"), copy.deepcopy(base(VISION[0]))
    first = cache(tmp_path / "cache", data_sets, model=model).rows(data_sets[0])[0][0]
    path = tmp_path / "data" / "images" / "0.png"
    before = path.stat()
    pixels = Image.open(path).convert("RGB")
    red, green, blue = pixels.getpixel((0, 0))
    pixels.putpixel((0, 0), (red ^ 1, green, blue))
    pixels.save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert num_tower_calls(tmp_path / "cache", data_sets, model) == 1
    second = cache(tmp_path / "cache", data_sets, model=model).rows(data_sets[0])[0][0]
    assert first != second and not torch.equal(first.load(), second.load())


def test_an_image_that_changes_meanwhile_is_not_stored_under_its_old_content(tmp_path: Path) -> None:
    data_sets, model = load(tmp_path / "data"), copy.deepcopy(base(VISION[0]))
    # The largest image, 2.png, goes first; another one is replaced while the tower looks at it.
    model.base_model.visual.register_forward_hook(
        lambda *_: write_picture(tmp_path / "data" / "images" / "1.png", *SIZES[1], 99)
    )
    with pytest.raises(UserError, match=r'captions\.jsonl:2: image "images/1\.png" is being changed'):
        cache(tmp_path / "cache", data_sets, model=model, batch_size=1)
    assert len(written(tmp_path / "cache")) < 5


def test_a_damaged_or_half_written_entry_is_computed_anew(tmp_path: Path) -> None:
    data_sets, model = load(tmp_path / "data"), copy.deepcopy(base(VISION[0]))
    table = cache(tmp_path / "cache", data_sets, model=model)
    whole = table.rows(data_sets[0])[0][0].load().clone()
    damaged = Path(table.rows(data_sets[0])[0][0].path)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    half_written = damaged.with_name(".of-a-killed-process")
    half_written.write_bytes(b"x")
    assert num_tower_calls(tmp_path / "cache", data_sets, model) == 1
    assert torch.equal(table.rows(data_sets[0])[0][0].load(), whole)
    assert not half_written.exists()


def test_an_entry_that_vanishes_is_named(tmp_path: Path) -> None:
    data_sets = load(tmp_path / "data")
    handle = cache(tmp_path / "cache", data_sets).rows(data_sets[0])[0][0]
    Path(handle.path).unlink()
    with pytest.raises(UserError, match=r"\.safetensors cannot be read .*Start the run again"):
        handle.load()


def test_a_broken_image_names_its_row(tmp_path: Path) -> None:
    data_sets = load(tmp_path / "data")
    path = tmp_path / "data" / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r'captions\.jsonl:3: image "images/2\.png" is truncated'):
        cache(tmp_path / "cache", data_sets)
    path.unlink()
    with pytest.raises(UserError, match=r'captions\.jsonl:3: image "images/2\.png" cannot be read'):
        cache(tmp_path / "cache", data_sets)


# Several processes


def in_a_process(tmp_path: Path, name: str, pipe: Connection) -> None:
    torch.set_num_threads(1)  # OpenMP's pool does not survive a fork
    data_sets, model = load(tmp_path / name), base(VISION[0])
    pipe.send("ready")
    pipe.recv()
    with TowerCalls(model) as calls:
        table = cache(tmp_path / "cache", data_sets, batch_size=1)
    handles = [handle for rows in map(table.rows, data_sets) for row in rows for handle in row]
    pipe.send((calls.count, sum(handle.load().double().sum().item() for handle in handles)))
    pipe.recv()


def test_two_processes_compute_nothing_twice_and_keep_what_they_use(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    base(VISION[0])
    pipes, processes = [], []
    for name in ("one", "two"):
        pipe, other_end = fork.Pipe()
        pipes.append(pipe)
        processes.append(fork.Process(target=in_a_process, args=(tmp_path, name, other_end), daemon=True))
        processes[-1].start()
    assert [pipe.recv() for pipe in pipes] == ["ready", "ready"]
    for pipe in pipes:
        pipe.send("go")
    (first_count, first_sum), (second_count, second_sum) = (pipe.recv() for pipe in pipes)
    assert first_count + second_count == 5
    assert first_sum == second_sum != 0
    entries = written(tmp_path / "cache")
    assert len(entries) == 5
    size_gib = sum(path.stat().st_size for path in entries) / 2**30

    # Both still use their entries: another run may not push them out, however old they are.
    store = FeatureStore(tmp_path / "cache", 1.5 * size_gib)
    other = {"other/0000": int(size_gib * 2**30)}
    with pytest.raises(UserError, match="other running processes use"):
        store.claim(other)
    pipes[0].send("end")
    processes[0].join()
    with pytest.raises(UserError, match="other running processes use"):
        store.claim(other)
    # A killed process gives up its claim without a chance to say so.
    processes[1].kill()
    processes[1].join()
    store.claim(other)
    assert len(written(tmp_path / "cache")) < 5


# Room


def entry(store: FeatureStore, key: str, last_used_seconds: float) -> Path:
    """Just under 1 MiB, so that the limit counts whole entries."""
    (store.folder / "tower").mkdir(exist_ok=True)
    store.put(key, torch.zeros(1023, 256), None)
    path = store.folder / "tower" / key.split("/")[1][:2] / f"{key.split('/')[1]}.safetensors"
    os.utime(path, (last_used_seconds, last_used_seconds))
    return path


BYTES = 1023 * 256 * 4


def test_the_longest_unused_go_first_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = FeatureStore(tmp_path, 4 / 1024)
    used, oldest, older, newest = (entry(store, f"tower/{n}", 1e9 + 10 * n) for n in range(4))
    store.claim({"tower/0": BYTES, "tower/4": BYTES, "tower/5": BYTES}).release()
    assert [path.exists() for path in (used, oldest, older, newest)] == [True, False, False, True]
    assert "evicted those of 2 images (0.00 GiB, last used until 2001-09-09" in capsys.readouterr().out
    # Being used has made it the youngest.
    store.claim({"tower/6": BYTES, "tower/7": BYTES, "tower/8": BYTES}).release()
    assert [path.exists() for path in (used, newest)] == [True, False]


def test_nothing_is_evicted_below_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = FeatureStore(tmp_path, 4 / 1024)
    paths = [entry(store, f"tower/{n}", 1e9) for n in range(3)]
    store.claim({"tower/3": BYTES}).release()
    assert all(path.exists() for path in paths)
    assert capsys.readouterr().out == ""


def test_what_another_run_is_about_to_write_counts(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, 4 / 1024)
    first = store.claim({f"tower/{n}": BYTES for n in range(3)})
    with pytest.raises(UserError, match=r"need 0\.00 GiB, and other running processes use 0\.00 GiB"):
        store.claim({"other/0": BYTES, "other/1": BYTES})
    store.claim({"tower/0": BYTES, "tower/1": BYTES}).release()  # the same ones take no more room
    first.release()
    store.claim({"other/0": BYTES, "other/1": BYTES}).release()


@pytest.mark.parametrize("is_unlocked", [False, True])
def test_a_claim_may_be_released_while_another_process_looks_at_it(
    is_unlocked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing of claims and the attempt to lock them: the file is gone, and its lock may be too."""
    store = FeatureStore(tmp_path, 4 / 1024)
    other = store.claim({f"tower/{n}": BYTES for n in range(3)})

    class LockOfAnInstantLater(FileLock):
        def acquire(self, *args: Any, **kwargs: Any) -> Any:
            if Path(self.lock_file) == other._path.with_suffix(".lock"):
                other.release() if is_unlocked else other._path.unlink()
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr("qvl.feature_store.FileLock", LockOfAnInstantLater)
    store.claim({"other/0": BYTES, "other/1": BYTES}).release()
    assert not is_unlocked or not list((tmp_path / "in-use").iterdir())
    other.release()


def test_a_run_that_does_not_fit_is_told_before_it_starts(tmp_path: Path) -> None:
    data_sets, model = load(tmp_path / "data"), copy.deepcopy(base(VISION[0]))
    with (
        TowerCalls(model) as calls,
        pytest.raises(UserError, match=r"of 5 images need .*--vision_cache_gib allows"),
    ):
        cache(tmp_path / "cache", data_sets, model=model, max_gib=1e-5)
    assert calls.count == 0
    with pytest.raises(UserError, match=r"need 931322\.57 GiB, and .* GiB free"):
        FeatureStore(tmp_path / "cache", 1e9).claim({"tower/0": 10**15})


def test_the_claim_outlives_data_loader_workers(tmp_path: Path) -> None:
    """A worker is a fork that holds the parent's lock file open; its end must not unlock it."""
    data_sets = load(tmp_path / "data")
    table = cache(tmp_path / "cache", data_sets)
    rows = with_cached_features(data_sets[0], table)
    assert len(list(DataLoader(rows, batch_size=2, collate_fn=list, num_workers=2))) == 2  # type: ignore[arg-type]
    size_gib = sum(path.stat().st_size for path in written(tmp_path / "cache")) / 2**30
    with pytest.raises(UserError, match="other running processes use"):
        FeatureStore(tmp_path / "cache", size_gib).claim({"tower/0": BYTES})
    table.claim.release()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be made .*--vision_cache_dir"):
        FeatureStore(tmp_path / "file" / "cache", 1)


# Refusals


def test_a_text_only_model_is_refused() -> None:
    with pytest.raises(UserError, match="qwen3 takes text only"):
        refuse_uncacheable(base(CHAT).config)


def test_an_unproven_family_is_refused() -> None:
    config = copy.deepcopy(base(VISION[0]).config)
    config.model_type = "qwen9_vl"
    with pytest.raises(UserError, match="not proven to equal fresh ones for qwen9_vl"):
        refuse_uncacheable(config)


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl.features.transformers.__version__", "5.17.3")
    with pytest.raises(UserError, match=r"transformers 5\.17\.3 takes no vision features .*install 5\.18"):
        refuse_uncacheable(base(VISION[0]).config)


def test_a_trained_tower_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    in_language_model = add_adapter(copy.deepcopy(base(VISION[0])), settings_for(VISION[0]))
    require_frozen_vision(in_language_model)
    for target in ({"target_modules": ["qkv"]}, {"target_modules": ["q_proj"], "modules_to_save": ["merger"]}):
        model = get_peft_model(copy.deepcopy(base(VISION[0])), LoraConfig(**target))
        with pytest.raises(UserError, match=r"the first is visual\..*Leave out --cache_vision_features"):
            cache(tmp_path / "cache", load(tmp_path / "data"), model=model)
        model.requires_grad_(False)  # not trained here, but other features than the base's all the same
        with pytest.raises(UserError, match="sit in the vision part"):
            require_frozen_vision(model)
