"""`--loader transformers` beside `--loader unsloth`: the recipe `qwen2_5_vl` by each, in a process of its own.

    python tests/gpu/loaders.py --model FOLDER --out FOLDER
    python tests/gpu/loaders.py --model FOLDER --out FOLDER --loaders unsloth --seconds 400

Needs one GPU with 24 GB and the versions of environments/unsloth.txt. `--model` is a checkpoint of Qwen2.5-VL, or a
folder with its configuration and processor: random weights are then made once, in `--work`.

Each loader loads the model into NF4, trains 12 steps at batch 1 with images of 1,024 visual tokens, answers 6 prompts
and goes through the stage check, cut to what applies to random weights; then plain qvl answers with the adapter that
Unsloth has trained. With the shape of Qwen2.5-VL-7B on one H200 that takes about 4 minutes with Unsloth and 2 without,
and half a minute for the random weights. LOADER.json and LOADER.log in `--out` grow as it goes on; the table at the end
shows all that are there, so the loaders may be measured by one call each. All other flags are the recipe's.
"""

import argparse
import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import inputs
import limited
from one_loader import LOADERS, NUM_FIRST_STEPS, recipe_words

# Of a process, checks and answers included.
_LIMIT_SECONDS = {"unsloth": 420, "transformers": 300}
# Below that not even the imports would end.
_LEAST_SECONDS = 60
Found = Mapping[str, Any]


def measure(loader: str, model: str, out: Path, work: Path, seconds: float, recipe_flags: list[str]) -> None:
    """One loader's process, with compile caches of its own, so that its first step is that of a fresh machine."""
    script = Path(__file__).resolve().with_name("one_loader.py").relative_to(limited.ROOT)
    words = [loader, "--model", model, "--out", str(out), "--work", str(work), *recipe_flags]
    print(f"\n{loader}: {shlex.join(['python', str(script), *words])}", flush=True)
    recipe = ["python", "recipes/qwen2_5_vl.py", *recipe_words(loader, model, recipe_flags)]
    print(f"which runs, with the stage check cut: {shlex.join(recipe)}", flush=True)
    caches = work / f"caches-{loader}"
    shutil.rmtree(caches, ignore_errors=True)
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "UNSLOTH_COMPILE_LOCATION")
    environment = {name: str(caches / name.lower()) for name in names}
    (out / f"{loader}.json").unlink(missing_ok=True)
    record = limited.run_limited([sys.executable, str(script), *words], out / f"{loader}.log", seconds, environment)
    print("\n".join([f"{loader}: {record['status']}, {record['seconds']} s", *record.get("tail", [])]), flush=True)


def table(found: Mapping[str, Found]) -> list[str]:
    """What the loaders' JSON files say, as a Markdown table with a column for each."""
    columns = {loader: cells(record) for loader, record in found.items()}
    if "of_unsloth" in columns.get("transformers", {}) and "unsloth" in found:
        columns["transformers"]["of_unsloth"] += answers_beside(found["transformers"], found["unsloth"])
    titles = {
        "import": "importing it: seconds",
        "load": "loading: seconds (each time), peak GiB on the GPU",
        "peak": "training: peak GiB",
        "step": "a step: seconds, median (least to most)",
        "first": "the first step: seconds",
        "loss": "loss of the last step",
        "answers": "six answers: seconds",
        "check": "stage check: passed, seconds, peak GiB",
        "failed": "checks that failed",
        "of_unsloth": "answers with Unsloth's adapter: seconds",
        "errors": "ended early",
    }
    lines = [f"| | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for key, title in titles.items():
        row = [column.get(key, "") for column in columns.values()]
        if any(row):
            lines.append(f"| {title} | {' | '.join(row)} |")
    return lines


def cells(record: Found) -> dict[str, str]:
    """One loader's column, without what it did not come to."""
    stages, result = record["stages"], {}
    if "import_seconds" in record:
        result["import"] = f"{record['import_seconds']:.1f}"
    if loads := record["loads"]:
        seconds = ", ".join(f"{load['seconds']:.1f}" for load in loads)
        result["load"] = f"{seconds}; {max(load['peak_gib'] for load in loads):.2f}"
    if steps := record["step_seconds"]:
        result["first"] = f"{steps[0]:.1f}"
    if steady := steps[NUM_FIRST_STEPS:]:
        result["step"] = f"{statistics.median(steady):.2f} ({min(steady):.2f} to {max(steady):.2f})"
    training = stages.get("train", {})
    if training.get("losses"):
        result["loss"] = f"{training['losses'][-1]:.3f}"
    if training.get("peak_gib"):
        result["peak"] = f"{training['peak_gib']:.2f}"
    for key, stage in (("answers", "evaluate"), ("of_unsloth", "evaluate_of_adapter")):
        if stages.get(stage, {}).get("cost"):
            result[key] = f"{stages[stage]['cost']['seconds']:.1f}"
    if checks := [check for check in record["checks"] if check["stage"] == "check"]:
        failed = [f"{check['name']} ({check['value']:.3g})" for check in checks if not check["passed"]]
        seconds = stages.get("check", {}).get("seconds") or sum(check["seconds_of_group"] for check in checks)
        peak = max(check["peak_gib"] for check in checks)
        result["check"] = f"{len(checks) - len(failed)} of {len(checks)}, {seconds:.0f}, {peak:.1f}"
        result["failed"] = ", ".join(failed)
    result["errors"] = ", ".join(record.get("errors", {}))
    return result


def answers_beside(plain: Found, unsloth: Found) -> str:
    """How the answers with Unsloth's adapter by plain qvl compare with Unsloth's own."""
    ours = plain["stages"]["evaluate_of_adapter"]["answers"]
    theirs = unsloth["stages"].get("evaluate", {}).get("answers")
    if not theirs:
        return ""
    num_same = sum(a["prediction"] == b["prediction"] for a, b in zip(ours, theirs, strict=True))
    sums = [sum(row["answer_loss"] for row in rows) for rows in (ours, theirs)]
    return f"; {num_same} of {len(ours)} as Unsloth's own, loss {abs(sums[0] - sums[1]) / sums[1]:.2%} apart"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="checkpoint, or a folder with its configuration and processor")
    parser.add_argument("--out", required=True, type=Path, help="a JSON and a log of each loader go there")
    parser.add_argument("--work", type=Path, help="checkpoint, run folders and compile caches; by default OUT/work")
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=LOADERS)
    parser.add_argument("--seconds", type=float, default=900, help="for all of it (default: 900)")
    options, recipe_flags = parser.parse_known_args()
    deadline = time.monotonic() + options.seconds
    limited.end_on_sigterm()
    out, work = options.out.resolve(), (options.work or options.out / "work").resolve()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    model = inputs.checkpoint(options.model, work)
    for loader in options.loaders:
        seconds = min(_LIMIT_SECONDS[loader], deadline - time.monotonic())
        if seconds < _LEAST_SECONDS:
            print(f"{loader}: not begun, no time", flush=True)
        else:
            measure(loader, model, out, work, seconds, recipe_flags)
    paths = {loader: out / f"{loader}.json" for loader in LOADERS}
    found = {loader: json.loads(path.read_text(encoding="utf-8")) for loader, path in paths.items() if path.is_file()}
    print("\n" + "\n".join(table(found)))


if __name__ == "__main__":
    main()
