"""PPO, the reward model, unlikelihood and best of N, with values by hand."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from scripts.studies.baselines import answer_tokens, ppo, reward_model, unlikelihood
from scripts.studies.baselines.best_of import best_of, kl_bound
from scripts.studies.parts.reward_kl import kl_levels
from scripts.studies.toy.exact import OTHER, answer_logps, kl_divergence
from scripts.studies.toy.words import END, USER, Words, write_checkpoint

WORDS = Words(("red", "blue", "sky", "sea"))
RED, BLUE = 4, 5
MASK = mx.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("toy") / "model", WORDS, seed=0, head=2.0)


@pytest.fixture
def batch():
    return answer_tokens.encode_answers(WORDS, ["sky", "sea"], ["red blue", "blue"], length=3)


def values_of(array):
    return np.array(array).tolist()


def test_answers_are_padded_and_masked(batch):
    assert values_of(batch.answers) == [[RED, BLUE, END], [BLUE, END, END]]
    assert values_of(batch.mask) == [[1, 1, 1], [1, 1, 0]]
    assert batch.count() == 5
    assert answer_tokens.decode_answers(WORDS, batch) == ["red blue", "blue"]
    assert answer_tokens.decode_answers(WORDS, batch.take([1])) == ["blue"]


@pytest.mark.parametrize("answer", [[RED, BLUE, RED], [END, RED, END], [RED, USER, END]])
def test_answers_without_an_end_or_words_are_no_texts(answer):
    batch = answer_tokens.AnswerTokens(mx.array([[USER, *answer]]), mx.ones((1, 3)))
    assert answer_tokens.decode_answers(WORDS, batch) == [OTHER]


def test_log_probs_of_tokens_add_up_to_those_of_answers(folder, batch):
    model = answer_tokens.load_trainable(folder)
    sums = answer_tokens.token_logps(model, batch).sum(axis=1)
    for value, prompt, answer in zip(sums, ("sky", "sea"), ("red blue", "blue"), strict=True):
        [expected] = answer_logps(model, WORDS, prompt, [answer])
        assert value.item() == pytest.approx(expected, abs=1e-4)


def test_only_blocks_are_trained(folder):
    names = dict(tree_flatten(answer_tokens.load_trainable(folder).trainable_parameters()))
    assert names
    assert all(name.startswith("model.layers.") for name in names)


def test_answers_are_sampled_with_their_probabilities(folder):
    model = answer_tokens.load_trainable(folder)
    prompts = mx.array([WORDS.prompt_ids("sky")] * 1000)
    sampled = answer_tokens.sample_answers(model, prompts, 3, mx.random.key(0))
    texts = answer_tokens.decode_answers(WORDS, sampled)
    for answer in ("red", "blue sky", "sea"):
        [logp] = answer_logps(model, WORDS, "sky", [answer])
        chance = math.exp(logp)
        error = math.sqrt(chance * (1 - chance) / 1000)
        assert texts.count(answer) / 1000 == pytest.approx(chance, abs=4 * error)
    ended = np.array(sampled.answers) == END
    before = np.cumsum(ended, axis=1) - ended
    assert np.array_equal(np.array(sampled.mask), before == 0)


def test_rewards_have_the_penalty_at_each_token_and_the_score_at_the_last():
    logps = mx.array([[-1.0, -2.0, -0.5], [-3.0, 0.0, 0.0]])
    reference = mx.array([[-2.0, -1.0, -0.5], [-1.0, 9.0, 9.0]])
    rewards = ppo.penalized_rewards(mx.array([5.0, 7.0]), logps, reference, MASK, beta=0.1)
    assert np.allclose(np.array(rewards), [[-0.1, 0.1, 5.0], [7.2, 0, 0]])


def test_advantages_are_those_of_gae_by_hand():
    rewards = mx.array([[1.0, 0.0, 2.0], [4.0, 0.0, 0.0]])
    values = mx.array([[0.5, 1.0, 1.5], [3.0, 8.0, 8.0]])
    # δ = 1 + 1 - 0.5, 0 + 1.5 - 1, 2 - 1.5; and 4 - 3
    half = ppo.estimate_advantages(rewards, values, MASK, gae_lambda=0.5)
    assert np.allclose(np.array(half), [[1.5 + 0.5 * 0.75, 0.5 + 0.5 * 0.5, 0.5], [1, 0, 0]])
    # λ = 1: the return minus the value; λ = 0: δ
    full = ppo.estimate_advantages(rewards, values, MASK, gae_lambda=1.0)
    assert np.allclose(np.array(full), [[3 - 0.5, 2 - 1, 2 - 1.5], [1, 0, 0]])
    one = ppo.estimate_advantages(rewards, values, MASK, gae_lambda=0.0)
    assert np.allclose(np.array(one), [[1.5, 0.5, 0.5], [1, 0, 0]])


def test_whitening_leaves_out_what_follows_answers():
    white = np.array(ppo.whiten(mx.array([[1.0, 3.0, 5.0], [7.0, 99.0, 99.0]]), MASK))
    assert np.allclose(white[0], (np.array([1, 3, 5]) - 4) / math.sqrt(5))
    assert white[1, 0] == pytest.approx(3 / math.sqrt(5))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.1, 2.0, -2.2),  # within the range
        (1.5, 2.0, -2.4),  # a good token is not made more probable than 1 + ε
        (0.5, 2.0, -1.0),  # but it may recover
        (0.5, -2.0, 1.6),  # a bad token is not made less probable than 1 - ε
        (1.5, -2.0, 3.0),
    ],
)
def test_the_policy_loss_is_clipped(ratio, advantage, loss):
    old = mx.array([[-1.0, 0.0, 0.0]])
    logps, mask = old + math.log(ratio), mx.array([[1.0, 0.0, 0.0]])
    found = ppo.policy_loss(logps, old, mx.full((1, 3), advantage), mask, clip=0.2)
    assert found.item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "loss"), [(1.1, 0.405), (1.5, 0.5 * 0.8**2), (0.5, 0.5 * 1.5**2)]
)
def test_the_value_loss_is_the_larger_one(value, loss):
    mask = mx.array([[1.0, 0.0]])
    old, returns = mx.array([[1.0, 0.0]]), mx.array([[2.0, 50.0]])
    found = ppo.value_loss(mx.array([[value, 0.0]]), old, returns, mask, clip=0.2)
    assert found.item() == pytest.approx(loss, rel=1e-5)


def test_ppo_raises_what_is_rewarded_and_moves_blocks_only(folder):
    settings = ppo.PPOSettings(
        beta=0.01, learning_rate=1e-3, critic_rate=1e-3, iterations=6, batch_size=32, length=3,
        seed=0,
    )  # fmt: skip
    prompts = mx.array([WORDS.prompt_ids("sky"), WORDS.prompt_ids("sea")])

    def score(batch):
        texts = answer_tokens.decode_answers(WORDS, batch)
        return mx.array([float(text.startswith("red")) for text in texts])

    before = answer_tokens.load_trainable(folder)
    *_, last = ppo.train_ppo(folder, prompts, score, settings)
    assert last.number == 6
    assert 2 * 32 <= last.tokens * 2 <= 3 * 32 * 2
    for prompt in ("sky", "sea"):
        [old], [new] = (answer_logps(m, WORDS, prompt, ["red"]) for m in (before, last.policy))
        assert new > old
    assert mx.array_equal(before.lm_head.weight, last.policy.lm_head.weight)


def make_pairs():
    prompts = ["sky", "sea"] * 8
    chosen, rejected = (
        answer_tokens.encode_answers(WORDS, prompts, [answer] * 16, length=3)
        for answer in ("red", "blue red")
    )
    return reward_model.TokenPairs(chosen, rejected)


def test_a_reward_model_begins_at_log_2_and_learns_the_pairs(folder):
    pairs = make_pairs()
    start = answer_tokens.ScalarModel(folder)
    assert reward_model.pairwise_loss(start, pairs).item() == pytest.approx(math.log(2))
    trained = reward_model.train_reward_model(
        folder, pairs, pairs, learning_rate=3e-3, batch_size=4, seed=0
    )
    network = trained.network
    assert reward_model.pairwise_loss(network, pairs).item() < 0.5 * math.log(2)
    rewards = [reward_model.score_answers(network, part).mean().item() for part in pairs]
    assert rewards[0] > 0 > rewards[1]
    assert sum(rewards) == pytest.approx(0, abs=1e-4)


def test_an_epoch_has_each_pair_once():
    pairs = make_pairs()
    batches = list(pairs.epoch(4, np.random.default_rng(0)))
    assert [len(batch.chosen.tokens) for batch in batches] == [4, 4, 4, 4]
    assert sum(batch.count() for batch in batches) == pairs.count() == 16 * (2 + 3)


def test_the_unlikelihood_loss_by_hand(folder):
    pairs, model = make_pairs(), answer_tokens.load_trainable(folder)
    logps = np.array([answer_logps(model, WORDS, p, ["red", "blue red"]) for p in ("sky", "sea")])
    expected = (0.5 * logps[:, 1] - logps[:, 0]).mean()
    assert unlikelihood.unlikelihood_loss(model, pairs, 0.5).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_the_best_of_two_by_hand():
    logps = np.log([0.5, 0.2, 0.3])
    best = np.exp(best_of(logps, np.array([1.0, 0.0, 1.0]), 2))
    # The worst one is the best of two only if both are it; the others share the rest 5 : 3.
    assert best == pytest.approx([0.96 * 5 / 8, 0.04, 0.96 * 3 / 8])
    assert best_of(logps, np.array([1.0, 0.0, 1.0]), 1) == pytest.approx(logps)


def test_the_kl_of_the_best_of_n_is_its_formula_without_ties():
    logps = np.full((1, 20_000), -math.log(20_000))
    for count in (2, 4, 16):
        best = best_of(logps, np.arange(20_000.0), count)
        assert kl_divergence(best, logps)[0] == pytest.approx(kl_bound(count), abs=1e-3)
    assert kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_the_best_of_many_has_finite_log_probs():
    logps = np.log(np.array([1e-3, 0.999]))
    best = best_of(logps, np.array([0.0, 1.0]), 256)
    assert np.isfinite(best).all()
    assert kl_divergence(best, logps) == pytest.approx(-math.log(0.999))


def test_rewards_at_kl_levels_are_read_from_the_concave_hull():
    points = [("base", 0, 0), ("dpo", 1.0, 1.0), ("dpo", 0.8, 0.2), ("dpo", 3.0, 2.0)]
    rows = [{"method": method, "kl": kl, "reward": reward} for method, kl, reward in points]
    assert kl_levels.best_within(rows, "dpo", 0.5) == pytest.approx(0.5)
    assert kl_levels.best_within(rows, "dpo", 0.9) == pytest.approx(0.9)
    assert kl_levels.best_within(rows, "dpo", 2.0) == pytest.approx(1.5)
    assert kl_levels.best_within(rows, "dpo", 4.0) == pytest.approx(2.0)
    assert kl_levels.best_within(rows, "ppo", 4.0) == 0
