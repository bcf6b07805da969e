"""Chunked attention against MLX's own: values, gradients, memory, and when it stays out."""

from statistics import median

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.scoring.kernels import attention
from mlx_dpo.scoring.kernels.attention import (
    AttentionInputs,
    AttentionOptions,
    QueryChunk,
    causal_mask,
)
from mlx_dpo.scoring.kernels.attention_dispatch import (
    StructuredMask,
    queries_per_chunk,
    use_chunked_attention,
    use_structured_masks,
)

HEADS, KEY_HEADS, DIMS = 6, 2, 16


def inputs(length, seen=None, batch=2, seed=0):
    mx.random.seed(seed)
    seen = seen or length
    shapes = [(batch, HEADS, length, DIMS)] + 2 * [(batch, KEY_HEADS, seen, DIMS)]
    return [mx.random.normal(shape) for shape in shapes]


def attend(q, k, v, mask=None, sinks=None):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask, sinks=sinks)


def values_and_gradients(arrays, function):
    """The output, and gradients of a weighted sum of it that tells every element apart."""

    def loss(*arrays):
        out = function(*arrays)
        return (out * mx.sin(mx.arange(out.size)).reshape(out.shape)).sum()

    return [function(*arrays), *mx.grad(loss, argnums=list(range(len(arrays))))(*arrays)]


def assert_same(arrays, function, chunk):
    plain = values_and_gradients(arrays, function)
    with use_chunked_attention(chunk):
        chunked = values_and_gradients(arrays, function)
    for ours, theirs in zip(chunked, plain, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert mx.abs(ours - theirs).max().item() < 5e-6 * max(1, mx.abs(theirs).max().item())


@pytest.mark.parametrize("chunk", [32, 33, 99, 100, 128])
def test_causal_attention_is_the_same_for_every_chunk_size(chunk):
    """100 queries: chunks that divide it, that leave one query over, that hold all of it."""
    assert_same(inputs(100), lambda q, k, v: attend(q, k, v, "causal"), chunk)


@pytest.mark.parametrize("length, seen", [(70, 101), (33, 200), (2, 4096)])
def test_fewer_queries_than_keys_are_the_last_positions(length, seen):
    assert_same(inputs(length, seen), lambda q, k, v: attend(q, k, v, "causal"), 32)


def test_without_a_mask_every_query_sees_every_key():
    assert_same(inputs(70, 90), attend, 32)


@pytest.mark.parametrize(
    "shape", [(70, 90), (1, 90), (2, 1, 70, 90), (1, 6, 70, 90), (2, 1, 1, 90), (6, 70, 90)]
)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_array_masks_of_every_shape_are_applied(shape, kind):
    mx.random.seed(3)
    visible = mx.random.uniform(shape=shape) < 0.7
    mask = visible if kind == "bool" else mx.where(visible, 0.5, -mx.inf)
    assert_same(inputs(70, 90), lambda q, k, v: attend(q, k, v, mask), 32)


def test_a_fully_masked_row_equals_mlx():
    mask = mx.arange(70)[:, None] > mx.zeros(70)
    assert_same(inputs(70), lambda q, k, v: attend(q, k, v, mask), 32)


@pytest.mark.parametrize("shape", [(70, 90), (6, 1, 90), (2, 1, 70, 90)])
def test_a_learned_mask_gets_its_gradient(shape):
    mx.random.seed(4)
    arrays = [*inputs(70, 90), mx.random.normal(shape)]
    assert_same(arrays, attend, 32)


@pytest.mark.parametrize("mask", [None, "causal"])
def test_sinks_take_probability_and_get_their_gradient(mask):
    arrays = [*inputs(100), mx.array([-1.0, 0.0, 1.0, 2.0, 3.0, 40.0])]
    assert_same(arrays, lambda q, k, v, sinks: attend(q, k, v, mask, sinks), 32)


def test_values_may_be_narrower_than_keys():
    q, k, v = inputs(100)
    assert_same([q, k, v[..., :5]], lambda q, k, v: attend(q, k, v, "causal"), 32)


def test_bfloat16_is_as_accurate_as_mlx():
    arrays = inputs(300)
    exact = values_and_gradients(arrays, lambda *a: attend(*a, mask="causal"))
    half = [array.astype(mx.bfloat16) for array in arrays]
    plain = values_and_gradients(half, lambda *a: attend(*a, mask="causal"))
    with use_chunked_attention(10):
        chunked = values_and_gradients(half, lambda *a: attend(*a, mask="causal"))
    for ours, theirs, true in zip(chunked, plain, exact, strict=True):
        assert ours.dtype == mx.bfloat16
        assert mx.abs(ours - true).mean().item() < 1.1 * mx.abs(theirs - true).mean().item()


def test_bfloat16_gradients_of_queries_survive_keys_that_have_much_in_common():
    """A rounded row sum would shift the gradients of all scores of a row: 1.5 times MLX's."""
    mx.random.seed(0)
    q, *noise = inputs(256)
    k, v = (x + 4 * mx.random.normal((2, KEY_HEADS, 1, DIMS)) for x in noise)
    half = [array.astype(mx.bfloat16) for array in (q, k, v)]

    def gradient(*arrays):
        return values_and_gradients(arrays, lambda *a: attend(*a, mask="causal"))[1]

    exact = gradient(*(array.astype(mx.float32) for array in half))
    plain = gradient(*half)
    with use_chunked_attention(32):
        chunked = gradient(*half)
    assert mx.abs(chunked - exact).mean().item() < 1.2 * mx.abs(plain - exact).mean().item()


def test_chunked_attention_works_inside_mx_checkpoint():
    def through_checkpoint(q, k, v):
        return mx.checkpoint(lambda q, k, v: attend(q, k, v, "causal"))(q, k, v)

    assert_same(inputs(100), through_checkpoint, 32)


def test_memory_does_not_grow_with_the_square_of_the_length():
    """The peak, forward alone and with backward; MLX's own grows by 3.6 and 3.9 here."""

    def peak(length, function):
        arrays = inputs(length, batch=1)
        mx.eval(arrays)
        before = mx.get_active_memory()
        peaks = []
        for _ in range(5):  # how far MLX runs ahead differs from time to time
            mx.reset_peak_memory()
            mx.eval(function(arrays))
            peaks.append(mx.get_peak_memory() - before)
        return median(peaks)

    def forward(arrays):
        return attend(*arrays, mask="causal")

    def both(arrays):
        return values_and_gradients(arrays, lambda q, k, v: attend(q, k, v, "causal"))

    with use_chunked_attention(32):
        assert peak(1024, forward) < 2.5 * peak(512, forward)
        assert peak(1024, both) < 2.5 * peak(512, both)


def test_the_original_function_is_restored_after_an_error():
    own = mx.fast.scaled_dot_product_attention
    with pytest.raises(KeyError), use_chunked_attention():
        assert mx.fast.scaled_dot_product_attention is not own
        raise KeyError
    assert mx.fast.scaled_dot_product_attention is own


def test_the_innermost_block_sets_the_chunk_size(monkeypatch):
    lengths = []
    own = mx.fast.scaled_dot_product_attention

    def spy(q, k, v, **more):
        lengths.append(q.shape[2])
        return own(q, k, v, **more)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    monkeypatch.setattr("mlx_dpo.scoring.kernels.attention.is_cpu", lambda: False)
    with use_chunked_attention(16):
        outer = mx.fast.scaled_dot_product_attention
        with use_chunked_attention(80):
            attend(*inputs(170))
        assert mx.fast.scaled_dot_product_attention is outer
        attend(*inputs(100))
    assert lengths == [80, 80, 10] + 6 * [16] + [4]


def test_on_a_gpu_each_chunk_uses_the_fused_kernel(monkeypatch):
    """The arithmetic of a GPU, run on the CPU."""
    for kernel in ("attention", "softmax"):
        monkeypatch.setattr(f"mlx_dpo.scoring.kernels.{kernel}.is_cpu", lambda: False)
    arrays = [*inputs(70, 100), mx.random.normal((HEADS,))]
    assert_same(arrays, lambda q, k, v, sinks: attend(q, k, v, "causal", sinks), 32)


@pytest.mark.parametrize(
    "length, seen, mask", [(1, 9000, None), (20, 20, "causal"), (90, 60, "causal")]
)
def test_unsupported_calls_go_to_mlx_unchanged(monkeypatch, length, seen, mask):
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda *_, **__: "MLX's own")
    with use_chunked_attention(32):
        assert attend(*inputs(length, seen), mask=mask) == "MLX's own"


def test_a_call_for_the_fused_kernel_goes_to_mlx_unchanged(monkeypatch):
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda *_, **__: "MLX's own")
    with use_chunked_attention(32):
        own = mx.fast.scaled_dot_product_attention(*inputs(200), scale=1.0, force_fused=True)
    assert own == "MLX's own"


class FixedChunks(StructuredMask):
    """The given chunks, whatever size is asked for."""

    def __init__(self, chunks):
        self.fixed = chunks

    def chunks(self, size, dtype):
        return self.fixed


def in_ranges(start, end, *ranges):
    """A chunk of queries that see all keys of the ranges but some that its mask hides."""
    keys = sum(last - first for first, last in ranges)
    hidden = (3 * mx.arange(start, end)[:, None] + mx.arange(keys)) % 5 == 0
    return QueryChunk(start, end, ranges, mx.where(hidden, -mx.inf, 0.0))


def chain(start, end, *ranges):
    """A chunk of which each query sees one key more than the query before it."""
    return QueryChunk(start, end, ranges, is_causal=True)


def masked_chain(start, end, *ranges):
    """A chain that also has the mask of a chain."""
    keys = sum(last - first for first, last in ranges)
    return chain(start, end, *ranges)._replace(mask=causal_mask(end - start, keys, mx.float32))


def visible_keys(chunks, length, seen):
    """The (query, key) places that `chunks` show, one by one. (T_q, T_k) bool"""
    visible = np.zeros((length, seen), bool)
    for chunk in chunks:
        keys = [key for first, last in chunk.key_ranges for key in range(first, last)]
        for row, query in enumerate(range(chunk.query_start, chunk.query_end)):
            for column, key in enumerate(keys):
                if chunk.is_causal:
                    shown = len(keys) - column >= chunk.query_end - query
                else:
                    shown = chunk.mask is None or chunk.mask[row, column].item() == 0
                visible[query, key] = shown
    return mx.array(visible)


@pytest.mark.parametrize("saved_keys", [0, 1000], ids=["computed again", "saved"])
@pytest.mark.parametrize("is_cpu", [True, False], ids=["cpu", "gpu's arithmetic"])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("make", [in_ranges, chain, masked_chain])
def test_chunks_see_the_keys_of_all_their_ranges(monkeypatch, make, has_sinks, is_cpu, saved_keys):
    """Against MLX's own with the whole mask: keys left out between, before and behind ranges."""
    for kernel in ("attention", "softmax"):
        monkeypatch.setattr(f"mlx_dpo.scoring.kernels.{kernel}.is_cpu", lambda: is_cpu)
    monkeypatch.setattr(attention, "MAX_SAVED_KEYS", saved_keys)
    chunks = [
        make(0, 3, (0, 3)),
        make(3, 8, (1, 2), (4, 9)),
        make(8, 9, (0, 2), (5, 6), (9, 12)),
        make(9, 14, (0, 4), (6, 9), (10, 13), (14, 15)),
        make(14, 20, (7, 13)),
    ]
    arrays = [*inputs(20, 18), *([mx.random.normal((HEADS,))] if has_sinks else [])]
    whole = visible_keys(chunks, 20, 18)
    plain = values_and_gradients(arrays, lambda q, k, v, *s: attend(q, k, v, whole, *s))
    with use_structured_masks():
        chunked = values_and_gradients(
            arrays, lambda q, k, v, *s: attend(q, k, v, FixedChunks(chunks), *s)
        )
    for ours, theirs in zip(chunked, plain, strict=True):
        assert mx.abs(ours - theirs).max().item() < 5e-6 * max(1, mx.abs(theirs).max().item())


@pytest.mark.parametrize("limit, kept", [(11, 1), (10, 0)])
def test_saved_probabilities_are_counted_by_the_keys_of_all_ranges(monkeypatch, limit, kept):
    monkeypatch.setattr(attention, "MAX_SAVED_KEYS", limit)
    chunk = QueryChunk(0, 4, ((0, 5), (9, 15)))  # 11 keys for each query
    options = AttentionOptions(mx.fast.scaled_dot_product_attention, 1.0, [chunk])
    q, k, v = inputs(4, 15)
    saved = attention._saved_probabilities(AttentionInputs(q, k, v, None, None), options)
    assert len(saved) == kept


def recorded_calls(monkeypatch, device):
    """A list that gets the mask and `force_fused` of each call of MLX's own attention."""
    calls = []
    own = mx.fast.scaled_dot_product_attention

    def spy(q, k, v, *, force_fused=False, **more):
        calls.append((more["mask"], force_fused))
        return own(q, k, v, **more)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(attention, "is_cpu", lambda: False)
    monkeypatch.setattr(attention, "device_kind", lambda: device)
    return calls


@pytest.mark.parametrize(
    "width, value_width, queries, device, forced",
    [
        (64, 64, 9, "metal", True),
        (80, 80, 9, "metal", True),
        (128, 128, 20, "metal", True),
        (64, 64, 8, "metal", False),  # another kernel, with other conditions
        (64, 32, 9, "metal", False),
        (16, 16, 9, "metal", False),
        (256, 256, 9, "metal", False),  # MLX finds its unfused path faster
        (64, 64, 9, "cuda", False),
    ],
)
def test_mlx_must_use_its_kernel_where_it_has_one(
    monkeypatch, width, value_width, queries, device, forced
):
    """Its kernel on Metal is otherwise not used while gradients are traced."""
    calls = recorded_calls(monkeypatch, device)
    q, k = mx.zeros((1, 4, queries, width)), mx.zeros((1, 2, 20, width))
    v = mx.zeros((1, 2, 20, value_width))
    chunks = FixedChunks([chain(0, queries, (0, 20))])
    with use_structured_masks():
        mx.grad(lambda q: attend(q, k, v, chunks).sum())(q)
    assert calls == [("causal", forced)]


def test_a_gpu_is_told_which_chunks_are_causal(monkeypatch):
    calls = recorded_calls(monkeypatch, "metal")
    chunks = [in_ranges(0, 10, (0, 12)), masked_chain(10, 30, (0, 5), (7, 30))]
    with use_structured_masks():
        attend(*inputs(30), mask=FixedChunks(chunks))
    assert calls[0][0] is chunks[0].mask
    assert calls[1][0] == "causal"


@pytest.mark.parametrize(
    "batch, heads, width, seen, expected",
    [
        (1, 9, 64, 766, 512),
        (1, 32, 128, 766, 192),  # scores that take seven times as long
        (1, 4, 8, 766, 2172 // 64 * 64),
        (8, 9, 64, 1864, 256 - 64),  # 512 queries would need 275 MB, 256 need 137 MB
        (4, 32, 128, 8192, 64),  # more than the limit, as little as the CPU takes
    ],
)
def test_chunks_on_a_gpu_depend_on_width_and_memory(
    monkeypatch, batch, heads, width, seen, expected
):
    q, k = mx.zeros((batch, heads, 766, width)), mx.zeros((batch, heads, seen, width))
    assert queries_per_chunk(q, k) == 64
    monkeypatch.setattr("mlx_dpo.scoring.kernels.attention_dispatch.is_cpu", lambda: False)
    assert queries_per_chunk(q, k) == expected


def test_chunks_on_a_gpu_have_equal_sizes(monkeypatch):
    """A short last chunk starts as many kernels as a long one."""
    lengths = []

    def spy(q, k, v, **more):
        lengths.append(q.shape[2])
        return q

    for module in ("attention", "attention_dispatch"):
        monkeypatch.setattr(f"mlx_dpo.scoring.kernels.{module}.is_cpu", lambda: False)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    with use_chunked_attention(80):
        attend(*inputs(170), mask="causal")
    assert lengths == [57, 57, 56]
