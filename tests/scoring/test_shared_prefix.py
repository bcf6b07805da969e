"""Each prompt once: what comes out equals a pass over whole rows, and what goes in is counted."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from mlx_dpo.scoring.backbone import split_backbone
from mlx_dpo.scoring.shared_prefix import completion_hidden_states, right_padded
from mlx_dpo.types import TokenizedPair
from tests.conftest import make_llama
from tests.scoring.architectures import WINDOW, build

EVEN = [
    TokenizedPair(prompt=(1, 2, 3), chosen=(10, 11), rejected=(20,)),
    TokenizedPair(prompt=(4, 5, 6), chosen=(12, 13, 14, 15), rejected=(21, 22, 7, 8, 9)),
]
UNEVEN = [*EVEN, TokenizedPair(prompt=(9,), chosen=(16,), rejected=(3,))]
LONG = [TokenizedPair(prompt=tuple(range(3 * WINDOW)), chosen=(5, 6, 7), rejected=(8, 9))]


def whole_rows(model, pairs):
    """The same hidden states without caches, one row after the other."""
    rows = [(pair.prompt, pair.chosen) for pair in pairs]
    rows += [(pair.prompt, pair.rejected) for pair in pairs]
    return mx.concatenate(
        [
            split_backbone(model).hidden_states(mx.array([p + c[:-1]]))[0, len(p) - 1 :]
            for p, c in rows
        ]
    )


def assert_equal_rows(model, pairs):
    result, expected = (
        completion_hidden_states(model, split_backbone(model), pairs),
        whole_rows(model, pairs),
    )
    assert result.shape == expected.shape
    assert mx.allclose(result, expected, rtol=1e-5, atol=1e-5)


# Plain caches; windows; state spaces with windows; latent attention; chunks; lists of caches;
# layers that share their keys.
FAMILIES = ["llama", "gemma3_text", "plamo2", "deepseek_v3", "llama4", "falcon_h1", "gemma4_text"]


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_equal_those_of_whole_rows(name):
    model = build(name)
    assert_equal_rows(model, EVEN)
    assert_equal_rows(model, UNEVEN[2:])
    assert_equal_rows(model, LONG)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next"])
def test_uneven_prompts_can_share_a_batch(name):
    assert_equal_rows(build(name), UNEVEN)
    assert_equal_rows(build(name), [*UNEVEN, *LONG])


def test_the_second_completion_does_not_see_the_first():
    model = build("gemma3_text")
    pairs = [TokenizedPair(prompt=(1, 2), chosen=(3, 4, 5, 6, 7), rejected=(3, 9, 8))]
    swapped = [TokenizedPair(prompt=(1, 2), chosen=(3, 9, 8), rejected=(3, 4, 5, 6, 7))]
    rows = completion_hidden_states(model, split_backbone(model), pairs)
    other = completion_hidden_states(model, split_backbone(model), swapped)
    assert mx.array_equal(rows, mx.concatenate([other[3:], other[:3]]))


class Counting:
    """Wraps the embedding and writes down the shape of what goes through the trunk."""

    def __init__(self, embedding):
        self.embedding = embedding
        self.shapes = []

    def __call__(self, tokens):
        self.shapes.append(tokens.shape)
        return self.embedding(tokens)


@pytest.fixture
def counted():
    model = make_llama()
    counting = Counting(model.model.embed_tokens)
    model.model.embed_tokens = counting
    return model, counting.shapes


def test_the_prompt_runs_once_and_last_tokens_are_left_out(counted):
    model, shapes = counted
    pair = TokenizedPair(prompt=tuple(range(7)), chosen=tuple(range(5)), rejected=(1, 2, 3))
    completion_hidden_states(model, split_backbone(model), [pair])
    assert shapes == [(1, 7), (1, 4), (1, 2)]


def test_completions_of_one_token_need_only_the_prompt(counted):
    model, shapes = counted
    pair = TokenizedPair(prompt=(1, 2), chosen=(3,), rejected=(4,))
    completion_hidden_states(model, split_backbone(model), [pair])
    assert shapes == [(1, 2)]


def test_a_cache_is_never_followed_by_a_single_token(counted):
    """On Metal some models take it for generation, and a kernel that has no gradient."""
    model, shapes = counted
    pair = TokenizedPair(prompt=(1, 2, 3), chosen=(4, 5), rejected=(6, 7))
    assert_equal_rows(model, [pair])
    assert shapes[:3] == [(1, 3), (1, 2), (1, 2)]


def test_padding_is_on_the_right():
    assert right_padded([(5, 6, 7), (8,)], 3).tolist() == [[5, 6, 7], [8, 0, 0]]
    assert right_padded([(5,)], 2).tolist() == [[5, 0]]


def test_gradients_flow_through_the_prompt():
    """Every token stands in one place only: what reaches its embedding passed through there."""
    model = make_llama()
    pairs = [TokenizedPair(prompt=(1, 2, 3), chosen=(10, 11, 12), rejected=(20, 21))]
    weights = mx.random.normal((5, 64), key=mx.random.key(0))

    def gradient(rows):
        def loss(embedding):
            model.model.embed_tokens.weight = embedding
            return (rows() * weights).sum()

        embedding = model.model.embed_tokens.weight
        result = mx.grad(loss)(embedding)
        model.model.embed_tokens.weight = embedding
        return mx.linalg.norm(result, axis=1), result

    norms, result = gradient(lambda: completion_hidden_states(model, split_backbone(model), pairs))
    _, expected = gradient(lambda: whole_rows(model, pairs))
    assert [i for i, norm in enumerate(norms.tolist()) if norm > 0] == [1, 2, 3, 10, 11, 20]
    assert mx.allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_caches_hold_no_unused_positions(monkeypatch):
    """A step is 256 positions: zeros that the backward pass would keep for every layer."""
    monkeypatch.setattr(KVCache, "update_and_fetch", None)
    assert_equal_rows(make_llama(), EVEN)
