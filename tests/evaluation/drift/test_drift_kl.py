"""The KL divergence of a policy from its base, on sampled answers."""

import math

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_dpo.adapters.adapter_files import load_adapter
from mlx_dpo.adapters.switch import AdapterSwitch
from mlx_dpo.evaluation.drift.kl import (
    AnswerKL,
    kl_of_logits,
    mean_per_answer,
    mean_per_token,
    measure_kl,
)
from mlx_dpo.generation.batch import GeneratedTokens
from mlx_dpo.training.monitor.samples import estimate_kl
from tests.checkpoints import make_adapter, make_checkpoint

PROMPTS = [[1, 40, 41, 3, 2], [1, 50, 3, 2]]
ANSWERS = [GeneratedTokens([60, 61, 62], 3), GeneratedTokens([70, 71], None)]


@pytest.fixture(scope="module")
def model_and_switch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl")
    base, adapter = str(make_checkpoint(folder / "base")), folder / "adapter"
    adapter.mkdir()
    make_adapter(adapter, base)
    model = mlx_lm.load(base)[0]
    switch = AdapterSwitch(model)
    switch.save_state("base")
    load_adapter(model, adapter)
    switch.save_state("aligned")
    return model, switch


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_divergence_and_log_ratio_by_hand():
    """Policy (1/2, 1/2), base (1/4, 3/4): KL = (log 2 + log 2/3) / 2."""
    policy = mx.array([[0.0, 0.0]])
    base = mx.array([[0.0, math.log(3.0)]])
    divergence, log_ratio = kl_of_logits(policy, base, mx.array([0]))
    assert divergence.item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    assert log_ratio.item() == pytest.approx(math.log(2), rel=1e-6)


def test_a_token_that_both_exclude_adds_nothing():
    policy = mx.array([[0.0, 0.0, -math.inf]])
    divergence, _ = kl_of_logits(policy, policy, mx.array([1]))
    assert divergence.item() == 0.0


def test_log_ratios_are_weighted_by_the_policy_not_by_the_base():
    policy, base = mx.array([[2.0, 0.0, -1.0]]), mx.array([[-1.0, 0.5, 0.0]])
    log_p, log_q = (log_softmax(np.array(x[0], float)) for x in (policy, base))
    expected = float((np.exp(log_p) * (log_p - log_q)).sum())
    assert kl_of_logits(policy, base, mx.array([0]))[0].item() == pytest.approx(expected, rel=1e-5)


def test_an_answers_divergence_is_that_of_float64(model_and_switch):
    """Each position of the answer and of its stop token counts, and none of the prompt."""
    model, switch = model_and_switch
    for prompt, answer, found in zip(
        PROMPTS, ANSWERS, measure_kl(model, switch, PROMPTS, ANSWERS), strict=True
    ):
        stop = [] if answer.stop_token is None else [answer.stop_token]
        completion = [*answer.tokens, *stop]
        tokens = mx.array([[*prompt, *completion]])
        logs = {}
        for state in ("aligned", "base"):
            with switch.activated(state):
                logs[state] = log_softmax(np.array(model(tokens)[0], np.float64))
        rows = range(len(prompt) - 1, len(prompt) - 1 + len(completion))
        differences = logs["aligned"] - logs["base"]
        exact = sum(float((np.exp(logs["aligned"][r]) * differences[r]).sum()) for r in rows)
        sampled = sum(differences[r, token] for r, token in zip(rows, completion, strict=True))
        assert found.tokens == len(completion)
        assert found.exact == pytest.approx(exact, rel=1e-4)
        assert found.sampled == pytest.approx(float(sampled), rel=1e-4)


def test_the_sequence_estimate_is_the_monitors(model_and_switch):
    model, switch = model_and_switch
    found = measure_kl(model, switch, PROMPTS, ANSWERS)
    per_token = mean_per_token([a.sampled for a in found], [a.tokens for a in found])
    assert per_token.mean == pytest.approx(estimate_kl(model, PROMPTS, ANSWERS), rel=1e-5)


def test_long_answers_are_added_up_over_chunks(model_and_switch, monkeypatch):
    model, switch = model_and_switch
    whole = measure_kl(model, switch, PROMPTS, ANSWERS)
    monkeypatch.setattr("mlx_dpo.evaluation.drift.kl.CHUNK", 2)
    for a, b in zip(whole, measure_kl(model, switch, PROMPTS, ANSWERS), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_policy_does_not_diverge_from_itself(model_and_switch):
    model, _ = model_and_switch
    unchanged = AdapterSwitch(model)
    unchanged.save_state("base")
    unchanged.save_state("aligned")
    for found in measure_kl(model, unchanged, PROMPTS, ANSWERS):
        assert (found.exact, found.sampled) == (0.0, 0.0)


def test_both_estimates_agree_on_average(model_and_switch):
    """Sampled at random, the log-ratio has the exact divergence as its mean, and more variance."""
    model, switch = model_and_switch
    prompt = mx.array([PROMPTS[0]])
    with switch.activated("aligned"):
        policy = model(prompt)[0, -1:]
    with switch.activated("base"):
        base = model(prompt)[0, -1:]
    count = 4000
    tokens = mx.random.categorical(policy, num_samples=count, key=mx.random.key(0))[0]
    rows = mx.broadcast_to(policy, (count, policy.shape[1]))
    exact, sampled = kl_of_logits(rows, mx.broadcast_to(base, rows.shape), tokens)
    estimate = mean_per_answer(np.array(sampled).tolist())
    assert estimate.mean == pytest.approx(exact[0].item(), abs=4 * estimate.stderr)


def test_an_empty_answer_has_no_divergence(model_and_switch):
    model, switch = model_and_switch
    [found] = measure_kl(model, switch, PROMPTS[:1], [GeneratedTokens([], None)])
    assert found == AnswerKL(0.0, 0.0, 0)


def test_standard_errors_by_hand():
    assert mean_per_answer([1.0, 3.0]).stderr == pytest.approx(1.0)  # s = sqrt 2
    ratio = mean_per_token([1.0, 5.0], [1, 2])  # R = 2, residuals -1 and 1
    assert (ratio.mean, ratio.stderr) == pytest.approx((2.0, math.sqrt(2 / 1 * 2) / 3))
    assert mean_per_token([2.0, 4.0], [1, 2]).stderr == 0.0  # equal per token: no error
    assert mean_per_answer([1.0]).stderr is None
    assert mean_per_token([1.0], [4]).stderr is None


def test_the_ratios_error_is_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, size=80)
    values = tokens * rng.gamma(2.0, 0.1, size=80)
    draws = rng.integers(0, 80, size=(4000, 80))
    ratios = values[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    found = mean_per_token(values.tolist(), tokens.tolist())
    assert found.stderr == pytest.approx(float(ratios.std()), rel=0.06)
