"""Several samples in one row: each once, none cut, trained as if each had a row of its own."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from curves import KEYS, training_curve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from qvl.bench_cases import Case, open_run, prepare
from qvl.collators import CompletionCollator
from qvl.errors import UserError
from qvl.packing import best_fit
from qvl.segment_attention import PADDING_SEGMENT, SEGMENTS_PER_SAMPLE, block_mask, dense_mask, sees
from qvl.training_rows import packed_if_wanted, prepare_training_rows
from recipes.qwen_chat import DEFAULTS, RECIPE


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_every_sample_is_in_one_row_and_no_row_is_opened_without_need(lengths: list[int]) -> None:
    rows = best_fit(lengths, 30)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    totals = [sum(lengths[number] for number in row) for row in rows]
    for row, total in zip(rows, totals, strict=True):
        assert total <= 30 or len(row) == 1
    # Two rows that fit into one would be one.
    assert all(first + second > 30 for first, second in itertools.combinations(totals, 2))


def test_the_fullest_row_with_room_is_filled_first() -> None:
    assert best_fit([6, 3, 7, 4, 2], 10) == [[0, 3], [1, 2], [4]]


def trial(tmp_path: Path, *flags: str) -> Any:
    prepared = prepare(Case("packed"), RECIPE, ["--smoke", *flags], 1, tmp_path, False)
    return open_run(prepared, prepared.settings)


def test_an_epoch_of_packed_rows_holds_every_conversation_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of = trial(tmp_path, "--num_train_examples", "40", "--max_length", "200", "--gradient_accumulation_steps", "2")
    rows, collator = prepare_training_rows(run_of)
    packed = packed_if_wanted(run_of, rows, collator)
    shown = [[example["id"] for example in packed[index]["pack"]] for index in range(len(packed))]
    assert sorted(itertools.chain(*shown)) == sorted(row["id"] for row in rows)
    assert len(packed) < len(rows) / 2
    lengths = packed.with_format(None)["length"]
    # What the sampler groups by is what the collator makes.
    assert [int(collator([packed[i]])["attention_mask"].sum()) for i in range(len(packed))] == lengths
    assert max(lengths) <= 200
    screen = capsys.readouterr().out
    assert f"--packing: 40 rows in {len(packed)} of up to 200 tokens" in screen
    assert f"an epoch has {-(-len(packed) // 2)} optimizer steps of 2 of them, in place of 20." in screen


def test_packed_training_follows_the_loss_curve_of_separate_rows(tmp_path: Path) -> None:
    # Every optimizer step sees all rows once, however they are packed.
    whole_epochs = ["--num_train_examples", "16", "--max_steps", "3", "--gradient_accumulation_steps", "100"]
    packed = training_curve(RECIPE, tmp_path / "packed", *whole_epochs, "--max_length", "256")
    one_by_one = ["--packing", "false", "--per_device_train_batch_size", "4"]
    separate = training_curve(RECIPE, tmp_path / "separate", *whole_epochs, *one_by_one)
    assert len(packed["loss"]) == 3
    for key in KEYS:
        assert packed[key] == pytest.approx(separate[key], rel=1e-4), key


def test_a_model_that_cannot_tell_samples_apart_trains_unpacked_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of = trial(tmp_path, "--num_train_examples", "8", "--attn_implementation", "eager")
    rows, collator = prepare_training_rows(run_of)
    assert isinstance(collator, CompletionCollator)
    assert packed_if_wanted(run_of, rows, collator) is rows
    assert "a row of its own, which is slower: --attn_implementation eager knows no segments" in capsys.readouterr().out


def test_packing_needs_a_length_to_fill_rows_up_to(tmp_path: Path) -> None:
    run_of = trial(tmp_path, "--num_train_examples", "8")
    run_of.settings.training.max_length = None
    with pytest.raises(UserError, match="--packing fills rows up to --max_length, which is none"):
        packed_if_wanted(run_of, *prepare_training_rows(run_of))


def test_the_chat_recipe_packs_by_default() -> None:
    assert DEFAULTS["packing"] is True


def segments_of(rows: list[list[tuple[int, list[int]]]]) -> torch.Tensor:
    """Segment ids of rows of (prefix length, branch lengths), padded to the longest and a little more."""
    numbered = [
        [
            sample * SEGMENTS_PER_SAMPLE + branch
            for sample, (prefix, branches) in enumerate(row)
            for branch, length in enumerate([prefix, *branches])
            for _ in range(length)
        ]
        for row in rows
    ]
    width = max(map(len, numbered)) + 9
    return torch.tensor([row + [PADDING_SEGMENT] * (width - len(row)) for row in numbered])


samples = st.tuples(st.integers(1, 300), st.lists(st.integers(1, 90), max_size=3))


@settings(deadline=None, max_examples=15)
@given(st.lists(st.lists(samples, min_size=1, max_size=4), min_size=1, max_size=2))
def test_blocks_of_the_flex_mask_are_those_of_torchs_dense_way(rows: list[list[tuple[int, list[int]]]]) -> None:
    ids = segments_of(rows)
    ours = block_mask(ids)

    def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return sees(ids[batch, query], ids[batch, key], query, key)

    wanted = create_block_mask(visible, len(ids), None, ids.shape[1], ids.shape[1], device="cpu")
    # A block too many costs time, one too few would hide tokens.
    assert bool((ours.to_dense() >= wanted.to_dense()).all())
    shown = dense_mask(ids)[:, 0]
    for batch, row in enumerate(shown):
        for place, count in enumerate(ours.full_kv_num_blocks[batch, 0].tolist()):
            for block in ours.full_kv_indices[batch, 0, place, :count].tolist():
                assert bool(row[place * 128 : (place + 1) * 128, block * 128 : (block + 1) * 128].all())


def test_text_in_one_long_row_costs_blocks_in_its_own_length() -> None:
    ids = segments_of([[(256, [])] * 16])[:, :4096]
    mask = block_mask(ids)
    # Three blocks of each sample's four lie on or below the diagonal; dense, half of all 1,024 would be computed.
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == 16 * 3
    assert int(mask.full_kv_num_blocks.sum()) == 16
