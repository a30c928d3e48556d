"""The stages baseline and evaluate (answers and their scores) and report (both compared)."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from qvl import metrics
from qvl.active_run import Run
from qvl.adapters import load_adapter
from qvl.data import prompt_messages
from qvl.errors import UserError
from qvl.examples import undecoded_examples
from qvl.files import read_jsonl, write_jsonl_atomically
from qvl.generate import Decoding, generate
from qvl.memory_use import peak_gib, reset_peak
from qvl.report import write_report
from qvl.survey import prompt_lengths

SCORES = ("bleu4", "rouge_l", "cider")


def baseline(run: Run) -> None:
    """Scores the base model as it comes."""
    _evaluate(run, run.load_base(), "baseline")


def evaluate(run: Run) -> None:
    """Scores the adapter of the run folder (or --adapter), loaded from disk: what is shipped is what is scored."""
    named = run.settings.recipe.adapter
    # With the stage train, --adapter is where the training started and the run's own adapter is what came of it.
    is_trained_here = named is None or "train" in run.settings.recipe.stages
    adapted = load_adapter(run.load_base(), run.folder / "adapter" if is_trained_here else Path(str(named)))
    _evaluate(run, adapted, "finetuned")
    adapted.unload()


def report(run: Run) -> Path:
    """Compares the two sets of predictions and writes report.html."""
    _compare(run)
    sides = {"train": run.data.train, "evaluation": run.data.evaluation}
    places = {
        row["id"]: (side, index) for side, rows in sides.items() for index, row in enumerate(undecoded_examples(rows))
    }

    def open_image(example_id: str) -> Any:
        # Training rows are named image/number once their captions are apart.
        place = places.get(example_id) or places.get(example_id.rpartition("/")[0])
        images = sides[place[0]][place[1]]["images"] if place else []
        return images[0] if images else None

    return write_report(run.folder, open_image, run.name)


def _evaluate(run: Run, model: PreTrainedModel | PeftModel, part: str) -> None:
    """Generates an answer to every evaluation prompt, writes the predictions and their scores."""
    recipe, training = run.settings.recipe, run.settings.training
    decoding = Decoding(
        max_new_tokens=recipe.max_new_tokens,
        batch_size=training.per_device_eval_batch_size,
        seed=training.seed,
        do_sample=recipe.do_sample,
        temperature=recipe.temperature,
        top_p=recipe.top_p,
        top_k=recipe.top_k,
        num_workers=training.dataloader_num_workers,
    )
    examples = run.data.evaluation
    lengths = prompt_lengths(examples, run.processing_class)
    reset_peak()
    start = time.perf_counter()
    answers = generate(model, run.processing_class, _Prompts(examples), decoding, lengths, label=part)
    seconds = time.perf_counter() - start
    rows = [
        {
            "id": row["id"],
            "image": row["image_names"][0] if row["image_names"] else None,
            "images": row["image_names"],
            "prompt": _plain_text(prompt_messages(row)),
            "prediction": answer,
            "references": row["references"],
        }
        for row, answer in zip(undecoded_examples(examples), answers, strict=True)
    ]
    write_jsonl_atomically(run.folder / f"{part}_predictions.jsonl", rows)
    scores = metrics.score(*_texts(rows))
    run.put_metrics(part, {key: scores[key] for key in (*SCORES, "num_examples")})
    cost = {"seconds": seconds, "examples_per_second": len(rows) / seconds, "peak_gib": peak_gib()}
    run.put_metrics("cost", {part: cost})
    print(f"{part}: BLEU-4 {scores['bleu4']:.4f} on {len(rows)} examples", flush=True)


class _Prompts:
    """Evaluation examples as prompts; decoded one by one in the data loader's workers."""

    def __init__(self, examples: Dataset) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        return {"prompt": prompt_messages(example), "images": example["images"], "tools": example.get("tools")}


def _compare(run: Run) -> None:
    """Fills metrics.json's difference, if both predictions exist and are of the same examples."""
    paths = [run.folder / f"{part}_predictions.jsonl" for part in ("baseline", "finetuned")]
    if not all(path.is_file() for path in paths):
        return
    before, after = (read_jsonl(path) for path in paths)
    if [row["id"] for row in before] != [row["id"] for row in after]:
        raise UserError(
            f"{paths[0]} and {paths[1]} are of different examples, so their scores do not compare. Run the stages "
            "baseline and evaluate again with the same data settings."
        )
    predictions, references = _texts(before)
    compared = metrics.compare(predictions, _texts(after)[0], references, seed=run.settings.training.seed)
    run.put_metrics("difference", {key: compared[key]["difference"] for key in SCORES})
    table = [
        {
            "id": a["id"],
            "baseline": a["prediction"],
            "finetuned": b["prediction"],
            "references": "\n".join(a["references"]),
        }
        for a, b in zip(before, after, strict=True)
    ]
    run.record.log_predictions(table)


def _texts(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, str], dict[str, list[str]]]:
    return {row["id"]: row["prediction"] for row in rows}, {row["id"]: row["references"] for row in rows}


def _plain_text(messages: Sequence[dict[str, Any]]) -> str:
    return "\n".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")
