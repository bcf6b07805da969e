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
from mlx_dpo.data.batching import CountTokens, padded_row_tokens
from mlx_dpo.errors import ModelError, reason
from mlx_dpo.io.arrays import Arrays, named_arrays, scalar
from mlx_dpo.models.device import number_type, on_cpu
from mlx_dpo.scoring.backbone import UnsupportedModelError, split_backbone
from mlx_dpo.scoring.lm_head import trainable_head_parameters
from mlx_dpo.scoring.packing import packed_hidden_states
from mlx_dpo.scoring.scorers import (
    TOKEN_COUNTS,
    Packing,
    Scorer,
    make_shared_log_weights,
    make_shared_scorer,
    plain_log_weights,
    plain_scorer,
)
from mlx_dpo.scoring.shared_prefix import completion_hidden_states
from mlx_dpo.types import TokenizedPair

RowFunction = Callable[[nn.Module], mx.array]  # (n, K), whatever K is
SEED = 0
PERTURBATION = 0.02  # about the size of a trained adapter's weights
MIN_NORM_SHARE = 0.01  # a gradient below this share of the largest is measured against that share


class RelativeErrors(NamedTuple):
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
def mode_without_dropout(model: nn.Module, *, training: bool) -> Iterator[None]:
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


def value_error(model: nn.Module, fast: RowFunction, oracle: RowFunction) -> float:
    """The largest difference of a row in evaluation mode, relative to the row."""
    with mode_without_dropout(model, training=False):
        return _max_value_error(fast(model), oracle(model))


def relative_errors(model: nn.Module, fast: RowFunction, oracle: RowFunction) -> RelativeErrors:
    """How far `fast` is from `oracle` in training mode, with dropout switched off."""
    with mode_without_dropout(model, training=True), _perturbed_parameters(model):
        expected, slopes = _values_and_gradients(model, oracle)
        found, found_slopes = _values_and_gradients(model, fast)
        return RelativeErrors(
            _max_value_error(found, expected), _max_gradient_error(found_slopes, slopes)
        )


def _values_and_gradients(model: nn.Module, rows: RowFunction) -> tuple[mx.array, Arrays]:
    def weighed(model: nn.Module) -> tuple[mx.array, mx.array]:
        values = rows(model).astype(mx.float32)
        return (values * mx.random.normal(values.shape, key=mx.random.key(SEED))).sum(), values

    if not named_arrays(model.trainable_parameters()):
        return rows(model), {}
    (_, values), gradients = nn.value_and_grad(model, weighed)(model)
    mx.eval(values, gradients)
    return values, named_arrays(gradients)


def _max_value_error(found: mx.array, expected: mx.array) -> float:
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    norms = mx.linalg.norm(expected, axis=-1)
    return _max_or_nan(scalar(row) for row in mx.linalg.norm(found - expected, axis=-1) / norms)


def _max_gradient_error(found: Arrays, expected: Arrays) -> float:
    """The largest relative difference of a parameter's gradient; nan if all of them are zero."""
    if not expected:
        return 0.0
    norms = {name: _norm(value) for name, value in expected.items()}
    least = MIN_NORM_SHARE * _max_or_nan(norms.values())
    if least == 0:
        return float("nan")
    return _max_or_nan(
        _norm(found[name] - expected[name]) / max(norm, least) for name, norm in norms.items()
    )


def _max_or_nan(values: Iterable[float]) -> float:
    """The maximum, or nan if there is one: Python's own keeps or loses it as the order wants."""
    return float(np.max(list(values)))


def _norm(value: mx.array) -> float:
    return scalar(mx.linalg.norm(value.astype(mx.float32)))


@contextmanager
def _perturbed_parameters(model: nn.Module) -> Iterator[None]:
    """Trainable weights that are all zero get random ones: LoRA's B hides the gradient of its A."""
    before = model.trainable_parameters()
    key = mx.random.key(SEED)

    def stir(value: mx.array) -> mx.array:
        nonlocal key
        if scalar(mx.any(value)):
            return value
        key, own = mx.random.split(key)
        return (PERTURBATION * mx.random.normal(value.shape, key=own)).astype(value.dtype)

    model.update(tree_map(stir, before))
    try:
        yield
    finally:
        model.update(before)


ScorerSetting = Literal["auto", "plain", "shared"]
PACKINGS: dict[Packing, str] = {
    "row": "pairs in one row, no padding",
    "batch": "pairs in one padded batch",
    "lengths": "pairs with equally long prompts in one batch",
}

# Lengths of prompt, chosen and rejected: uneven prompts, two of one length, completions of
# one token and of two, after which nothing and a single token goes through the trunk.
TEST_LENGTHS = ((5, 1, 4), (9, 6, 2), (5, 3, 1))
MAX_TESTED_WINDOW = 512

# Relative errors of values and gradients that still are the same mathematics. Float32 errs
# by 1e-6, products as a GPU may take them by 2e-3, 16 bits by their rounding.
TOLERANCES = {
    "float32": RelativeErrors(1e-4, 1e-3),
    "float16": RelativeErrors(1e-2, 5e-2),
    "bfloat16": RelativeErrors(5e-2, 2e-1),
}
FLOAT32_GPU_TOLERANCE = RelativeErrors(1e-3, 1e-2)

# What the models of mlx-lm and MLX raise where a model is not made for what is tried.
UNSUPPORTED_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class ScorerChoice:
    """The scorer a model gets, and why."""

    scorer: Scorer
    forward_only: Scorer  # the same values without gradients: for the reference and evaluation
    name: Literal["shared", "plain"]
    reason: str
    way: Packing | None = None  # how pairs that share their prompts go through together
    alignments: Scorer = plain_log_weights  # what WPO weighs pairs by, in the same way

    @property
    def cost(self) -> CountTokens:
        """What a pass through the scorer costs, in tokens."""
        return padded_row_tokens if self.way is None else TOKEN_COUNTS[self.way]


class _NotEquivalentError(Exception):
    """The shared scorer is not for this model; says why."""


def select_scorer(
    model: nn.Module,
    *,
    vocab_size: int,
    wanted: ScorerSetting = "auto",
    ways: Sequence[Packing] = (),
    ld_alpha: float | None = None,
) -> ScorerChoice:
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
        return _plain_choice(oracle, "as asked")
    why = ""
    for way in ways or (("row", "lengths") if on_cpu() else PACKINGS):
        try:
            return _shared_choice(model, vocab_size, way, oracle, ld_alpha)
        except _NotEquivalentError as refused:
            why = str(refused)
    _check_trainable(model, vocab_size)
    if wanted == "shared":
        raise ModelError(
            f"the scorer `shared` is not exact for this model ({why}); leave it at `auto`"
        )
    return _plain_choice(oracle, why)


def _check_trainable(model: nn.Module, vocab_size: int) -> None:
    """What the plain scorer cannot do cannot be done: better said now than at the first step."""
    oracle = _test_pair_logps(plain_scorer, vocab_size)
    try:
        relative_errors(model, oracle, oracle)
    except UNSUPPORTED_ERRORS as error:
        raise ModelError(
            f"the model cannot be trained as it is adapted ({_describe_error(error)}); "
            "name other layers in `lora_target_modules`, or take another model"
        ) from error


def _describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {reason(error)}".rstrip(".")


def _plain_choice(scorer: Scorer, why: str) -> ScorerChoice:
    return ScorerChoice(scorer, scorer, "plain", why)


def _shared_choice(
    model: nn.Module, vocab_size: int, way: Packing, plain: Scorer, ld_alpha: float | None
) -> ScorerChoice:
    """The shared scorer, if it passes every comparison.

    Raises:
        _RefusedError: it does not.
    """
    training, forward_only = (
        make_shared_scorer(vocab_size=vocab_size, gradients=gradients, way=way, ld_alpha=ld_alpha)
        for gradients in (True, False)
    )
    oracle = _test_pair_logps(plain, vocab_size)
    try:
        if way == "batch" and any(isinstance(c, CacheList) for c in make_prompt_cache(model)):
            # Such models may choose whole blocks of keys, which the padding of batched caches
            # moves; only long rows show it.
            raise _NotEquivalentError("its caches are of several kinds")
        found = relative_errors(model, _test_pair_logps(training, vocab_size), oracle)
        _check_tolerance(model, "", found)
        values = value_error(model, _test_pair_logps(forward_only, vocab_size), oracle)
        _check_tolerance(model, " without gradients", RelativeErrors(values, 0.0))
        if window := shortest_window(model):
            _check_tolerance(
                model,
                " past the window",
                relative_errors(model, *_long_prompt_functions(window, vocab_size, way)),
            )
    except UnsupportedModelError as error:
        raise _NotEquivalentError(str(error)) from error
    except UNSUPPORTED_ERRORS as error:
        raise _NotEquivalentError(_describe_error(error)) from error
    alignments = make_shared_log_weights(vocab_size=vocab_size, way=way)
    return ScorerChoice(
        training, forward_only, "shared", _describe_choice(model, found, way), way, alignments
    )


def _describe_choice(model: nn.Module, found: RelativeErrors, way: Packing) -> str:
    said = f"{PACKINGS[way]}; equal to the plain scorer on a probe, to {found.values:.0e}"
    if found.gradients:
        said += f", its gradients to {found.gradients:.0e}"
    halves = split_backbone(model)
    with mode_without_dropout(model, training=False):
        hidden = halves.hidden(mx.zeros((1, 1), mx.int32))
    if halves.logits(hidden) is hidden:
        said += "; the head is part of the trunk and runs on every token"
    if trainable_head_parameters(halves):
        said += "; the head is run again for gradients, as its weights may be trained"
    return said


def _check_tolerance(model: nn.Module, where: str, found: RelativeErrors) -> None:
    """Refuse errors above the limits of the model's number type, and what is not a number."""
    with narrowed(model):
        kind = number_type(model)
    allowed = FLOAT32_GPU_TOLERANCE if kind == "float32" and not on_cpu() else TOLERANCES[kind]
    for name, error, limit in zip(("values", "gradients"), found, allowed, strict=True):
        if not error <= limit:
            raise _NotEquivalentError(
                f"{name}{where} differ from the plain scorer's by {error:.0e}"
            )


def _test_pair_logps(scorer: Scorer, vocab_size: int) -> RowFunction:
    """Log-probabilities of the probe's pairs, as rows. (2B, 1)"""
    pairs = random_pairs(TEST_LENGTHS, vocab_size)
    return lambda model: mx.concatenate([*scorer(model, pairs)])[:, None]


def _long_prompt_functions(
    window: int, vocab_size: int, way: Packing
) -> tuple[RowFunction, RowFunction]:
    """Hidden states after a prompt longer than the window: with caches, and without. (n, D)

    Without the head, for whole rows of logits of that length might not fit into memory.
    """
    pairs = random_pairs([(window + 3, 4, 2)], vocab_size)
    [pair] = pairs

    def whole(model: nn.Module) -> mx.array:
        rows = [mx.array([pair.prompt + c[:-1]]) for c in (pair.chosen, pair.rejected)]
        start = len(pair.prompt) - 1
        return mx.concatenate([split_backbone(model).hidden(row)[0, start:] for row in rows])

    predicting = packed_hidden_states if way == "row" else completion_hidden_states
    return lambda model: predicting(model, split_backbone(model), pairs), whole


def shortest_window(model: nn.Module) -> int:
    """Tokens that the narrowest layer sees, 0 if every one sees all or more than is probed."""
    return min((width for width in _window_sizes(make_prompt_cache(model))), default=0)


def _window_sizes(caches: Iterable[Any]) -> Iterator[int]:
    for cache in caches:
        yield from _window_sizes(getattr(cache, "caches", ()))
        width = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
        if width and width <= MAX_TESTED_WINDOW:
            yield width
