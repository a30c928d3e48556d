"""The flags of evaluation while training, settled before anything is loaded."""

from typing import Any

import pytest

from qvl.best_checkpoint import settle_best_checkpoint
from qvl.errors import UserError
from qvl.settings import Settings, parse_settings
from qvl.text_scores import TextScore
from recipes.flickr8k import DEFAULTS, SMOKE

OWN = {"errors": TextScore(lambda prediction, references: 1.0, "errors", higher_is_better=False)}
BEST = {"eval_strategy": "steps", "eval_steps": 10, "save_steps": 10, "load_best_model_at_end": True}


def settled(flags: dict[str, Any], continued: dict[str, Any] | None = None) -> Settings:
    settings = parse_settings(DEFAULTS, SMOKE, ["--smoke", "--use_cpu"], flags, continued=continued)
    settle_best_checkpoint(settings, OWN)
    return settings


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("bleu4", True),
        ("eval_bleu4", True),
        ("cer", False),
        ("errors", False),
        ("loss", False),
        ("eval_loss", False),
        ("perplexity", False),
        ("mean_token_accuracy", True),
    ],
)
def test_the_direction_follows_from_the_metric(metric: str, greater: bool) -> None:
    flags = {**BEST, "metric_for_best_model": metric, "eval_generations": 4, "scores": ["bleu4", "cer", "errors"]}
    settings = settled(flags)
    assert settings.training.greater_is_better is greater
    # And it stays when the file is fed back.
    again = settled({}, settings.as_dict())
    assert again.training.greater_is_better is greater


def test_a_strategy_that_saves_the_best_needs_no_steps_of_its_own() -> None:
    assert settled({**BEST, "save_strategy": "best", "save_steps": 20}).training.save_strategy == "best"


def test_without_a_metric_it_is_the_loss() -> None:
    settings = settled(BEST)
    assert (settings.training.metric_for_best_model, settings.training.greater_is_better) == ("loss", False)
    assert settled({}).training.metric_for_best_model is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"eval_generations": 4}, "--eval_generations has no effect without evaluations"),
        ({"eval_generations": -1}, "cannot be below 0"),
        ({"early_stopping_patience": 2}, "--early_stopping_patience needs evaluations and the best checkpoint"),
        ({"early_stopping_patience": 0, **BEST}, "at least 1"),
        ({**BEST, "metric_for_best_model": "bleu4"}, "add --eval_generations N"),
        ({**BEST, "save_steps": 20}, "leaves evaluations .--eval_steps 10. without one: add --save_steps 10"),
        ({**BEST, "metric_for_best_model": "perplexty"}, r"Did you mean `perplexity`\?"),
        ({**BEST, "metric_for_best_model": "anls", "eval_generations": 4}, "is in no evaluation"),
        (
            {**BEST, "metric_for_best_model": "loss", "greater_is_better": True},
            "would keep the worst checkpoint by loss",
        ),
    ],
)
def test_what_would_fail_at_the_first_evaluation_fails_at_once(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settled(flags)
