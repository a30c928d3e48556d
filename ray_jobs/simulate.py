"""What Ray Tune itself costs: many trials that do nothing, on nodes that are processes of this machine.

    python -m ray_jobs.simulate --num_nodes 16 --num_trials 64 128 256

Each node has one GPU, which need not exist. A trial reports ten times, checkpoints a small file at its end, and is the
next one's actor, as in a sweep. Prints one JSON object a line.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.cluster_utils import Cluster
from ray.tune import CheckpointConfig, RunConfig, TuneConfig, Tuner

from ray_jobs.search import STEP, make_scheduler

_NUM_REPORTS = 10


class NoTrial(tune.Trainable):
    """Reports, and does nothing else."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begins."""
        self._step = 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial."""
        self._step = 0
        return True

    def step(self) -> dict[str, Any]:
        """One report."""
        self._step += 1
        return {STEP: self._step, "loss": 1.0, "done": self._step == _NUM_REPORTS}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A small file."""
        Path(checkpoint_dir, "step").write_text(str(self._step))


def main() -> None:
    """Prints a line of JSON for each number of trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_nodes", type=int, default=16)
    parser.add_argument("--num_trials", type=int, nargs="+", default=[64, 128, 256])
    options = parser.parse_args()
    node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    start = time.perf_counter()
    cluster = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(options.num_nodes - 1):
        cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80_000_000)
    cluster.wait_for_nodes()
    print(json.dumps({"nodes": options.num_nodes, "start_seconds": round(time.perf_counter() - start, 1)}), flush=True)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
    try:
        for num_trials in options.num_trials:
            print(json.dumps(_measure(num_trials)), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _measure(num_trials: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as storage:
        tuner = Tuner(
            tune.with_resources(NoTrial, {"cpu": 1, "gpu": 1}),
            param_space={"learning_rate": tune.loguniform(1e-5, 1e-3)},
            tune_config=TuneConfig(num_samples=num_trials, scheduler=make_scheduler("fifo", 1, {}), reuse_actors=True),
            run_config=RunConfig(
                storage_path=storage, verbose=0, checkpoint_config=CheckpointConfig(checkpoint_at_end=True)
            ),
        )
        start, cpu = time.perf_counter(), time.process_time()
        tuner.fit()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        size = sum(path.stat().st_size for path in Path(storage).rglob("*") if path.is_file())
        states = [path.stat().st_size for path in Path(storage).rglob("experiment_state*.json")]
    return {
        "trials": num_trials,
        "seconds": round(seconds, 1),
        "seconds_per_trial": round(seconds / num_trials, 3),
        "driver_cpu_seconds_per_trial": round(cpu_seconds / num_trials, 3),
        "driver_mib": round(_resident_mib(os.getpid()), 1),
        "gcs_mib": round(sum(_resident_mib(pid) for pid in _pids("gcs_server")), 1),
        "storage_kib_per_trial": round(size / num_trials / 1024, 1),
        "experiment_state_kib": round(max(states, default=0) / 1024, 1),
    }


def _pids(name: str) -> list[int]:
    """Processes of this session's head; all of this machine, where several run."""
    found = subprocess.run(["pgrep", name], capture_output=True, text=True, check=False).stdout.split()
    return [int(pid) for pid in found]


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


if __name__ == "__main__":
    main()
