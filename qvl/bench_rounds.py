"""The cases in turns: builds, times and frees each, and keeps what is measured on disk all the time."""

import copy
import dataclasses
import gc
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl

import qvl
from qvl.bench_cases import Prepared, contestant
from qvl.bench_report import FAILED, MEASURED, NOT_RUN, OUT_OF_MEMORY, draw, summarize, table, write_results
from qvl.bench_timer import Block, BlockTimer, measure_matmul_peak
from qvl.bench_work import WorkCounter, count_weights
from qvl.errors import UserError
from qvl.memory_use import is_out_of_memory, peak_gib, reset_peak
from qvl.models import load_config
from qvl.provenance import provenance_tags
from qvl.settings import Settings

_SEARCH_WARMUP_STEPS, _SEARCH_STEPS = 3, 5
# cuBLAS and the caching allocator keep workspaces of their own.
_TOLERATED_GIB = 0.25


@dataclasses.dataclass(frozen=True)
class Plan:
    """How it is measured.

    Attributes:
        num_rounds: every round runs each case once.
        num_warmup_steps: of a case in a round, before its blocks.
        num_blocks: timed blocks of a case in a round.
        num_block_steps: optimizer steps of a block.
        trl_once: TRL's cases run in the first round only.
        batch_sizes: tried by the case that looks for TRL's best.
    """

    num_rounds: int
    num_warmup_steps: int
    num_blocks: int
    num_block_steps: int
    trl_once: bool
    batch_sizes: tuple[int, ...]


class Rounds:
    """The cases in turns. After every block bench.json holds what there is."""

    def __init__(self, plan: Plan, folder: Path, prepared: Sequence[Prepared], deadline_seconds: float) -> None:
        self.plan = plan
        self.folder = folder
        self.prepared = list(prepared)
        self.deadline_seconds = deadline_seconds
        settings = prepared[0].settings
        device = settings.training.device
        self.results: dict[str, Any] = {
            **_facts(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "model": settings.model.model_name_or_path,
            "random_weights": prepared[0].has_random_weights,
            "dtype": settings.model.dtype,
            "plan": dataclasses.asdict(plan),
            "tflop_formula": "useful operations only, see qvl/bench_work.py; recomputed and padded ones do not count",
            "matmul_peak": measure_matmul_peak(device, _compute_dtype(settings)),
            "cases": [
                {
                    "name": one.case.name,
                    "is_trl": one.case.is_trl,
                    "flags": list(one.case.flags),
                    "batch_size": one.settings.training.per_device_train_batch_size,
                    "settings": one.settings.as_dict(),
                    "data_fingerprint": one.data.summary.fingerprint,
                    "status": NOT_RUN,
                    "message": "",
                    "rounds": [],
                }
                for one in prepared
            ],
        }
        if self.results["random_weights"]:
            print("RANDOM WEIGHTS: speed and memory are real, losses are not.", flush=True)
        # What stays allocated by the matrix product is no case's leak.
        self.allocated_before_gib = _free_memory()

    def run(self) -> None:
        """All rounds."""
        for number in range(self.plan.num_rounds):
            for index, record in enumerate(self.results["cases"]):
                is_first = number == 0
                if not is_first and (record["status"] != MEASURED or (record["is_trl"] and self.plan.trl_once)):
                    continue
                if time.perf_counter() > self.deadline_seconds:
                    record["message"] = record["message"] or f"no time for round {number + 1}"
                    continue
                if is_first and self.prepared[index].case.searches_batch_size:
                    self._search_batch_size(index, record)
                    if record["status"] != NOT_RUN:
                        continue
                print(f"\n== round {number + 1} of {self.plan.num_rounds}: {record['name']} ==", flush=True)
                plan = self.plan
                self._measure(
                    self.prepared[index], record, plan.num_warmup_steps, plan.num_blocks, plan.num_block_steps
                )
                self._save()

    def report(self) -> int:
        """Prints the table and draws the plot."""
        self._save()
        print("\n" + table(self.results))
        draw(self.folder / "bench.png", self.results)
        print(f"\nNumbers:  {self.folder / 'bench.json'}\nPlot:     {self.folder / 'bench.png'}")
        failed = [case["name"] for case in self.results["cases"] if case["status"] == FAILED]
        leaked = [case["name"] for case in self.results["cases"] if any(one["leaked_gib"] for one in case["rounds"])]
        return 1 if failed or leaked else 0

    def _save(self) -> None:
        write_results(self.folder, self.results)

    def _search_batch_size(self, index: int, record: dict[str, Any]) -> None:
        """Doubles the batch of a case until it is slower or does not fit, with a few steps each; keeps the fastest."""
        tried: dict[int, float | str] = {}
        record["batch_sizes_tried"] = tried
        best: Prepared | None = None
        steps = min(_SEARCH_STEPS, self.plan.num_block_steps)
        warmup_steps = min(_SEARCH_WARMUP_STEPS, self.plan.num_warmup_steps)
        for batch_size in self.plan.batch_sizes:
            print(f"\n== {record['name']}: trying {batch_size} ==", flush=True)
            trial: dict[str, Any] = {"name": record["name"], "status": "", "message": "", "rounds": []}
            candidate = _with_batch_size(self.prepared[index], batch_size)
            self._measure(candidate, trial, warmup_steps, 1, steps)
            summary = summarize(trial["rounds"])
            speeds = [speed for speed in tried.values() if isinstance(speed, float)]
            if trial["status"] != MEASURED or summary is None:
                tried[batch_size] = trial["status"]
                break
            tried[batch_size] = speed = summary["captions_per_second"]["median"]
            if speeds and speed <= max(speeds):
                break
            best = candidate
        if best is None:
            record |= {"status": trial["status"], "message": trial["message"]}
            return
        self.prepared[index] = best
        record["batch_size"] = best.settings.training.per_device_train_batch_size

    def _measure(
        self, prepared: Prepared, record: dict[str, Any], num_warmup_steps: int, num_blocks: int, num_block_steps: int
    ) -> None:
        """One round of a case: build, warm up, time, free; what goes wrong becomes the row's status."""
        one: dict[str, Any] = dict.fromkeys(
            ("build_seconds", "first_step_seconds", "warmup_seconds", "build_peak_gib", "peak_gib", "leaked_gib")
        )
        one |= {"warmup_losses": [], "blocks": []}
        record["rounds"].append(one)
        # qvl's trainer takes the signal over and gives it back at the end of a training, to which an error never comes.
        on_termination = signal.getsignal(signal.SIGTERM)
        try:
            is_late = self._time(prepared, one, num_warmup_steps, num_blocks, num_block_steps)
            record["status"] = NOT_RUN if is_late and not one["blocks"] else MEASURED
            if len(one["blocks"]) < num_blocks:
                record["message"] = f"out of time after {len(one['blocks'])} blocks"
        except UserError as error:
            record |= {"status": FAILED, "message": str(error)}
        except Exception as error:
            is_memory = is_out_of_memory(error)
            record |= {
                "status": OUT_OF_MEMORY if is_memory else FAILED,
                "message": "" if is_memory else f"{type(error).__name__}: {error}",
            }
            if not is_memory:
                traceback.print_exc()
        finally:
            signal.signal(signal.SIGTERM, on_termination)
        leaked_gib = _free_memory() - self.allocated_before_gib
        one["leaked_gib"] = leaked_gib if leaked_gib > _TOLERATED_GIB else 0.0
        print(f"{record['name']}: {record['status']} {record['message']}".rstrip(), flush=True)

    def _time(
        self, prepared: Prepared, one: dict[str, Any], num_warmup_steps: int, num_blocks: int, num_block_steps: int
    ) -> bool:
        """Builds a trainer and runs it; returns whether it was stopped for lack of time."""

        def keep(block: Block) -> None:
            one["blocks"].append(block)
            one["peak_gib"] = peak_gib()
            one["first_step_seconds"], one["warmup_seconds"] = timer.first_step_seconds, timer.warmup_seconds
            one["warmup_losses"] = timer.warmup_losses
            self._save()
            print(f"  {block['captions_per_second']:.1f} captions/s, {block['ms_per_step']:.0f} ms/step", flush=True)

        reset_peak()
        start = time.perf_counter()
        config = load_config(prepared.settings)
        with contestant(prepared, num_warmup_steps + num_blocks * num_block_steps) as made:
            one["build_seconds"], one["build_peak_gib"] = time.perf_counter() - start, peak_gib()
            num_adapter_weights = sum(p.numel() for p in made.trainer.model.parameters() if p.requires_grad)
            timer = BlockTimer(
                WorkCounter(config, getattr(prepared.processing_class, "image_token_id", None)),
                count_weights(config, num_adapter_weights),
                self.results["matmul_peak"]["tflops"],
                num_warmup_steps,
                num_block_steps,
                self.deadline_seconds,
                keep,
            )
            timer.attach(made.trainer)
            reset_peak()
            made.train()
        return timer.is_late


def _with_batch_size(prepared: Prepared, batch_size: int) -> Prepared:
    """The same with another batch size, which decides nothing else."""
    settings = copy.copy(prepared.settings)
    settings.training = copy.copy(settings.training)
    settings.training.per_device_train_batch_size = batch_size
    return dataclasses.replace(prepared, case=prepared.case.with_batch_size(batch_size), settings=settings)


def _free_memory() -> float:
    """Drops compiled code and cycles, gives memory back to the device; returns what stays allocated, in GiB."""
    if "torch._dynamo" in sys.modules:
        # Compiled code holds the weights it was compiled for, and its count of recompilations belongs to one case.
        torch._dynamo.reset()
    gc.collect()
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / 2**30


def _compute_dtype(settings: Settings) -> torch.dtype:
    training = settings.training
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32


def _facts() -> dict[str, Any]:
    tags = provenance_tags()
    return {
        "command": tags["command"],
        **{key: tags[key] for key in ("git_commit", "git_dirty") if key in tags},
        "versions": {module.__name__: module.__version__ for module in (qvl, torch, transformers, trl, peft)},
    }
