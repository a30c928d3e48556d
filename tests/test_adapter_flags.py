"""LoRA flags beside `--adapter`, which has LoRA of its own: refused where they differ, and recorded as they are."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import CPU, VISION, processing_class, settings_for

from qvl.adapters import add_adapter
from qvl.errors import UserError
from qvl.files import read_jsonl
from qvl.models import load_base
from qvl.recipe import run
from recipes.flickr8k import RECIPE

SHORT = {
    "smoke": True,
    "stages": ["train"],
    "num_train_examples": 8,
    "num_eval_examples": 2,
    "captions_per_image": 1,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "max_new_tokens": 4,
}
OWN = {
    "lora_r": 4,
    "lora_alpha": 12,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj"],
    "use_rslora": True,
    "use_dora": False,
}


def saved(model: PeftModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One whose rank, alpha, dropout, layers and scaling are those of no recipe."""
    flags = "--lora_r 4 --lora_alpha 12 --lora_dropout 0 --lora_target_modules q_proj v_proj --use_rslora"
    settings = settings_for(VISION[0], *flags.split())
    folder = tmp_path_factory.mktemp("own") / "adapter"
    processing_class(VISION[0]).save_pretrained(folder)
    return saved(add_adapter(load_base(settings, CPU), settings), folder)


def words(flags: dict[str, Any]) -> list[str]:
    return [
        word
        for key, value in flags.items()
        for word in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]


def settings_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8"))
    return values


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(folder / "training_log.jsonl") if "loss" in row]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"lora_r": 64}, r"--lora_r 64 \(it has 4\)"),
        # Upstream's default, and the recipe's: typed, it asks for it.
        ({"lora_alpha": 32}, r"--lora_alpha 32 \(it has 12\)"),
        ({"lora_dropout": 0.9}, r"--lora_dropout 0.9 \(it has 0.0\)"),
        ({"use_dora": True}, r"--use_dora true \(it has false\)"),
        ({"use_rslora": False}, r"--use_rslora false \(it has true\)"),
        ({"lora_target_modules": ["q_proj"]}, r"--lora_target_modules q_proj \(it has q_proj v_proj\)"),
        ({"lora_target_modules": ["all-linear"]}, r"--lora_target_modules all-linear \(it has q_proj v_proj\)"),
        ({"lora_modules_to_save": ["lm_head"]}, r"--lora_modules_to_save lm_head \(it has none\)"),
        ({"lora_r": 8, "lora_dropout": 0.5}, r"--lora_r 8 \(it has 4\), --lora_dropout 0.5 \(it has 0.0\)"),
    ],
)
def test_another_lora_than_the_adapters_is_refused_before_anything_is_loaded(
    flags: dict[str, Any], told: str, adapter: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for further in ({}, {"dry_run": True}, {"stages": ["check"]}):
        with pytest.raises(UserError, match=f"{told}.*Leave that out, or start a fresh adapter without --adapter"):
            run(RECIPE, {**SHORT, **further, "adapter": adapter, "output_dir": str(folder)}, words(flags))
    assert not folder.exists()


def test_a_files_other_lora_is_refused_too(adapter: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"adapter: {adapter}\nlora_r: 64\n")
    with pytest.raises(UserError, match=r"--lora_r 64 \(it has 4\)"):
        run(RECIPE, {**SHORT, "output_dir": str(tmp_path / "run")}, ["--config", str(file)])


def test_a_run_records_the_adapters_lora_and_is_repeated_by_its_settings(adapter: str, tmp_path: Path) -> None:
    """A recipe's own LoRA gives way without a word; what the adapter has may be said, as its settings.yaml does."""
    first, again, scored = (tmp_path / name for name in ("first", "again", "scored"))
    run(RECIPE, {**SHORT, "adapter": adapter, "output_dir": str(first)})
    assert settings_of(first).items() >= OWN.items()
    shapes = {tuple(tensor.shape) for tensor in load_file(first / "adapter" / "adapter_model.safetensors").values()}
    assert {min(shape) for shape in shapes} == {4}
    run(RECIPE, {}, ["--config", str(first / "settings.yaml"), "--output_dir", str(again)])
    assert losses(again) == losses(first)
    assert settings_of(again) == settings_of(first)
    # To score an adapter nothing is asked of its LoRA: the same flags serve for several.
    run(RECIPE, {**SHORT, "stages": ["evaluate"], "lora_r": 64, "adapter": adapter, "output_dir": str(scored)})
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'flickr8k'")
    records = client.search_runs([experiment.experiment_id])
    assert len(records) == 3
    for record in records:
        assert {name: record.data.params[name] for name in OWN} == {name: str(value) for name, value in OWN.items()}


def test_the_settings_of_one_run_train_another_ones_adapter(adapter: str, tmp_path: Path) -> None:
    """A settings.yaml holds the recipe's own LoRA too, which nobody has asked for."""
    folder = tmp_path / "dry"
    run(RECIPE, {**SHORT, "dry_run": True, "output_dir": str(folder)})
    assert settings_of(folder)["lora_r"] == 16
    flags = ["--config", str(folder / "settings.yaml"), "--adapter", adapter, "--output_dir", str(folder)]
    run(RECIPE, {"dry_run": True}, flags)
    assert settings_of(folder).items() >= OWN.items()


def test_all_layers_are_those_of_an_adapter_on_all(tmp_path: Path) -> None:
    settings = settings_for(VISION[0], "--lora_target_modules", "all-linear")
    whole = saved(add_adapter(load_base(settings, CPU), settings), tmp_path / "adapter")
    flags = {**SHORT, "adapter": whole, "dry_run": True, "output_dir": str(tmp_path / "dry")}
    run(RECIPE, {**flags, "lora_target_modules": ["all-linear"]})
    assert len(settings_of(tmp_path / "dry")["lora_target_modules"]) == 7


@pytest.mark.parametrize("targets", [["k_proj", "mlp.up_proj"], r".*language_model.*\.k_proj"])
def test_layers_are_recorded_as_another_program_named_them(
    targets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_base(settings_for(VISION[0]), CPU)
    other = saved(get_peft_model(base, LoraConfig(r=2, target_modules=targets)), tmp_path / "adapter")
    flags = {**SHORT, "adapter": other, "output_dir": str(tmp_path / "dry")}
    run(RECIPE, {**flags, "dry_run": True})
    assert settings_of(tmp_path / "dry")["lora_target_modules"] == targets
    assert f"LoRA that of {other}" in capsys.readouterr().out
    run(RECIPE, {"dry_run": True}, ["--config", str(tmp_path / "dry" / "settings.yaml")])
