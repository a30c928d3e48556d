"""The held-out loss: what it is by hand, and that no batch size moves it, alone and in the trainer."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import CHAT, CPU, VISION, answered, base, conversation, picture, processing_class, settings_for
from torch.nn import functional
from transformers import Trainer
from trl import SFTConfig

from qvl.collators import CompletionCollator
from qvl.data import DataConfig, load_examples, separate_completions
from qvl.encode import IGNORED_LABEL
from qvl.held_out import held_out_losses, means, token_sums
from qvl.models import load_base
from qvl.positions import positions_of
from qvl.segment_attention import use_segment_attention
from qvl.shared_prefix import SharedPrefixCollator
from qvl.trainer import CompletionTrainer, build_trainer

BATCH_SIZES = (1, 2, 4, 7)


def rows_for(name: str) -> list[dict[str, Any]]:
    """Answers of very different lengths."""
    if name == CHAT:
        turns = [("Say hello.", "Hello."), ("And?", "Goodbye, and thank you for all the fish.")]
        return [conversation(turns[: 1 + index % 2]) for index in range(9)]
    sizes = [(32, 32), (96, 40), (40, 64)]
    return [
        answered("What is it?", "a red circle " * (1 + 2 * (index % 3)), [picture(*sizes[index % 3], index)])
        for index in range(9)
    ]


@pytest.mark.parametrize("name", [*VISION, CHAT])
def test_sums_are_those_of_the_full_logits(name: str) -> None:
    batch = CompletionCollator(processing_class(name), None)(rows_for(name))
    with torch.no_grad():
        sums = token_sums(base(name), batch)
        logits = base(name)(**batch).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    losses = functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none")
    assert sums.num_tokens.tolist() == (labels != IGNORED_LABEL).sum(dim=1).tolist()
    torch.testing.assert_close(sums.losses, losses.sum(dim=1), rtol=1e-5, atol=1e-5)
    assert sums.num_correct.tolist() == (logits.argmax(dim=-1) == labels).sum(dim=1).tolist()


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("name", [*VISION, CHAT])
def test_samples_of_one_row_are_summed_apart(name: str, padding_free: bool) -> None:
    rows = rows_for(name)
    model = copy.deepcopy(base(name))
    with torch.no_grad():
        expected = token_sums(model, CompletionCollator(processing_class(name), None)(rows)).stacked()
        use_segment_attention(model)
        collator = SharedPrefixCollator(
            processing_class(name), positions_of(model.config), None, padding_free=padding_free, pad_to_multiple_of=16
        )
        batch = collator(rows)
        batch.pop("num_answers")
        found = token_sums(model, batch).stacked()
    assert len(batch["labels"]) == (1 if padding_free else len(rows))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_for_perplexity() -> None:
    model = copy.deepcopy(base(CHAT))
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    batch = CompletionCollator(processing_class(CHAT), None)(rows_for(CHAT))
    with torch.no_grad():
        found = means(token_sums(model, batch).stacked().sum(dim=0).tolist())
    num_words = model.get_output_embeddings().weight.shape[0]
    assert found["loss"] == pytest.approx(math.log(num_words), rel=1e-6)
    assert found["perplexity"] == pytest.approx(num_words, rel=1e-5)
    assert found["entropy"] == pytest.approx(math.log(num_words), rel=1e-6)


def test_means_weigh_tokens() -> None:
    assert means([12.0, 8, 2, 4.0]) == {
        "loss": 1.5,
        "perplexity": math.exp(1.5),
        "mean_token_accuracy": 0.25,
        "entropy": 0.5,
    }
    assert means([0.0, 0, 0, 0.0]) == {}


@pytest.mark.parametrize("name", [*VISION, CHAT])
def test_losses_of_rows_are_equal_for_every_batch_size(name: str) -> None:
    rows: Any = rows_for(name)
    collator = CompletionCollator(processing_class(name), None)
    model = copy.deepcopy(base(name)).train()
    first, counts = held_out_losses(model, rows, collator, BATCH_SIZES[0], 0)
    assert model.training
    for size in BATCH_SIZES[1:]:
        losses, num_tokens = held_out_losses(model, rows, collator, size, 0)
        assert num_tokens == counts
        assert losses == pytest.approx(first, rel=1e-5)


def test_a_quantized_base_stays_the_same_whoever_reads_its_state() -> None:
    """On CPUs with AVX512-BF16 bitsandbytes packs the weights in an inference, and spoils them in a `state_dict()`."""
    model = load_base(settings_for(CHAT, "--load_in_4bit"), CPU)
    rows: Any = rows_for(CHAT)
    collator = CompletionCollator(processing_class(CHAT), None)
    before, _ = held_out_losses(model, rows, collator, 4, 0)
    model.state_dict()
    assert held_out_losses(model, rows, collator, 4, 0)[0] == before


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    config = DataConfig("qvl/scenes", dataset_test_split="test", num_train_examples=1, num_eval_examples=5)
    rows = separate_completions(load_examples(config).evaluation)
    return rows.select(range(len(rows)))


def trainer_for(rows: Dataset, batch_size: int, folder: Path, **flags: Any) -> CompletionTrainer:
    name = VISION[0]
    model = get_peft_model(copy.deepcopy(base(name)), LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
    args = SFTConfig(
        output_dir=str(folder),
        per_device_eval_batch_size=batch_size,
        max_length=None,
        bf16=False,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        gradient_checkpointing=False,
        **flags,
    )
    collator = CompletionCollator(processing_class(name), None)
    return build_trainer(model, copy.deepcopy(processing_class(name)), rows, rows, args, collator)


def test_the_trainers_held_out_loss_is_equal_for_every_batch_size(scenes: Dataset, tmp_path: Path) -> None:
    losses, num_tokens = held_out_losses(
        base(VISION[0]), scenes, CompletionCollator(processing_class(VISION[0]), None), 3, 0
    )
    expected = sum(losses) / sum(num_tokens)
    found = [trainer_for(scenes, size, tmp_path / str(size)).evaluate() for size in BATCH_SIZES]
    for metrics in found:
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
        for name in ("eval_mean_token_accuracy", "eval_entropy"):
            assert metrics[name] == pytest.approx(found[0][name], rel=1e-5)


def test_upstreams_mean_of_batches_moves_with_the_batch_size(scenes: Dataset, tmp_path: Path) -> None:
    """What is mended: should upstream mend it itself, `qvl.held_out` can leave the trainer."""

    def of_batches(size: int) -> float:
        trainer = trainer_for(scenes, size, tmp_path / str(size))
        trainer._held_out_sums = torch.zeros(4, dtype=torch.float64)
        loop = Trainer.evaluation_loop(trainer, trainer.get_eval_dataloader(), "Evaluation", True)
        return float(loop.metrics["eval_loss"])

    assert abs(of_batches(1) - of_batches(4)) > 1e-3
