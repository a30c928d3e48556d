"""The base model is loaded once for many trials, and no trial sees that another one was there. Without Ray itself."""

import functools
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import picture, settings_for

import qvl.training_form
from qvl.compiled_layers import _MOST_VARIANTS, compiled_layers, num_compiled_frames
from qvl.files import read_jsonl
from qvl.kept_base import KeptBase
from ray_jobs.learning_rate import set_learning_rate
from ray_jobs.trial_run import Report, TrialRun

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "flickr8k.py"
SHORT = {
    "num_train_examples": 16,
    "num_eval_examples": 3,
    "captions_per_image": 2,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "max_new_tokens": 6,
    "scores": ["rouge_l"],
}
WORDS = ["--smoke", "--stages", "train", "evaluate", "--no_shared_prefix"]

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(autouse=True)
def own_store(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.getbasetemp()}/mlflow.db")


def trial(folder: Path, kept: KeptBase, **axes: Any) -> TrialRun:
    folder.parent.mkdir(parents=True, exist_ok=True)
    overrides = {**SHORT, "output_dir": str(folder), **axes}
    return TrialRun(RECIPE, WORDS, overrides, kept, folder.parent / f"{folder.name}.log")


def finish(run: TrialRun) -> Report:
    while not (report := run.next_report()).is_last:
        pass
    return report


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(folder / "training_log.jsonl") if "loss" in row]


def answers(folder: Path) -> list[str]:
    return [row["prediction"] for row in read_jsonl(folder / "finetuned_predictions.jsonl")]


def traces(model: torch.nn.Module) -> dict[str, int]:
    """What SFTTrainer, PEFT and accelerate leave on a model: counted."""
    modules = list(model.modules())
    return {
        "modules": len(modules),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "wrapped forwards": sum("forward" in m.__dict__ for m in modules),
        "gradients": sum(p.grad is not None for p in model.parameters()),
        "trainable": sum(p.requires_grad for p in model.parameters()),
    }


FRESH = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_ray_reuse import finish, trial
from qvl.kept_base import KeptBase
report = finish(trial(Path(sys.argv[1]), KeptBase(), learning_rate=3e-3, lora_r=4, lora_dropout=0.1))
sys.exit(report.failure or 0)
"""


def test_a_reused_trial_equals_one_in_a_fresh_process_bit_for_bit(tmp_path: Path) -> None:
    fresh = subprocess.Popen([sys.executable, "-c", FRESH, str(tmp_path / "fresh")], cwd=ROOT, env=dict(os.environ))
    kept = KeptBase()
    first = finish(trial(tmp_path / "first", kept, learning_rate=1e-3, lora_r=8))
    assert not first.failure
    assert first.numbers["finetuned_rouge_l"] > 0
    clean = traces(kept._model)
    assert clean["wrapped forwards"] == clean["hooks"] == 0

    # A scheduler ends one in its course, one does not fit, one has settings that do not work.
    pruned = trial(tmp_path / "pruned", kept, learning_rate=5e-3, lora_r=16)
    assert pruned.next_report().numbers["training_step"] == 1
    assert pruned.next_report().numbers["training_step"] == 2
    assert traces(kept._model) != clean
    pruned.stop()
    assert traces(kept._model) == clean
    too_large = finish(trial(tmp_path / "too_large", kept, lora_r=10**11))
    assert too_large.failure.startswith("out of memory: ")
    assert traces(kept._model) == clean
    wrong = finish(trial(tmp_path / "wrong", kept, lora_target_modules=["no_such_proj"]))
    assert "no_such_proj" in wrong.failure
    assert traces(kept._model) == clean

    reused = trial(tmp_path / "reused", kept, learning_rate=3e-3, lora_r=4, lora_dropout=0.1)
    assert not finish(reused).failure
    assert traces(kept._model) == clean
    assert kept.num_loaded == 1
    assert fresh.wait(timeout=300) == 0, (tmp_path / "fresh.log").read_text()[-3000:]
    assert losses(tmp_path / "reused") == losses(tmp_path / "fresh")
    assert len(losses(tmp_path / "reused")) == SHORT["max_steps"]
    assert answers(tmp_path / "reused") == answers(tmp_path / "fresh")

    # Of five runs, nothing but the base is left.
    gc.collect()
    held = [thing for thing in gc.get_objects() if type(thing).__name__ in ("CompletionTrainer", "AdamW", "LoraLayer")]
    assert held == []


def test_another_base_is_loaded_where_the_flags_ask_for_one(tmp_path: Path) -> None:
    kept = KeptBase()
    stop_early = trial(tmp_path / "one", kept)
    stop_early.next_report()
    stop_early.stop()
    other = trial(tmp_path / "other", kept, dtype="bfloat16", bf16=True)
    other.next_report()
    assert next(kept._model.parameters()).dtype == torch.bfloat16
    other.stop()
    assert kept.num_loaded == 2


def test_features_are_computed_once_for_all_trials(tmp_path: Path) -> None:
    kept = KeptBase()
    flags = {"cache_vision_features": True, "vision_cache_dir": str(tmp_path / "features"), "learning_rate": 1e-3}
    for name in ("one", "two"):
        run = trial(tmp_path / name, kept, **flags)
        run.next_report()
        run.stop()
    assert "are computed now" in (tmp_path / "one.log").read_text()
    assert "all are there already" in (tmp_path / "two.log").read_text()


def test_a_picture_that_changes_between_two_trials_is_seen_anew(tmp_path: Path) -> None:
    """Its name, its size and the bytes of its file stay what they were."""
    rows = [{"image": f"{n}.bmp", "captions": ["a dog"], "split": s} for n in range(3) for s in ("train", "test")]
    (tmp_path / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    kept = KeptBase()
    flags = {"dataset_name": str(tmp_path), "num_train_examples": 3, "captions_per_image": 1, "max_steps": 1}
    cached = {"cache_vision_features": True, "vision_cache_dir": str(tmp_path / "features")}
    curves = []
    for name, seed, own in (("before", 0, cached), ("after", 1, cached), ("pixels", 1, {})):
        for number in range(3):
            picture(64, 64, 3 * seed + number).save(tmp_path / f"{number}.bmp")
        run = trial(tmp_path / name, kept, **flags, **own)
        run.next_report()
        run.stop()
        curves.append(losses(tmp_path / name))
    before, after, pixels = curves
    assert after == pytest.approx(pixels, rel=1e-5) != before
    claims = list((tmp_path / "features" / "in-use").glob("*.json"))
    assert len(claims) == 1, "a run's claim ends where the next one has its own"


def test_a_changed_learning_rate_is_what_a_resumed_training_uses(tmp_path: Path) -> None:
    kept, folder = KeptBase(), tmp_path / "run"
    flags = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_steps": 2}
    run = trial(folder, kept, **flags)
    while not run.next_report().has_checkpoint:
        pass
    run.stop()
    set_learning_rate(folder / "checkpoints", 5e-4)
    assert not finish(trial(folder, kept, **flags, resume_from_checkpoint="true")).failure
    rates = [row["learning_rate"] for row in read_jsonl(folder / "training_log.jsonl") if "learning_rate" in row]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])
    assert json.loads((folder / "metrics.json").read_text())["train"]["num_steps"] == SHORT["max_steps"]


class Unusable(KeptBase):
    """As on a GPU that an illegal access has left without an answer to this process."""

    def clean(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("kept", "log", "failure"),
    [(Unusable(), "run.log", "Did you mean --learning_rate?"), (KeptBase(), "missing/run.log", "FileNotFoundError")],
)
def test_a_process_of_no_more_use_says_so_and_takes_no_further_trial(
    kept: KeptBase, log: str, failure: str, tmp_path: Path
) -> None:
    """Nobody would wait for it for ever, or give it the next trials to fail."""
    words = [*WORDS, "--learning_rat", "1e-3"]
    run = TrialRun(RECIPE, words, {"output_dir": str(tmp_path / "run")}, kept, tmp_path / log)
    reports: list[Report] = []
    asking = threading.Thread(target=lambda: reports.append(run.next_report()), daemon=True)
    asking.start()
    asking.join(timeout=120)
    (report,) = reports
    assert report.is_last and report.may_go_well_again
    assert failure in report.failure


def test_a_base_to_be_trained_in_fp8_is_none_that_is_kept() -> None:
    """Its layers are replaced, and 16-bit ones that somebody keeps would stay in memory beside them."""
    kept, device = KeptBase(), torch.device("cpu")
    settings = settings_for("qvl/tiny-qwen3-vl")
    first = weakref.ref(kept.load(settings, device))
    assert kept.load(settings, device) is first()
    settings.recipe.base_precision = "fp8"
    second = kept.load(settings, device)
    assert first() is None and second is not None
    settings.recipe.base_precision = None
    assert kept.load(settings, device) is not second
    assert kept.num_loaded == 3


def test_variants_of_compiled_code_do_not_come_to_torchs_limit() -> None:
    """Each rank and each dropout is one; at the limit a training would go on uncompiled, without a word."""
    torch._dynamo.reset()
    kept, counters = KeptBase(), torch._dynamo.utils.counters["frames"]
    compiled = torch.compile(lambda x, number: x + number, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=_MOST_VARIANTS):
        for number in range(2 * _MOST_VARIANTS):
            before = counters["ok"]
            compiled(torch.ones(2), number)
            assert counters["ok"] == before + 1, f"variant {number} was not compiled"
            if number % 30 == 29:
                kept.clean()


@pytest.mark.slow
def test_a_second_trial_finds_all_that_the_first_one_has_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of the 8B model takes half a minute to compile; a training must leave nothing that asks for it again."""
    # What a GPU would answer, and a backend that needs none.
    monkeypatch.setattr(qvl.training_form, "can_compile", lambda device: True)
    monkeypatch.setattr(qvl.training_form, "compiled_layers", functools.partial(compiled_layers, backend="eager"))
    torch._dynamo.reset()
    kept = KeptBase()
    assert not finish(trial(tmp_path / "first", kept, learning_rate=1e-3)).failure
    compiled = num_compiled_frames()
    assert compiled > 0
    assert not finish(trial(tmp_path / "second", kept, learning_rate=3e-3)).failure
    assert num_compiled_frames() == compiled


class Noting(KeptBase):
    """Notes the threads that it is used in."""

    def clean(self) -> None:
        threads.append(threading.current_thread())


threads: list[threading.Thread] = []


def test_all_trials_of_a_process_run_in_one_thread(tmp_path: Path) -> None:
    """torch 2.11 crashes when a second thread compiles after the first one has ended."""
    for number in range(2):
        finish(trial(tmp_path / str(number), Noting(), max_steps="none"))
    assert len(threads) == 2 and threads[0] is threads[1]
