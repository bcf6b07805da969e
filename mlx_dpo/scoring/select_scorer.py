"""Which scorer a model gets: the shared one where it is found equal to the plain one.

Values and gradients of both are compared on a few random, uneven pairs before anything is
trained. A model with a window of attention of up to LONGEST_WINDOW tokens also gets a prompt
that does not fit into it; wider windows run through the same code with another number.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import CacheList, make_prompt_cache

from mlx_dpo.adapters.master_weights import narrowed
from mlx_dpo.data.batching import Cost, whole_rows
from mlx_dpo.errors import ModelError, reason
from mlx_dpo.io import Arrays, flat, scalar
from mlx_dpo.models.device import number_type, on_cpu
from mlx_dpo.scoring.backbone import NotSplitError, split
from mlx_dpo.scoring.lm_head import head_weights
from mlx_dpo.scoring.packing import predicting_rows_of_tree
from mlx_dpo.scoring.scorers import (
    COSTS,
    Scorer,
    Way,
    make_shared,
    make_shared_alignments,
    plain_alignments,
    plain_scorer,
)
from mlx_dpo.scoring.shared_prefix import predicting_rows
from mlx_dpo.types import TokenizedPair

Rows = Callable[[nn.Module], mx.array]  # (n, K), whatever K is
SEED = 0
STIR = 0.02  # about the size of a trained adapter's weights
SMALL = 0.01  # a gradient below this share of the largest is measured against that share


class Errors(NamedTuple):
    """The largest relative difference of a row, and of a trainable parameter's gradient."""

    values: float
    gradients: float  # 0 where nothing is trainable


def random_pairs(shapes: Sequence[tuple[int, int, int]], vocab_size: int) -> list[TokenizedPair]:
    """Pairs of random ids; a shape is the lengths of prompt, chosen and rejected."""
    rng = np.random.default_rng(SEED)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab_size, length).tolist())

    return [TokenizedPair(ids(p), ids(c), ids(r)) for p, c, r in shapes]


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """In training or evaluation mode, which select kernels, and without dropout either way."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    try:
        yield
    finally:
        for module, mode in before:  # parents come first: each sets all that is below it
            module.train(mode)


def value_error(model: nn.Module, fast: Rows, oracle: Rows) -> float:
    """The largest difference of a row in evaluation mode, relative to the row."""
    with in_mode(model, training=False):
        return _value_error(fast(model), oracle(model))


def errors(model: nn.Module, fast: Rows, oracle: Rows) -> Errors:
    """How far `fast` is from `oracle` in training mode, with dropout switched off."""
    with in_mode(model, training=True), _stirred(model):
        expected, slopes = _with_gradients(model, oracle)
        found, found_slopes = _with_gradients(model, fast)
        return Errors(_value_error(found, expected), _gradient_error(found_slopes, slopes))


def _with_gradients(model: nn.Module, rows: Rows) -> tuple[mx.array, Arrays]:
    def weighed(model: nn.Module) -> tuple[mx.array, mx.array]:
        values = rows(model).astype(mx.float32)
        return (values * mx.random.normal(values.shape, key=mx.random.key(SEED))).sum(), values

    if not flat(model.trainable_parameters()):
        return rows(model), {}
    (_, values), gradients = nn.value_and_grad(model, weighed)(model)
    mx.eval(values, gradients)
    return values, flat(gradients)


def _value_error(found: mx.array, expected: mx.array) -> float:
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    norms = mx.linalg.norm(expected, axis=-1)
    return _largest(scalar(row) for row in mx.linalg.norm(found - expected, axis=-1) / norms)


def _gradient_error(found: Arrays, expected: Arrays) -> float:
    """The largest relative difference of a parameter's gradient; nan if all of them are zero."""
    if not expected:
        return 0.0
    norms = {name: _norm(value) for name, value in expected.items()}
    least = SMALL * _largest(norms.values())
    if least == 0:
        return float("nan")
    return _largest(
        _norm(found[name] - expected[name]) / max(norm, least) for name, norm in norms.items()
    )


def _largest(values: Iterable[float]) -> float:
    """The maximum, or nan if there is one: Python's own keeps or loses it as the order wants."""
    return float(np.max(list(values)))


def _norm(value: mx.array) -> float:
    return scalar(mx.linalg.norm(value.astype(mx.float32)))


@contextmanager
def _stirred(model: nn.Module) -> Iterator[None]:
    """Trainable weights that are all zero get random ones: LoRA's B hides the gradient of its A."""
    before = model.trainable_parameters()
    key = mx.random.key(SEED)

    def stir(value: mx.array) -> mx.array:
        nonlocal key
        if scalar(mx.any(value)):
            return value
        key, own = mx.random.split(key)
        return (STIR * mx.random.normal(value.shape, key=own)).astype(value.dtype)

    model.update(tree_map(stir, before))
    try:
        yield
    finally:
        model.update(before)


Wanted = Literal["auto", "plain", "shared"]
WAYS: dict[Way, str] = {
    "row": "pairs in one row, no padding",
    "batch": "pairs in one padded batch",
    "lengths": "pairs with equally long prompts in one batch",
}

# Lengths of prompt, chosen and rejected: uneven prompts, two of one length, completions of
# one token and of two, after which nothing and a single token goes through the trunk.
SHAPES = ((5, 1, 4), (9, 6, 2), (5, 3, 1))
LONGEST_WINDOW = 512

# Relative errors of values and gradients that still are the same mathematics. Float32 errs
# by 1e-6, products as a GPU may take them by 2e-3, 16 bits by their rounding.
LIMITS = {
    "float32": Errors(1e-4, 1e-3),
    "float16": Errors(1e-2, 5e-2),
    "bfloat16": Errors(5e-2, 2e-1),
}
FLOAT32_ON_GPU = Errors(1e-3, 1e-2)

# What the models of mlx-lm and MLX raise where a model is not made for what is tried.
UNSUITED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Choice:
    """The scorer a model gets, and why."""

    scorer: Scorer
    forward_only: Scorer  # the same values without gradients: for the reference and evaluation
    name: Literal["shared", "plain"]
    reason: str
    way: Way | None = None  # how pairs that share their prompts go through together
    alignments: Scorer = plain_alignments  # what WPO weighs pairs by, in the same way

    @property
    def cost(self) -> Cost:
        """What a pass through the scorer costs, in tokens."""
        return whole_rows if self.way is None else COSTS[self.way]


class _RefusedError(Exception):
    """The shared scorer is not for this model; says why."""


def choose(
    model: nn.Module,
    *,
    vocab_size: int,
    wanted: Wanted = "auto",
    ways: Sequence[Way] = (),
    ld_alpha: float | None = None,
) -> Choice:
    """Probe `model`, adapters attached, and choose its scorer.

    Weights, modes and random state stay as they are. The first of `ways` that is exact is
    taken. Unless they are given, padded batches are among them on a GPU only: on the CPU they
    cost more than they save. `ld_alpha` is what tokens count beyond the shorter completion.

    Raises:
        ModelError: `shared` is wanted, and is not exact for this model; or the plain scorer
            cannot be differentiated either.
    """
    oracle = partial(plain_scorer, ld_alpha=ld_alpha) if ld_alpha is not None else plain_scorer
    if wanted == "plain":
        return _plain(oracle, "as asked")
    why = ""
    for way in ways or (("row", "lengths") if on_cpu() else WAYS):
        try:
            return _probed(model, vocab_size, way, oracle, ld_alpha)
        except _RefusedError as refused:
            why = str(refused)
    _require_plain(model, vocab_size)
    if wanted == "shared":
        raise ModelError(
            f"the scorer `shared` is not exact for this model ({why}); leave it at `auto`"
        )
    return _plain(oracle, why)


def _require_plain(model: nn.Module, vocab_size: int) -> None:
    """What the plain scorer cannot do cannot be done: better said now than at the first step."""
    oracle = _scored(plain_scorer, vocab_size)
    try:
        errors(model, oracle, oracle)
    except UNSUITED as error:
        raise ModelError(
            f"the model cannot be trained as it is adapted ({_named(error)}); "
            "name other layers in `lora_target_modules`, or take another model"
        ) from error


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {reason(error)}".rstrip(".")


def _plain(scorer: Scorer, why: str) -> Choice:
    return Choice(scorer, scorer, "plain", why)


def _probed(
    model: nn.Module, vocab_size: int, way: Way, plain: Scorer, ld_alpha: float | None
) -> Choice:
    """The shared scorer, if it passes every comparison.

    Raises:
        _RefusedError: it does not.
    """
    training, forward_only = (
        make_shared(vocab_size=vocab_size, gradients=gradients, way=way, ld_alpha=ld_alpha)
        for gradients in (True, False)
    )
    oracle = _scored(plain, vocab_size)
    try:
        if way == "batch" and any(isinstance(c, CacheList) for c in make_prompt_cache(model)):
            # Such models may choose whole blocks of keys, which the padding of batched caches
            # moves; only long rows show it.
            raise _RefusedError("its caches are of several kinds")
        found = errors(model, _scored(training, vocab_size), oracle)
        _check(model, "", found)
        values = value_error(model, _scored(forward_only, vocab_size), oracle)
        _check(model, " without gradients", Errors(values, 0.0))
        if window := shortest_window(model):
            _check(model, " past the window", errors(model, *_past(window, vocab_size, way)))
    except NotSplitError as error:
        raise _RefusedError(str(error)) from error
    except UNSUITED as error:
        raise _RefusedError(_named(error)) from error
    alignments = make_shared_alignments(vocab_size=vocab_size, way=way)
    return Choice(training, forward_only, "shared", _report(model, found, way), way, alignments)


def _report(model: nn.Module, found: Errors, way: Way) -> str:
    said = f"{WAYS[way]}; equal to the plain scorer on a probe, to {found.values:.0e}"
    if found.gradients:
        said += f", its gradients to {found.gradients:.0e}"
    halves = split(model)
    with in_mode(model, training=False):
        hidden = halves.hidden(mx.zeros((1, 1), mx.int32))
    if halves.logits(hidden) is hidden:
        said += "; the head is part of the trunk and runs on every token"
    if head_weights(halves):
        said += "; the head is run again for gradients, as its weights may be trained"
    return said


def _check(model: nn.Module, where: str, found: Errors) -> None:
    """Refuse errors above the limits of the model's number type, and what is not a number."""
    with narrowed(model):
        kind = number_type(model)
    allowed = FLOAT32_ON_GPU if kind == "float32" and not on_cpu() else LIMITS[kind]
    for name, error, limit in zip(("values", "gradients"), found, allowed, strict=True):
        if not error <= limit:
            raise _RefusedError(f"{name}{where} differ from the plain scorer's by {error:.0e}")


def _scored(scorer: Scorer, vocab_size: int) -> Rows:
    """Log-probabilities of the probe's pairs, as rows. (2B, 1)"""
    pairs = random_pairs(SHAPES, vocab_size)
    return lambda model: mx.concatenate([*scorer(model, pairs)])[:, None]


def _past(window: int, vocab_size: int, way: Way) -> tuple[Rows, Rows]:
    """Hidden states after a prompt longer than the window: with caches, and without. (n, D)

    Without the head, for whole rows of logits of that length might not fit into memory.
    """
    pairs = random_pairs([(window + 3, 4, 2)], vocab_size)
    [pair] = pairs

    def whole(model: nn.Module) -> mx.array:
        rows = [mx.array([pair.prompt + c[:-1]]) for c in (pair.chosen, pair.rejected)]
        start = len(pair.prompt) - 1
        return mx.concatenate([split(model).hidden(row)[0, start:] for row in rows])

    predicting = predicting_rows_of_tree if way == "row" else predicting_rows
    return lambda model: predicting(model, split(model), pairs), whole


def shortest_window(model: nn.Module) -> int:
    """Tokens that the narrowest layer sees, 0 if every one sees all or more than is probed."""
    return min((width for width in _windows(make_prompt_cache(model))), default=0)


def _windows(caches: Iterable[Any]) -> Iterator[int]:
    for cache in caches:
        yield from _windows(getattr(cache, "caches", ()))
        width = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
        if width and width <= LONGEST_WINDOW:
            yield width
