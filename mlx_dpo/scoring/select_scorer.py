"""Choose the scorer of a model: the function that computes the log-probs of completions.

The trie scorer runs each distinct prefix of the texts of a pass once, the shared scorer runs the
prompt of each pair once, and the plain scorer runs whole padded sequences. Each of the first two is
used only if its values and gradients equal the plain scorer's on a few random pairs: for the trie
scorer pairs with common beginnings, for the shared scorer pairs of uneven lengths. If the model has
sliding-window attention of up to MAX_TESTED_WINDOW tokens, a prompt longer than the window is
tested too. Wider windows run through the same code and are not tested. The plain scorer itself is
compared with generation first (`generation_match`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, make_prompt_cache

from mlx_dpo.data.batches.token_counts import CountTokens, padded_row_tokens
from mlx_dpo.distributed.ranks import SINGLE_PROCESS, Ranks
from mlx_dpo.errors import ModelError, reason
from mlx_dpo.models.device import is_cpu
from mlx_dpo.scoring.backbone import UnsupportedModelError, split_backbone
from mlx_dpo.scoring.equivalence import (
    UNSUPPORTED_ERRORS,
    RelativeErrors,
    RowFunction,
    branching_pairs,
    mode_without_dropout,
    random_pairs,
    relative_errors,
    tolerance,
    value_error,
)
from mlx_dpo.scoring.generation_match import (
    GenerationMatch,
    NotComparableError,
    computes_with_caches,
    empty_caches,
    match_generation,
    shortest_window,
)
from mlx_dpo.scoring.lm_head import trainable_head_parameters
from mlx_dpo.scoring.packing.packed_sequence import (
    count_attention_caches,
    packed_hidden_states,
)
from mlx_dpo.scoring.scorers import (
    PACKED_LAYOUTS,
    TOKEN_COUNTS,
    Packing,
    Scorer,
    make_shared_log_weights,
    make_shared_scorer,
    plain_log_weights,
    plain_scorer,
)
from mlx_dpo.scoring.sharded.gathered_blocks import is_sharded
from mlx_dpo.scoring.shared_prefix import completion_hidden_states
from mlx_dpo.types import TokenizedPair

ScorerName = Literal["trie", "shared", "plain"]
ScorerSetting = Literal["auto"] | ScorerName
PACKINGS: dict[Packing, str] = {
    "trie": "each distinct prefix of all pairs of a pass once, in one sequence without padding",
    "row": "pairs packed into one sequence without padding",
    "batch": "pairs in one padded batch",
    "lengths": "pairs with equally long prompts in one batch",
}

# Lengths of prompt, chosen and rejected: uneven prompts, two of equal length, and completions of
# one and two tokens, of which zero and one go through the backbone.
TEST_LENGTHS = ((5, 1, 4), (9, 6, 2), (5, 3, 1))


@dataclass(frozen=True)
class ScorerChoice:
    """The scorer of a model (function that computes log-probs), and why it was chosen."""

    scorer: Scorer
    forward_only: Scorer  # same values without gradients, for reference and evaluation
    name: ScorerName
    reason: str
    packing: Packing | None = None  # batching strategy of the trie or shared scorer
    log_weights: Scorer = plain_log_weights  # mean log-weights of completions, for WPO
    generation: GenerationMatch | None = None  # None if generation fails
    passes_at_once: int = 1  # 2: every other pass is computed by a second process
    ranks: Ranks = SINGLE_PROCESS  # processes that share the passes

    @property
    def cost(self) -> CountTokens:
        """Function that counts the tokens of a forward pass of the scorer."""
        return padded_row_tokens if self.packing is None else TOKEN_COUNTS[self.packing]


class _NotEquivalentError(Exception):
    """Error raised if a scorer differs from the plain scorer; the message says why."""


def select_scorer(
    model: nn.Module,
    *,
    vocab_size: int,
    requested: ScorerSetting = "auto",
    packings: Sequence[Packing] = (),
    ld_alpha: float | None = None,
    max_length: int | None = None,
) -> ScorerChoice:
    """Choose the scorer of `model`, to which adapters are attached.

    The model's weights, its training or evaluation mode and MLX's random state stay unchanged. If
    its log-probs without KV caches are not those of generation, it uses caches from then on.

    Args:
        requested: name of a scorer; `auto` takes the first equivalent one of trie, shared and
            plain.
        packings: batching strategies to try; the first equivalent one is taken. The default is
            `default_packings(requested)`.
        ld_alpha: weight of the tokens beyond the length of the pair's shorter completion (LD-DPO).
        max_length: longest sequence that will be scored; None means any length.

    Raises:
        ModelError: the requested scorer is not equivalent for this model, not even the plain
            scorer can be differentiated, or none agrees with generation.
    """
    match = None
    try:
        match = match_generation(model, vocab_size=vocab_size, max_length=max_length)
        note = match.describe()
    except NotComparableError as error:
        note = f"log-probs could not be compared with generation ({error})"
    choice = _select(model, vocab_size, requested, packings, ld_alpha)
    return replace(choice, reason=f"{choice.reason}; {note}", generation=match)


def _select(
    model: nn.Module,
    vocab_size: int,
    requested: ScorerSetting,
    packings: Sequence[Packing],
    ld_alpha: float | None,
) -> ScorerChoice:
    """Choose the scorer of a model whose plain scorer is known to be right."""
    plain = partial(plain_scorer, ld_alpha=ld_alpha) if ld_alpha is not None else plain_scorer
    if requested == "plain":
        return _plain_choice(plain, "as requested")
    failures: dict[Packing, str] = {}
    for packing in packings or default_packings(requested):
        if is_sharded(model) and packing not in PACKED_LAYOUTS:
            # All ranks must gather the weights of the blocks equally often.
            failures[packing] = "its passes run the blocks more or less often, by the pairs"
            continue
        try:
            choice = _shared_choice(model, vocab_size, packing, plain, ld_alpha)
        except _NotEquivalentError as error:
            failures[packing] = str(error)
            continue
        why_not = f"; not `trie`: {failures['trie']}" if "trie" in failures else ""
        return replace(choice, reason=choice.reason + why_not)
    _check_trainable(model, vocab_size)
    last = list(failures.values())[-1]
    if requested != "auto":
        raise ModelError(
            f"the scorer `{requested}` is not exact for this model ({last}); leave it at `auto`"
        )
    return _plain_choice(plain, last)


def default_packings(requested: ScorerSetting) -> tuple[Packing, ...]:
    """Return the batching strategies to try for a value of the setting `scorer`, in their order.

    The CPU does not try `batch`, which costs more there than it saves.
    """
    shared: tuple[Packing, ...] = ("row", "lengths") if is_cpu() else ("row", "batch", "lengths")
    return {"auto": ("trie", *shared), "trie": ("trie",), "shared": shared}.get(requested, ())


def _check_trainable(model: nn.Module, vocab_size: int) -> None:
    """Raise `ModelError` if the plain scorer cannot be differentiated with this model.

    This check reports a model that cannot be trained before the first step.
    """
    plain = _pair_logps(plain_scorer, random_pairs(TEST_LENGTHS, vocab_size))
    try:
        relative_errors(model, plain, plain)
    except UNSUPPORTED_ERRORS as error:
        raise ModelError(
            f"the model cannot be trained with these adapters ({_describe_error(error)}); "
            "name other layers in `lora_target_modules`, or use another model"
        ) from error


def _describe_error(error: Exception) -> str:
    """Return the type and the message of an error in one line."""
    return f"{type(error).__name__}: {reason(error)}".rstrip(".")


def _plain_choice(scorer: Scorer, why: str) -> ScorerChoice:
    """Return a `ScorerChoice` of the plain scorer with the reason `why`."""
    return ScorerChoice(scorer, scorer, "plain", why)


def _shared_choice(
    model: nn.Module, vocab_size: int, packing: Packing, plain: Scorer, ld_alpha: float | None
) -> ScorerChoice:
    """Return a `ScorerChoice` of the scorer with `packing` after comparing it with `plain`.

    Raises:
        _NotEquivalentError: the two scorers differ, or the model does not support that packing.
    """
    training, forward_only = (
        make_shared_scorer(
            vocab_size=vocab_size, gradients=gradients, packing=packing, ld_alpha=ld_alpha
        )
        for gradients in (True, False)
    )
    is_trie = packing == "trie"
    pairs = branching_pairs(vocab_size) if is_trie else random_pairs(TEST_LENGTHS, vocab_size)
    expected = _pair_logps(plain, pairs)
    try:
        if packing in PACKED_LAYOUTS:
            count_attention_caches(model)  # before a pass is computed for nothing
        if packing == "batch" and any(isinstance(c, CacheList) for c in make_prompt_cache(model)):
            # Such models may select whole blocks of keys, which the padding of batched caches
            # shifts. Only long sequences show the error.
            raise _NotEquivalentError("its layers have caches of several types")
        errors = relative_errors(model, _pair_logps(training, pairs), expected)
        _check_tolerance(model, "", errors)
        error = value_error(model, _pair_logps(forward_only, pairs), expected)
        _check_tolerance(model, " without gradients", RelativeErrors(error, 0.0))
        if window := shortest_window(model):
            long_prompt = _long_prompt_functions(window, vocab_size, packing)
            _check_tolerance(model, " past the window", relative_errors(model, *long_prompt))
    except UnsupportedModelError as error:
        raise _NotEquivalentError(str(error)) from error
    except UNSUPPORTED_ERRORS as error:
        raise _NotEquivalentError(_describe_error(error)) from error
    description = _describe_choice(model, errors, packing)
    log_weights = make_shared_log_weights(vocab_size=vocab_size, packing=packing)
    name: ScorerName = "trie" if is_trie else "shared"
    return ScorerChoice(training, forward_only, name, description, packing, log_weights)


def _describe_choice(model: nn.Module, errors: RelativeErrors, packing: Packing) -> str:
    """Return a description of a scorer: its batching strategy and its measured errors."""
    text = f"{PACKINGS[packing]}; verified against the plain scorer (values to {errors.values:.0e}"
    text += f", gradients to {errors.gradients:.0e})" if errors.gradients else ")"
    parts = split_backbone(model)
    with mode_without_dropout(model, training=False):
        hidden = parts.hidden_states(mx.zeros((1, 1), mx.int32))
    if parts.logits(hidden) is hidden:
        text += "; the head is part of the backbone and runs on every token"
    if trainable_head_parameters(parts):
        text += "; the head runs again for gradients, because its weights may be trained"
    return text


def _check_tolerance(model: nn.Module, case: str, errors: RelativeErrors) -> None:
    """Raise `_NotEquivalentError` if an error is NaN or exceeds the tolerance for the dtype."""
    for name, error, limit in zip(("values", "gradients"), errors, tolerance(model), strict=True):
        if not error <= limit:  # also for NaN
            raise _NotEquivalentError(f"{name}{case} differ from the plain scorer's by {error:.0e}")


def _pair_logps(scorer: Scorer, pairs: Sequence[TokenizedPair]) -> RowFunction:
    """Return a function that computes the log-probs of the pairs with `scorer`. (2B, 1)

    The returned function takes the model as its argument.
    """
    return lambda model: mx.concatenate([*scorer(model, pairs)])[:, None]


def _long_prompt_functions(
    window: int, vocab_size: int, packing: Packing
) -> tuple[RowFunction, RowFunction]:
    """Return two functions that compute hidden states after a prompt longer than the window. (n, D)

    The first function runs the shared prompt once, the second runs whole sequences. The LM head is
    left out, because the logits of such long sequences might not fit into memory. For the trie, the
    completions branch after two tokens.
    """
    [pair] = random_pairs([(window + 3, 4, 2)], vocab_size)
    if packing == "trie":
        pair = replace(pair, rejected=pair.chosen[:2] + pair.rejected)

    def from_whole_rows(model: nn.Module) -> mx.array:
        rows = [mx.array([pair.prompt + c[:-1]]) for c in (pair.chosen, pair.rejected)]
        start = len(pair.prompt) - 1
        parts = split_backbone(model)
        caches = [empty_caches(model) if computes_with_caches(model) else None for _ in rows]
        hidden = map(parts.hidden_states, rows, caches)
        return mx.concatenate([row[0, start:] for row in hidden])

    return partial(_predicting_hidden_states, packing=packing, pairs=[pair]), from_whole_rows


def _predicting_hidden_states(
    model: nn.Module, *, packing: Packing, pairs: Sequence[TokenizedPair]
) -> mx.array:
    """Return the hidden states that predict the tokens of all completions. (n, D)

    The rows are in the order of `pairs`: first all chosen completions, then all rejected ones.
    """
    parts = split_backbone(model)
    layout = PACKED_LAYOUTS.get(packing)
    if layout is None:
        return completion_hidden_states(model, parts, pairs)
    sequence = layout(pairs)
    head = sequence.head_rows()
    hidden = packed_hidden_states(model, parts, sequence)[head.indices]
    return hidden if head.rows is None else hidden[head.rows]
