"""How much faster is batched generation here? Answers the same prompts one by one as scripts do, and as qvl does.

    python -m qvl.generation_bench recipes/flickr8k.py --max_new_tokens 20
    python -m qvl.generation_bench recipes/flickr8k.py --smoke

Flags of the recipe's command line count. One by one means the processor and `model.generate` on a row at a time, with
the decoding, the model and the images of the batched run. With a GPU there are two batched rows, one with compiled
layers; each is run twice, and the first run is its warm-up.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qvl.bench import load_recipe
from qvl.errors import UserError
from qvl.files import write_json_atomically
from qvl.recipe import quieten_and_tame_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qvl.active_run import Run


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Command line."""
    quieten_and_tame_libraries()
    try:
        measure(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def measure(argv: Sequence[str]) -> dict[str, Any]:
    """Runs the comparison, prints it and writes generation_bench.json into --output_dir.

    Args:
        argv: command line without the program's name.

    Returns:
        `{"device", "random_weights", "max_new_tokens", "rows": [{"name", "num_prompts", "warm_up_seconds", "seconds",
        "prompts_per_second", "times_one_by_one", "peak_gib"}]}`.

    Raises:
        UserError: something the user has to change.
    """
    parser = argparse.ArgumentParser(prog="python -m qvl.generation_bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", help="file of a recipe")
    parser.add_argument("--num_prompts", type=int, default=500, help="answered in batches (500)")
    parser.add_argument("--num_one_by_one", type=int, default=20, help="of them, answered one by one (20)")
    parser.add_argument("--random_weights", action="store_true", help="make the model from its configuration alone")
    parser.add_argument("--output_dir", default="outputs/generation_bench", help="gets generation_bench.json")
    options, recipe_argv = parser.parse_known_args(argv)

    from qvl.compiled_layers import can_compile
    from qvl.data import prompt_messages
    from qvl.survey import prompt_lengths

    run = _open(options, recipe_argv)
    base = run.load_base()
    rows = run.data.evaluation.select(range(min(options.num_prompts, len(run.data.evaluation))))
    prompts = [
        {"prompt": prompt_messages(row), "images": row["images"]}
        for row in rows.select(range(min(options.num_one_by_one + 1, len(rows))))
    ]
    found = [_one_by_one(run, base, prompts)]
    lengths = prompt_lengths(rows, run.processing_class)
    for compiles in [False, True] if can_compile(run.device) else [False]:
        found.append(_batched(run, base, rows, lengths, compiles))
    for row in found:
        row["times_one_by_one"] = row["prompts_per_second"] / found[0]["prompts_per_second"]
    result = {
        "device": _device_name(run),
        "random_weights": options.random_weights,
        "max_new_tokens": run.settings.recipe.max_new_tokens,
        "rows": found,
    }
    write_json_atomically(Path(options.output_dir) / "generation_bench.json", result)
    _show(result)
    return result


def _open(options: argparse.Namespace, recipe_argv: Sequence[str]) -> "Run":
    """The recipe's run, with nothing recorded."""
    from qvl.bench_cases import Case, open_run, prepare

    recipe = load_recipe(options.recipe)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    prepared = prepare(Case("generation"), recipe, recipe_argv, 1, folder, options.random_weights)
    return open_run(prepared, prepared.settings)


def _one_by_one(run: "Run", base: "PreTrainedModel", prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """The loop of scripts; the first prompt is the warm-up."""
    import torch

    from qvl.answers import decoding_of
    from qvl.encode import prompt_text

    config = decoding_of(run, len(prompts)).config(run.processing_class, base)

    def answer(row: dict[str, Any]) -> None:
        text = prompt_text(row["prompt"], run.processing_class)
        images = {"images": row["images"]} if row["images"] else {}
        inputs = run.processing_class(text=[text], **images, return_tensors="pt").to(base.device)
        with torch.inference_mode():
            base.generate(**inputs, generation_config=config)

    base.eval()
    start = time.perf_counter()
    answer(prompts[0])
    warm_up_seconds = time.perf_counter() - start

    def answer_all() -> None:
        for row in prompts[1:]:
            answer(row)

    return {"name": "one by one"} | _timed(answer_all, len(prompts) - 1, warm_up_seconds)


def _batched(run: "Run", base: "PreTrainedModel", rows: Any, lengths: list[int], compiles: bool) -> dict[str, Any]:
    from dataclasses import replace

    from qvl.answers import Prompts, decoding_of
    from qvl.generate import generate

    decoding = replace(decoding_of(run, len(rows)), compile_layers=compiles)

    def answer() -> None:
        generate(base, run.processing_class, Prompts(rows), decoding, lengths)

    start = time.perf_counter()
    answer()
    warm_up_seconds = time.perf_counter() - start
    found = _timed(answer, len(rows), warm_up_seconds)
    # What the first run took longer than the second is what warming up costs.
    found["warm_up_seconds"] -= found["seconds"]
    return {"name": "batched, compiled" if compiles else "batched"} | found


def _timed(work: Callable[[], None], num_prompts: int, warm_up_seconds: float) -> dict[str, Any]:
    from qvl.memory_use import peak_gib, reset_peak

    reset_peak()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return {
        "num_prompts": num_prompts,
        "warm_up_seconds": warm_up_seconds,
        "seconds": seconds,
        "prompts_per_second": num_prompts / seconds,
        "peak_gib": peak_gib(),
    }


def _device_name(run: "Run") -> str:
    import torch

    return torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"


def _show(result: dict[str, Any]) -> None:
    weights = ", random weights" if result["random_weights"] else ""
    print(f"\n{result['device']}, {result['max_new_tokens']} new tokens{weights}")
    print(f"{'':27}prompts  prompts/s  one by one x  warm-up s  peak GiB")
    for row in result["rows"]:
        print(
            f"{row['name']:27}{row['num_prompts']:7}  {row['prompts_per_second']:9.2f}  "
            f"{row['times_one_by_one']:12.1f}  {row['warm_up_seconds']:9.1f}  {row['peak_gib']:8.1f}"
        )


if __name__ == "__main__":
    main()
