"""The command line: every upstream flag takes effect or is refused, and mistakes are named with their remedy."""

import argparse
import dataclasses
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import ModelConfig, SFTConfig

from qvl.errors import UserError
from qvl.flags import REFUSED, REFUSED_VALUES, RENAMED, RecipeArguments
from qvl.settings import Settings, _make_parser, _plain, parse_settings
from recipes.flickr8k import DEFAULTS, SMOKE

# Fields of SFTConfig that `train_stage.trainer_arguments` takes out, and where their value goes instead.
EFFECT_OUTSIDE_THE_TRAINER = {
    "max_length": "the collator and the survey of lengths",
    "model_init_kwargs": "models.load_base",
    "chat_template_path": "models.load_processing_class",
    "assistant_only_loss": "the collator trains on nothing else, with or without the flag",
    "completion_only_loss": "the collator trains on nothing else; False is refused",
    "output_dir": "the run folder; the trainer's own is checkpoints/ in it",
    "resume_from_checkpoint": "run_folder.find_checkpoint, whose answer goes to Trainer.train",
    "dataset_kwargs": "refused, always skip_prepare_dataset",
    "logging_nan_inf_filter": "refused, always off",
    "report_to": "the trainer gets all but mlflow, whose run is qvl's own",
}

# Flags that need a value of their own kind: words on the command line, the value that has to arrive, and flags that
# upstream wants beside them.
SPECIAL: dict[str, tuple[list[str], Any]] = {
    "stages": (["--stages", "report", "train"], ["train", "report"]),
    "overlong": (["--overlong", "drop"], "drop"),
    "datasets": (["--datasets", "a.jsonl", '{"path": "b"}'], [{"path": "a.jsonl"}, {"path": "b"}]),
    "temperature": (["--do_sample", "--temperature", "0.5"], 0.5),
    "top_p": (["--do_sample", "--top_p", "0.5"], 0.5),
    "top_k": (["--do_sample", "--top_k", "7"], 7),
    "use_peft": (["--use_peft", "true"], True),
    "lora_dropout": (["--lora_dropout", "0.5"], 0.5),
    "dtype": (["--dtype", "bfloat16"], "bfloat16"),
    "tf32": (["--tf32", "false"], False),
    "activation_checkpointing": (["--activation_checkpointing", "false"], False),
    "fp16": (["--fp16"], UserError),
    "ddp_backend": (["--ddp_backend", "gloo"], UserError),
    "debug": (["--debug", "underflow_overflow"], ["underflow_overflow"]),
    "report_to": (["--report_to", "wandb"], ["wandb"]),
    "optim_args": (["--optim_args", "a=1"], "a=1"),
    "projector_learning_rate": (["--train_projector", "--projector_learning_rate", "1e-5"], 1e-5),
    **{
        name: (["--vision_encoder", "clip", f"--{name}", word], int(word) if word.isdigit() else word)
        for name, word in [("vision_encoder_revision", "v1"), ("vision_mode", "text"), ("num_image_tokens", "16")]
    },
    "phase": (["--train_projector", "--phase", "align"], ["align"]),
    "align_share": (["--align_share", "0.5"], 0.5),
    "merger_learning_rate": (["--train_merger", "--merger_learning_rate", "1e-5"], 1e-5),
    "vision_tower_learning_rate": (["--train_vision_tower", "--vision_tower_learning_rate", "1e-5"], 1e-5),
    "load_best_model_at_end": (
        ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "500"],
        True,
    ),
    "greater_is_better": (["--greater_is_better", "false"], False),
    "dataloader_prefetch_factor": (["--dataloader_prefetch_factor", "3", "--dataloader_num_workers", "1"], 3),
    "dataloader_persistent_workers": (["--dataloader_persistent_workers", "--dataloader_num_workers", "1"], True),
    "accelerator_config": (["--accelerator_config", '{"split_batches": true}'], {"split_batches": True}),
    "use_cpu": (["--use_cpu"], True),
}
_NESTED = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
SPECIAL |= {
    name: ([f"--{name}", '{"use_reentrant": true}'], {"use_reentrant": True})
    for name in (*_NESTED, "model_init_kwargs")
}


def parse(
    *argv: str, defaults: Mapping[str, Any] | None = None, smoke: Mapping[str, Any] | None = None, **overrides: Any
) -> Settings:
    return parse_settings(defaults or {}, smoke or {}, argv, overrides, "flickr8k.py")


def refusal(*argv: str, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv, **kwargs)
    return str(caught.value)


def value_of(settings: Settings, name: str) -> Any:
    parts = [part for part in (settings.recipe, settings.model, settings.training) if hasattr(part, name)]
    assert len(parts) == 1, f"{name} is a field of {len(parts)} parts"
    return _plain(getattr(parts[0], name))


def actions() -> Iterator[tuple[str, argparse.Action]]:
    """Every field of the three classes with the parser's first action for it."""
    first = {action.dest: action for action in reversed(_make_parser("x")._actions)}
    for part in (RecipeArguments, ModelConfig, SFTConfig):
        for field in dataclasses.fields(part):
            if field.init:
                yield field.name, first[field.name]


def other_value(action: argparse.Action) -> tuple[list[str], Any]:
    """Words that give a flag another value than its default, and that value."""
    flag, default = f"--{action.dest}", action.default
    kind = getattr(action.type, "__name__", "")
    if kind == "string_to_bool":
        return [flag, str(not default).lower()], not default
    if action.choices is not None:
        choice = next(item for item in action.choices if item not in (default, _plain(default)))
        return [flag, str(choice)], choice
    if kind in ("int", "float"):
        word = str((default or 0) + 3)
        return [flag, word], action.type(word)  # type: ignore[operator, misc]
    if action.nargs == "+":
        return [flag, "one", "two"], ["one", "two"]
    return [flag, "some_word"], "some_word"


FIELDS = dict(actions())
TAKEN = sorted(FIELDS.keys() - REFUSED.keys())


@pytest.mark.parametrize("name", TAKEN)
def test_every_flag_that_is_not_refused_arrives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words, expected = SPECIAL.get(name) or other_value(FIELDS[name])
    if expected is UserError:
        assert f"--{name.split('_')[0]}" in refusal(*words) or name == "ddp_backend"
        return
    settings = parse(*words)
    value = value_of(settings, name)
    assert value == (value | expected if isinstance(expected, dict) else expected)
    assert name in settings.given or name in ("use_peft", "use_cpu", "run_name")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_flags_give_their_reason(name: str) -> None:
    words, _ = other_value(FIELDS[name])
    assert REFUSED[name] in refusal(*words)


def test_the_lists_name_flags_that_exist() -> None:
    known = set(FIELDS)
    assert REFUSED.keys() <= known
    assert {key for key, _ in REFUSED_VALUES} <= known
    assert set(RENAMED.values()) <= known
    assert not set(RENAMED) & known
    assert known >= EFFECT_OUTSIDE_THE_TRAINER.keys()


def test_what_the_trainer_does_not_get_is_accounted_for(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from qvl.train_stage import trainer_arguments

    settings = parse("--max_length", "99", "--report_to", "wandb", "--output_dir", str(tmp_path))
    passed = trainer_arguments(SimpleNamespace(settings=settings, folder=tmp_path))  # type: ignore[arg-type]
    untouched = parse("--max_length", "99", "--report_to", "wandb", "--output_dir", str(tmp_path)).training
    changed = {
        field.name
        for field in dataclasses.fields(SFTConfig)
        if getattr(passed, field.name) != getattr(untouched, field.name)
    }
    assert changed <= EFFECT_OUTSIDE_THE_TRAINER.keys()
    assert passed.report_to == ["wandb"]
    assert settings.training.max_length == 99, "the settings themselves must stay as they are"


@pytest.mark.parametrize(("key", "value"), list(REFUSED_VALUES))
def test_refused_values_give_their_reason(key: str, value: Any) -> None:
    assert REFUSED_VALUES[key, value] in refusal(f"--{key}", str(value).lower())


@pytest.mark.parametrize("name", ["deepspeed", "fsdp", "fsdp_config"])
def test_a_refused_launch_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    """transformers keeps a reference to a DeepSpeed configuration that failed while any traceback holds it."""
    from transformers.integrations.deepspeed import deepspeed_config

    from qvl import models

    file = tmp_path / "none.json"
    with pytest.raises(UserError, match="accelerate launch") as kept:
        parse(f"--{name}", str(file))
    assert deepspeed_config() is None
    config = models.load_config(parse("--model_name_or_path", "qvl/tiny-qwen3-chat", "--use_cpu"))
    assert models.skeleton(config).num_parameters() > 0
    assert kept.value is not None


def test_a_refused_flag_with_its_default_is_no_contradiction() -> None:
    assert parse("--packing_strategy", "bfd").training.packing_strategy == "bfd"


# Precedence


def config_file(folder: Path, **values: Any) -> str:
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def test_precedence(tmp_path: Path) -> None:
    recipe = {"learning_rate": 1.0, "lora_r": 1, "max_steps": 1, "num_train_epochs": 1, "logging_steps": 1}
    smoke = {"lora_r": 2, "max_steps": 2, "num_train_epochs": 2, "logging_steps": 2}
    path = config_file(tmp_path, max_steps=3, num_train_epochs=3, logging_steps=3)
    argv = ["--smoke", "--config", path, "--num_train_epochs", "4", "--logging_steps", "4"]
    settings = parse_settings(recipe, smoke, argv, {"logging_steps": 5})
    assert settings.training.learning_rate == 1.0  # recipe
    assert settings.model.lora_r == 2  # smoke
    assert settings.training.max_steps == 3  # file
    assert settings.training.num_train_epochs == 4  # command line
    assert settings.training.logging_steps == 5  # sweep
    assert settings.training.adam_beta2 == 0.999  # upstream
    assert parse_settings(recipe, smoke, []).model.lora_r == 1, "smoke defaults only with --smoke"


@pytest.mark.parametrize("words", [["--config", "{}"], ["--config={}"]])
def test_both_forms_of_config(tmp_path: Path, words: list[str]) -> None:
    path = config_file(tmp_path, lora_r=3, smoke="false", lora_target_modules=["v_proj", "q_proj"])
    settings = parse(*[word.format(path) for word in words], smoke={"lora_r": 99, "lora_alpha": 99})
    assert settings.model.lora_r == 3
    assert settings.model.lora_alpha == 32, "`smoke: 'false'` is not --smoke"
    assert settings.model.lora_target_modules == ["v_proj", "q_proj"]


def test_smoke_in_a_file_counts(tmp_path: Path) -> None:
    assert parse("--config", config_file(tmp_path, smoke=True), smoke={"lora_r": 99}).model.lora_r == 99


def test_null_in_a_file_beats_a_recipe_default(tmp_path: Path) -> None:
    path = config_file(tmp_path, num_train_examples=None, max_length=None)
    settings = parse("--config", path, defaults=DEFAULTS)
    assert settings.recipe.num_train_examples is None and settings.training.max_length is None


def test_none_on_the_command_line_beats_a_recipe_default() -> None:
    settings = parse("--num_train_examples", "none", "--max_length=none", defaults=DEFAULTS)
    assert settings.recipe.num_train_examples is None and settings.training.max_length is None
    assert parse(num_train_examples=None, defaults=DEFAULTS).recipe.num_train_examples is None


@pytest.mark.parametrize(("default", "asked_for"), [("4", "8"), ("8", "4")])
def test_the_quantization_asked_for_beats_a_recipes_other_one(default: str, asked_for: str, tmp_path: Path) -> None:
    other, wanted = f"load_in_{default}bit", f"load_in_{asked_for}bit"
    defaults = {**DEFAULTS, other: True}
    for settings in (
        parse(f"--{wanted}", defaults=defaults),
        parse(f"--{wanted}", "--smoke", defaults=DEFAULTS, smoke={other: True}),
        parse("--config", config_file(tmp_path, **{wanted: True}), defaults=defaults),
        parse(defaults=defaults, **{wanted: True}),
    ):
        assert (value_of(settings, wanted), value_of(settings, other)) == (True, False)
    assert value_of(parse(f"--{wanted}", "false", defaults=defaults), other) is True
    assert "not both" in refusal(f"--{wanted}", f"--{other}", defaults=defaults)


def test_images_as_words_switch_a_recipes_feature_cache_off() -> None:
    smoke = {"cache_vision_features": True, "vision_encoder": "clip"}
    assert parse("--smoke", smoke=smoke).recipe.cache_vision_features
    words = ["--smoke", "--vision_mode", "text"]
    assert not parse(*words, smoke=smoke).recipe.cache_vision_features
    assert "--cache_vision_features" in refusal(*words, "--cache_vision_features", smoke=smoke)


def test_overrides_of_a_sweep_pass_the_same_checks() -> None:
    settings = parse(
        learning_rate=1e-3,
        lora_target_modules=["q_proj", "o_proj"],
        load_in_4bit=True,
        lr_scheduler_kwargs={"num_cycles": 2},
    )
    assert settings.training.learning_rate == 1e-3
    assert settings.model.lora_target_modules == ["q_proj", "o_proj"]
    assert settings.model.load_in_4bit is True
    assert settings.training.lr_scheduler_kwargs == {"num_cycles": 2}
    with pytest.raises(UserError, match=r"`lr`|learning_rate"):
        parse(learning_rat=1)


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "There is no flag --learning_rat. Did you mean --learning_rate?"),
        (["--lora-rr=1"], "Did you mean --lora-r?"),
        (["--max_leng", "5"], "Did you mean --max_length?"),  # no abbreviations
        (["--lora_target_module", "q_proj"], "Did you mean --lora_target_modules?"),
        (["--zzzzzz"], "`flickr8k.py --help` lists every flag"),
        (["word"], "Unrecognized arguments: word"),
        (["settings.yaml"], "--config settings.yaml"),
        (["--config"], "--config needs a file"),
        (["--config", "no/such.yaml"], "no/such.yaml"),
        (["--lora_r", "x"], "invalid int value: 'x'"),
        (["--max_length", "no"], "invalid"),
        (["--stages", "trian"], "invalid choice: 'trian'"),
        (["--load_in_4bit", "--load_in_8bit"], "--load_in_4bit or --load_in_8bit, not both"),
        (["--report_to", "wandbb"], "wandb"),
        (["--temperature", "0.5"], "without --do_sample"),
        (["--top_k", "3"], "without --do_sample"),
        (["--do_sample", "--temperature", "0"], "--temperature has to be above 0"),
        (["--max_pixels", "0"], "at least 1"),
        (["--lora_r", "0"], "--lora_r 0: it has to be at least 1"),
        (["--lora_dropout", "1"], "below 1"),
        (["--max_length", "0"], "at least 1"),
        (["--per_device_train_batch_size", "0"], "at least 1"),
        (["--gradient_accumulation_steps", "0"], "at least 1"),
        (["--max_new_tokens", "-1"], "at least 1"),
        (["--model_init_kwargs", "{broken"], "do not go together"),
        (["--accelerator_config", '{"nonsense": 1}'], "nonsense"),
        (["--lr_scheduler_kwargs", "num_cycles=2"], "takes a JSON object"),
        (["--model_init_kwargs", "a"], "takes a JSON object"),
        (["USE_MOCK=True"], "--smoke"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], message: str) -> None:
    assert message in refusal(*words)


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_flags_of_the_older_scripts_are_named(old: str, tmp_path: Path) -> None:
    assert f"--{RENAMED[old]}" in refusal(f"--{old}", "1")
    assert f"--{RENAMED[old]}" in refusal(f"--{old}=1")
    assert f"`{RENAMED[old]}`" in refusal("--config", config_file(tmp_path, **{old: 1}))
    assert f"`{RENAMED[old]}`" in refusal(defaults={old: 1})


def test_use_mock_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_MOCK", "True")
    assert "--smoke" in refusal()


def test_unknown_recipe_defaults_and_keys(tmp_path: Path) -> None:
    assert "recipe default `learning_rat` is no flag. Did you mean `learning_rate`?" in refusal(
        defaults={"learning_rat": 1}
    )
    assert "smoke default `lora_rr`" in refusal("--smoke", smoke={"lora_rr": 1})
    assert "--config key `max_lenght` is no flag. Did you mean `max_length`?" in refusal(
        "--config", config_file(tmp_path, max_lenght=1)
    )
    assert "`help` is no flag" in refusal(defaults={"help": 1})
    assert "is refused" in refusal("--config", config_file(tmp_path, packing_strategy="wrapped"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_r": "many"}, "'many' is not a valid whole number"),
        ({"max_steps": 1.5}, "1.5 is not a valid whole number"),
        ({"learning_rate": "fast"}, "'fast' is not a valid number"),
        ({"load_in_4bit": "perhaps"}, "'perhaps' is not a valid true or false"),
        ({"gradient_checkpointing": 3}, "3 is not a valid true or false"),
        ({"average_tokens_across_devices": "perhaps"}, "true or false"),
        ({"lora_r": [1, 2]}, "takes one value, found the list"),
        ({"gradient_checkpointing": [True]}, "takes one value, found the list"),
        ({"lora_r": {"a": 1}}, "found a mapping"),
        ({"stages": None}, "`stages` needs a value"),
        ({"learning_rate": None}, "`learning_rate` needs a value"),
        ({"stages": ["trian"]}, "'trian' is none of check, baseline"),
        ({"stages": []}, "--stages is empty"),
        ({"dtype": "float8"}, "'float8' is none of"),
        ({"lr_scheduler_type": "cosin"}, "'cosin' is none of linear, cosine"),
    ],
)
def test_wrong_types_in_a_file(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal("--config", config_file(tmp_path, **values))


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 2e-4", "learning_rate", 2e-4),  # YAML reads that as text
        ("max_steps: '5'", "max_steps", 5),
        ("num_train_epochs: 2", "num_train_epochs", 2.0),
        ("load_in_4bit: 'false'", "load_in_4bit", False),
        ("gradient_checkpointing: 'no'", "gradient_checkpointing", False),
        ("model_revision: 1.10", "model_revision", "1.1"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "true"),
        ("instruction: 5", "instruction", "5"),
        ("lora_target_modules: q_proj", "lora_target_modules", "q_proj"),
        ("report_to: [wandb, tensorboard]", "report_to", ["wandb", "tensorboard"]),
        ("accelerator_config: {split_batches: true}", "accelerator_config", None),
    ],
)
def test_values_of_a_file_get_the_type_of_the_command_line(line: str, name: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_text(line, encoding="utf-8")
    got = value_of(parse("--config", str(path)), name)
    if value is None:
        assert got["split_batches"] is True
    else:
        assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", ["a: [1", "- lora_r", "\tlora_r: 1"])
def test_a_file_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_text(text, encoding="utf-8")
    assert "given.yaml" in refusal("--config", str(path))


# Secrets


def test_a_token_is_refused_everywhere_and_never_shown(tmp_path: Path) -> None:
    secret = "hf_" + "x" * 30
    for message in (
        refusal("--hub_token", secret),
        refusal(f"--hub_token={secret}"),
        refusal(defaults={"hub_token": secret}),
        refusal("--config", config_file(tmp_path, hub_token=secret)),
        refusal("--model_init_kwargs", json.dumps({"token": secret})),
    ):
        assert secret not in message
        assert "HF_TOKEN" in message
    assert "hub_token" not in parse().to_yaml()


# The file that repeats a run


ARGUMENT_SETS: list[list[str]] = [
    [],
    ["--smoke"],
    ["--bf16"],
    ["--dtype", "bfloat16", "--load_in_4bit", "--bnb_4bit_quant_storage", "uint8"],
    ["--no_gradient_checkpointing"],
    ["--gradient_checkpointing_kwargs", '{"use_reentrant": false}'],
    ["--lora_target_modules", "all-linear"],
    ["--stages", "train", "evaluate", "--seed", "7", "--do_sample", "--temperature", "0.7"],
    ["--instruction", 'Caption: "yes", #1\nn\u00e4chste Zeile', "--dataset_name", "null"],
    ["--report_to", "wandb", "--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end"],
    ["--accelerator_config", '{"split_batches": true}'],
    ["--debug", "underflow_overflow", "--optim_target_modules", "all-linear", "--warmup_steps", "0.1"],
    ["--model_init_kwargs", '{"use_kernels": true}', "--lr_scheduler_kwargs", '{"num_cycles": 2}'],
    ["--loss_type", "dft", "--neftune_noise_alpha", "5", "--torch_compile", "--tf32", "false"],
]


if "activation_checkpointing" in FIELDS:  # the name since transformers 5.23
    ARGUMENT_SETS.append(["--activation_checkpointing", "false"])


@pytest.mark.parametrize("argv", ARGUMENT_SETS, ids=" ".join)
def test_settings_yaml_repeats_the_run(argv: list[str], tmp_path: Path) -> None:
    first = parse(*argv, defaults=DEFAULTS, smoke=SMOKE)
    path = tmp_path / "settings.yaml"
    path.write_text(first.to_yaml(), encoding="utf-8")
    # Upstream's lists and dicts have to survive too, and with another recipe's defaults below them.
    for defaults in (DEFAULTS, {}, {**DEFAULTS, "lora_r": 5, "lora_modules_to_save": ["lm_head"]}):
        again = parse("--config", str(path), defaults=defaults, smoke=SMOKE)
        assert again.as_dict() == first.as_dict()
    again = parse("--config", str(path), defaults=DEFAULTS, smoke=SMOKE)
    # What the device or upstream filled in is written down, and is then given.
    filled_in = {"bf16", "fp16", "dtype", "gradient_checkpointing", "torch_compile_backend"}
    filled_in |= {"metric_for_best_model", "greater_is_better"}
    assert again.given.keys() <= first.given.keys() | filled_in


def test_a_null_survives_the_round_trip(tmp_path: Path) -> None:
    first = parse("--config", config_file(tmp_path, num_train_examples=None, max_length=None), defaults=DEFAULTS)
    path = tmp_path / "settings.yaml"
    path.write_text(first.to_yaml(), encoding="utf-8")
    again = parse("--config", str(path), defaults=DEFAULTS)
    assert again.recipe.num_train_examples is None and again.training.max_length is None


def test_settings_yaml_names_no_place_and_starts_with_what_defines_the_run(tmp_path: Path) -> None:
    settings = parse("--output_dir", str(tmp_path), "--run_name", "x", "--lora_r", "8", "--dry_run", defaults=DEFAULTS)
    text = settings.to_yaml()
    defining = yaml.safe_load(text.partition("\n\n")[0])
    assert defining == {key: yaml.safe_load(text)[key] for key in defining}
    assert defining["lora_r"] == 8 and defining["learning_rate"] == 2e-4
    assert len(defining) < 40
    assert not {"output_dir", "run_name", "dry_run", "resume_from_checkpoint", *REFUSED} & yaml.safe_load(text).keys()


# Behaviour around the parser


def test_parsing_raises_no_deprecation_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse(defaults=DEFAULTS)
        parse("--smoke", defaults=DEFAULTS, smoke=SMOKE)
        parse("--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": false}')


def test_gradient_checkpointing_reaches_upstream_under_its_new_name() -> None:
    for value in (True, False):
        training = parse("--gradient_checkpointing", str(value)).training
        assert getattr(training, "activation_checkpointing", value) is value
    kwargs = {"use_reentrant": False}
    training = parse("--gradient_checkpointing_kwargs", json.dumps(kwargs)).training
    assert getattr(training, "activation_checkpointing_kwargs", kwargs) == kwargs


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in FIELDS)


@pytest.fixture(scope="module")
def mistaken_run(project: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "recipes/flickr8k.py", "--smoke", "--train_steps", "3"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_mistake_ends_with_code_2_and_without_traceback(mistaken_run: subprocess.CompletedProcess[str]) -> None:
    assert mistaken_run.returncode == 2
    assert "--train_steps is now called --max_steps" in mistaken_run.stderr
    assert "Traceback" not in mistaken_run.stderr + mistaken_run.stdout
