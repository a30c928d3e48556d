"""Sweeps on a real cluster of this machine: three nodes with one GPU each, which need not exist."""

import copy
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
import yaml
from local_ray import QUICK, ROOT, clean_environment, free_ports
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from qvl.errors import UserError
from qvl.mlflow_store import Store
from qvl.scenes import write_scenes
from ray_jobs.axes import Range, example_of
from ray_jobs.children import TRIAL_TAG, children, find_or_make_child, require_reachable_by_all, with_patience
from ray_jobs.narrator import Narrator
from ray_jobs.outcome import FAILED, FINISHED, NOT_STARTED, PRUNED, Outcome, outcomes
from ray_jobs.search import axes_for
from ray_jobs.storage import make_sweep_folder, note_sweep, sweep_folder
from ray_jobs.sweep import Sweep, _go_on_as_before, _parse, _require_stages, _say_what_lasts, run_sweep
from ray_jobs.sweep_record import SweepRecord
from ray_jobs.task import checked_settings
from ray_jobs.trial import DEFAULT_STAGES

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]

TINY = (
    "--smoke --num_train_examples 16 --num_eval_examples 3 --max_steps 2 --logging_steps 1 "
    "--per_device_train_batch_size 4 --max_new_tokens 6 --scores rouge_l bleu4"
).split()
PATIENCE_SECONDS = 600
# Room for the record of a small sweep and a small adapter, not for an adapter of rank 400.
SMALL_DISK = "3m"


def node(num_cpus: int) -> dict[str, Any]:
    """A node with a GPU that need not exist, and with ports that no other Ray of this machine has."""
    (port,) = free_ports(1)
    return {
        "num_cpus": num_cpus,
        "num_gpus": 1,
        "object_store_memory": 80_000_000,
        "dashboard_agent_listen_port": port,
        "include_dashboard": False,
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One node; a test adds more."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setenv(name, value)
        started = Cluster(initialize_head=True, head_node_args=node(2))
        yield started
        started.shutdown()


@pytest.fixture
def in_cluster(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process as a sweep's driver."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    ray.shutdown()
    signal.signal(signal.SIGTERM, before)


def client_of(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder / 'outputs' / 'mlflow.db'}")


def runs_of(folder: Path) -> tuple[Any, list[Any]]:
    """The parent and its children."""
    client = client_of(folder)
    found = list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))
    parents = [run for run in found if TRIAL_TAG not in run.data.tags]
    assert len(parents) == 1
    below = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(below) == len(found) - 1
    return parents[0], below


def adapter_on(folder: Path, run: Any) -> Path:
    return Path(client_of(folder).download_artifacts(run.info.run_id, "adapter"))


def assert_says_what_the_trial_did(folder: Path, run: Any) -> None:
    """The best trial's run, to which the comparison with the base model was added."""
    client = client_of(folder)
    assert (run.info.status, run.data.tags["trial_state"]) == ("FINISHED", "finished")
    assert "error" not in run.data.tags
    assert len(client.get_metric_history(run.info.run_id, "total_seconds")) == 1
    assert "RecipeTrial" in run.data.tags["run_dir"]
    settings = Path(client.download_artifacts(run.info.run_id, "settings.yaml")).read_text()
    assert yaml.safe_load(settings)["stages"] == ["train", "evaluate"]


def load(name: str) -> Sweep:
    import runpy

    return runpy.run_path(str(ROOT / "ray_jobs" / f"{name}.py"))["SWEEP"]


SWEEPS = sorted(path.stem for path in (ROOT / "ray_jobs").glob("*_lora.py"))


def test_each_recipe_has_a_sweep() -> None:
    recipes = {path.name for path in (ROOT / "recipes").glob("*.py")}
    assert {Path(load(name).recipe).name for name in SWEEPS} == recipes


@pytest.mark.parametrize("name", SWEEPS)
def test_two_trials_of_each_sweep(name: str, in_cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = load(name)
    words = [*TINY, "--num_samples", "2", "--max_concurrent", "1", "--ray_num_gpus", "1"]
    # Different searches and schedulers, each at least once.
    words += {0: ["--scheduler", "fifo"], 1: ["--search", "optuna"], 2: ["--scheduler", "pbt"]}[SWEEPS.index(name) % 3]
    assert run_sweep(sweep, name, words)
    screen = capsys.readouterr().out
    assert "Best trial:" in screen and "Warning" not in screen
    parent, below = runs_of(in_cluster)
    assert [run.info.status for run in (parent, *below)] == ["FINISHED"] * 3
    assert {run.data.tags["trial_state"] for run in below} == {"finished"}
    varied = axes_for("pbt" if "pbt" in words else "fifo", sweep.axes)
    for run in below:
        assert set(varied) <= run.data.params.keys()
        assert sweep.metric in run.data.metrics
    artifacts = {file.path for file in client_of(in_cluster).list_artifacts(parent.info.run_id)}
    assert {"adapter", "report.html", "trials.csv", "trials.json", "trials.png"} <= artifacts
    table = json.loads(Path(client_of(in_cluster).download_artifacts(parent.info.run_id, "trials.json")).read_text())
    assert [row["state"] for row in table["trials"]] == ["finished"] * 2
    (best,) = [run for run in below if sweep.metric.replace("finetuned_", "baseline_") in run.data.metrics]
    assert_says_what_the_trial_did(in_cluster, best)
    assert any(name.startswith("difference_") for name in best.data.metrics)
    added = {file.path for file in client_of(in_cluster).list_artifacts(best.info.run_id)}
    assert {"baseline_predictions.jsonl", "predictions.json", "report.html"} <= added
    # One actor for both: the second trial found everything in place.
    starts = [run.data.metrics["train_seconds"] for run in below]
    assert len(starts) == 2


def test_asha_ends_trials_and_says_so(in_cluster: Path) -> None:
    # The worst learning rate comes last and is compared with what the others had reached.
    sweep = Sweep("recipes/flickr8k.py", {"learning_rate": [1e-2, 5e-3, 1e-9]}, "finetuned_loss", "min", 3, 2)
    words = [*TINY, "--max_steps", "12", "--search", "grid", "--max_concurrent", "1", "--time_budget", "400"]
    assert run_sweep(sweep, "asha", words)
    _, below = runs_of(in_cluster)
    by_rate = {float(run.data.params["learning_rate"]): run for run in below}
    assert by_rate[1e-9].data.tags["trial_state"] == "pruned"
    assert by_rate[1e-9].info.status == "KILLED"
    assert "finetuned_loss" not in by_rate[1e-9].data.metrics
    assert by_rate[1e-2].data.tags["trial_state"] == "finished"


def test_an_unknown_axis_or_flag_stops_before_ray_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # No address: a sweep that does ask Ray fails at once, where one that nobody answers at is waited for.
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    sweep = Sweep("recipes/flickr8k.py", {"lora_rank": [4, 8]}, "finetuned_bleu4", "max", 2, 2)
    with pytest.raises(UserError, match="override `lora_rank` is no flag"):
        run_sweep(sweep, "wrong", [*TINY])
    right = load("flickr8k_lora")
    for words, message in (
        (["--learning_rat", "1e-3"], "Did you mean --learning_rate?"),
        (["--output_dir", "x"], "--storage_path"),
        (["--resume"], "holds no sweep"),
        (["--num_samples", "0"], "at least 1"),
        (["--scores", "rouge_l"], "judged by finetuned_bleu4"),
        (["--lora_r", "64"], r"--lora_r: this sweep varies lora_r over \[8, 16, 32\].* the axis in wrong.py"),
        (["--lora_dropout=0.3"], "--lora_dropout: this sweep varies"),
        (["--learning-rate", "1e-3"], r"--learning-rate: this sweep varies learning_rate over Range\(low=5e-05"),
        (["--dry_run"], "`python recipes/flickr8k.py --dry_run`"),
        (["--stages", "train"], "--stages train gives no trial finetuned_bleu4, .*: add evaluate, or"),
        (["--stages", "evaluate"], ": add train, or"),
        (["--stages", "check", "report"], ": add train and evaluate, or"),
    ):
        with pytest.raises(UserError, match=message):
            run_sweep(right, "wrong", words)
    switch = Sweep("recipes/flickr8k.py", {"compile_layers": [True, False]}, "finetuned_bleu4", "max", 2, 2)
    with pytest.raises(UserError, match="--no_compile_layers: this sweep varies compile_layers"):
        run_sweep(switch, "wrong", [*TINY, "--no_compile_layers"])
    assert not ray.is_initialized()


def test_stages_are_refused_only_where_trials_would_have_no_score() -> None:
    sweep = load("flickr8k_lora")
    by_loss = dataclasses.replace(sweep, metric="train_final_loss")

    def settle(judged: Sweep, *words: str) -> None:
        _require_stages(judged, checked_settings(ROOT / sweep.recipe, [*DEFAULT_STAGES, *words]).recipe)

    settle(sweep)
    settle(sweep, "--stages", "check", "train", "evaluate")
    settle(sweep, "--stages", "evaluate", "--adapter", "trained")
    settle(by_loss, "--stages", "train")
    with pytest.raises(UserError, match=": add train, or"):
        settle(by_loss, "--stages", "evaluate", "--adapter", "trained")


FAILING = """
import sys
sys.path.insert(0, {root!r})
from ray_jobs.sweep import Sweep, main
main(Sweep("recipes/flickr8k.py", {{"lora_r": [2, 3, 4, 5, 6, 7, 8, 10**11]}}, "finetuned_rouge_l", "max", 8, 2))
"""


def driver(file: Path, address: str, words: Sequence[str]) -> tuple["subprocess.Popen[str]", Path]:
    """Starts a sweep's driver; its screen goes to a file."""
    screen = file.parent / f"screen_{len(list(file.parent.glob('screen_*')))}"
    with open(screen, "w") as sink:
        process = subprocess.Popen(
            [sys.executable, str(file), *words],
            cwd=file.parent,
            env={**clean_environment(), "RAY_ADDRESS": address},
            stdout=sink,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    return process, screen


def wait_until(happened: Callable[[], Any], screen: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, screen.read_text()[-5000:]
        time.sleep(0.3)


def test_eight_trials_survive_a_lost_node_a_lost_driver_and_one_that_does_not_fit(
    cluster: Cluster, tmp_path: Path
) -> None:
    doomed, _ = (cluster.add_node(**node(1)) for _ in range(2))
    cluster.wait_for_nodes()
    file = tmp_path / "failing.py"
    file.write_text(FAILING.format(root=str(ROOT)))
    words = [*TINY, "--max_steps", "12", "--save_steps", "3", "--search", "grid", "--scheduler", "fifo"]
    process, screen = driver(file, cluster.address, words)
    wait_until(lambda: screen.read_text().count(" starts: ") >= 3, screen)
    # In the middle of its first trials.
    storage = tmp_path / "outputs" / "sweeps"
    wait_until(lambda: list(storage.glob("failing_*/RecipeTrial*/checkpoint_*")), screen)
    cluster.remove_node(doomed, allow_graceful=False)
    wait_until(lambda: " lost its process or node" in screen.read_text(), screen)
    wait_until(lambda: screen.read_text().count(" finished: ") >= 2, screen)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, before = runs_of(tmp_path)
    finished_before = {r.info.run_id: r.info.end_time for r in before if r.info.status == "FINISHED"}
    assert finished_before

    process, screen = driver(file, cluster.address, ["--resume"])
    assert process.wait(timeout=PATIENCE_SECONDS) == 0, screen.read_text()[-5000:]
    parent, below = runs_of(tmp_path)
    states = sorted(run.data.tags["trial_state"] for run in below)
    assert states == ["failed"] + ["finished"] * 7
    assert parent.info.status == "FINISHED"
    (failed,) = [run for run in below if run.data.tags["trial_state"] == "failed"]
    assert failed.info.status == "FAILED"
    assert failed.data.params["lora_r"] == str(10**11)
    assert failed.data.tags["error"].startswith("out of memory: ")
    assert len({run.data.tags[TRIAL_TAG] for run in below}) == 8
    client = client_of(tmp_path)
    for run in below:
        assert run.info.status == {"finished": "FINISHED", "failed": "FAILED"}[run.data.tags["trial_state"]]
        if run.info.status == "FINISHED":
            assert {point.step for point in client.get_metric_history(run.info.run_id, "loss")} == set(range(1, 13))
    # What had finished was left alone.
    assert {run.info.run_id: run.info.end_time for run in below}.items() >= finished_before.items()

    from peft import PeftModel
    from tiny import base

    adapted = PeftModel.from_pretrained(copy.deepcopy(base("qvl/tiny-qwen3-vl")), adapter_on(tmp_path, parent))
    assert sum(parameter.abs().sum().item() for name, parameter in adapted.named_parameters() if "lora_B" in name) > 0
    adapted.unload()
    assert torch.is_tensor(next(adapted.parameters()))


SCORED_BY_THE_FIRST_PROCESS_ALONE = """
import dataclasses, os, runpy
from pathlib import Path
from qvl.text_scores import TextScore

def once(prediction, references):
    first = Path(__file__).with_name("first")
    if not first.exists():
        first.write_text(str(os.getpid()))
    if first.read_text() != str(os.getpid()):
        raise ArithmeticError("no score for the base model")
    return 1.0

RECIPE = dataclasses.replace(runpy.run_path({recipe!r})["RECIPE"], scores={{"once": TextScore(once, "once")}})
"""


def test_a_baseline_that_fails_takes_nothing_from_the_best_trial(
    in_cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = in_cluster / "flickr8k.py"
    recipe.write_text(SCORED_BY_THE_FIRST_PROCESS_ALONE.format(recipe=str(ROOT / "recipes" / "flickr8k.py")))
    sweep = Sweep(str(recipe), {"lora_r": [4]}, "finetuned_rouge_l", "max", 1, 2)
    assert run_sweep(sweep, "unscored", [*TINY, "--scores", "rouge_l", "once"])
    screen = capsys.readouterr().out
    assert re.search("The report of the best trial failed .* ArithmeticError: no score for the base model", screen)
    parent, (best,) = runs_of(in_cluster)
    assert_says_what_the_trial_did(in_cluster, best)
    assert best.data.metrics["finetuned_once"] == 1.0
    assert parent.info.status == "FINISHED"
    assert (adapter_on(in_cluster, parent) / "adapter_model.safetensors").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder)]
    if subprocess.run(words, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_bad_row_and_a_full_disk_take_nothing_from_finished_trials(
    in_cluster: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_scenes(in_cluster / "good", 16, 3, seed=1)
    bad = Path(shutil.copytree(good, in_cluster / "bad"))
    rows = bad / "captions.jsonl"
    rows.write_text('{"image": "images/00001.png", "split": "train"}\n' + rows.read_text())
    # A whole lot of LoRA: what a trial saves has no room.
    axes = {"lora_r": [2, 400], "dataset_name": [str(bad), str(good)]}
    sweep = Sweep("recipes/flickr8k.py", axes, "finetuned_rouge_l", "max", 4, 2)
    words = [*TINY, "--search", "grid", "--scheduler", "fifo", "--max_concurrent", "1", "--max_failures", "0"]
    with pytest.raises(UserError, match="is the disk full"):
        run_sweep(sweep, "full", [*words, "--storage_path", str(small_disk)])
    screen = capsys.readouterr().out
    assert screen.count("failed: ") == screen.count("captions.jsonl:1: ") == 2, screen
    assert screen.count("No space left on device") == 1, screen
    _, before = runs_of(in_cluster)
    (finished,) = [run for run in before if run.info.status == "FINISHED"]
    assert finished.data.metrics["finetuned_rouge_l"] > 0
    assert (adapter_on(in_cluster, finished) / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("address", ["file:///proc/bucket/sweeps", "s4://bucket/sweeps"])
def test_a_storage_that_takes_nothing_is_told_before_anything_is_recorded(address: str, in_cluster: Path) -> None:
    with pytest.raises(UserError, match=f"--storage_path {address} cannot be used .*: correct it"):
        run_sweep(load("flickr8k_lora"), "nowhere", [*TINY, "--storage_path", address])
    client = client_of(in_cluster)
    assert client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]) == []
    with pytest.raises(UserError, match=f"--storage_path {address} cannot be used|{address} holds no sweep"):
        sweep_folder(address, "nowhere", "newest")


def test_a_sweep_that_finds_no_room_for_its_first_note_does_not_stay_running(
    in_cluster: Path, small_disk: Path
) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "others").write_bytes(bytes(2**23))
    with pytest.raises(UserError, match=f"--storage_path {small_disk} cannot be used .*No space left"):
        run_sweep(load("flickr8k_lora"), "full", [*TINY, "--storage_path", str(small_disk)])
    parent, below = runs_of(in_cluster)
    assert (parent.info.status, below) == ("FAILED", [])


def test_an_error_of_rays_own_is_told_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Ray leaves no error behind then, and what tells of it must not end the sweep."""
    trial = SimpleNamespace(trial_id="0a1b", pickled_error_file=None)
    Narrator("finetuned_loss").on_trial_error(0, [], trial)
    assert "0a1b could not go on; that was too often, it has failed" in capsys.readouterr().out


@pytest.mark.parametrize("state", [None, '{"trial_data": ['])
def test_a_sweep_without_rays_record_is_not_resumed(state: str | None, tmp_path: Path) -> None:
    """Ray would know of no trials, and begin one that varies nothing."""
    make_sweep_folder(str(tmp_path), "lost_1")
    note_sweep(str(tmp_path), "lost_1", {"words": [], "scheduler": "fifo", "parent_id": "0a1b"})
    if state is not None:
        (tmp_path / "lost_1" / "experiment_state-2026.json").write_text(state)
    with pytest.raises(UserError, match="MLflow's run 0a1b, adapters too; start the sweep again"):
        sweep_folder(str(tmp_path), "lost", "newest")
    (tmp_path / "lost_1" / "experiment_state-2027.json").write_text("{}")
    assert sweep_folder(str(tmp_path), "lost", "newest")[0] == "lost_1"


def test_a_resumed_sweep_has_its_own_flags(tmp_path: Path) -> None:
    sweep = load("flickr8k_lora")
    options, _ = _parse(sweep, "flickr8k_lora", ["--resume", "--storage_path", str(tmp_path)])
    _go_on_as_before(options, {"words": [], "scheduler": "pbt", "cpus_per_trial": 8.0, "parent_id": "0a1b"})
    assert (options.scheduler, options.cpus_per_trial) == ("pbt", 8.0)
    # Ray would go on with the old ones, without a word.
    for words in (["--num_samples", "99"], ["--max_concurrent", "2"], ["--time_budget", "60"], ["--smoke"]):
        with pytest.raises(UserError, match=f"leave out {' '.join(words)[: len(words[0])]}"):
            _parse(sweep, "flickr8k_lora", ["--resume", *words])


def results_of(last: list[dict[str, Any]]) -> Any:
    """As Ray gives them, without what was reported on the way."""
    return [
        SimpleNamespace(metrics=row, error=None, metrics_dataframe=None, config=row.get("config"), path="")
        for row in last
    ]


def test_a_trial_that_ended_before_its_first_report_has_started() -> None:
    """Of such a one, Ray knows what its actor says of itself; its MLflow run says KILLED."""
    grid = results_of([{"trial_id": "t0", "config": {"lora_r": 4}, "pid": 7}, {"trial_id": "t1"}])
    assert [trial.state for trial in outcomes(grid, "bleu4", "max")] == [PRUNED, NOT_STARTED]


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    scores = [float("nan"), 0.2, 0.5, float("nan")]
    last = [{"trial_id": f"t{n}", "is_finished": True, "bleu4": score} for n, score in enumerate(scores)]
    grid = results_of([{"config": {}, **row} for row in last])
    for mode, best in (("max", "t2"), ("min", "t1")):
        found = outcomes(grid, "bleu4", mode)
        assert [trial.score for trial in found[2:]] == [None, None]
        assert found[0].trial_id == best
        assert {trial.state for trial in found} == {FINISHED}


def test_a_sweep_that_is_settled_again_says_what_is_true_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store(tmp_path)
    record = SweepRecord(store, "recipe", "sweep", None, {})
    child = find_or_make_child(store, "recipe", record.run_id, "t0", {"lora_r": 4}).info.run_id
    for state, score, reason in ((FAILED, None, "no room"), (PRUNED, None, ""), (FINISHED, 0.5, "")):
        record.settle([Outcome("t0", {"lora_r": 4}, state, score, 1, 1.0, 1.0, reason)], "bleu4")
    run = store.client.get_run(child)
    assert (run.info.status, run.data.tags["trial_state"]) == ("FINISHED", "finished")
    assert "error" not in run.data.tags
    counts = store.client.get_run(record.run_id).data.metrics
    assert counts == {
        "best_bleu4": 0.5,
        "num_finished": 1,
        "num_failed": 0,
        "num_pruned": 0,
        "num_not_started": 0,
    }


def test_a_sweep_in_rays_copy_of_the_checkout_is_told_to_write_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _say_what_lasts(tmp_path / "outputs" / "sweeps", 1)
    assert "--storage_path" in capsys.readouterr().out
    _say_what_lasts(tmp_path.parent / "shared", 1)
    assert capsys.readouterr().out == ""
    _say_what_lasts(tmp_path.parent / "shared", 2)
    assert "NFS" in capsys.readouterr().out


def test_a_child_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store(tmp_path)
    with store.lock():
        experiment = store.experiment_id("recipe")
    parent = store.client.create_run(experiment).info.run_id
    first = find_or_make_child(store, "recipe", parent, "trial_1", {"lora_r": 4})
    assert find_or_make_child(store, "recipe", parent, "trial_1", {"lora_r": 4}).info.run_id == first.info.run_id
    find_or_make_child(store, "recipe", parent, "trial_2", {"lora_r": 8})
    assert {run.data.tags[TRIAL_TAG] for run in children(store, experiment, parent)} == {"trial_1", "trial_2"}


def test_a_file_is_refused_as_the_store_of_several_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store(tmp_path)
    require_reachable_by_all(store, {"10.0.0.1"})
    with pytest.raises(UserError, match=r"mlflow server --host 0.0.0.0 .*--allowed-hosts 10.0.0.1:5000"):
        require_reachable_by_all(store, {"10.0.0.2", "10.0.0.1"})


def test_a_grid_takes_three_points_of_a_range() -> None:
    assert Range(1e-5, 1e-3, is_log=True).three_points() == [1e-5, 1e-4, 1e-3]
    assert Range(0.0, 0.2).three_points() == [0.0, 0.1, 0.2]
    assert example_of({"a": Range(1, 2), "b": [3, 4]}) == {"a": 1, "b": 3}


def readme_commands() -> list[str]:
    lines = (ROOT / "ray_jobs" / "README.md").read_text(encoding="utf-8").splitlines()
    return [match[1] for line in lines if (match := re.search(r"python ((?:ray_jobs|recipes)/\w+\.py[^#`|]*)", line))]


@pytest.mark.parametrize("command", readme_commands())
def test_commands_of_the_readme_are_accepted(command: str) -> None:
    file, *words = shlex.split(command)
    if file.startswith("ray_jobs/"):
        options, words = _parse(load(Path(file).stem), Path(file).stem, words)
        assert options.resume is None or not words
        file = load(Path(file).stem).recipe
    assert checked_settings(ROOT / file, words).recipe.dataset_name


def test_a_store_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_jobs.children._PAUSES_SECONDS", (0.01, 0.01))
    answers = [None, None, "there"]

    def call() -> str:
        answer = answers.pop(0)
        if answer is None:
            raise ConnectionError("refused")
        return answer

    assert with_patience(call) == "there"
    answers[:] = [None, None, None]
    with pytest.raises(ConnectionError):
        with_patience(call)
