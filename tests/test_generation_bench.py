"""The comparison of batched answers with answers one by one, on a CPU: that it works, not how fast it is."""

import json
from pathlib import Path

import pytest

from qvl.errors import UserError
from qvl.generation_bench import measure

FLAGS = ["recipes/qwen_chat.py", "--smoke", "--num_eval_examples", "6", "--max_new_tokens", "4"]


def test_it_measures_both_ways_on_the_same_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure([*FLAGS, "--num_prompts", "5", "--num_one_by_one", "2", "--output_dir", str(tmp_path)])
    assert found == json.loads((tmp_path / "generation_bench.json").read_text(encoding="utf-8"))
    assert found["device"] == "CPU"
    assert found["max_new_tokens"] == 4
    assert found["random_weights"] is False
    one_by_one, batched = found["rows"]
    assert (one_by_one["name"], one_by_one["num_prompts"]) == ("one by one", 2)
    assert (batched["name"], batched["num_prompts"]) == ("batched", 5)
    for row in found["rows"]:
        assert row["prompts_per_second"] == pytest.approx(row["num_prompts"] / row["seconds"])
        assert row["times_one_by_one"] == row["prompts_per_second"] / one_by_one["prompts_per_second"]
        assert row["peak_gib"] > 0.1
    screen = capsys.readouterr().out
    assert "CPU, 4 new tokens" in screen
    for row in found["rows"]:
        assert f"{row['name']:27}{row['num_prompts']:7}" in screen


def test_a_file_without_a_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.py is no file"):
        measure([str(tmp_path / "nothing.py")])
