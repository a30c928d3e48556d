"""The stages baseline and evaluate (answers and their scores) and report (both compared)."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from qvl import bootstrap
from qvl.active_run import Run
from qvl.adapters import load_adapter
from qvl.answers import answer_prompts, images_of, statistics_of
from qvl.collators import CompletionCollator
from qvl.data import separate_completions
from qvl.errors import UserError
from qvl.examples import undecoded_examples
from qvl.features import require_frozen_vision
from qvl.files import read_jsonl, write_jsonl_atomically
from qvl.held_out import held_out_losses
from qvl.memory_use import peak_gib, reset_peak
from qvl.metrics import ScoreStatistics
from qvl.processes import is_main
from qvl.report import write_report
from qvl.trained_parts import take_off


def baseline(run: Run) -> None:
    """Scores the base model as it comes."""
    _evaluate(run, run.load_base(), "baseline")


def evaluate(run: Run) -> None:
    """Scores the adapter of the run folder (or --adapter), loaded from disk: what is shipped is what is scored."""
    named = run.settings.recipe.adapter
    # With the stage train, --adapter is where the training started and the run's own adapter is what came of it.
    is_trained_here = named is None or "train" in run.settings.recipe.stages
    adapted = load_adapter(run.load_base(), run.folder / "adapter" if is_trained_here else Path(str(named)))
    if run.settings.recipe.cache_vision_features:
        require_frozen_vision(adapted)
    _evaluate(run, adapted, "finetuned")
    take_off(adapted)


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
    reset_peak()
    start = time.perf_counter()
    rows = answer_prompts(run, model, run.data.evaluation, label=part)
    seconds = time.perf_counter() - start
    rows = _with_losses(run, model, rows)
    loss_seconds = time.perf_counter() - start - seconds
    if not is_main():
        return
    # Before they are scored: a recipe's own score may fail.
    write_jsonl_atomically(run.folder / f"{part}_predictions.jsonl", rows)
    statistics = _score(run, part, rows)
    # Of what was answered before: the stage report compares again.
    run.put_metrics("difference", {})
    (run.folder / "report.html").unlink(missing_ok=True)
    cost = {
        "seconds": seconds,
        "examples_per_second": len(rows) / seconds,
        "held_out_loss_seconds": loss_seconds,
        "peak_gib": peak_gib(),
        **run.predicted_peak(part),
    }
    run.put_metrics("cost", {part: cost})
    first = next(iter(statistics.values()))
    print(f"{part}: {first.label} {first.value:.4f} on {len(rows)} examples", flush=True)


def _with_losses(run: Run, model: PreTrainedModel | PeftModel, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each row the loss of its own answers, summed over their tokens, and how many tokens those are.

    Answers are those that training would learn from such a row (`--captions_per_image` of a caption row), whole: what
    `--max_length` would cut counts here.
    """
    answers = separate_completions(run.for_model(run.data.evaluation))
    if not len(answers):
        return rows
    training = run.settings.training
    collator = CompletionCollator(run.processing_class, max_length=None)
    batch_size, num_workers = training.per_device_eval_batch_size, training.dataloader_num_workers
    losses, num_tokens = held_out_losses(model, answers, collator, batch_size, num_workers)
    result, start = [], 0
    for row, example in zip(rows, undecoded_examples(run.data.evaluation), strict=True):
        end = start + (len(example["completions"]) if "completions" in example else 1)
        result.append({**row, "answer_loss": sum(losses[start:end]), "answer_tokens": sum(num_tokens[start:end])})
        start = end
    return result


def _score(run: Run, part: str, rows: Sequence[dict[str, Any]]) -> dict[str, ScoreStatistics]:
    """Writes a model's predictions, each with its own scores, and puts the scores of the set into metrics.json."""
    statistics = statistics_of(run, rows)
    items = {name: found.items.tolist() for name, found in statistics.items() if found.items is not None}
    with_scores = [
        {**row, "scores": {name: values[index] for name, values in items.items()}} for index, row in enumerate(rows)
    ]
    write_jsonl_atomically(run.folder / f"{part}_predictions.jsonl", with_scores)
    labels = {name: {"label": s.label, "higher_is_better": s.higher_is_better} for name, s in statistics.items()}
    run.put_metrics("scores", labels)
    found = bootstrap.intervals(statistics, images_of(rows), seed=run.settings.training.seed)
    values = {name: interval["mean"] for name, interval in found.items()}
    ends = {name: {"low": interval["low"], "high": interval["high"]} for name, interval in found.items()}
    run.put_metrics(part, {**values, "num_examples": len(rows), "interval": ends})
    return statistics


def _compare(run: Run) -> None:
    """Scores the predictions that are there by the scores that are asked for now, and fills in the difference."""
    paths = {part: run.folder / f"{part}_predictions.jsonl" for part in ("baseline", "finetuned")}
    predictions = {part: read_jsonl(path) for part, path in paths.items() if path.is_file()}
    statistics = {part: _score(run, part, rows) for part, rows in predictions.items()}
    if len(predictions) < 2:
        return
    before, after = predictions.values()
    different = _what_differs(before, after)
    if different is not None:
        raise UserError(
            f"{paths['baseline']} and {paths['finetuned']} are of different {different}, so their scores do not "
            "compare. Run the stages baseline and evaluate again with the same settings."
        )
    common = statistics["baseline"].keys() & statistics["finetuned"].keys()
    a, b = ({name: s for name, s in statistics[part].items() if name in common} for part in paths)
    compared = bootstrap.compare(a, b, images_of(before), seed=run.settings.training.seed)
    run.put_metrics("difference", dict(compared))
    table = [
        {
            "id": first["id"],
            "baseline": first["prediction"],
            "finetuned": second["prediction"],
            "references": "\n".join(first["references"]),
        }
        for first, second in zip(before, after, strict=True)
    ]
    run.record.log_predictions(table)


def _what_differs(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> str | None:
    """What keeps the answers of two models from being answers to the same questions; None if nothing does."""
    words = {
        "id": "examples",
        "prompt": "prompts",
        "images": "images",
        "references": "references",
        "answer_tokens": "held-out answers",
        "decoding": "flags of decoding",
    }
    for key, word in words.items():
        if [row.get(key) for row in before] != [row.get(key) for row in after]:
            return word
    return None
