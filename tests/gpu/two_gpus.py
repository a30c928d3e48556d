"""Two GPUs against one, with `recipes/flickr8k.py`: speed, memory, losses, resumption, answers and QLoRA.

    python tests/gpu/two_gpus.py --model FOLDER --photos FOLDER --out FOLDER
    python tests/gpu/two_gpus.py --model FOLDER --photos FOLDER --out FOLDER --cases one ddp --batch 16 --steps 8

Needs two GPUs of one host (with 80 GB each `--batch 16` for one_plain, which keeps all activations), qvl with its extra
`deepspeed`, and a folder of photos with `captions.jsonl` (rows with image, five captions and split).
`--model` is a checkpoint, or a folder with the configuration and processor of one: random weights are then made once,
in `--work`.

All cases take about 15 minutes with the shape of Qwen3-VL-8B on two H200: `one` and `one_plain` (layers compiled and
not), `ddp`, `fsdp2` and `zero3` train on the same rows a step; `..._resumed` goes on from their checkpoint; `eval_one`
and `eval_two` answer with the adapter of `one`; `qlora_zero2` and `qlora_fsdp2` train in 4 bits. They run one after
another, each under a limit. `summary.json` and `log.txt` in `--out` are written after each; a later call with the same
`--out` and `--work` adds to them. All other flags are the recipe's, and count for every case.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import inputs
import limited
from two_gpus_summary import CAPTIONS_PER_IMAGE, Shape, summarize, table

from qvl.files import write_json_atomically

RECIPE = "recipes/flickr8k.py"
# Of a GPU's batch in the other cases: 4-bit weights are about memory.
_QLORA_SHARE, _QLORA_STEPS = 4, 6
_NUM_PROMPTS = 48
# Below this share of its limit a case is not begun.
_LEAST_SHARE = 0.3

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A command and what it needs.

    Attributes:
        name: of its run folder.
        flags: of the recipe.
        launch_file: in environments/accelerate; None for one process, which takes the first GPU.
        limit_seconds: it is killed then.
        resumes: the case whose run it goes on with, from the checkpoint in its middle.
        needs: a file in the runs' folder that an earlier case leaves.
    """

    name: str
    flags: Flags = field(repr=False)
    launch_file: str | None = None
    limit_seconds: float = 240
    resumes: str | None = None
    needs: str | None = None


def cases(model: str, photos: Path, runs: Path, shape: Shape) -> Iterator[Case]:
    """All of them, those that others need and those that matter most first."""
    data = {
        "model_name_or_path": model,
        "dataset_name": photos,
        "dataset_test_split": "test",
        "num_eval_examples": _NUM_PROMPTS,
        "ignore_memory_plan": True,
    }
    training = {
        **data,
        "captions_per_image": CAPTIONS_PER_IMAGE,
        "num_train_examples": 2 * shape.batch * shape.num_steps,
        "per_device_train_batch_size": shape.batch,
        "gradient_accumulation_steps": 1,
        "lora_dropout": 0,
        "gradient_checkpointing": False,
        "max_steps": shape.num_steps,
        "logging_steps": 1,
        "save_steps": shape.saved_at,
        "save_total_limit": 2,
        "keep_checkpoints": True,
        "dataloader_num_workers": 8,
        "stages": "train",
    }
    alone = {**training, "gradient_accumulation_steps": 2}
    yield Case("one", alone)
    yield Case("ddp", training, "ddp.yaml")
    yield Case("fsdp2", training, "fsdp2.yaml")
    yield Case("zero3", training, "zero3.yaml")
    yield Case("one_plain", {**alone, "compile_layers": False})
    for name in ("ddp", "fsdp2", "zero3"):
        checkpoint = f"{name}/checkpoints/checkpoint-{shape.saved_at}/trainer_state.json"
        resumed = {"resume_from_checkpoint": "true", "ignore_memory_plan": True}
        yield Case(f"{name}_resumed", resumed, f"{name}.yaml", resumes=name, needs=checkpoint)
    answering = {
        **data,
        "adapter": runs / "one" / "adapter",
        "num_train_examples": 8,
        "generation_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_new_tokens": 16,
        "dataloader_num_workers": 2,
        "stages": ["baseline", "evaluate"],
    }
    for name, launch_file in (("eval_one", None), ("eval_two", "ddp.yaml")):
        yield Case(name, answering, launch_file, 180, needs="one/adapter/adapter_config.json")
    batch = max(1, shape.batch // _QLORA_SHARE)
    qlora = {
        **training,
        "load_in_4bit": True,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": batch,
        "num_train_examples": 2 * batch * _QLORA_STEPS,
        "max_steps": _QLORA_STEPS,
    }
    yield Case("qlora_zero2", qlora, "zero2.yaml", 180)
    yield Case("qlora_fsdp2", {**qlora, "bnb_4bit_quant_storage": "bfloat16"}, "fsdp2.yaml", 180)


def command(case: Case, folder: Path, recipe_flags: Sequence[str]) -> list[str]:
    """As a user types it."""
    launcher = ["python"]
    if case.launch_file is not None:
        launcher = ["accelerate", "launch", "--config_file", f"environments/accelerate/{case.launch_file}"]
    words = [word for key, value in case.flags.items() for word in (f"--{key}", *_texts(value))]
    return [*launcher, RECIPE, *words, "--output_dir", str(folder), *recipe_flags]


def _texts(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def of_this_python(words: Sequence[str]) -> list[str]:
    """The same command by the interpreter that runs this script, whatever is on the path."""
    if words[0] == "accelerate":
        return [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
    return [sys.executable, *words[1:]]


def run_case(case: Case, runs: Path, log: Path, seconds_left: float, recipe_flags: Sequence[str]) -> dict[str, Any]:
    """Runs a case, or says why not."""
    if case.needs is not None and not (runs / case.needs).is_file():
        return {"status": f"not begun: no {case.needs}"}
    if seconds_left < _LEAST_SHARE * case.limit_seconds:
        return {"status": "not begun: no time"}
    folder = runs / case.name
    shutil.rmtree(folder, ignore_errors=True)
    if case.resumes is not None:
        copy_run_at_its_checkpoint(runs / case.resumes, folder, (runs / str(case.needs)).parent.name)
    words = command(case, folder, recipe_flags)
    print(f"\n{case.name}: {shlex.join(words)}", flush=True)
    record = limited.run_limited(of_this_python(words), log, min(case.limit_seconds, seconds_left))
    print("\n".join([f"{case.name}: {record['status']}, {record['seconds']} s", *record.get("tail", [])]), flush=True)
    return {**record, "command": shlex.join(words)}


def copy_run_at_its_checkpoint(source: Path, target: Path, checkpoint: str) -> None:
    """The run as it was then, without what came later."""
    later = [path.name for path in (source / "checkpoints").glob("checkpoint-*") if path.name != checkpoint]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*later, "adapter"))


def main() -> None:
    options, recipe_flags = read_options()
    deadline = time.monotonic() + options.seconds
    limited.end_on_sigterm()
    out, work = options.out.resolve(), (options.work or options.out / "work").resolve()
    runs = work / "runs"
    for folder in (out, runs):
        folder.mkdir(parents=True, exist_ok=True)
    shape = Shape(options.batch, options.steps)
    model = inputs.checkpoint(options.model, work)
    photos = inputs.photos(options.photos, work, 2 * shape.batch * shape.num_steps)
    path = out / "summary.json"
    records = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else {}
    for case in cases(model, photos, runs, shape):
        if case.name in (options.cases or [case.name]):
            records[case.name] = run_case(case, runs, out / "log.txt", deadline - time.monotonic(), recipe_flags)
            summary = summarize(runs, shape)
            write_json_atomically(path, {"model": model, "cases": records, **summary})
    print("\n" + "\n".join(table(summary, records)))


def read_options() -> tuple[argparse.Namespace, list[str]]:
    """This script's flags, and the recipe's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    known = [case.name for case in cases("", Path(), Path(), Shape(1, 4))]
    parser.add_argument("--model", required=True, help="checkpoint, or a folder with its configuration and processor")
    parser.add_argument("--photos", required=True, type=Path, help="folder with captions.jsonl")
    parser.add_argument("--out", required=True, type=Path, help="summary.json and log.txt go there")
    parser.add_argument("--work", type=Path, help="checkpoint, photos and run folders; by default OUT/work")
    parser.add_argument("--cases", nargs="+", choices=known, metavar="CASE", help=f"by default all: {' '.join(known)}")
    parser.add_argument("--batch", type=int, default=32, help="images a GPU and step (default: 32)")
    parser.add_argument("--steps", type=int, default=14, help="steps of the timed trainings (default: 14)")
    parser.add_argument("--seconds", type=float, default=1800, help="for all of it (default: 1800)")
    return parser.parse_known_args()


if __name__ == "__main__":
    main()
