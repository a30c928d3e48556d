"""What of `--loader unsloth` runs without Unsloth: who may ask for it, when it is imported, and what is told.

The rest needs a GPU and environments/unsloth.txt; recipes/RESULTS.md has what was measured there.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import CHAT, CPU, VISION, base, settings_for
from torch import nn
from trl import SFTConfig

from qvl import settings as settings_module
from qvl import unsloth_loader
from qvl.adapters import lora_config
from qvl.errors import UserError
from qvl.memory_settings import find_needs, rows_as_long_as_allowed
from qvl.models import language_model_path, load_base, load_config
from qvl.settings import Settings, parse_settings
from qvl.training_form import checkpointing_arguments, wants_compiled
from qvl.training_rows import row_sharing_refusal
from qvl.unsloth_import import import_if_asked, require_usable

ROOT = Path(__file__).parents[1]
ASKED = ("--loader", "unsloth")


def gpu_settings(*argv: str) -> Settings:
    """Of a run that does not ask for the CPU; parsing needs no GPU."""
    return parse_settings({"model_name_or_path": VISION[1]}, {}, [*ASKED, *argv])


@pytest.fixture
def in_an_unsloth_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))


def recipe_ends(*flags: str, python_path: Path | None = None) -> tuple[int, str]:
    """Exit code and standard error of a recipe's command line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, [python_path, ROOT])))}
    done = subprocess.run(
        [sys.executable, "recipes/qwen2_5_vl.py", "--smoke", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_cpu"], "--use_cpu"),
        (["--base_precision", "fp8"], "--base_precision fp8 replaces the layers"),
        (["--vision_encoder", "clip"], "--vision_encoder composes"),
        (["--load_in_8bit"], "use --load_in_4bit"),
        (["--attn_implementation", "sdpa"], "--attn_implementation"),
        (["--cache_vision_features"], "--cache_vision_features"),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'], "--gradient_checkpointing_kwargs"),
        (["--padding_free"], "--padding_free puts samples into one row"),
        (["--train_merger"], "--train_merger: with --loader unsloth LoRA alone"),
        (["--train_merger", "--train_vision_tower"], "--train_merger, --train_vision_tower: with"),
        (["--train_projector"], "--train_projector: with"),
        (["--lora_modules_to_save", "norm"], "--lora_modules_to_save: with"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_that_do_not_go_with_it_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        require_usable(gpu_settings(*flags), is_base_kept=False)
    assert str(refused.value).endswith(", or go without --loader unsloth.")
    transformers_run = parse_settings({"model_name_or_path": VISION[1]}, {}, flags)
    require_usable(transformers_run, is_base_kept=False)


def test_it_is_refused_in_sweeps_and_by_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = gpu_settings()
    with pytest.raises(UserError, match="A sweep keeps one base"):
        require_usable(settings, is_base_kept=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it without a launcher"):
        require_usable(settings, is_base_kept=False)


def test_what_the_recipe_sets_goes_with_it(in_an_unsloth_process: None) -> None:
    from recipes.qwen2_5_vl import DEFAULTS

    require_usable(parse_settings(DEFAULTS, {}, ASKED), is_base_kept=False)


def test_a_dry_run_needs_no_unsloth() -> None:
    require_usable(gpu_settings("--dry_run"), is_base_kept=False)
    for words in (["--dry_run"], ["--dry-run"], ["--dry_run=yes"], ["--dry_run", "true"]):
        import_if_asked({}, [*ASKED, *words], {})


def test_an_unsloth_process_runs_nothing_else(in_an_unsloth_process: None) -> None:
    with pytest.raises(UserError, match="a run with --loader transformers would not be one"):
        require_usable(settings_for(VISION[1]), is_base_kept=False)


def test_a_run_that_is_gone_on_with_says_it_again() -> None:
    """Its settings.yaml is read after transformers has been imported."""
    with pytest.raises(UserError, match="give it on the command line too, or --loader transformers"):
        require_usable(gpu_settings(), is_base_kept=False)


@pytest.mark.parametrize(
    ("defaults", "argv", "overrides"),
    [
        ({}, ["--loader", "unsloth"], {}),
        ({}, ["--seed", "1", "--loader=unsloth", "--unknown", "x"], {}),
        ({"loader": "unsloth"}, [], {}),
        ({"loader": "transformers"}, ["--loader", "transformers"], {"loader": "unsloth"}),
        ({"dry_run": True}, ["--loader", "unsloth", "--dry_run", "no"], {}),
        ({}, ["--config", "run.yaml"], {}),
        ({}, ["--config=run.yaml", "--seed", "1"], {}),
    ],
)
def test_it_is_asked_for_wherever_a_flag_may_stand(
    defaults: dict[str, Any],
    argv: list[str],
    overrides: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This process has imported what Unsloth patches, so that asking for it ends there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("loader: unsloth\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"has imported transformers and trl and peft already.*process of its own"):
        import_if_asked(defaults, argv, overrides)


@pytest.mark.parametrize(
    ("argv", "overrides"),
    [
        ([], {}),
        (["--loader"], {}),
        (["--loader", "transformers", "--config", "run.yaml"], {}),
        (["--config", "run.yaml"], {"loader": "transformers"}),
        (["--config", "nowhere.yaml"], {}),
        (["--config", "broken.yaml"], {}),
        (["--config"], {}),
    ],
)
def test_it_is_not_imported_where_nobody_asks(
    argv: list[str], overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with a flag or file is for the parser to say."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("loader: unsloth\n", encoding="utf-8")
    (tmp_path / "broken.yaml").write_text("loader: [", encoding="utf-8")
    import_if_asked({}, argv, overrides)


def test_without_unsloth_the_message_names_its_environment(tmp_path: Path) -> None:
    """It comes before anything is imported that Unsloth would patch, else it would say that."""
    code, errors = recipe_ends(*ASKED, "--output_dir", str(tmp_path / "run"))
    assert code == 2
    assert "Unsloth is not installed" in errors and "environments/unsloth.txt" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()
    assert (ROOT / "environments" / "unsloth.txt").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_not_even_imported(tmp_path: Path) -> None:
    (tmp_path / "unsloth.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    code, errors = recipe_ends(*ASKED, "--output_dir", str(tmp_path / "run"), python_path=tmp_path)
    assert code == 2
    assert "--loader unsloth needs an NVIDIA GPU" in errors


def test_a_loader_that_is_none_is_named() -> None:
    with pytest.raises(UserError, match="unslot"):
        settings_for(VISION[1], "--loader", "unslot")


def test_programs_that_do_not_import_it_in_time_say_so() -> None:
    with pytest.raises(UserError, match="works with recipes only"):
        load_base(gpu_settings(), CPU)


@pytest.mark.parametrize("name", [*VISION, CHAT])
def test_lora_is_asked_for_by_full_paths_in_the_language_model(name: str) -> None:
    """Unsloth looks for names in vision towers too; a pattern is taken as it is."""
    model = base(name)
    pattern = lora_config(model, settings_for(name, *ASKED)).target_modules
    assert isinstance(pattern, str)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [path for path in linear if path.startswith(f"{language_model_path(model)}.")]
    matched = [path for path in linear if re.fullmatch(pattern, path)]
    assert matched == inside and len(matched) % 7 == 0


def test_layers_rows_and_checkpointing_are_left_to_unsloth() -> None:
    settings, other = gpu_settings(), parse_settings({"model_name_or_path": VISION[1]}, {}, [])
    config = load_config(settings)
    assert wants_compiled(other) and not wants_compiled(settings)
    assert row_sharing_refusal(other, config) is None
    assert row_sharing_refusal(settings, config) == unsloth_loader.NO_SEGMENTS
    assert checkpointing_arguments(settings) == {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    checkpointed = gpu_settings("--gradient_checkpointing")
    needs = find_needs(checkpointed, config, rows_as_long_as_allowed(checkpointed), for_gpu=True)
    assert needs is not None and needs.mode == "checkpointed"


def test_the_parser_keeps_to_trls_own_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth puts a subclass in the place of trl's configuration, with fields and this mark of its own."""
    patched = type("UnslothSFTConfig", (SFTConfig,), {"_unsloth_patched_rl_config": True})
    monkeypatch.setattr(settings_module, "SFTConfig", patched)
    assert type(settings_for(VISION[1]).training) is SFTConfig


def test_layers_run_as_written_in_the_midst_of_unsloths_own_switching(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("of_unsloth")
    module.torch_compiler_set_stance = torch.compiler.set_stance
    monkeypatch.setitem(sys.modules, "of_unsloth", module)
    monkeypatch.setitem(sys.modules, "not_there", None)

    def compiles() -> bool:
        """Whether a function is compiled; a backend is only called for one that is."""
        torch.compiler.reset()
        calls = []

        def backend(graph: Any, inputs: Any) -> Any:
            calls.append(graph)
            return graph.forward

        torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2))
        return bool(calls)

    with unsloth_loader.uncompiled(settings_for(VISION[1])):
        assert compiles(), "with the other loader nothing changes"
    with unsloth_loader.uncompiled(gpu_settings()):
        module.torch_compiler_set_stance("default", skip_guard_eval_unsafe=False)
        assert not compiles()
    assert module.torch_compiler_set_stance is torch.compiler.set_stance
    assert compiles()
