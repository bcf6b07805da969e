"""Signs of an exploited reward, by hand, and the rule that ends a loop."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlx_dpo.collect.iterative.collapse import measure_health
from mlx_dpo.collect.iterative.folder import (
    IterativePaths,
    IterativeSettings,
    SplitPrompts,
    Stage,
    next_stage,
)
from mlx_dpo.generation.batch import GeneratedText, GeneratedTokens
from mlx_dpo.io.checksums import to_checked_json
from mlx_dpo.training.monitor.samples import find_collapse, measure_answers

BASE = {
    "completions/mean_length": 20.0,
    "completions/clipped_ratio": 0.1,
    "completions/repetition": 0.03,
}
SOUND = BASE | {"completions/kl": 0.2}


@pytest.mark.parametrize(
    ("health", "collapse"),
    [
        (SOUND, None),
        (SOUND | {"completions/clipped_ratio": 0.59}, None),
        (SOUND | {"completions/clipped_ratio": 0.6},
         "answers run to the length limit (60%, base model 10%)"),
        (SOUND | {"completions/repetition": 0.5, "completions/kl": 2.0},
         "answers repeat themselves (4-gram repetition 50%, base model 3%), and answers are far "
         "from the base model's (KL 2.0 nats per token)"),
    ],
)  # fmt: skip
def test_collapse_is_named_with_numbers(health, collapse):
    assert find_collapse(health, BASE) == collapse


def test_answers_are_measured_by_the_tokens_that_were_generated():
    answers = [GeneratedTokens([5, 6, 7], 9), GeneratedTokens([5] * 8, None)]
    replies = [GeneratedText("the text has other tokens", answer) for answer in answers]
    policy = SimpleNamespace(base=SimpleNamespace(tokenizer=None))
    health = measure_health(policy, [], replies, has_base=False)
    assert health == measure_answers(answers).to_row()


def test_without_the_base_only_absolute_bounds_count():
    assert find_collapse(SOUND | {"completions/clipped_ratio": 1.0}, {}) is None
    assert find_collapse(SOUND | {"completions/repetition": 0.3}, {}) is not None


def test_a_collapsed_round_ends_the_loop_if_the_settings_say_so(tmp_path):
    paths, prompts = IterativePaths(tmp_path), SplitPrompts([], [], [])
    for number, collapse in ((0, None), (1, "answers repeat themselves")):
        path = paths.round(number).evaluation
        path.parent.mkdir()
        path.write_text(to_checked_json({"round": number, "collapse": collapse}))
    settings = IterativeSettings(prompts="p.txt", rounds=3)
    assert next_stage(paths, prompts, settings) == Stage(2, "train")
    assert next_stage(paths, prompts, replace(settings, on_collapse="stop")) is None
