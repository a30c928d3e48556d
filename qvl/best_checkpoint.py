"""Which evaluation metric chooses the best checkpoint, settled before anything is loaded.

Upstream looks the metric up after the first evaluation, hours into a run, and takes more for better with every metric
whose name does not end in "loss".
"""

import difflib
from collections.abc import Mapping

from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import SFTConfig

from qvl.errors import UserError
from qvl.metrics import CAPTION_SCORES
from qvl.settings import Settings
from qvl.text_scores import TEXT_SCORES, TextScore

# Of the held-out answers, in every evaluation; True where more is better.
_HELD_OUT = {"loss": False, "perplexity": False, "mean_token_accuracy": True, "entropy": False}


def settle_best_checkpoint(settings: Settings, own_scores: Mapping[str, TextScore]) -> None:
    """Checks the flags of evaluation while training, and sets `greater_is_better` where the user did not.

    Args:
        settings: of the run; `recipe.scores` are checked already.
        own_scores: the recipe's own scores.

    Raises:
        UserError: flags that would have no effect, a metric that no evaluation has, or a wrong direction.
    """
    recipe, training = settings.recipe, settings.training
    evaluates = training.eval_strategy != IntervalStrategy.NO
    if recipe.eval_generations and not (evaluates or training.eval_on_start):
        raise UserError("--eval_generations has no effect without evaluations: add --eval_strategy steps or epoch.")
    if recipe.early_stopping_patience is not None and not (evaluates and training.load_best_model_at_end):
        raise UserError(
            "--early_stopping_patience needs evaluations and the best checkpoint: add --eval_strategy steps and "
            "--load_best_model_at_end."
        )
    _require_checkpoints_at_evaluations(training)
    if training.metric_for_best_model is None:
        return
    name = training.metric_for_best_model.removeprefix("eval_")
    scores = {key: _higher_is_better(key, own_scores) for key in recipe.scores}
    known = {**_HELD_OUT, **(scores if recipe.eval_generations else {})}
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        if name in scores:
            hint = "It is a score of generated answers: add --eval_generations N."
        else:
            hint = f"Did you mean `{nearest[0]}`?" if nearest else f"There are {', '.join(known)}."
        raise UserError(f"--metric_for_best_model {training.metric_for_best_model} is in no evaluation. {hint}")
    if settings.given.get("greater_is_better") is None:
        training.greater_is_better = known[name]
    elif training.greater_is_better != known[name]:
        raise UserError(
            f"--greater_is_better {str(training.greater_is_better).lower()} would keep the worst checkpoint by {name}: "
            "leave it out."
        )


def _require_checkpoints_at_evaluations(training: SFTConfig) -> None:
    """Upstream lets saving be rarer than evaluating; the best evaluation may then have no checkpoint to go back to."""
    if not training.load_best_model_at_end or training.eval_strategy != IntervalStrategy.STEPS:
        return
    if training.save_strategy != SaveStrategy.BEST and training.save_steps != training.eval_steps:
        raise UserError(
            f"--load_best_model_at_end chooses among checkpoints, and --save_steps {training.save_steps:g} leaves "
            f"evaluations (--eval_steps {training.eval_steps:g}) without one: add --save_steps "
            f"{training.eval_steps:g}, or --save_strategy best."
        )


def _higher_is_better(name: str, own_scores: Mapping[str, TextScore]) -> bool:
    return name in CAPTION_SCORES or (TEXT_SCORES.get(name) or own_scores[name]).higher_is_better
