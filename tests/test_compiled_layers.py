"""Layers compiled for training give what they give otherwise, and keep no more for the backward than was asked for.

The backend is torch's own without the code generator, which needs a GPU or a C++ compiler: the layers are traced and
divided into forward and backward by the same partitioner.
"""

import copy
import functools
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from curves import KEYS, training_curve
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import CHAT, base, conversation, message, picture, processing_class, settings_for
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import qvl.training_form
from qvl.collators import CompletionCollator
from qvl.compiled_layers import compiled_generation, compiled_layers, scale_by_tensors
from qvl.generate import PromptCollator
from qvl.models import load_base
from qvl.positions import positions_of
from qvl.seeded_dropout import seed_dropout
from qvl.segment_attention import use_segment_attention
from qvl.shared_prefix import SharedPrefixCollator
from qvl.training_form import wants_compiled
from recipes.qwen_chat import RECIPE

BACKEND = "aot_eager_decomp_partition"
EXAMPLES = [
    conversation([("Hello there", "Hi."), ("How are you?", "Well, thank you, and you?")]),
    conversation([("Why?", "Because.")]),
    conversation([("Name a colour, please", "Red")]),
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def with_adapter(model: PreTrainedModel, rank: int = 4, dropout: float = 0.0) -> PeftModel:
    torch.manual_seed(0)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_dropout=dropout, target_modules=projections))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return adapted.train()


def loss_and_gradients(model: PeftModel, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    inputs = {key: value for key, value in batch.items() if key != "num_answers"}
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found: tuple[float, dict[str, torch.Tensor]], wanted: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def kept_by_layers(model: PeftModel, batch: dict[str, Any]) -> list[torch.Tensor]:
    """What the decoder's layers keep for the backward, without the model's own weights."""
    kept: list[torch.Tensor] = []
    weights = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    decoder = model.get_base_model().get_decoder()
    inside = decoder.norm.register_forward_pre_hook(lambda module, inputs: hooks.__exit__(None, None, None))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    names = ("input_ids", "attention_mask", "position_ids", "segment_ids")
    hooks.__enter__()
    decoder(**{name: batch[name] for name in names}, use_cache=False)
    inside.remove()
    return [tensor for tensor in kept if tensor.data_ptr() not in weights]


def batches(number_of_rows: int) -> list[dict[str, Any]]:
    """The same conversations behind each other in one row; then fewer of them: another length."""
    collator = SharedPrefixCollator(
        processing_class(CHAT), positions_of(base(CHAT).config), max_length=None, padding_free=True
    )
    return [collator(EXAMPLES[:count]) for count in (number_of_rows, 2)]


def test_layers_that_keep_their_inputs_only_train_as_separate_samples_do() -> None:
    model = with_adapter(copy.deepcopy(base(CHAT)))
    plain = model.get_base_model()
    separate = CompletionCollator(processing_class(CHAT), None)
    wanted = [loss_and_gradients(model, separate(EXAMPLES[:count])) for count in (3, 2)]
    use_segment_attention(plain)
    eager = kept_by_layers(model, batches(3)[0])
    with compiled_layers(plain, keeps_inputs_only=True, backend=BACKEND):
        for batch, expected in zip(batches(3), wanted, strict=True):
            assert_alike(loss_and_gradients(model, batch), expected)
        # All layers share one compilation, and so do all lengths.
        assert torch._dynamo.utils.counters["frames"]["total"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        batch = batches(3)[0]
        kept = kept_by_layers(model, batch)
    width, length = plain.config.hidden_size, batch["input_ids"].shape[1]
    num_layers, head_dim = plain.config.num_hidden_layers, plain.config.head_dim
    # Of each layer its input; sine, cosine and segments are the same tensors for all. No numbers handed in as tensors.
    shapes = sorted({tuple(tensor.shape) for tensor in kept})
    assert shapes == sorted({(1, length, width), (1, length, head_dim), (1, length)})
    assert sum(tensor.shape[-1] == width for tensor in kept) == num_layers
    assert sum(t.nbytes for t in {t.data_ptr(): t for t in kept}.values()) < sum(t.nbytes for t in eager) / 8
    assert all(module._compiled_call_impl is None for module in plain.modules())


@pytest.mark.parametrize("quantized", [False, True])
def test_one_compilation_serves_every_rank_scale_and_dropout(quantized: bool) -> None:
    flags = ["--load_in_4bit", "--use_bnb_nested_quant"] if quantized else []
    plain = load_base(settings_for(CHAT, *flags), torch.device("cpu"))
    use_segment_attention(plain)
    for rank, dropout in ((4, 0.05), (16, 0.1)):
        model = with_adapter(plain, rank, dropout)
        seed_dropout(model, model.device)
        torch.manual_seed(0)
        wanted = [loss_and_gradients(model, batch) for batch in batches(3)]
        scale_by_tensors(model, model.device)
        torch.manual_seed(0)
        with compiled_layers(plain, keeps_inputs_only=False, backend=BACKEND):
            for batch, expected in zip(batches(3), wanted, strict=True):
                assert_alike(loss_and_gradients(model, batch), expected)
        assert torch._dynamo.utils.counters["frames"]["total"] == 1
        model.unload()


def test_in_pieces_the_hooks_of_a_layer_stay_outside_of_its_compiled_code() -> None:
    """ZeRO-3 and FSDP2 put weights together in such hooks, and let them go."""
    model = with_adapter(copy.deepcopy(base(CHAT)))
    plain = model.get_base_model()
    use_segment_attention(plain)
    wanted = [loss_and_gradients(model, batch) for batch in batches(3)]
    layers, seen = plain.get_decoder().layers, []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(torch.compiler.is_compiling()))
    with compiled_layers(plain, keeps_inputs_only=True, in_pieces=True, backend=BACKEND):
        for batch, expected in zip(batches(3), wanted, strict=True):
            assert_alike(loss_and_gradients(model, batch), expected)
    assert torch._dynamo.utils.counters["frames"]["total"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert seen == [False] * (2 * len(layers))
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_layers_are_compiled_whole_where_several_processes_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would cut a layer where a bucket of gradients is full, and keep what goes over the cut for the backward."""
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", SimpleNamespace(bucket_bytes_cap=25 * 2**20))
    model = with_adapter(copy.deepcopy(base(CHAT)))
    plain = model.get_base_model()
    use_segment_attention(plain)
    batch = batches(3)[0]
    with compiled_layers(plain, keeps_inputs_only=True, backend=BACKEND):
        loss_and_gradients(model, batch)
        kept = kept_by_layers(model, batch)
    length = batch["input_ids"].shape[1]
    shapes = {tuple(tensor.shape) for tensor in kept}
    assert shapes == {(1, length, plain.config.hidden_size), (1, length, plain.config.head_dim), (1, length)}


def test_a_compiled_4bit_layer_keeps_no_weight_in_16_bits() -> None:
    plain = load_base(settings_for(CHAT, "--load_in_4bit", "--use_bnb_nested_quant"), torch.device("cpu"))
    use_segment_attention(plain)
    model = with_adapter(plain)
    wanted = [loss_and_gradients(model, batch) for batch in batches(3)]
    with compiled_layers(plain, keeps_inputs_only=False, backend=BACKEND):
        for batch, expected in zip(batches(3), wanted, strict=True):
            assert_alike(loss_and_gradients(model, batch), expected)
        assert torch._dynamo.utils.counters["frames"]["total"] == 1
        kept = kept_by_layers(model, batches(3)[0])
    config, num_tokens = plain.config, batches(3)[0]["input_ids"].shape[1]
    narrow, wide = config.hidden_size, config.intermediate_size
    assert num_tokens not in (narrow, wide)
    for tensor in kept:
        if tensor.is_floating_point():
            assert num_tokens in tensor.shape, tuple(tensor.shape)


def test_the_trainer_compiled_follows_the_loss_curve_of_checkpointed_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--num_train_examples", "24", "--max_steps", "3", "--max_length", "128", "--gradient_checkpointing"]
    checkpointed = training_curve(RECIPE, tmp_path / "checkpointed", *flags)
    # What a GPU would answer, and a backend that needs none.
    monkeypatch.setattr(qvl.training_form, "can_compile", lambda device: True)
    monkeypatch.setattr(qvl.training_form, "compiled_layers", functools.partial(compiled_layers, backend=BACKEND))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = training_curve(RECIPE, tmp_path / "compiled", *flags)
    # One compilation serves all layers, the first one too, whose input wants a gradient as theirs do.
    assert torch._dynamo.utils.counters["frames"]["ok"] == 1
    assert compiled["num_compilations"] == [1, 0, 0]
    for key in KEYS:
        assert compiled[key] == pytest.approx(checkpointed[key], rel=1e-4), key


@pytest.mark.parametrize(
    ("flags", "compiled"),
    [
        ([], True),
        (["--gradient_checkpointing"], True),
        (["--load_in_4bit"], True),
        (["--load_in_8bit"], False),
        (["--no_compile_layers"], False),
        (["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"selective": true}'], False),
    ],
)
def test_what_is_compiled_where_the_device_can(flags: list[str], compiled: bool) -> None:
    assert wants_compiled(settings_for(CHAT, *flags)) is compiled


def test_answers_are_those_of_plain_layers_and_the_wrapped_modules_are_kept() -> None:
    model = copy.deepcopy(base("qvl/tiny-qwen3-vl"))
    processor = processing_class("qvl/tiny-qwen3-vl")
    rows = [{"prompt": [message("user", "What is this?", 1)], "images": [picture(64, 96)]}]
    inputs = PromptCollator(processor)(rows)
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)

    found, calls = [], []
    for _ in range(2):
        with compiled_generation(model, backend="eager"):
            norm = model.get_decoder().layers[0].input_layernorm
            calls.append(norm._compiled_call_impl)
            found.append(model.generate(**inputs, max_new_tokens=8, do_sample=False))

    assert all(torch.equal(tokens, plain) for tokens in found)
    assert calls[0] is calls[1] is not None
    assert not any(module._compiled_call_impl for module in model.modules())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_model_that_nobody_uses_any_more_goes_for_all_that_was_wrapped() -> None:
    model = copy.deepcopy(base(CHAT))
    with compiled_generation(model, backend="eager"):
        pass
    reference = weakref.ref(model)

    del model
    gc.collect()

    assert reference() is None
