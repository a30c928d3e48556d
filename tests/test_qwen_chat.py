"""The chat recipe and the command that talks to its adapters, run as users run them."""

import io
import json
import math
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import recipe_command
from mlflow import MlflowClient
from PIL import Image
from tiny import CHAT, VISION, picture, processing_class
from transformers import TextStreamer

from qvl.chat import Conversation, main, parse_arguments
from qvl.data import DataConfig, load_examples
from qvl.errors import UserError
from qvl.examples import undecoded_examples
from qvl.files import read_jsonl
from qvl.generate import generate
from qvl.recipe import run
from qvl.survey import training_lengths
from qvl.trained_model import TrainedModel, load_trained
from recipes.qwen_chat import DEFAULTS, RECIPE

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "recipes" / "data" / "chat_sample.jsonl"
SMOKE_LIMIT_SECONDS = 90
SHORT = {
    "smoke": True,
    "num_train_examples": 24,
    "num_eval_examples": 6,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "max_new_tokens": 12,
}
GREEDY = {"max_new_tokens": 40}


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def smoke(outputs: Path) -> tuple[Path, str, float]:
    """The smoke run's folder, what it printed, and the processor time it took: others may be using the cores."""
    folder = outputs / "smoke"
    screen, seconds = recipe_command("qwen_chat", "--smoke", "--output_dir", str(folder))
    return folder, screen, seconds


@pytest.fixture(scope="module")
def adapter(smoke: tuple[Path, str, float]) -> Path:
    return smoke[0] / "adapter"


@pytest.fixture(scope="module")
def tuned(adapter: Path) -> TrainedModel:
    return load_trained(adapter, False, GREEDY)


# --- the recipe


@pytest.mark.slow
def test_smoke_lowers_the_held_out_loss(smoke: tuple[Path, str, float]) -> None:
    folder, screen, seconds = smoke
    metrics = metrics_of(folder)
    before, after = metrics["baseline"], metrics["finetuned"]
    assert after["loss"] <= 0.8 * before["loss"]
    assert metrics["difference"]["loss"]["high"] < 0
    for part in (before, after):
        assert part["perplexity"] == pytest.approx(math.exp(part["loss"]), rel=1e-3)
        assert part["num_examples"] == 60
    assert seconds <= SMOKE_LIMIT_SECONDS
    assert all(check["passed"] for check in json.loads((folder / "checks.json").read_text(encoding="utf-8")))
    for shown in ("held-out loss", "perplexity", "trained on", "[["):
        assert shown in screen
    assert "Warning" not in screen


@pytest.mark.slow
def test_the_report_shows_lengths_and_answers_side_by_side(smoke: tuple[Path, str, float]) -> None:
    folder = smoke[0]
    lengths = json.loads((folder / "token_lengths.json").read_text(encoding="utf-8"))
    assert sum(row["count"] for row in lengths["bins"]) == lengths["num_rows"] == 320
    assert 0.1 < lengths["trained_share"] == lengths["num_target_tokens"] / lengths["num_tokens"] < 0.9
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"Length of the 320 training rows: {lengths['num_tokens']:,} tokens" in page
    assert f"{lengths['trained_share']:.1%} of them trained on" in page
    for part in ("baseline", "finetuned"):
        assert read_jsonl(folder / f"{part}_predictions.jsonl")[0]["prediction"] in page


def test_defaults_are_those_of_the_published_recipe() -> None:
    expected = {
        "model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": True,
        "lora_r": 16,
        "max_length": 2048,
        "learning_rate": 2e-4,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "gradient_checkpointing": True,
        "seed": 42,
    }
    assert {key: DEFAULTS[key] for key in expected} == expected
    assert len(DEFAULTS["lora_target_modules"]) == 7


def test_the_sample_is_varied_and_fits() -> None:
    data = load_examples(DataConfig(str(SAMPLE)))
    rows = [row["messages"] for side in (data.train, data.evaluation) for row in undecoded_examples(side)]
    assert (len(data.train), len(data.evaluation)) == (32, 8)
    texts = ["".join(part["text"] for message in row for part in message["content"]) for row in rows]
    assert len(set(texts)) == len(texts)
    for feature in (
        [row[0]["role"] == "system" for row in rows],
        [len(row) >= 6 for row in rows],
        ["```" in text for text in texts],
        [any(ord(character) > 0x2FF for character in text) for text in texts],
    ):
        assert 3 <= sum(feature) < len(rows)
    answers = [message["content"][0]["text"] for row in rows for message in row if message["role"] == "assistant"]
    assert all("\n\nIn short: " in answer for answer in answers)
    assert max(row.num_tokens for row in training_lengths(data.train, processing_class(CHAT))) <= DEFAULTS["max_length"]


def recorded(folder: Path) -> Any:
    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, f"tags.mlflow.runName = '{folder.name}'", max_results=1)[0].data


def test_several_sets_are_trained_on_and_recorded(outputs: Path) -> None:
    folder, config = outputs / "mixture", outputs / "mixture.yaml"
    config.write_text(
        f"datasets:\n- path: {SAMPLE}\n  fraction: 0.25\n- path: qvl/chats\n  fraction: 0.75\n", encoding="utf-8"
    )
    run(RECIPE, {**SHORT, "stages": ["train"], "output_dir": str(folder)}, ["--config", str(config)])
    sources = recorded(folder).params["data_sources"].split("; ")
    assert [source.partition(", fingerprint ")[0] for source in sources] == [str(SAMPLE), "qvl/chats"]
    assert json.loads((folder / "token_lengths.json").read_text(encoding="utf-8"))["num_rows"] == 24
    assert "fraction: 0.25" in (folder / "settings.yaml").read_text(encoding="utf-8")


def test_overlong_conversations_lose_whole_turns(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = outputs / "shortened"
    flags = {**SHORT, "stages": ["train"], "output_dir": str(folder), "max_length": 80}
    with pytest.raises(UserError, match="rows are longer than --max_length 80"):
        run(RECIPE, flags)
    run(RECIPE, {**flags, "overlong": "truncate_turns"})
    metrics = recorded(folder).metrics
    assert metrics["num_answers_cut_off"] >= metrics["num_rows_shortened"] > 0
    assert f"{metrics['num_answers_cut_off']:.0f} answers at the ends of" in capsys.readouterr().out
    lengths = json.loads((folder / "token_lengths.json").read_text(encoding="utf-8"))
    assert (lengths["num_rows"], lengths["bins"][-1]["from"] <= 80) == (24, True)


# --- the command


def test_the_commands_of_the_readme_are_accepted() -> None:
    lines = re.findall(r"^python -m qvl\.chat (.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line.partition("<")[0], comments=True)
        assert parse_arguments(words).adapter.endswith("adapter")


def test_answers_are_printed_word_by_word(
    tuned: TrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces: list[str] = []
    put = TextStreamer.on_finalized_text
    monkeypatch.setattr(
        TextStreamer, "on_finalized_text", lambda self, text, **end: (pieces.append(text), put(self, text, **end))
    )
    answer = tuned.answer([text_message("user", "Describe the scene .")], [])
    assert len([piece for piece in pieces if piece]) >= 3
    assert "".join(pieces).strip() == answer == capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.parametrize(("part", "flags"), [("finetuned", []), ("baseline", ["--base_only", "--prompt", "-"])])
def test_one_question_gets_the_answer_of_the_evaluation(
    part: str,
    flags: list[str],
    smoke: tuple[Path, str, float],
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = read_jsonl(smoke[0] / f"{part}_predictions.jsonl")
    row = next(row for row in rows if "\n" not in row["prompt"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(row["prompt"] + "\n"))
    with pytest.raises(SystemExit) as ended:
        main(["--adapter", str(adapter), "--prompt", row["prompt"], "--max_new_tokens", "40", *flags])
    assert (ended.value.code, capsys.readouterr().out) == (0, row["prediction"] + "\n")


@pytest.mark.slow
def test_a_conversation_through_a_pipe_remembers_what_was_said(adapter: Path, tuned: TrainedModel) -> None:
    first = "A large red star is above a small blue circle on a grey background . Which shape is at the top ?"
    second = "What colour is the shape at the bottom ?"
    done = subprocess.run(
        [sys.executable, "-m", "qvl.chat", "--adapter", str(adapter)],
        cwd=ROOT,
        input=f"{first}\n\n{second}\n/new\n{first}\n",
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [line.strip() for line in done.stdout.splitlines()]
    history = [text_message("user", first), text_message("assistant", answers[0]), text_message("user", second)]
    expected = [
        generate(tuned.model, tuned.processing_class, [{"prompt": prompt, "images": []}], tuned.decoding)[0]
        for prompt in (history[:1], history)
    ]
    assert answers == [*expected, expected[0]]


def text_message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


@pytest.mark.slow
def test_a_terminal_goes_on_after_a_mistake_and_ends_with_ctrl_d(adapter: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qvl.chat", "--adapter", str(adapter)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    try:
        screen = read_until(ours, "to end.\r\n> ")
        os.write(ours, b"/image cat.png\n")
        screen += read_until(ours, "text only.\r\n> ")
        os.write(ours, b"What colour is the background ?\n")
        screen += read_until(ours, "\r\n> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0, screen
    finally:
        process.kill()
        os.close(ours)
    assert "float32, cpu" in screen
    assert re.search(r"background \?\s+\S+.*\r\n> $", screen), "an answer and the next prompt"


def read_until(handle: int, ending: str, seconds: float = 240.0) -> str:
    """Reads a terminal until something has been written anew."""
    text, end = "", time.monotonic() + seconds
    while ending not in text:
        ready, _, _ = select.select([handle], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"{ending!r} did not come within {seconds:.0f} s, but {text!r}"
        text += os.read(handle, 4096).decode(errors="replace")
    return text


@pytest.mark.slow
def test_mistakes_end_in_one_line(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--adapter", str(tmp_path), "--prompt", "Hi"])
    screen = capsys.readouterr()
    assert (stopped.value.code, screen.out) == (2, "")
    assert "holds no adapter" in screen.err
    with pytest.raises(SystemExit) as stopped:
        main(["--adapter", str(adapter), "--prompt", " \n"])
    screen = capsys.readouterr()
    assert (stopped.value.code, screen.out) == (2, "")
    assert "question is empty" in screen.err
    for flags, said in (({"temperature": 0.5}, "--do_sample"), ({"max_new_tokens": 0}, "at least 1")):
        with pytest.raises(UserError, match=said):
            load_trained(adapter, False, flags)


@pytest.mark.slow
def test_a_turn_that_fails_leaves_no_trace(tuned: TrainedModel) -> None:
    conversation = Conversation(tuned, system="Be brief .")
    conversation.say("What colour is the background ?")
    before = list(conversation.messages)
    assert [message["role"] for message in before] == ["system", "user", "assistant"]
    with pytest.raises(UserError, match="look back"):
        conversation.say("red " * 5000)
    assert conversation.messages == before


@pytest.mark.slow
def test_sampling_depends_on_the_seed_only(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sampled(seed: int) -> str:
        partner = load_trained(adapter, False, {"do_sample": True, "temperature": 3.0, "seed": seed})
        return partner.answer([text_message("user", "Describe the scene .")], [])

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.fixture(scope="module")
def seeing(outputs: Path) -> Path:
    """The adapter of a vision-language model, trained by this recipe on LLaVA conversations with pictures."""
    folder = outputs / "pictures"
    folder.mkdir()
    rows = []
    for number in range(6):
        picture(96, 96, seed=number).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is this ?"}, {"from": "gpt", "value": "A red star ."}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns, "system": "Look ."})
    lines = "".join(json.dumps(row | {"split": "train" if row["id"] > "1" else "test"}) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    flags = {
        **SHORT,
        "model_name_or_path": VISION[0],
        "dataset_name": str(folder / "rows.jsonl"),
        "learning_rate": 1e-2,
        "max_steps": 4,
        "max_pixels": 64 * 64,
        "output_dir": str(outputs / "seeing"),
    }
    run(RECIPE, flags)
    return outputs / "seeing"


@pytest.mark.slow
def test_images_are_shown_by_path_at_the_size_of_the_training(
    seeing: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = read_jsonl(seeing / "finetuned_predictions.jsonl")[0]
    image = str(outputs / "pictures" / row["image"])
    question = "\nWhat is this ?"
    assert row["prompt"] == f"Look .\n{question}"
    flags = ["--max_new_tokens", "12", "--system", "Look .", "--image", image, "--prompt", question]
    with pytest.raises(SystemExit) as stopped:
        main(["--adapter", str(seeing / "adapter"), *flags])
    assert (stopped.value.code, capsys.readouterr().out) == (0, row["prediction"] + "\n")
    partner = load_trained(seeing / "adapter", False, {"max_new_tokens": 12})
    assert partner.processing_class.image_processor.size["longest_edge"] == 64 * 64
    conversation = Conversation(partner)
    conversation.show(image)
    conversation.say("What is this ?")
    conversation.show(image)
    conversation.say("And this ?")
    assert len(conversation.images) == 2
    with pytest.raises(UserError, match="stands for an image"):
        conversation.say("<|image_pad|>")
    line = outputs / "line.png"
    Image.new("RGB", (600, 2)).save(line)
    refused = {outputs / "no.png": "cannot be read", SAMPLE: "chat_sample.jsonl", line: "refuses its size .*200"}
    for path, said in refused.items():
        with pytest.raises(UserError, match=said):
            conversation.show(str(path))


@pytest.mark.slow
def test_an_adapter_of_another_program_is_talked_to(adapter: Path, tuned: TrainedModel, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).symlink_to(adapter / name)
    other = load_trained(tmp_path, False, GREEDY)
    question = [text_message("user", "What colour is the background ?")]
    assert other.answer(question, []) == tuned.answer(question, [])
