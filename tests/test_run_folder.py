"""Run folders: their names, what is found in them again, and whether they will hold what comes."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from qvl.errors import UserError
from qvl.run_folder import (
    choose_run_folder,
    find_checkpoint,
    flat_metrics,
    prepare,
    require_space,
    update_checks,
    update_metrics,
)

GIB = 2**30
Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def earlier_run(name: str, seconds: int) -> Path:
    folder = Path("outputs/flickr8k") / name
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text("lora_r: 8\n", encoding="utf-8")
    os.utime(folder / "settings.yaml", (seconds, seconds))
    return folder


def test_names() -> None:
    assert choose_run_folder("flickr8k", "some/where", "name", False) == Path("some/where")
    assert choose_run_folder("flickr8k", None, "name", False) == Path("outputs/flickr8k/name")
    fresh = choose_run_folder("flickr8k", None, None, False)
    assert fresh.parent == Path("outputs/flickr8k")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", fresh.name)


def test_two_runs_of_one_second_do_not_share_a_folder() -> None:
    seen = set()
    for _ in range(5):
        folder = choose_run_folder("flickr8k", None, None, False)
        prepare(folder)
        seen.add(folder)
    assert len(seen) == 5


def test_the_newest_run_is_continued_and_a_dry_run_is_none() -> None:
    earlier_run("b", 1_000)
    newest = earlier_run("a", 3_000)
    earlier_run("dry_run", 9_000)
    (newest.parent / "never_began").mkdir()
    (newest.parent / "a_file").write_text("", encoding="utf-8")
    assert choose_run_folder("flickr8k", None, None, True) == newest
    assert choose_run_folder("flickr8k", None, "b", True).name == "b"
    assert choose_run_folder("flickr8k", "named", None, True) == Path("named")


def test_nothing_to_continue() -> None:
    with pytest.raises(UserError, match=r"no earlier run in outputs/flickr8k .* --output_dir"):
        choose_run_folder("flickr8k", None, None, True)


def test_prepare_makes_the_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    prepare(folder)
    prepare(folder)
    assert list(folder.iterdir()) == []


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "run"):
        with pytest.raises(UserError, match=r"cannot be written to .* --output_dir"):
            prepare(folder)


def test_a_folder_where_nothing_can_be_written() -> None:
    # Refuses new files to root too.
    with pytest.raises(UserError, match="cannot be written to"):
        prepare(Path("/proc/self"))


def test_a_full_disk_is_found_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    with pytest.raises(UserError, match="No space left on device"):
        prepare(tmp_path)


def test_space_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(9 * GIB, 8 * GIB, 1 * GIB))
    require_space(tmp_path, num_trainable=10_000_000, num_checkpoints=3)  # 0.34 + 0.25 GiB
    with pytest.raises(
        UserError, match=r"1\.0 GiB free; the adapter and 3 checkpoints need 1\.6 GiB.*--save_total_limit"
    ):
        require_space(tmp_path, num_trainable=40_000_000, num_checkpoints=3)


def test_space_is_asked_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="GiB free"):
        require_space(tmp_path, num_trainable=10**15, num_checkpoints=1)


def checkpoint(run: Path, step: Any, complete: bool = True) -> Path:
    folder = run / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if complete:
        (folder / "trainer_state.json").write_text('{"global_step": 1}', encoding="utf-8")
        (folder / "rng_state.pth").touch()
    return folder


@pytest.mark.parametrize("wanted", ["true", "True"])
def test_the_newest_complete_checkpoint_by_number(tmp_path: Path, wanted: str) -> None:
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 100)
    checkpoint(tmp_path, 200, complete=False)
    checkpoint(tmp_path, "best")
    checkpoint(tmp_path, "300.tmp")
    assert find_checkpoint(tmp_path, wanted) == newest


def test_a_named_checkpoint_has_to_be_complete(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 1)
    assert find_checkpoint(tmp_path, str(whole)) == whole
    broken = checkpoint(tmp_path, 2, complete=False)
    with pytest.raises(UserError, match="checkpoint-2 is no complete checkpoint"):
        find_checkpoint(tmp_path, str(broken))
    with pytest.raises(UserError, match=r"no/such is no complete checkpoint"):
        find_checkpoint(tmp_path, "no/such")


@pytest.mark.parametrize(("files", "num_saved"), [(("rng_state.pth",), 1), (("rng_state_0.pth", "rng_state_1.pth"), 2)])
def test_a_checkpoint_is_resumed_by_as_many_processes_as_saved_it(
    files: tuple[str, ...], num_saved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checkpoint(tmp_path, 2)
    (found / "rng_state.pth").unlink()
    for name in files:
        (found / name).touch()
    for wanted in ("true", str(found)):
        monkeypatch.setenv("WORLD_SIZE", str(num_saved))
        assert find_checkpoint(tmp_path, wanted) == found
        monkeypatch.setenv("WORLD_SIZE", str(3 - num_saved))
        with pytest.raises(UserError, match=rf"saved by {num_saved} process.*Resume it with {num_saved}\."):
            find_checkpoint(tmp_path, wanted)


def test_a_checkpoint_without_the_optimizer_is_not_gone_on_from(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, 2)
    (found / "rng_state.pth").unlink()
    with pytest.raises(UserError, match=r"saved with --save_only_model, .*--adapter .*checkpoint-2\."):
        find_checkpoint(tmp_path, "true")


def test_no_checkpoint(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2, complete=False)
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        find_checkpoint(tmp_path, "true")


def test_metrics_has_all_keys_from_the_start_and_fills_up(tmp_path: Path) -> None:
    first = update_metrics(tmp_path, "baseline", {"bleu4": 0.1, "num_examples": 5})
    assert first.keys() == {"scores", "baseline", "finetuned", "difference", "train", "cost"}
    assert first["finetuned"] is None and first["difference"] == {}
    assert first["train"].keys() >= {"samples_per_second", "seconds", "peak_gib", "final_loss"}
    update_metrics(tmp_path, "train", {"seconds": 3.0})
    update_metrics(tmp_path, "cost", {"baseline": {"seconds": 1.0}})
    update_metrics(tmp_path, "cost", {"finetuned": {"seconds": 2.0}})
    update_metrics(tmp_path, "baseline", {"bleu4": 0.2})
    whole = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert whole["baseline"] == {"bleu4": 0.2}, "an evaluation replaces the one before"
    assert whole["train"]["seconds"] == 3.0 and whole["train"]["final_loss"] is None
    assert whole["cost"] == {"baseline": {"seconds": 1.0}, "finetuned": {"seconds": 2.0}}


def test_metrics_under_their_names_in_mlflow(tmp_path: Path) -> None:
    update_metrics(tmp_path, "finetuned", {"bleu4": 0.5, "num_examples": 7})
    whole = update_metrics(tmp_path, "difference", {"bleu4": {"mean": 0.4, "low": None, "high": 0.5}})
    assert flat_metrics(whole) == {
        "finetuned_bleu4": 0.5,
        "finetuned_num_examples": 7.0,
        "difference_bleu4_mean": 0.4,
        "difference_bleu4_high": 0.5,
    }


def test_a_check_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    update_checks(tmp_path, [{"name": "a", "passed": False}, {"name": "b", "passed": True}])
    update_checks(tmp_path, [{"name": "a", "passed": True}, {"name": "c", "passed": True}])
    checks = json.loads((tmp_path / "checks.json").read_text(encoding="utf-8"))
    assert [(check["name"], check["passed"]) for check in checks] == [("a", True), ("b", True), ("c", True)]
