"""A run's answers to its evaluation prompts: asked for, recorded and scored in one way by all stages."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from qvl.active_run import Run
from qvl.data import prompt_messages
from qvl.examples import undecoded_examples
from qvl.generate import Decoding, generate
from qvl.given_prompts import as_prompt
from qvl.metrics import ScoreStatistics, loss_statistics, score_statistics
from qvl.survey import prompt_lengths

# Prompts from which on compiled layers make up for their compilation: they saved 2.4 ms a prompt and took 12 s once (8B
# shape, one H100), and a run answers most of its prompts twice.
_WORTH_COMPILING = 3000


def answer_prompts(run: Run, model: PreTrainedModel | PeftModel, examples: Dataset, label: str) -> list[dict[str, Any]]:
    """Generates an answer to the prompt of every example.

    Args:
        run: has the flags of decoding.
        model: base or adapter on it, as `qvl.generate` takes it.
        examples: evaluation examples.
        label: of the progress bar.

    Returns:
        Rows of a predictions file, in the order of `examples`: id, image, images, image_keys (see
        `qvl.examples.build_dataset`), prompt, prediction, references, decoding.
    """
    decoding = decoding_of(run, len(examples))
    asked = run.in_words(examples)
    lengths = prompt_lengths(asked, run.processing_class)
    answers = generate(model, run.processing_class, Prompts(run.for_model(examples)), decoding, lengths, label=label)
    return [
        {
            "id": row["id"],
            "image": row["image_names"][0] if row["image_names"] else None,
            "images": row["image_names"],
            "image_keys": row["image_keys"],
            "prompt": _plain_text(prompt_messages(row)),
            "prediction": answer,
            "references": row["references"],
            "decoding": decoding.summary(),
        }
        for row, answer in zip(undecoded_examples(asked), answers, strict=True)
    ]


def decoding_of(run: Run, num_prompts: int) -> Decoding:
    """How the run's flags say that so many prompts are answered."""
    recipe, training = run.settings.recipe, run.settings.training
    is_captured = run.device.type == "cuda"
    return Decoding(
        max_new_tokens=recipe.max_new_tokens,
        # On a GPU, by its free memory, where a captured graph says how much a prompt needs.
        batch_size=recipe.generation_batch_size or (None if is_captured else training.per_device_eval_batch_size),
        seed=training.seed,
        do_sample=recipe.do_sample,
        temperature=recipe.temperature,
        top_p=recipe.top_p,
        top_k=recipe.top_k,
        num_workers=training.dataloader_num_workers,
        compile_layers=recipe.compile_layers and num_prompts >= _WORTH_COMPILING,
    )


def statistics_of(run: Run, rows: Sequence[Mapping[str, Any]]) -> dict[str, ScoreStatistics]:
    """What the scores of --scores, and the held-out loss where the rows have one, sum over the rows."""
    found = score_statistics(
        {row["id"]: row["prediction"] for row in rows},
        {row["id"]: row["references"] for row in rows},
        run.settings.recipe.scores,
        run.own_scores,
        with_first_reference=True,
    )
    if all("answer_loss" in row for row in rows):
        unsound = [row["id"] for row in rows if not math.isfinite(row["answer_loss"])]
        if unsound:
            print(
                f"No held-out loss: it is no finite number for {len(unsound):,} of {len(rows):,} examples, "
                f"{unsound[0]} the first of them. `--stages check` looks for the layer that overflows.",
                flush=True,
            )
        else:
            found |= loss_statistics([row["answer_loss"] for row in rows], [row["answer_tokens"] for row in rows])
    return found


def images_of(rows: Sequence[Mapping[str, Any]]) -> list[Hashable]:
    """What the bootstrap draws together: rows of the same images; a row without any stands for itself."""
    return [tuple(row.get("image_keys") or row["images"]) or row["id"] for row in rows]


class Prompts:
    """Evaluation examples as prompts; decoded one by one in the data loader's workers."""

    def __init__(self, examples: Dataset) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return as_prompt(self.examples[index])


def _plain_text(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")
