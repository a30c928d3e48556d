"""Adapters sit in the language model and nowhere else; whatever cannot be loaded ends in one line."""

import copy
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import CHAT, CPU, LLAVA, VISION, answered, base, conversation, picture, processing_class, settings_for
from torch import nn
from transformers import PreTrainedModel

from qvl.adapters import (
    add_adapter,
    load_adapter,
    report_parameters,
    require_adapter_in_language_model,
    require_modules_in_language_model,
)
from qvl.checks import hash_parameters
from qvl.collators import CompletionCollator
from qvl.encode import tokenize, tokenizer_of
from qvl.errors import UserError
from qvl.model_names import ASSETS, model_source
from qvl.models import (
    language_model_path,
    load_base,
    load_config,
    load_processing_class,
    skeleton,
)
from qvl.padding_token import ensure_padding_token
from qvl.recipe import run
from qvl.settings import parse_settings
from qvl.vision_attention import VARLEN_FLASH
from recipes.flickr8k import RECIPE

ALL = [*VISION, CHAT, LLAVA]
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
PATHS = dict.fromkeys([*VISION, LLAVA], "model.language_model") | {CHAT: "model"}


def fresh(name: str) -> PreTrainedModel:
    return copy.deepcopy(base(name))


def adapted(name: str, *argv: str) -> PeftModel:
    return add_adapter(fresh(name), settings_for(VISION[0] if name == LLAVA else name, *argv))


def adapted_layers(model: PeftModel) -> list[str]:
    """Paths of the modules that hold LoRA weights, as the base model names them."""
    return [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if len(getattr(module, "lora_A", ())) > 0
    ]


# Placement by path


@pytest.mark.parametrize("name", ALL)
def test_the_language_model_is_found(name: str) -> None:
    assert language_model_path(fresh(name)) == PATHS[name]


@pytest.mark.parametrize(
    ("argv", "leaves"),
    [
        ([], SEVEN),
        (["--lora_target_modules", "q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["--lora_target_modules", "k_proj"], {"k_proj"}),
        (["--lora_target_modules", "all-linear"], SEVEN),
    ],
    ids=["default", "two", "one", "all-linear"],
)
@pytest.mark.parametrize("name", ALL)
def test_adapters_sit_in_the_language_model_only(name: str, argv: list[str], leaves: set[str]) -> None:
    model = adapted(name, *argv)
    layers = adapted_layers(model)
    assert all(layer.startswith(f"{PATHS[name]}.layers.") for layer in layers)
    assert sorted(layer.rpartition(".")[2] for layer in layers) == sorted([*leaves] * 4), "four layers of each"
    trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in key for key in trainable)
    report = report_parameters(model)
    require_adapter_in_language_model(report)
    assert sum(report.modules.values()) == len(layers)
    assert report.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.num_total == sum(p.numel() for p in model.parameters())


def test_plain_names_would_have_hit_the_vision_tower() -> None:
    """Or the test above would pass whatever the code does."""
    names = [name for name, _ in base(LLAVA).named_modules() if name.endswith("q_proj")]
    assert any("vision_tower" in name for name in names)


def test_the_report_can_be_read() -> None:
    lines = report_parameters(adapted(VISION[0], "--lora_target_modules", "q_proj")).lines()
    assert lines[:2] == ["Adapters on:", "     4 x model.language_model.layers.*.self_attn.q_proj"]
    assert lines[2].startswith("Trainable: ") and lines[2].endswith("%)")


@pytest.mark.parametrize("targets", [["qkv"], ["q_proj", "lm_head"], ["proj"], ["self_attn"], [".*"], ["embed_tokens"]])
@pytest.mark.parametrize("name", [VISION[0], CHAT])
def test_a_target_that_is_not_there_lists_what_is(name: str, targets: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        adapted(name, "--lora_target_modules", *targets)
    message = str(caught.value)
    assert f"--lora_target_modules {targets[-1]} matches no linear layer" in message
    assert "down_proj (4x), gate_proj (4x)" in message and "all-linear" in message


@pytest.mark.parametrize(
    ("name", "module"),
    [(VISION[0], "lm_head"), (VISION[0], "merger"), (VISION[1], "patch_embed"), (LLAVA, "multi_modal_projector")],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_modules_to_save_outside_of_it_stop_the_run(name: str, module: str) -> None:
    report = report_parameters(adapted(name, "--lora_modules_to_save", module))
    assert report.outside
    with pytest.raises(UserError, match=rf"outside the language model, the first is .*{module}"):
        require_adapter_in_language_model(report)

    with pytest.raises(
        UserError, match=rf"--lora_modules_to_save {module}: .*{module} lies outside the language model"
    ):
        require_modules_in_language_model(base(name), settings_for(name, "--lora_modules_to_save", module))


def test_modules_to_save_outside_of_it_stop_before_the_base_is_loaded(tmp_path: Path, capsys: Any) -> None:
    flags = ["--smoke", "--cache_vision_features", "--lora_modules_to_save", "merger", "--output_dir", str(tmp_path)]
    with pytest.raises(UserError, match=r"model\.visual\.merger lies .* with --train_merger or --train_vision_tower\."):
        run(RECIPE, argv=flags)
    assert "Loading" not in capsys.readouterr().out


def test_modules_to_save_inside_of_it_are_trained() -> None:
    settings = settings_for(VISION[0], "--lora_modules_to_save", "q_norm")
    require_modules_in_language_model(base(VISION[0]), settings)
    asked_for_twice = settings_for(VISION[0], "--lora_modules_to_save", "merger", "--train_merger")
    require_modules_in_language_model(base(VISION[0]), asked_for_twice)
    report = report_parameters(adapted(VISION[0], "--lora_modules_to_save", "q_norm"))
    require_adapter_in_language_model(report)
    assert report.modules["model.language_model.layers.*.self_attn.q_norm"] == 4


def test_modules_to_save_that_are_not_there() -> None:
    with pytest.raises(UserError, match="--lora_modules_to_save nothing matches no module"):
        adapted(VISION[0], "--lora_modules_to_save", "nothing")


def test_lora_flags_arrive() -> None:
    flags = "--lora_r 4 --lora_alpha 12 --lora_dropout 0.25 --use_rslora --use_dora"
    config = adapted(VISION[0], *flags.split()).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12, 0.25)
    assert config.use_rslora and config.use_dora


def test_the_seed_governs_the_adapters_start() -> None:
    def start(seed: str) -> dict[str, int]:
        torch.rand(3)  # whatever was drawn before must not matter
        return hash_parameters(adapted(CHAT, "--seed", seed))

    assert start("1") == start("1") != start("2")


# Placement by which tensors move


def batch_for(name: str) -> dict[str, torch.Tensor]:
    rows = [answered("Hi", "A dog", [picture(64, 64)]), answered("And?", "A cat", [picture(70, 90)])]
    if name == CHAT:
        rows = [conversation([("Hi", "Hello"), ("And?", "No")])]
    return CompletionCollator(processing_class(name), None)(rows)


@pytest.mark.parametrize("name", ALL)
def test_two_steps_move_every_adapter_pair_and_nothing_else(name: str) -> None:
    model = adapted(name, "--lora_dropout", "0").train()
    before = hash_parameters(model)
    # All parameters: what must not move has to be safe by itself.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = batch_for(name)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = hash_parameters(model)
    moved = {key for key in before if after[key] != before[key]}
    assert moved == {key for key in before if ".lora_A." in key or ".lora_B." in key}
    assert len(moved) == 2 * 7 * 4


# Loading


def test_weights_come_in_the_precision_of_the_run() -> None:
    assert {p.dtype for p in base(VISION[0]).parameters()} == {torch.float32}
    options = settings_for(VISION[0], "--dtype", "bfloat16")
    model = add_adapter(load_base(options, CPU), options)
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_the_attention_asked_for() -> None:
    assert load_base(settings_for(CHAT, "--attn_implementation", "eager"), CPU).config._attn_implementation == "eager"
    with pytest.raises(UserError, match="nonsense"):
        load_base(settings_for(CHAT, "--attn_implementation", "nonsense"), CPU)


def test_model_init_kwargs_reach_the_model() -> None:
    options = settings_for(CHAT, "--model_init_kwargs", '{"max_position_embeddings": 77}')
    assert load_base(options, CPU).config.max_position_embeddings == 77


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"dtype": "float16"}, "--dtype"), ({"revision": "x"}, "--model_revision"), ({"nonsense": 1}, "nonsense")],
)
def test_model_init_kwargs_that_cannot_be(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"--model_init_kwargs.*{message}"):
        load_base(settings_for(CHAT, "--model_init_kwargs", json.dumps(kwargs)), CPU)


@pytest.mark.parametrize("name", [*VISION, CHAT])
def test_a_skeleton_has_the_models_names_and_no_memory(name: str) -> None:
    empty = skeleton(load_config(settings_for(name)))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert [key for key, _ in empty.named_modules()] == [key for key, _ in base(name).named_modules()]


@pytest.mark.parametrize(("flag", "kind"), [("--load_in_4bit", Linear4bit), ("--load_in_8bit", Linear8bitLt)])
@pytest.mark.parametrize("name", [*VISION, CHAT])
def test_quantized_is_the_language_model_and_nothing_else(name: str, flag: str, kind: type[nn.Module]) -> None:
    options = settings_for(name, flag)
    model = load_base(options, CPU)
    linear = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = {key for key in linear if key.startswith(PATHS[name] + ".")}
    assert {key for key, module in linear.items() if isinstance(module, kind)} == inside
    assert len(inside) == 7 * 4
    assert "lm_head" in linear.keys() - inside
    assert name == CHAT or any("visual" in key and "merger" in key for key in linear.keys() - inside)
    lora = add_adapter(model, options)
    assert {p.dtype for key, p in lora.named_parameters() if p.requires_grad} == {torch.float32}
    assert len(adapted_layers(lora)) == 7 * 4
    report = report_parameters(lora)
    require_adapter_in_language_model(report)
    if flag == "--load_in_4bit":
        assert report.num_total == report_parameters(adapted(name)).num_total, "4-bit weights are counted unpacked"


def test_4bit_flags_arrive() -> None:
    flags = "--load_in_4bit --bnb_4bit_quant_type fp4 --use_bnb_nested_quant --bnb_4bit_quant_storage bfloat16"
    model = load_base(settings_for(CHAT, *flags.split()), CPU)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.quant_type == "fp4" and weight.compress_statistics and weight.dtype == torch.bfloat16


def test_4bit_trains_the_adapter_only() -> None:
    options = settings_for(VISION[0], "--load_in_4bit", "--lora_dropout", "0")
    model = add_adapter(load_base(options, CPU), options).train()
    before = hash_parameters(model)
    assert sum("absmax" in key for key in before) == 7 * 4, "the scales of the 4-bit weights are hashed too"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = batch_for(VISION[0])
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    after = hash_parameters(model)
    assert {key for key in before if after[key] != before[key]} == {key for key in before if ".lora_" in key}


# Processors


def num_visual_tokens(processor: Any, width: int, height: int) -> int:
    ids, _ = tokenize([processor.image_token], [picture(width, height)], processor)
    return len(ids[0])


@pytest.mark.parametrize("name", VISION)
def test_the_pixel_budget_changes_the_visual_tokens_and_is_saved(name: str, tmp_path: Path) -> None:
    few = load_processing_class(settings_for(name, "--max_pixels", "20000"))
    many = load_processing_class(settings_for(name, "--min_pixels", "60000"))
    plain = processing_class(name)
    assert num_visual_tokens(few, 300, 300) < num_visual_tokens(plain, 300, 300)
    assert num_visual_tokens(many, 70, 70) > num_visual_tokens(plain, 70, 70)
    pixels_of_token = (few.image_processor.patch_size * few.image_processor.merge_size) ** 2
    assert num_visual_tokens(few, 300, 300) * pixels_of_token <= 20000
    assert num_visual_tokens(many, 70, 70) * pixels_of_token >= 60000
    few.save_pretrained(tmp_path)
    again = load_processing_class(settings_for(name), tmp_path)
    assert num_visual_tokens(again, 300, 300) == num_visual_tokens(few, 300, 300)
    assert dict(again.image_processor.size) == dict(few.image_processor.size)


def test_a_small_budget_lowers_the_least_pixels_too() -> None:
    size = load_processing_class(settings_for(VISION[0], "--max_pixels", "2048")).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (2048, 2048)


def test_pixel_budgets_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"--min_pixels 9000 is more than --max_pixels 8000"):
        load_processing_class(settings_for(VISION[0], "--min_pixels", "9000", "--max_pixels", "8000"))
    with pytest.raises(UserError, match="--min_pixels and --max_pixels need a model"):
        load_processing_class(settings_for(CHAT, "--max_pixels", "8000"))


def copy_of(name: str, folder: Path, **changes: Any) -> Path:
    """A model's files with keys of tokenizer_config.json changed (None: taken out)."""
    target = folder / "model"
    target.mkdir()
    for path in (ASSETS / name.removeprefix("qvl/")).iterdir():
        if path.name != "chat_template.jinja":
            (target / path.name).symlink_to(path)
    config = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8")) | changes
    (target / "tokenizer_config.json").unlink()
    config = {key: value for key, value in config.items() if value is not None}
    (target / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def test_a_model_without_chat_template(tmp_path: Path) -> None:
    folder = copy_of(CHAT, tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_processing_class(settings_for(str(folder)))
    with pytest.raises(UserError, match=r"--chat_template_path no\.jinja"):
        load_processing_class(settings_for(CHAT, "--chat_template_path", "no.jinja"))


@pytest.mark.parametrize("pad_token", [None, "<|im_end|>"], ids=["missing", "end_token"])
def test_padding_is_never_an_answers_end(pad_token: str | None, tmp_path: Path) -> None:
    folder = copy_of(CHAT, tmp_path, pad_token=pad_token, tokenizer_class="PreTrainedTokenizerFast")
    (folder / "chat_template.jinja").symlink_to(ASSETS / "tiny-qwen3-chat" / "chat_template.jinja")
    tokenizer = load_processing_class(settings_for(str(folder)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    rows = [conversation([("Hi", "Hello")]), conversation([("What colour is it ?", "red"), ("Why ?", "blue")])]
    batch = CompletionCollator(tokenizer, None)(rows)
    labels = batch["labels"][batch["labels"] != -100].tolist()
    assert labels.count(tokenizer.eos_token_id) == 3
    assert tokenizer.pad_token_id not in labels
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_a_vocabulary_without_a_token_to_spare_for_padding(tmp_path: Path) -> None:
    tokenizer = load_processing_class(settings_for(CHAT))
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="no special token to spare"):
        ensure_padding_token(tokenizer, "".join(tokenizer.get_vocab()))


def test_an_own_chat_template_is_used_and_saved(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("Q: {{ messages[0].content }} A:", encoding="utf-8")
    tokenizer = load_processing_class(settings_for(CHAT, "--chat_template_path", str(tmp_path / "own.jinja")))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_processing_class(settings_for(CHAT), tmp_path / "saved")
    assert again.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Q: Hi A:"
    assert tokenizer_of(again).pad_token == "<|endoftext|>"


# What cannot be loaded


def one_line(name: str | None, load: Any = load_config) -> str:
    argv = [] if name is None else ["--model_name_or_path", name]
    with pytest.raises(UserError) as caught:
        load(parse_settings({}, {}, argv))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_model_and_unknown_embedded_models() -> None:
    assert "--model_name_or_path" in one_line(None)
    message = one_line("qvl/tiny-qwen4")
    assert "qvl/tiny-qwen4" in message and all(name in message for name in [*VISION, CHAT])


def test_gguf_is_explained_with_the_command_that_helps() -> None:
    message = one_line("models/Qwen3-8B-Q4_K_M.gguf")
    assert "cannot be trained" in message
    assert "gguf_file='Qwen3-8B-Q4_K_M.gguf'" in message and "save_pretrained" in message
    assert model_source("someone/name") == "someone/name"


@pytest.mark.parametrize("load", [load_config, load_processing_class, lambda s: load_base(s, CPU)])
def test_a_model_that_is_not_cached_while_offline(load: Any) -> None:
    message = one_line("someone/no-such-model", load)
    for remedy in ("someone/no-such-model", "HF_ENDPOINT", "hf auth login", "HF_TOKEN", "local folder"):
        assert remedy in message


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such/folder", "spaces are not allowed"])
def test_what_is_neither_a_folder_nor_an_id(name: str) -> None:
    message = one_line(name)
    assert name in message and "hf auth login" in message


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert str(tmp_path) in one_line(str(tmp_path))
    (tmp_path / "config.json").write_text("{broken", encoding="utf-8")
    assert str(tmp_path) in one_line(str(tmp_path))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    folder = copy_of(CHAT, tmp_path)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in one_line(str(folder), lambda options: load_base(options, CPU))


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a gated and for a missing model."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_response(403 if "gated" in self.path else 401)
        self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "RepoNotFound")
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process's hub is a local server, and it is online."""
    server = http.server.HTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/{filename}")
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("hub")
def test_gated_and_missing_models() -> None:
    gated, missing = one_line("someone/gated"), one_line("someone/missing")
    assert any("someone/gated" in path for path in FakeHub.asked)
    assert any("someone/missing" in path for path in FakeHub.asked)
    assert gated.startswith("someone/gated is gated") and "hf auth login" in gated
    assert missing.startswith("someone/missing is neither a folder") and "HF_TOKEN" in missing


@pytest.mark.usefixtures("hub")
def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/{filename}")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between five tries
    assert "the hub cannot be reached. Check the network, set HF_ENDPOINT to a mirror" in one_line("someone/name")


# Adapters from disk


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = adapted(VISION[0])
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def copied(saved: Path, folder: Path) -> Path:
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_saved_adapter_comes_back(saved: Path) -> None:
    frozen = load_adapter(fresh(VISION[0]), saved)
    assert not any(p.requires_grad for p in frozen.parameters())
    going_on = add_adapter(fresh(VISION[0]), settings_for(VISION[0], "--adapter", str(saved)))
    assert all(p.requires_grad == (".lora_" in key) for key, p in going_on.named_parameters())
    require_adapter_in_language_model(report_parameters(going_on))
    stored = load_file(saved / "adapter_model.safetensors")
    weights = dict(going_on.named_parameters())
    assert all(torch.equal(weights[key.replace(".weight", ".default.weight")], stored[key]) for key in stored)
    batch = batch_for(VISION[0])
    with torch.no_grad():
        assert torch.equal(frozen(**batch).logits, going_on.eval()(**batch).logits)
        assert not torch.equal(frozen(**batch).logits, base(VISION[0])(**batch).logits)


def test_a_folder_that_is_no_adapter(saved: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing", saved / "adapter_config.json"):
        with pytest.raises(UserError, match="holds no adapter"):
            load_adapter(fresh(VISION[0]), folder)
    (tmp_path / "adapter_config.json").write_text((saved / "adapter_config.json").read_text(encoding="utf-8"))
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapter(fresh(VISION[0]), tmp_path)


@pytest.mark.parametrize("name", [CHAT, LLAVA])
def test_an_adapter_of_another_base(saved: Path, name: str) -> None:
    with pytest.raises(UserError, match="does not fit this base model"):
        load_adapter(fresh(name), saved)


def test_an_adapter_with_weights_missing(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    weights = load_file(folder / "adapter_model.safetensors")
    gone = sorted(weights)[3]
    save_file({key: value for key, value in weights.items() if key != gone}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"1 weights are missing and 0 find no place, such as {gone}"):
        load_adapter(fresh(VISION[0]), folder)


def test_an_adapter_with_weights_that_find_no_place(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["target_modules"] = config["target_modules"].replace("q_proj|", "")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"0 weights are missing and 8 find no place"):
        load_adapter(fresh(VISION[0]), folder)


def test_a_damaged_adapter(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(fresh(VISION[0]), folder)


def test_an_adapter_that_touches_the_vision_tower_stops_the_run(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(fresh(LLAVA), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = add_adapter(fresh(LLAVA), settings_for(VISION[0], "--adapter", str(tmp_path)))
    with pytest.raises(UserError, match=r"outside the language model.*vision_tower"):
        require_adapter_in_language_model(report_parameters(model))


def test_a_skeleton_is_made_of_a_configuration_whose_attention_only_a_loaded_model_has() -> None:
    """On a GPU the tower's attention is switched after loading, and the check stage counts by the model's config."""
    config = copy.deepcopy(base(VISION[1]).config)
    config.vision_config._attn_implementation = VARLEN_FLASH
    assert skeleton(config).num_parameters() == base(VISION[1]).num_parameters()
    assert config.vision_config._attn_implementation == VARLEN_FLASH
