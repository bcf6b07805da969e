"""Sampled answers: their numbers by hand, what is wrong with them, and no trace of sampling."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.adapters.attach import attach_adapters, disable_adapters
from mlx_dpo.generation.batch import GeneratedTokens
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.scoring.logps import token_logps
from mlx_dpo.training.monitor import Monitor
from mlx_dpo.training.monitor.metrics import MonitoredRun
from mlx_dpo.training.monitor.samples import (
    AnswerSampler,
    degenerate_answers,
    estimate_kl,
    measure_answers,
)
from mlx_dpo.training.monitor.verdict import DEGENERATE
from mlx_dpo.types import TokenizedPair

RUN = MonitoredRun(
    total_steps=60, warmup_steps=6, batch_size=16, beta=0.1, learning_rate=1e-3,
    max_grad_norm=1.0, chosen_tokens=10.0,
)  # fmt: skip
SOUND = {
    "completions/mean_length": 40.0,
    "completions/clipped_ratio": 0.25,
    "completions/repetition": 0.05,
    "completions/kl": 0.1,
    "completions/base_repetition": 0.03,
    "completions/base_mean_length": 42.0,
}


@pytest.fixture
def policy(tiny_llama):
    attach_adapters(tiny_llama, rank=4, scale=8.0)
    tiny_llama.eval()
    return tiny_llama


def move(policy):
    for name, module in policy.named_modules():
        if name.endswith("_proj"):
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(2)) * 0.2


def test_metrics_of_answers_by_hand():
    """5, 5, 5, 5, 5 has two 4-grams, one of them repeated; 1 to 4 has one."""
    answers = [GeneratedTokens([5] * 5, None), GeneratedTokens([1, 2, 3, 4], 9)]
    assert measure_answers(answers, 0.5).to_row() == {
        "completions/mean_length": 4.5,
        "completions/clipped_ratio": 0.5,
        "completions/repetition": 0.25,
        "completions/kl": 0.5,
    }
    assert "completions/kl" not in measure_answers(answers).to_row()


def test_kl_is_the_mean_log_ratio_of_the_tokens_with_the_stop_token(policy):
    prompts, answers = [(1, 2), (3,)], [GeneratedTokens([4, 5], 6), GeneratedTokens([7], None)]
    assert estimate_kl(policy, prompts, answers) == 0.0
    move(policy)
    ratios = []
    for tokens, start in (([1, 2, 4, 5, 6], 1), ([3, 7], 0)):
        row = mx.array([tokens])
        ours = np.array(token_logps(policy, row))[0, start:]
        with disable_adapters(policy):
            ratios += list(ours - np.array(token_logps(policy, row))[0, start:])
    assert len(ratios) == 4
    assert estimate_kl(policy, prompts, answers) == pytest.approx(np.mean(ratios), abs=1e-5)


def test_sampling_changes_neither_the_weights_nor_the_random_state(policy):
    move(policy)
    sampler = AnswerSampler([(1, 2, 3), (4, 5)], frozenset({0}), max_tokens=6, context=None)
    mx.random.seed(7)
    state = np.array(mx.random.state[0])
    before = named_arrays(policy.parameters())
    first, second = sampler.measure(policy), sampler.measure(policy)
    assert first == second
    assert np.array_equal(np.array(mx.random.state[0]), state)
    after = named_arrays(policy.parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())
    assert first["eval_completions/kl"] != 0.0
    assert first.keys() == {
        f"eval_completions/{who}{name}"
        for who in ("", "base_")
        for name in ("mean_length", "clipped_ratio", "repetition")
    } | {"eval_completions/kl"}


def test_prompts_are_different_and_leave_room():
    pairs = [
        TokenizedPair(prompt=prompt, chosen=(1,), rejected=(2,))
        for prompt in ((1,) * 90, (2,) * 40, (2,) * 40, (3,) * 70, (4,))
    ]
    how = {"stop_tokens": frozenset(), "context": 100}
    sampler = AnswerSampler.for_pairs(pairs, 2, **how)
    assert sampler.prompts == [(2,) * 40, (3,) * 70]
    assert sampler.sampling.max_tokens <= 30
    assert AnswerSampler.for_pairs(pairs, 0, **how) is None
    assert AnswerSampler.for_pairs(pairs[:1], 2, **how) is None
    assert AnswerSampler.for_pairs([], 2, **how) is None


@pytest.mark.parametrize(
    ("metrics", "fault"),
    [
        (SOUND, None),
        ({}, None),
        (SOUND | {"completions/repetition": 0.62},
         "answers repeat themselves (4-gram repetition 62%, base model 3%)"),
        # A model that repeats itself anyway is no fault of the training.
        (SOUND | {"completions/repetition": 0.62, "completions/base_repetition": 0.55}, None),
        (SOUND | {"completions/mean_length": 0.5},
         "answers are empty (0.5 tokens, base model 42.0)"),
        (SOUND | {"completions/kl": 1.4},
         "answers are far from the base model's (KL 1.4 nats per token)"),
    ],
)  # fmt: skip
def test_degenerate_answers_are_named_with_numbers(metrics, fault):
    assert degenerate_answers(metrics) == fault


def test_answers_are_judged_at_evaluations_once_whatever_the_accuracy():
    monitor = Monitor(RUN)
    broken = SOUND | {"completions/repetition": 0.62}
    pairs = {"loss": 0.3, "rewards/margins": 2.0, "rewards/chosen": 0.5, "rewards/accuracies": 0.88,
             "rewards/margins_stderr": 0.1, "lengths/chosen": 10.0}  # fmt: skip
    row = {"step": 20} | {f"eval_{name}": value for name, value in (broken | pairs).items()}
    [warning] = monitor.update(row)
    assert warning.startswith("step 20: answers repeat themselves (4-gram repetition 62%")
    assert "smaller learning_rate than 0.001" in warning
    assert monitor.update(row | {"step": 40}) == []
    verdict = monitor.judge(row)
    assert (verdict.kind, verdict.is_worse) == (DEGENERATE, True)
    sound = {"step": 20} | {f"eval_{name}": value for name, value in (SOUND | pairs).items()}
    assert Monitor(RUN).update(sound) == []
    assert monitor.judge(sound) is None
