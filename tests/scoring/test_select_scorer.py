"""Selection of the scorer: the shared one is used only where it is exact."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.data.batches.prefix_trie import PrefixTrie, common_prefix_length, pair_texts
from mlx_dpo.errors import ModelError
from mlx_dpo.io.arrays import random_state
from mlx_dpo.scoring.equivalence import branching_pairs, random_pairs, relative_errors, value_error
from mlx_dpo.scoring.packing import trie
from mlx_dpo.scoring.scorers import plain_scorer
from mlx_dpo.scoring.select_scorer import PACKINGS, select_scorer
from tests.conftest import VOCAB, make_llama
from tests.scoring.architectures import WINDOW, build


def adapted(model, **settings):
    adapters.attach_adapters(model, rank=2, scale=2.0, **settings)
    return model


def with_caches(make_cache, **more):
    """A small llama whose caches are made by `make_cache`; its uncached passes are right."""
    kind = type("Model", (llama.Model,), {"make_cache": make_cache, **more})
    model = make_llama()
    model.__class__ = kind
    return adapted(model)


def assert_plain(choice, reason):
    assert choice.name == "plain"
    assert choice.scorer is plain_scorer
    assert choice.forward_only is plain_scorer
    assert reason in choice.reason
    assert choice.packing is None


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_exact_model_gets_the_shared_scorer(packing):
    choice = select_scorer(adapted(make_llama()), vocab_size=VOCAB, packings=(packing,))
    assert choice.name == ("trie" if packing == "trie" else "shared")
    assert choice.packing == packing
    expected = f"{PACKINGS[packing]}; verified against the plain scorer (values to "
    assert choice.reason.startswith(expected)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_rounding_of_sixteen_bits_is_tolerated(dtype):
    model = make_llama()
    model.set_dtype(dtype)
    assert select_scorer(adapted(model), vocab_size=VOCAB).name == "trie"


def test_a_model_without_adapters_is_tested_by_its_values():
    model = make_llama()
    model.freeze()
    assert select_scorer(model, vocab_size=VOCAB).name == "trie"


class Detached(KVCache):
    """Right values, but no gradient through cached keys and values."""

    def update_and_fetch(self, keys, values):
        keys, values = super().update_and_fetch(keys, values)
        past = self.offset - 1
        return tuple(
            mx.concatenate([mx.stop_gradient(x[..., :past, :]), x[..., past:, :]], axis=2)
            for x in (keys, values)
        )


class Forgetful(KVCache):
    """Keeps positions and loses the first key."""

    def update_and_fetch(self, keys, values):
        first = self.empty()
        keys, values = super().update_and_fetch(keys, values)
        if first:
            self.keys[..., :1, :] = 0
        return keys, values


def test_a_model_that_generates_by_another_function_is_refused():
    model = with_caches(lambda self: [Forgetful() for _ in self.layers])
    with pytest.raises(
        ModelError, match="training would optimize another function than the one that generates"
    ):
        select_scorer(model, vocab_size=VOCAB)


def test_wrong_values_of_batches_are_rejected(monkeypatch):
    model = with_caches(lambda self: [KVCache() for _ in self.layers])
    monkeypatch.setattr(KVCache, "merge", lambda caches: Forgetful())
    monkeypatch.setattr(Forgetful, "prepare", lambda self, **padding: None, raising=False)
    monkeypatch.setattr(Forgetful, "finalize", lambda self: None, raising=False)
    choice = select_scorer(model, vocab_size=VOCAB, packings=("batch",))
    assert_plain(choice, "values differ from the plain scorer's by ")


def test_wrong_gradients_are_rejected_even_if_values_are_right():
    model = with_caches(lambda self: [Detached() for _ in self.layers])
    assert_plain(
        select_scorer(model, vocab_size=VOCAB), "gradients differ from the plain scorer's by "
    )


def test_a_window_of_the_caches_only_is_scored_with_caches():
    """Wide enough for short sequences; a prompt past it shows that generation has a window."""
    model = with_caches(lambda self: [RotatingKVCache(32) for _ in self.layers])
    choice = select_scorer(model, vocab_size=VOCAB, packings=("lengths",))
    assert choice.name == "shared"
    assert choice.generation.uses_caches
    assert choice.generation.difference < 1e-4 < choice.generation.uncached_difference


def test_a_head_that_mixes_tokens_is_refused():
    def call(self, tokens, cache=None):
        hidden = self.model(tokens, cache)
        return self.model.embed_tokens.as_linear(mx.cumsum(hidden, axis=1))

    model = with_caches(lambda self: [KVCache() for _ in self.layers], __call__=call)
    with pytest.raises(ModelError, match=r"by up to .* nats per token"):
        select_scorer(model, vocab_size=VOCAB)


# Wrong on the test pairs; wrong on longer pairs only, where it chooses among blocks of keys.
@pytest.mark.parametrize("name", ["gemma2", "minimax_m3_vl"])
def test_prompts_are_batched_by_length_where_batched_caches_are_wrong(name):
    choice = select_scorer(adapted(build(name)), vocab_size=128, packings=("batch", "lengths"))
    assert choice.name == "shared"
    assert choice.packing == "lengths"


def test_a_model_without_caches_gets_the_plain_scorer():
    def make_cache(self):
        raise NotImplementedError("no cache for this one")

    assert_plain(
        select_scorer(with_caches(make_cache), vocab_size=VOCAB),
        "NotImplementedError: no cache for this one",
    )


def test_a_model_without_a_backbone_gets_the_plain_scorer():
    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(VOCAB, VOCAB)

        def __call__(self, tokens, cache=None):
            return self.table(tokens)

    assert_plain(select_scorer(Bigram(), vocab_size=VOCAB), "no backbone named `model`")


def test_the_requested_scorer_is_used_or_an_error_raised():
    model = with_caches(lambda self: [Detached() for _ in self.layers])
    assert_plain(
        select_scorer(adapted(make_llama()), vocab_size=VOCAB, requested="plain"), "as requested"
    )
    with pytest.raises(ModelError, match=r"^the scorer `shared` is not exact .* by \d"):
        select_scorer(model, vocab_size=VOCAB, requested="shared")


def test_an_untrainable_model_is_reported_in_one_line():
    def call(self, tokens, cache=None):
        raise RuntimeError("[metal_kernel] No Metal back-end.")

    model = with_caches(lambda self: [KVCache() for _ in self.layers], __call__=call)
    with pytest.raises(ModelError, match=r"No Metal back-end\); name other layers") as caught:
        select_scorer(model, vocab_size=VOCAB)
    assert "\n" not in str(caught.value)


def test_the_model_is_not_changed():
    model = adapted(make_llama(), dropout=0.5)
    model.train()
    model.layers[0].eval()
    mx.random.seed(7)
    before = {name: mx.array(value) for name, value in tree_flatten(model.parameters())}
    modes = [(name, module.training) for name, module in model.named_modules()]
    state = random_state().tolist()

    assert select_scorer(model, vocab_size=VOCAB).name == "trie"  # dropout would make them differ

    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[name], before[name]) for name in before)
    assert not any(mx.any(v).item() for name, v in after.items() if name.endswith("lora_b"))
    assert [(name, module.training) for name, module in model.named_modules()] == modes
    assert random_state().tolist() == state


def test_nan_never_counts_as_equivalent():
    model = adapted(make_llama())
    pairs = random_pairs([(3, 2, 2)], VOCAB)

    def oracle(model):
        return mx.concatenate([*plain_scorer(model, pairs)])[:, None]

    def one_nan(model):
        return mx.where(mx.arange(2)[:, None] == 1, mx.nan, oracle(model))

    def one_nan_gradient(model):  # sqrt has an infinite slope at zero, and zero times it is nan
        a = model.layers[0].self_attn.q_proj.lora_a
        return oracle(model) + mx.sqrt(mx.stop_gradient(a).sum() * 0 + (a - a).sum())

    assert not value_error(model, one_nan, oracle) <= 1
    assert not relative_errors(model, one_nan, oracle).values <= 1
    assert not relative_errors(model, one_nan_gradient, oracle).gradients <= 1


def test_a_missing_gradient_of_one_small_adapter_is_detected():
    """Measured against its own size, not against that of all adapters together."""
    model = adapted(make_llama())
    pairs = random_pairs([(3, 2, 2)], VOCAB)

    def oracle(model):
        return mx.concatenate([*plain_scorer(model, pairs)])[:, None]

    def without_one(model):
        layer = model.layers[0].self_attn.k_proj
        original = layer.lora_a
        layer.lora_a = mx.stop_gradient(original)
        scores = oracle(model)
        layer.lora_a = original
        return scores

    assert relative_errors(model, without_one, oracle).gradients >= 0.1


def test_prompts_longer_than_a_narrow_window_are_exact():
    assert WINDOW < 5  # so that the probe's own pairs do not fit into it
    for requested in ("auto", "trie", "shared"):
        choice = select_scorer(adapted(build("gemma3_text")), vocab_size=128, requested=requested)
        assert choice.name == ("trie" if requested == "auto" else requested)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("attribute", ["ends", "positions"])
def test_a_wrong_trie_is_not_taken(name, attribute, monkeypatch):
    """The test pairs branch in every way: a walk that hides or shifts any of it is noticed."""

    class Wrong(PrefixTrie):
        def __init__(self, texts):
            super().__init__(texts)
            inside = [b.start for b in self.branches if self.positions[b.start] > 0]
            if attribute == "ends":  # what precedes the last branch inside a text is hidden
                self.ends[inside[-1] - 1 :] = np.arange(inside[-1], len(self) + 1)
            else:
                self.positions[inside[-1]] += 1

    monkeypatch.setattr(trie, "PrefixTrie", Wrong)
    choice = select_scorer(adapted(build(name)), vocab_size=128)
    assert choice.name == "shared"
    assert "; not `trie`: values differ from the plain scorer's by " in choice.reason
    with pytest.raises(ModelError, match=r"^the scorer `trie` is not exact for .* \(values"):
        select_scorer(adapted(build(name)), vocab_size=128, requested="trie")


def test_test_pairs_share_in_every_way():
    pairs = branching_pairs(VOCAB)
    prompts = [pair.prompt for pair in pairs]
    completions = [c for pair in pairs for c in (pair.chosen, pair.rejected)]
    lengths = [len(completion) for completion in completions]
    walk = PrefixTrie(pair_texts(pairs))
    depths = [int(walk.positions[branch.start]) for branch in walk.branches]
    assert len(set(prompts)) < len(prompts)  # repeated
    assert common_prefix_length(prompts[0], prompts[1]) == 2 < len(prompts[0])  # system message
    assert any(depth > max(map(len, prompts)) for depth in depths)  # inside completions
    assert depths.count(0) >= 2  # a text that shares nothing
    assert any(pair.chosen == pair.rejected for pair in pairs)
    assert any(pair.rejected[: len(pair.chosen)] == pair.chosen for pair in pairs[:-1])
    assert len(set(completions)) < len(completions) - 1  # one in two pairs too
    assert 1 in lengths
    assert max(map(len, pairs)) <= 8  # padded rows of 8 tokens: a third less than the others
