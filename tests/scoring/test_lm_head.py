"""Backbone and head of a model, and log-probabilities of rows without the full array of logits."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dpo.adapters.attach import attach_adapters
from mlx_dpo.scoring import lm_head as head
from mlx_dpo.scoring.backbone import UnsupportedModelError, split_backbone
from mlx_dpo.scoring.lm_head import chunked_logps, trainable_head_parameters
from tests.conftest import VOCAB, make_llama
from tests.scoring.architectures import build

ROWS = 10


@pytest.fixture
def hidden():
    return mx.random.normal((ROWS, 64), key=mx.random.key(1))


@pytest.fixture
def targets():
    return mx.random.randint(0, VOCAB, (ROWS,), key=mx.random.key(2))


@pytest.fixture
def chunks_of_four(monkeypatch):
    monkeypatch.setattr(head, "LOGITS_BYTES_PER_CHUNK", 4 * VOCAB * 4)


def autodiff(parts, hidden, targets):
    """The same from whole logits, differentiated by MLX."""
    logits = parts.logits(hidden[None])[0]
    return mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, -1)


# Tied; soft cap; scale; divided before; own names; a wrapper around the language model.
@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "cohere", "minicpm3", "internlm2", "mamba", "gpt_bigcode", "gemma3"]
)
def test_the_parts_together_are_the_model(name):
    model = build(name)
    tokens = mx.array([[3, 1, 4, 1, 5]])
    parts = split_backbone(model)
    result = parts.hidden_states(tokens)
    assert mx.array_equal(parts.logits(result), model(tokens))
    some = parts.logits(result[:, 1:4:2])
    assert mx.allclose(some, model(tokens)[:, 1:4:2], rtol=1e-6, atol=1e-6)


def test_the_head_is_not_run_to_get_hidden_states():
    model = make_llama()
    model.lm_head = None  # a call would raise
    model.args.tie_word_embeddings = False
    assert split_backbone(model).hidden_states(mx.array([[1, 2]])).shape == (1, 2, 64)


def test_a_model_without_a_backbone_is_rejected():
    class Bigram(nn.Module):
        def __call__(self, tokens, cache=None):
            return mx.zeros((*tokens.shape, VOCAB))

    with pytest.raises(UnsupportedModelError, match="no backbone named"):
        split_backbone(Bigram())


def test_log_probabilities_equal_float64(tiny_llama, hidden, targets, chunks_of_four):
    logps = chunked_logps(
        split_backbone(tiny_llama), hidden, targets, vocab_size=VOCAB, gradients=False
    )
    weight = np.array(tiny_llama.model.embed_tokens.weight, np.float64)
    logits = np.array(hidden, np.float64) @ weight.T
    expected = logits[np.arange(ROWS), np.array(targets)] - np.log(np.exp(logits).sum(axis=1))
    assert np.allclose(np.array(logps), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_equal_those_of_full_logits(tiny_llama, hidden, targets, chunks_of_four, trained):
    tiny_llama.freeze()
    if trained:
        tiny_llama.model.embed_tokens.unfreeze()
        tiny_llama.model.norm.unfreeze()  # outside the layers, but not in the head
    parts, weights = split_backbone(tiny_llama), mx.arange(ROWS) - 3.5
    before = tiny_llama.model.embed_tokens.weight

    def gradients(logps):
        def loss(trainable, hidden):
            tiny_llama.update(trainable)
            return (logps(hidden) * weights).sum()

        result = mx.grad(loss, argnums=[0, 1])(tiny_llama.trainable_parameters(), hidden)
        tiny_llama.model.embed_tokens.weight = before
        return dict(tree_flatten(result))

    expected = gradients(lambda h: autodiff(parts, h, targets))
    result = gradients(lambda h: chunked_logps(parts, h, targets, vocab_size=VOCAB, gradients=True))
    assert result.keys() == expected.keys()
    assert ("0.model.embed_tokens.weight" in result) == trained
    for name in result:
        error = mx.linalg.norm(result[name] - expected[name])
        assert error.item() <= 1e-5 * max(mx.linalg.norm(expected[name]).item(), 1e-3), name


@pytest.mark.parametrize("trained", [False, True])
def test_values_do_not_depend_on_gradients(tiny_llama, hidden, targets, chunks_of_four, trained):
    tiny_llama.freeze()
    if trained:
        tiny_llama.model.embed_tokens.unfreeze()
    parts = split_backbone(tiny_llama)
    alone, with_gradients = (
        chunked_logps(parts, hidden, targets, vocab_size=VOCAB, gradients=gradients)
        for gradients in (False, True)
    )
    assert mx.array_equal(alone, with_gradients)


def test_only_parameters_outside_the_layers_may_belong_to_the_head(tiny_llama):
    assert trainable_head_parameters(split_backbone(tiny_llama)).keys() == {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }
    tiny_llama.freeze()
    tiny_llama.layers[0].unfreeze()
    assert trainable_head_parameters(split_backbone(tiny_llama)) == {}


def test_layers_are_located_in_a_multimodal_model():
    model = build("kimi_vl")
    names = trainable_head_parameters(split_backbone(model)).keys()
    assert names == {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}


class CountsRows(nn.Module):
    """A head that writes down how many rows it was given each time."""

    def __init__(self, dims, vocab):
        super().__init__()
        self.weight = 0.02 * mx.random.normal((dims, vocab))
        self.seen = []

    def __call__(self, x):
        self.seen.append(x.shape[0] * x.shape[1])
        return x @ self.weight


@pytest.mark.parametrize("gradients", [False, True])
def test_every_row_runs_once_in_chunks_of_limited_size(
    tiny_llama, hidden, targets, chunks_of_four, gradients
):
    tiny_llama.args.tie_word_embeddings = False
    tiny_llama.lm_head = CountsRows(64, VOCAB)
    tiny_llama.freeze()

    def loss(hidden):
        return chunked_logps(
            split_backbone(tiny_llama), hidden, targets, vocab_size=VOCAB, gradients=gradients
        ).sum()

    mx.eval(mx.grad(loss)(hidden) if gradients else loss(hidden))
    assert tiny_llama.lm_head.seen == [4, 4, 2]


def peak(vocab, trained):
    """Bytes beyond the weights at the peak of 768 rows, value and gradient."""
    model = make_llama()
    model.args.tie_word_embeddings = False
    model.lm_head = nn.Linear(8, vocab, bias=False)
    model.freeze()
    if trained:
        model.lm_head.unfreeze()
    hidden, targets = mx.random.normal((768, 8)), mx.random.randint(0, vocab, (768,))
    mx.eval(model.parameters(), hidden, targets)

    def loss(model, hidden):
        return chunked_logps(
            split_backbone(model), hidden, targets, vocab_size=vocab, gradients=True
        ).sum()

    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    if trained:
        mx.eval(nn.value_and_grad(model, loss)(model, hidden))
    else:
        mx.eval(mx.value_and_grad(loss, argnums=1)(model, hidden))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("trained", [False, True])
def test_twice_the_vocabulary_needs_hardly_more_memory(trained):
    # A trained head has a gradient of its size, held twice while chunks add to it.
    own = trained * 2 * (65536 - 32768) * 8 * 4
    # MLX's CPU backend sometimes runs ahead by one more array of logits, of eight.
    assert peak(65536, trained) - own <= 1.2 * peak(32768, trained)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])  # soft cap; scale
def test_a_gpu_uses_one_kernel_on_the_final_logits(monkeypatch, name, trained):
    """MLX's cross-entropy of what the head makes of the logits, run on the CPU in float32."""
    model = build(name)
    model.freeze()
    if trained:
        (model.lm_head if "lm_head" in model else model.model.embed_tokens).unfreeze()
    width, vocab_size = model.args.hidden_size, model.args.vocab_size
    hidden = 9 * mx.random.normal((ROWS, width), key=mx.random.key(1))
    targets = mx.random.randint(0, vocab_size, (ROWS,), key=mx.random.key(2))
    monkeypatch.setattr(head, "LOGITS_BYTES_PER_CHUNK", 4 * vocab_size * 4)
    weights = mx.arange(1.0, ROWS + 1)

    def loss(policy, rows):
        logps = chunked_logps(
            split_backbone(policy), rows, targets, vocab_size=vocab_size, gradients=True
        )
        return (weights * logps).sum(), logps

    def run():
        (_, logps), gradient = mx.value_and_grad(lambda rows: loss(model, rows))(hidden)
        if not trained:
            return [logps, gradient]
        parameters = nn.value_and_grad(model, lambda m: loss(m, hidden)[0])(model)[1]
        return [logps, gradient, *(value for _, value in tree_flatten(parameters))]

    expected = run()
    monkeypatch.setattr(head, "is_cpu", lambda: False)
    for ours, theirs in zip(run(), expected, strict=True):
        assert mx.linalg.norm(ours - theirs).item() <= 1e-5 * mx.linalg.norm(theirs).item()


@pytest.mark.parametrize("is_cpu, calls", [(True, 0), (False, 3)])
def test_the_kernel_that_adds_in_the_dtype_of_the_logits_is_not_used_on_the_cpu(
    monkeypatch, tiny_llama, hidden, targets, chunks_of_four, is_cpu, calls
):
    counted = []
    own = mx.fast.cross_entropy
    monkeypatch.setattr(
        mx.fast, "cross_entropy", lambda *arrays: counted.append(arrays) or own(*arrays)
    )
    monkeypatch.setattr(head, "is_cpu", lambda: is_cpu)
    chunked_logps(split_backbone(tiny_llama), hidden, targets, vocab_size=VOCAB, gradients=False)
    assert len(counted) == calls


def test_the_gradient_of_the_logits_is_written_once(tiny_llama, hidden, targets, tmp_path):
    """Indexing, or MLX's gradient of taking the target's logit, scatters a chunk into zeros."""
    parts = split_backbone(tiny_llama)
    graph = tmp_path / "graph.dot"
    _, [gradient] = mx.vjp(
        lambda rows: head._chunk_logps(parts, rows, targets), [hidden], [mx.ones(targets.shape)]
    )
    mx.export_to_dot(str(graph), gradient)
    counts = [graph.read_text().count(f'"{name}') for name in ("Scatter", "Gather")]
    assert counts == [1, 0]


def test_dropout_of_the_head_is_the_same_in_both_passes(hidden, targets, chunks_of_four):
    """The backward pass runs each chunk again, with the random numbers of the forward pass."""
    model = make_llama()
    attach_adapters(model, rank=2, scale=2.0, dropout=0.5, target_modules=["embed_tokens"])
    layer = model.model.embed_tokens  # also the head
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(3))
    model.train()
    parts = split_backbone(model)

    def chunked(policy):
        return chunked_logps(parts, hidden, targets, vocab_size=VOCAB, gradients=True).sum()

    def by_chunk(policy):
        rows = [slice(start, start + 4) for start in range(0, ROWS, 4)]
        return sum(autodiff(parts, hidden[part], targets[part]).sum() for part in rows)

    found = []
    for function in (chunked, by_chunk):
        mx.random.seed(5)
        value, gradients = nn.value_and_grad(model, function)(model)
        found.append(dict(tree_flatten(gradients)) | {"value": value})
    for name, expected in found[1].items():
        assert mx.allclose(found[0][name], expected, rtol=1e-4, atol=1e-4), name
