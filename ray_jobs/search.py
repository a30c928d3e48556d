"""Which points a sweep looks at and which trials it ends early, as Ray Tune's own objects."""

from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from ray_jobs.axes import Axis, Range, grid_space, random_space

STEP = "training_step"
# Trials are compared while they train by what every training logs.
RUNG_METRIC = "loss"
# Longer than any training: a trial ends by itself.
_MOST_STEPS = 10**7
_REDUCTION = 3


class FinalScoreSearch(OptunaSearch):
    """Optuna that learns from what trials end with; the score of a sweep is not there before."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing to learn yet."""


def make_scheduler(name: str, first_rung_steps: int, axes: Mapping[str, Axis]) -> TrialScheduler:
    """The scheduler of `--scheduler`.

    Args:
        name: asha, fifo or pbt.
        first_rung_steps: optimizer steps before a trial can be ended, or between two changes of a population.
        axes: of the sweep; a population changes `learning_rate`.
    """
    if name == "asha":
        return AsyncHyperBandScheduler(
            time_attr=STEP,
            metric=RUNG_METRIC,
            mode="min",
            max_t=_MOST_STEPS,
            grace_period=first_rung_steps,
            reduction_factor=_REDUCTION,
        )
    if name == "pbt":
        return PopulationBasedTraining(
            time_attr=STEP,
            metric=RUNG_METRIC,
            mode="min",
            perturbation_interval=first_rung_steps,
            # A run's last word has its scores, and no training loss.
            require_attrs=False,
            hyperparam_mutations=random_space({"learning_rate": axes["learning_rate"]}),
        )
    return FIFOScheduler()


def make_search(
    name: str, axes: Mapping[str, Axis], metric: str, mode: str, seed: int, num_samples: int, max_concurrent: int | None
) -> tuple[dict[str, Any], Searcher | BasicVariantGenerator, int]:
    """The search of `--search`.

    Args:
        name: random, grid or optuna.
        axes: of the sweep.
        metric: what Optuna learns from, by its MLflow name.
        mode: min or max.
        seed: of what is drawn.
        num_samples: trials; a grid has as many as it has points.
        max_concurrent: trials at a time, None for as many as fit.

    Returns:
        Ray Tune's `param_space`, `search_alg` and `num_samples`.
    """
    if name == "grid":
        return grid_space(axes), BasicVariantGenerator(max_concurrent=max_concurrent or 0), 1
    space = random_space(axes)
    if name == "random":
        generator = BasicVariantGenerator(max_concurrent=max_concurrent or 0, random_state=seed)
        return space, generator, num_samples
    search: Searcher = FinalScoreSearch(metric=metric, mode=mode, seed=seed)
    if max_concurrent:
        search = tune.search.ConcurrencyLimiter(search, max_concurrent)
    return space, search, num_samples


def axes_for(scheduler: str, axes: Mapping[str, Axis]) -> dict[str, Axis]:
    """The axes that a scheduler can vary: a training cannot change another one than its learning rate on the way."""
    if scheduler != "pbt":
        return dict(axes)
    return {name: axis for name, axis in axes.items() if name == "learning_rate" and isinstance(axis, Range)}
