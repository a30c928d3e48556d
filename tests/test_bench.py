"""`python -m qvl.bench`: both sides train on the same, the counts are right, and what is measured is never lost."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from PIL import Image
from tiny import CHAT, CPU, VISION, answered, base, picture, processing_class, settings_for
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import ModelConfig, SFTConfig

from qvl.adapters import add_adapter
from qvl.bench import _parser, bench
from qvl.bench_cases import TRL_BEST, TRL_DEFAULTS, Case, contestant, prepare, read_case
from qvl.bench_report import table
from qvl.bench_timer import BlockTimer, measure_matmul_peak
from qvl.bench_work import WeightCounts, Work, WorkCounter, count_weights
from qvl.collators import CompletionCollator
from qvl.compiled_layers import num_compiled_frames
from qvl.encode import IGNORED_LABEL
from qvl.errors import UserError
from qvl.flags import RecipeArguments
from qvl.models import load_base, load_config
from qvl.random_weights import build_with_random_weights
from recipes import qwen_clip

RECIPE = str(Path(__file__).resolve().parent.parent / "recipes" / "flickr8k.py")
SMALL = ["--smoke", "--num_train_examples", "4", "--num_eval_examples", "2", "--lora_dropout", "0"]
FEW_STEPS = ["--num_warmup_steps", "2", "--num_blocks", "2", "--num_block_steps", "1"]
BLOCK_RATES = {"captions_per_second": "num_captions", "tokens_per_second": "num_tokens"}


def bench_case(text: str) -> list[str]:
    return ["--case", text]


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bench.json").read_text(encoding="utf-8"))


def case_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    (case,) = [case for case in results["cases"] if case["name"] == name]
    return case


# The whole command


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of TRL with qvl on one row, the order of which cannot differ, and a case that cannot fit."""
    folder = tmp_path_factory.mktemp("bench")
    template = folder / "template.jinja"
    # TRL also trains on the newline behind the end token: without it both have the same labels.
    text = processing_class(VISION[0]).chat_template
    ending = "{{- '<|im_end|>\\n' }}"
    assert ending in text
    template.write_text(text.replace(ending, "{{- '<|im_end|>' }}"), encoding="utf-8")
    code = bench(
        [
            RECIPE,
            *SMALL,
            *("--num_train_examples", "1", "--captions_per_image", "1", "--chat_template_path", str(template)),
            *("--learning_rate", "0.001", "--output_dir", str(folder), "--num_rounds", "2", "--trl_once"),
            *("--trl_batch_size", "4"),
            *FEW_STEPS,
            *bench_case(TRL_DEFAULTS),
            *bench_case(TRL_BEST),
            *bench_case("qvl: --per_device_train_batch_size 4"),
            # More addresses than a process has.
            *bench_case("too big: --lora_r 1000000000000000"),
        ]
    )
    assert code == 0
    return folder


@pytest.mark.slow
def test_trl_and_qvl_train_on_the_same(finished: Path) -> None:
    results = results_of(finished)
    trl, qvl = case_of(results, TRL_DEFAULTS), case_of(results, "qvl")
    theirs, ours = (case["rounds"][0]["warmup_losses"] for case in (trl, qvl))
    # The second loss is that of updated weights: gradients and updates are the same too.
    assert len(theirs) == 2 and theirs[0] - theirs[1] > 1e-3
    assert ours == pytest.approx(theirs, rel=1e-4)
    blocks = [case["rounds"][0]["blocks"][0] for case in (trl, qvl)]
    assert [block["num_captions"] for block in blocks] == [4, 4]
    assert trl["data_fingerprint"] == qvl["data_fingerprint"]


@pytest.mark.slow
def test_the_numbers_agree_with_each_other(finished: Path) -> None:
    results = results_of(finished)
    for name, num_rounds in ((TRL_DEFAULTS, 1), ("qvl", 2)):
        case = case_of(results, name)
        assert case["status"] == "measured"
        assert len(case["rounds"]) == num_rounds
        for one in case["rounds"]:
            assert len(one["blocks"]) == 2
            assert 0 < one["first_step_seconds"] < one["warmup_seconds"]
            assert one["peak_gib"] > 0.1 and one["build_seconds"] > 0 and one["leaked_gib"] == 0
        blocks = [block for one in case["rounds"] for block in one["blocks"]]
        for block in blocks:
            for rate, count in BLOCK_RATES.items():
                assert block[rate] == pytest.approx(block[count] / block["seconds"])
            assert block["ms_per_step"] == pytest.approx(1000 * block["seconds"])
            peak = results["matmul_peak"]["tflops"]
            assert block["matmul_peak_share"] == pytest.approx(block["tflop"] / block["seconds"] / peak)
            assert 0 < block["num_target_tokens"] < block["num_tokens"]
            assert 0 < block["num_visual_tokens"] * 4 == block["num_patches"]
            assert 0 <= block["data_wait_share"] < 1
            assert block["num_recompiles"] == 0
        speeds = [block["captions_per_second"] for block in blocks]
        summary = case["summary"]["captions_per_second"]
        assert (summary["least"], summary["most"]) == (min(speeds), max(speeds))
        assert case["summary"]["num_blocks"] == len(blocks)
    trl, qvl = (case_of(results, name)["summary"] for name in (TRL_DEFAULTS, "qvl"))
    assert trl["times_trl"] == 1
    ratio = qvl["captions_per_second"]["median"] / trl["captions_per_second"]["median"]
    assert qvl["times_trl"] == pytest.approx(ratio)


@pytest.mark.slow
def test_trl_keeps_its_defaults_and_the_recipe_its_own_settings(finished: Path) -> None:
    results = results_of(finished)
    trl, qvl = (case_of(results, name)["settings"] for name in (TRL_DEFAULTS, "qvl"))
    assert (trl["per_device_train_batch_size"], trl["gradient_checkpointing"]) == (4, True)
    assert _parser().get_default("trl_batch_size") == SFTConfig.per_device_train_batch_size
    assert (qvl["per_device_train_batch_size"], qvl["gradient_checkpointing"]) == (4, False)
    for name in ("lora_r", "lora_dropout", "learning_rate", "seed", "dtype", "dataloader_num_workers"):
        assert trl[name] == qvl[name], name


@pytest.mark.slow
def test_out_of_memory_is_a_row(finished: Path) -> None:
    results = results_of(finished)
    case = case_of(results, "too big")
    assert case["status"] == "out of memory" and case["summary"] is None
    (line,) = [line for line in table(results).splitlines() if line.startswith("too big")]
    assert line.split() == ["too", "big", "out", "of", "memory"]
    assert "RANDOM" not in table(results)


@pytest.mark.slow
def test_a_plot_is_drawn_and_nothing_else_is_left(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {"bench.json", "bench.png", "template.jinja"}
    with Image.open(finished / "bench.png") as plot:
        assert plot.width > 1000 and len(plot.convert("RGB").getcolors(1 << 20) or []) > 10


@pytest.mark.slow
def test_the_best_batch_is_searched(finished: Path) -> None:
    results = results_of(finished)
    case = case_of(results, TRL_BEST)
    speeds = {int(size): speed for size, speed in case["batch_sizes_tried"].items()}
    assert list(speeds) == [4, 8]
    assert case["batch_size"] == max(speeds, key=speeds.__getitem__)
    assert case["rounds"][0]["blocks"][0]["num_captions"] == case["batch_size"]
    assert f"batch {case['batch_size']} of those tried" in table(results)


@pytest.mark.slow
def test_random_weights_in_4_bit_are_trained_by_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config-only"
    shutil.copytree(Path(RECIPE).parent.parent / "qvl" / "assets" / "tiny-qwen3-vl", config)
    (config / "model.safetensors").unlink()
    arguments = ["--model_name_or_path", str(config), "--random_weights", "--load_in_4bit"]
    steps = ["--num_warmup_steps", "1", "--num_blocks", "1", "--num_block_steps", "1"]
    small = "--per_device_train_batch_size 2 --captions_per_image 2"
    cases = [*bench_case(f"TRL, small: {small}"), *bench_case(f"qvl: {small}")]
    assert bench([RECIPE, *SMALL, *arguments, *steps, *cases, "--output_dir", str(tmp_path)]) == 0
    results = results_of(tmp_path)
    assert results["random_weights"] is True
    assert [case["status"] for case in results["cases"]] == ["measured", "measured"]
    blocks = [case["rounds"][0]["blocks"][0] for case in results["cases"]]
    # Both captions of an image in one sequence, against a row each.
    assert [block["num_captions"] for block in blocks] == [2, 4]
    assert capsys.readouterr().out.count("RANDOM WEIGHTS") == 2


@pytest.mark.slow
@pytest.mark.parametrize("form", ["messages", "instructions"])
def test_rows_of_text_are_compared_too(form: str, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    row = (
        {"messages": [*talk, *talk]}
        if form == "messages"
        else {"images": [], "instruction": "Hi", "response": "Hello there"}
    )
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    arguments = ["--model_name_or_path", CHAT, "--dataset_name", str(tmp_path), "--captions_per_image", "1"]
    steps = ["--num_warmup_steps", "1", "--num_blocks", "1", "--num_block_steps", "1", "--trl_batch_size", "2"]
    cases = [*bench_case(TRL_DEFAULTS), *bench_case("qvl: --per_device_train_batch_size 2")]
    out = tmp_path / "out"
    assert bench([RECIPE, *SMALL, *arguments, *steps, *cases, "--output_dir", str(out)]) == 0
    trl, qvl = (case["rounds"][0]["blocks"][0] for case in results_of(out)["cases"])
    num_answers = 4 if form == "messages" else 2
    assert trl["num_captions"] == qvl["num_captions"] == num_answers
    # TRL trains on the newline behind each answer too.
    assert trl["num_target_tokens"] == qvl["num_target_tokens"] + num_answers
    assert trl["num_patches"] == qvl["num_patches"] == 0


@pytest.mark.slow
def test_both_train_the_same_parts(tmp_path: Path) -> None:
    flags = ["--smoke", "--num_train_examples", "4", "--num_eval_examples", "2", "--learning_rate", "0.001"]
    flags += ["--projector_learning_rate", "0.125", "--vision_cache_dir", str(tmp_path / "features")]
    shapes, rates = [], []
    for case in (TRL_DEFAULTS, "qvl"):
        prepared = prepare(read_case(case), qwen_clip.RECIPE, flags, 4, tmp_path, False)
        with contestant(prepared, 2) as made:
            made.trainer.create_optimizer()
            trained = {name: p for name, p in made.trainer.model.named_parameters() if p.requires_grad}
            shapes.append({name: p.shape for name, p in trained.items()})
            groups = made.trainer.optimizer.param_groups
            rates.append({group["lr"] for group in groups if group["params"]})
            before = {name: p.detach().clone() for name, p in trained.items() if "multi_modal_projector" in name}
            made.train()
            assert before and not any(torch.equal(trained[name], values) for name, values in before.items())
    assert shapes[0] == shapes[1]
    assert rates == [{0.001}, {0.001, 0.125}]


def test_without_time_left_the_rows_say_so(tmp_path: Path) -> None:
    assert bench([RECIPE, *SMALL, "--max_seconds", "0.001", "--output_dir", str(tmp_path)]) == 0
    results = results_of(tmp_path)
    assert [case["status"] for case in results["cases"]] == ["not run"] * 3
    assert (tmp_path / "bench.png").is_file()


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_had(tmp_path: Path) -> None:
    arguments = ["--num_warmup_steps", "1", "--num_blocks", "1000", "--num_block_steps", "1", *bench_case("qvl")]
    command = [sys.executable, "-m", "qvl.bench", RECIPE, *SMALL, *arguments, "--output_dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(RECIPE).parent.parent)
    assert process.stdout is not None
    num_blocks = 0
    for line in process.stdout:
        num_blocks += " captions/s" in line
        if num_blocks == 2:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(results_of(tmp_path)["cases"][0]["rounds"][0]["blocks"]) >= 2


# Mistakes


def test_a_case_is_a_name_and_flags() -> None:
    assert read_case("4-bit: --load_in_4bit --lora_r 8") == Case("4-bit", ("--load_in_4bit", "--lora_r", "8"))
    assert read_case("TRL, big: --per_device_train_batch_size 64").is_trl
    assert read_case(TRL_BEST).searches_batch_size
    assert not read_case("qvl").is_trl


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--case", "qvlx"],
            "is no `NAME: --flag value ...`, and none of: TRL, its defaults; TRL, its best batch; qvl",
        ),
        (["--case", ": --lora_r 4"], "has no name"),
        (["--case", "a: --lora_rank 4"], "a: There is no flag --lora_rank. Did you mean"),
        (["--case", "a: --lora_r 4", "--case", "a: --lora_r 8"], 'two cases are called "a"'),
        (["--num_blocks", "0"], "--num_blocks 0: it has to be at least 1"),
        (["--max_seconds", "0"], "--max_seconds 0: it has to be above 0"),
        (["--max_seconds", "-5"], "--max_seconds -5: it has to be above 0"),
        (["--max_seconds", "nan"], "--max_seconds nan: it has to be above 0"),
        (["--lora_rank", "4"], "There is no flag --lora_rank"),
    ],
)
def test_mistakes_stop_before_anything_is_measured(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as stopped:
        bench([RECIPE, *SMALL, *arguments, "--output_dir", str(tmp_path)])
    assert message in str(stopped.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "message"), [("nowhere.py", "is no file"), (__file__, "holds no RECIPE")])
def test_the_recipe_is_named_by_its_file(name: str, message: str, tmp_path: Path) -> None:
    if name == __file__:
        name = str(tmp_path / "empty.py")
        Path(name).write_text("RECIPE = None\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        bench([name])


def test_its_flags_are_not_a_recipes() -> None:
    own = {action.dest for action in _parser()._actions} - {"help", "recipe", "output_dir"}
    taken = {item.name for part in (RecipeArguments, ModelConfig, SFTConfig) for item in dataclasses.fields(part)}
    assert own & taken == set()


# Counting


def test_answers_and_tokens_of_a_batch_are_counted_without_padding() -> None:
    skip = IGNORED_LABEL
    image = 9
    # One image with two answers in a sequence, and a padded row with one.
    ids = torch.tensor([[image, image, 3, 4, 5, 3, 6, 7], [image, image, 3, 4, 0, 0, 0, 0]])
    labels = torch.tensor([[skip, skip, skip, 4, 5, skip, 6, 7], [skip, skip, skip, 4, skip, skip, skip, skip]])
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.tensor([[1] * 8, [1] * 4 + [0] * 4])}
    counter = WorkCounter(load_config(settings_for(VISION[0])), image)
    counter.add(batch)
    counter.add({**batch, "pixel_values": torch.zeros(16, 24)})
    assert counter.take() == Work(6, 24, 10, 8, 16)
    assert counter.take() == Work()


def test_images_of_cached_features_cost_no_tower() -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    counter = WorkCounter(load_config(settings_for(VISION[0])), 9)
    counter.add({"input_ids": ids, "labels": ids, "image_features": torch.zeros(4, 24)})
    assert counter.take().num_patches == 0
    counter.patch_size = 14
    counter.add({"input_ids": ids, "labels": ids, "pixel_values": torch.zeros(2, 3, 28, 42)})
    assert counter.take().num_patches == 2 * 2 * 3


def test_operations_are_those_that_torch_counts() -> None:
    name = VISION[0]
    options = settings_for(name, "--lora_dropout", "0")
    model = add_adapter(load_base(options, CPU), options)
    rows = [answered("What is this?", f"Thing {i}, seen from its left side.", [picture(96, 64, i)]) for i in range(3)]
    batch = CompletionCollator(processing_class(name), None)(rows)
    config = load_config(options)
    counter = WorkCounter(config, processing_class(name).image_token_id)
    counter.add(batch)
    work = counter.take()
    weights = count_weights(config, sum(p.numel() for p in model.parameters() if p.requires_grad))
    counted = FlopCounterMode(display=False)
    with counted:
        # The model's own loss projects every position, padding included; TRL's does only the targets.
        model(**batch).loss.backward()
    products = sum(
        count
        for kind, count in counted.get_flop_counts()["Global"].items()
        if any(word in str(kind) for word in ("mm", "conv"))
    )
    padded = batch["input_ids"].numel()
    everywhere = dataclasses.replace(work, num_tokens=padded, num_target_tokens=padded)
    # The first layer's inputs need no gradient, and torch counts the products of attention scores where they are eager.
    assert everywhere.tflop(weights) == pytest.approx(products / 1e12, rel=0.1)
    assert work.tflop(weights) < everywhere.tflop(weights)
    assert weights.tower > 0 < weights.merger


def test_the_formula() -> None:
    weights = WeightCounts(language=1000, head=100, tower=10, merger=1, adapter=7)
    work = Work(num_captions=2, num_tokens=50, num_target_tokens=5, num_visual_tokens=12, num_patches=48)
    language, vision, adapter = 4 * (1000 * 50 + 100 * 5), 2 * (10 * 48 + 12), 6 * 7 * 50
    assert work.tflop(weights) == pytest.approx((language + vision + adapter) / 1e12)
    cached = dataclasses.replace(work, num_patches=0)
    assert cached.tflop(weights) == pytest.approx((language + adapter) / 1e12)


def test_a_text_model_has_no_tower() -> None:
    weights = count_weights(load_config(settings_for(CHAT)), 0)
    assert (weights.tower, weights.merger) == (0, 0)
    linear = [m for m in base(CHAT).modules() if isinstance(m, torch.nn.Linear)]
    assert weights.language + weights.head == sum(m.weight.numel() for m in linear)


# The timer


def test_the_training_stops_when_time_is_up(tmp_path: Path) -> None:
    counter = WorkCounter(load_config(settings_for(CHAT)), None)
    weights = WeightCounts(1, 1, 0, 0, 1)
    control, args = TrainerControl(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for left_seconds, stops in ((1000, False), (-1, True)):
        timer = BlockTimer(counter, weights, 1.0, 5, 5, time.perf_counter() + left_seconds, lambda block: None)
        timer._step_losses.append(torch.tensor(1.0))
        timer.on_step_end(args, TrainerState(global_step=2), control)
        assert (timer.is_late, control.should_training_stop) == (stops, stops)


def test_recompilations_are_counted() -> None:
    double = torch.compile(lambda x: x * 2, backend="eager")
    double(torch.ones(3))
    before = num_compiled_frames()
    double(torch.ones(3))
    assert num_compiled_frames() == before
    double(torch.ones(3, dtype=torch.int64))
    assert num_compiled_frames() == before + 1
    torch._dynamo.reset()


def test_the_matmul_peak_is_that_of_a_product() -> None:
    peak = measure_matmul_peak(CPU, torch.float32)
    assert (peak["size"], peak["dtype"]) == (512, "float32")
    # From a slow core to a large server.
    assert 1e-3 < float(peak["tflops"]) < 100


# Random weights


@pytest.mark.parametrize("name", [*VISION, CHAT])
def test_random_weights_make_the_model_that_would_be_loaded(name: str) -> None:
    settings = settings_for(name)
    model, loaded = build_with_random_weights(settings, CPU), base(name)
    assert type(model) is type(loaded) and not model.training
    shapes, expected = ({k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (model, loaded))
    assert shapes == expected
    for (key, buffer), (loaded_key, loaded_buffer) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert key == loaded_key and torch.equal(buffer, loaded_buffer), key
    is_tied = model.config.get_text_config().tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == is_tied
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert abs(parameter.std().item() - 0.02) < 0.004, key
        else:
            assert parameter.unique().tolist() == [0.0 if key.endswith("bias") else 1.0], key
    again = build_with_random_weights(settings, CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_random_weights_have_the_dtype_that_only_the_language_model_names(tmp_path: Path) -> None:
    """As the configuration of Qwen3-VL does."""
    config = load_config(settings_for("qvl/tiny-qwen3-vl")).to_dict()
    config["dtype"], config["text_config"]["dtype"] = None, "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = settings_for("qvl/tiny-qwen3-vl", "--model_name_or_path", str(tmp_path), "--dtype", "auto")
    assert {p.dtype for p in build_with_random_weights(settings, CPU).parameters()} == {torch.bfloat16}


def test_random_weights_in_4_bit_are_packed_as_loaded_ones() -> None:
    settings = settings_for(VISION[0], "--load_in_4bit", "--use_bnb_nested_quant")
    model, loaded = build_with_random_weights(settings, CPU), load_base(settings, CPU)
    packed, expected = ({n for n, m in x.named_modules() if isinstance(m, Linear4bit)} for x in (model, loaded))
    assert packed == expected and packed
    for name in packed:
        ours, theirs = model.get_submodule(name).weight, loaded.get_submodule(name).weight
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) == (torch.uint8, theirs.shape)
        assert ours.quant_state.quant_type == theirs.quant_state.quant_type
        assert ours.quant_state.nested and theirs.quant_state.nested
    assert model.is_loaded_in_4bit and model.hf_quantizer.is_trainable
    batch = CompletionCollator(processing_class(VISION[0]), None)([answered("Hi", "Yes", [picture(64, 64)])])
    assert torch.isfinite(model(**batch).loss)


def test_random_weights_come_not_in_8_bit() -> None:
    with pytest.raises(UserError, match="not with --load_in_8bit"):
        build_with_random_weights(settings_for(VISION[0], "--load_in_8bit"), CPU)
