"""Several processes, one run: two of them on the CPU give what one gives, and only one of them speaks."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from mlflow import MlflowClient
from PIL import Image
from torch import nn
from torch.distributed.fsdp import fully_shard

from qvl import processes
from qvl.errors import UserError
from qvl.files import read_jsonl
from qvl.memory import plan_memory
from qvl.models import load_config, load_processing_class
from qvl.recipe import Recipe, run
from qvl.settings import Settings, parse_settings
from qvl.sharding import (
    Sharding,
    gather_at_once,
    keep_sums_in_full,
    leave_linear_layers_plain,
    require_shardable,
    sharding,
    whole,
)
from qvl.training_form import wants_compiled
from recipes import qwen_chat
from recipes.flickr8k import RECIPE

ROOT = Path(__file__).parents[1]
LAUNCH_FILES = ROOT / "environments" / "accelerate"
# 16 rows of two captions, 4 in a step: five steps reach into the second epoch. 7 prompts in batches of 3 are shared
# unevenly. Dropout would draw other numbers in two processes.
SHORT: dict[str, Any] = {
    "smoke": True,
    "num_train_examples": 16,
    "num_eval_examples": 7,
    "captions_per_image": 2,
    "max_steps": 5,
    "logging_steps": 1,
    "lora_dropout": 0.0,
    "max_new_tokens": 12,
    "per_device_eval_batch_size": 3,
}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 5, "eval_generations": 3}
LONG = {**SHORT, "max_steps": 14, "stages": ["train"]}
# fp32 sums of two halves, in another order.
TOLERANCE = 1e-5


def words(flags: dict[str, Any]) -> list[str]:
    return [
        word
        for key, value in flags.items()
        for word in (f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)]))
    ]


def launch(file: str, place: Path, *flags: str, recipe: str = "flickr8k.py") -> subprocess.Popen[str]:
    """A user's command; --smoke computes on the CPU, where the launch files' processes talk through gloo."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH_FILES / file)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(ROOT / "recipes" / recipe), *flags],
        cwd=place,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def logged(folder: Path, key: str) -> list[float]:
    return [row[key] for row in read_jsonl(folder / "training_log.jsonl") if key in row]


def recorded_runs(store: Path) -> list[Any]:
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    run(RECIPE, {**SHORT, **EVALUATING, "per_device_train_batch_size": 4, "output_dir": str(folder)})
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where two processes ran, in a folder that they agreed on, and what was on the screen."""
    place = tmp_path_factory.mktemp("two")
    process = launch("ddp.yaml", place, *words({**SHORT, **EVALUATING, "per_device_train_batch_size": 2}))
    screen, _ = process.communicate(timeout=600)
    assert process.returncode == 0, screen
    return place, screen


def folder_of(place: Path) -> Path:
    (folder,) = (place / "outputs" / "flickr8k").iterdir()
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one_does(one: Path, two: tuple[Path, str]) -> None:
    folder = folder_of(two[0])
    assert len(logged(folder, "loss")) == 5
    for key in ("loss", "grad_norm", "num_tokens", "mean_token_accuracy"):
        assert logged(folder, key) == pytest.approx(logged(one, key), rel=TOLERANCE), key
    verdicts = {check["name"]: check for check in json.loads((folder / "checks.json").read_text())}
    assert verdicts["same_tensors_in_all_processes"]["detail"] == "2 processes"
    assert all(check["passed"] for check in verdicts.values())
    assert {*verdicts} - {check["name"] for check in json.loads((one / "checks.json").read_text())} == {
        "same_tensors_in_all_processes"
    }


@pytest.mark.slow
def test_two_processes_answer_and_score_as_one_does(one: Path, two: tuple[Path, str]) -> None:
    folder = folder_of(two[0])
    for key in ("eval_loss", "eval_perplexity", "eval_bleu4", "eval_cider"):
        assert logged(folder, key) == pytest.approx(logged(one, key), rel=TOLERANCE), key
    for part in ("baseline", "finetuned"):
        ours, theirs = (read_jsonl(path / f"{part}_predictions.jsonl") for path in (folder, one))
        same = ("id", "prediction", "references", "answer_tokens")
        assert [[row[key] for key in same] for row in ours] == [[row[key] for key in same] for row in theirs]
        losses = [row["answer_loss"] for row in theirs]
        # The base's batches are those of one process, to the last bit.
        assert [row["answer_loss"] for row in ours] == (
            losses if part == "baseline" else pytest.approx(losses, rel=TOLERANCE)
        )
    ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (folder, one))
    assert ours["baseline"] == theirs["baseline"]
    assert ours["finetuned"]["loss"] == pytest.approx(theirs["finetuned"]["loss"], rel=TOLERANCE)


@pytest.mark.slow
def test_one_of_two_processes_writes_and_speaks(one: Path, two: tuple[Path, str]) -> None:
    place, screen = two
    folder = folder_of(place)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in one.iterdir())
    (record,) = recorded_runs(place / "outputs")
    assert record.info.status == "FINISHED"
    for line in ("== train ==", "Trainable:", "finetuned: BLEU-4", "Took "):
        assert screen.count(line) == 1, line
    assert screen.count("\n== evaluate ==") == 1
    assert "Warning" not in screen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        (RECIPE, {**SHORT, "captions_per_image": 1, "padding_free": True}),
        (qwen_chat.RECIPE, {**SHORT, "captions_per_image": 1, "packing": True, "max_length": 256}),
    ],
    ids=["padding_free", "packing"],
)
def test_two_processes_hold_out_rows_without_padding_as_one_does(
    recipe: Recipe, flags: dict[str, Any], tmp_path: Path
) -> None:
    """7 rows in batches of 3: what fills up the last one counts nowhere, although a batch is one row."""
    # Before the first step, where the model is the same to the last bit.
    flags = {**flags, "max_steps": 1, "stages": ["train"], "eval_on_start": True, "per_device_train_batch_size": 1}
    process = launch("ddp.yaml", tmp_path, *words({**flags, "output_dir": "run"}), recipe=f"{recipe.name}.py")
    screen, _ = process.communicate(timeout=600)
    assert process.returncode == 0, screen
    run(recipe, {**flags, "output_dir": str(tmp_path / "one")})
    for key in ("eval_loss", "eval_perplexity", "eval_entropy", "eval_mean_token_accuracy"):
        (ours,), (theirs,) = logged(tmp_path / "run", key), logged(tmp_path / "one", key)
        assert ours == pytest.approx(theirs, rel=TOLERANCE), key


@pytest.mark.slow
def test_one_process_from_a_launcher_is_plain_python(one: Path, tmp_path: Path) -> None:
    flags = {**SHORT, "per_device_train_batch_size": 4, "stages": ["train"], "output_dir": "run"}
    process = launch("single.yaml", tmp_path, *words(flags))
    screen, _ = process.communicate(timeout=600)
    assert process.returncode == 0, screen
    assert logged(tmp_path / "run", "loss") == logged(one, "loss")


@pytest.mark.slow
def test_sigterm_ends_all_at_one_step_and_they_resume(tmp_path: Path) -> None:
    """With cached vision features, which both processes want at the same time."""
    cached = {"cache_vision_features": "true", "vision_cache_dir": str(tmp_path / "features")}
    flags = words({**LONG, **cached, "per_device_train_batch_size": 2, "output_dir": "run"})
    process = launch("ddp.yaml", tmp_path, *flags)
    assert process.stdout is not None
    screen = ""
    for line in process.stdout:
        screen += line
        if screen.count("'loss'") == 4:
            process.send_signal(signal.SIGTERM)
            break
    screen += process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert screen.count("SIGTERM: checkpoint saved") == 1, screen
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert 4 <= int(checkpoint.name.rpartition("-")[2]) < 14
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    (record,) = recorded_runs(tmp_path)
    assert record.info.status == "KILLED"

    resumed = launch("ddp.yaml", tmp_path, "--resume_from_checkpoint", "true", "--output_dir", "run")
    screen, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, screen
    whole = tmp_path / "whole"
    run(RECIPE, {**LONG, "per_device_train_batch_size": 4, "output_dir": str(whole)})
    assert logged(tmp_path / "run", "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)


@pytest.mark.slow
def test_what_ends_one_process_ends_both_with_one_message(tmp_path: Path) -> None:
    """A picture goes away while training, and one process is the one to read it."""
    splits = ["train"] * 13 + ["test"] * 3
    rows = [{"image": f"{n}.png", "captions": [f"picture {n}"], "split": split} for n, split in enumerate(splits)]
    for number, row in enumerate(rows):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / str(row["image"]))
    (tmp_path / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    flags = {**SHORT, "num_train_examples": 13, "num_eval_examples": 3, "max_steps": 7, "stages": ["train"]}
    flags |= {"captions_per_image": 1, "dataset_name": tmp_path, "per_device_train_batch_size": 1}
    process = launch("ddp.yaml", tmp_path, *words(flags), "--output_dir", "run")
    assert process.stdout is not None
    screen = ""
    for line in process.stdout:
        screen += line
        if "== train ==" in line:
            # Behind the rows that are looked at before the first step.
            (tmp_path / "12.png").unlink()
            break
    screen += process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert "13 rows do not fill batches of 2 x 1: 1 of them come twice" in screen
    assert screen.count("captions.jsonl:13: ") == 1, screen
    assert "exitcode  : 2" in screen, "of the process, as the launcher tells it"


@pytest.mark.slow
def test_a_mistake_that_all_make_is_told_once(tmp_path: Path) -> None:
    process = launch("ddp.yaml", tmp_path, "--smoke", "--per_device_train_batch_size", "0")
    screen, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert screen.count("--per_device_train_batch_size 0: it has to be at least 1.") == 1
    assert not (tmp_path / "outputs").exists()
    assert "Traceback" not in screen.partition("elastic")[0]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_batches_are_dealt_out_as_one_process_makes_them(num_processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    dealt = []
    for rank in range(num_processes):
        monkeypatch.setenv("RANK", str(rank))
        dealt.append(processes.own_batches(range(10), 4))
    turns = [batches[turn] for turn in range(3) for batches in dealt if turn < len(batches)]
    assert turns == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_of_several_gpus_plain_python_takes_the_first_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    processes.take_first_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert "2 GPUs are visible, this run takes GPU 3" in capsys.readouterr().out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.take_first_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5", "a launcher has dealt them out"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        processes.take_first_gpu()


def settings(*argv: str) -> Settings:
    return parse_settings({"model_name_or_path": "qvl/tiny-qwen3-vl", "use_cpu": True}, {}, argv)


def as_launched(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate leaves in the environment of the processes that it starts with a file."""
    content = yaml.safe_load((LAUNCH_FILES / file).read_text(encoding="utf-8"))
    kind = content["distributed_type"]
    monkeypatch.setenv("WORLD_SIZE", str(content["num_processes"]))
    if kind == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", str(content["fsdp_config"]["fsdp_version"]))
    if kind == "DEEPSPEED":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(content["deepspeed_config"]["zero_stage"]))
        monkeypatch.setattr("qvl.sharding.is_deepspeed_available", lambda: True)


KINDS = {
    "single.yaml": Sharding.NOTHING,
    "ddp.yaml": Sharding.NOTHING,
    "zero2.yaml": Sharding.ZERO2,
    "zero2_offload.yaml": Sharding.ZERO2,
    "zero3.yaml": Sharding.ZERO3,
    "fsdp2.yaml": Sharding.FSDP2,
}


def test_every_launch_file_is_known() -> None:
    assert {path.name for path in LAUNCH_FILES.glob("*.yaml")} == KINDS.keys()


@pytest.mark.parametrize("file", list(KINDS))
def test_launch_files_share_out_what_their_names_say(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = settings("--stages", "baseline", "train", "evaluate")
    as_launched(file, monkeypatch)
    assert sharding() is KINDS[file]
    require_shardable(plain)


@pytest.mark.parametrize(
    ("file", "flags", "reason"),
    [
        ("ddp.yaml", "--stages check train", "stage check"),
        ("zero2.yaml", "--base_precision fp8", "--base_precision fp8"),
        ("zero2.yaml", "--load_in_8bit", "--load_in_8bit"),
        ("zero3.yaml", "--load_in_4bit", "zero2.yaml or fsdp2.yaml"),
        ("zero3.yaml", "--eval_strategy epoch", "the stage evaluate works"),
        ("zero3.yaml", "--cache_vision_features", "--cache_vision_features"),
        ("fsdp2.yaml", "--load_in_4bit", "--bnb_4bit_quant_storage float32"),
        ("fsdp2.yaml", "--lora_modules_to_save lm_head", "only LoRA"),
    ],
)
def test_what_does_not_go_together_is_refused(
    file: str, flags: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(*flags.split())
    require_shardable(made)
    as_launched(file, monkeypatch)
    with pytest.raises(UserError, match=reason):
        require_shardable(made)


def test_qlora_goes_with_zero2_and_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    made = settings("--load_in_4bit", "--bnb_4bit_quant_storage", "float32")
    for file in ("zero2.yaml", "fsdp2.yaml"):
        with monkeypatch.context() as patch:
            as_launched(file, patch)
            require_shardable(made)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_fsdp2_gives_the_loss_and_the_gradients_in_full(group_of_one: None) -> None:
    """As it computes in bf16; accelerate's own policy would round both."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    keep_sums_in_full(plugin)
    keep_sums_in_full(None)

    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).float().square().mean()

    torch.manual_seed(0)
    model, x = Model(8, 8), torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        fully_shard(model, mp_policy=plugin.mixed_precision_policy)
        loss = model(x)
    assert loss.dtype == torch.float32
    assert loss == expected
    # Two micro-batches, whose gradients are bf16 each: their sum has more digits.
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            (model(x) / 3).backward()
            x = x * 1.37
    assert model.weight.grad is not None
    gradient = whole(model.weight.grad)
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize("file", ["ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3.yaml"])
def test_layers_are_compiled_however_a_model_is_shared_out(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = settings()
    as_launched(file, monkeypatch)
    assert wants_compiled(made)


def test_deepspeed_leaves_linear_layers_as_they_are_unless_it_is_told_to(tmp_path: Path) -> None:
    plugin = DeepSpeedPlugin(zero_stage=3)
    leave_linear_layers_plain(plugin)
    # The second is what transformers hands to DeepSpeed when a model is loaded.
    for config in (plugin.deepspeed_config, plugin.hf_ds_config.config):
        assert config["zero_optimization"]["memory_efficient_linear"] is False

    file = tmp_path / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "memory_efficient_linear": True}}))
    plugin = DeepSpeedPlugin(hf_ds_config=str(file))
    leave_linear_layers_plain(plugin)
    assert plugin.deepspeed_config["zero_optimization"]["memory_efficient_linear"] is True


def test_zero3_gathers_a_layer_at_once_and_the_next_one_ahead() -> None:
    utils = pytest.importorskip("deepspeed.utils")
    layers = [nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), nn.Linear(2, 2)]
    plugin = DeepSpeedPlugin(zero_stage=3)
    gather_at_once(layers, plugin)
    assert all(utils.z3_leaf_module(layer) for layer in layers)
    assert plugin.deepspeed_config["zero_optimization"]["stage3_prefetch_bucket_size"] == 4 * 8 * 2 + 12

    plain = nn.Linear(2, 2)
    gather_at_once([plain], DeepSpeedPlugin(zero_stage=2))
    gather_at_once([plain], None)
    assert not utils.z3_leaf_module(plain)


@pytest.mark.parametrize(("file", "in_pieces"), [("zero2.yaml", False), ("zero3.yaml", True), ("fsdp2.yaml", True)])
def test_a_plan_for_the_whole_base_says_so_where_it_is_shared_out(
    file: str, in_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings("--gpu_memory_gib", "1")
    as_launched(file, monkeypatch)
    plan = plan_memory(made, load_config(made), None, load_processing_class(made))
    assert plan is not None and not plan.fits()
    assert plan.trained_in_pieces is in_pieces and plan.may_stop is not in_pieces
    assert any("that is for the whole base" in line for line in plan.lines()) is in_pieces


def test_deepspeed_that_is_missing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    as_launched("zero3.yaml", monkeypatch)
    monkeypatch.setattr("qvl.sharding.is_deepspeed_available", lambda: False)
    with pytest.raises(UserError, match=r"setup_gpu_env\.sh deepspeed"):
        sharding()


def test_other_launches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="fsdp_version: 2"):
        sharding()
