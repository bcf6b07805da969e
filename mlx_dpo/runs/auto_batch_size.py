"""Choose micro-batch size and gradient checkpointing automatically, from measured memory."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.training import PassLimit
from mlx_dpo.data.batches.micro_batches import first_steps, largest_micro_batch, micro_batches
from mlx_dpo.data.batches.token_counts import shares_prefixes
from mlx_dpo.data.columns import LENGTHS, column, longest_pairs, longest_row
from mlx_dpo.errors import ConfigError
from mlx_dpo.models.device import device_kind
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.parallel.second_process import PASSES_AT_ONCE, can_compute_two_passes
from mlx_dpo.phases import phase
from mlx_dpo.profiling import memory
from mlx_dpo.profiling.device_memory import MemoryBudget, available_memory
from mlx_dpo.profiling.profile import (
    REPEATS,
    PassProfile,
    TrainingPass,
    extrapolate_from_short_texts,
    profile_training_pass,
)
from mlx_dpo.runs.build import (
    choose_scorer,
    make_order,
    optimizer_state_bytes,
    with_recorded_scorer,
)
from mlx_dpo.runs.distributed.peers import Peers
from mlx_dpo.runs.distributed.shard_base import check_same_scorer, compare_with_whole
from mlx_dpo.runs.inputs import Inputs
from mlx_dpo.scoring.select_scorer import ScorerChoice
from mlx_dpo.scoring.sharded.gathered_blocks import is_sharded, measuring
from mlx_dpo.training.grad_cache import skip_kl_completions
from mlx_dpo.training.objective import Objective
from mlx_dpo.types import TokenizedPair
from mlx_dpo.units import format_bytes

# Pairs per pass. On a GPU larger passes gain little beyond a few thousand tokens.
SIZES = {"cpu": (2, 1), "metal": (8, 4, 2, 1), "cuda": (8, 4, 2, 1)}
# On the CPU a pass over short pairs costs mostly the start of its operations (measured: passes of 8
# pairs of 54 tokens take three quarters of the time of 2; with 190 tokens they gain nothing), and
# larger passes run fewer tokens if their texts share prefixes.
LARGER_CPU_SIZES = (8, 4)
SHORT_PASS = 450  # tokens that the layers run
FEWER_TOKENS = 0.9  # share of the tokens that passes of the usual size run
SIZED_PAIRS = 64  # of the first steps
BOUND_MARGIN = 1.5  # a memory bound that fits this many times needs no measurement
MAX_GRADIENT_BYTES = 2**28  # of gradients that a second process sends
MIN_EXTRAPOLATED = 256  # tokens of the longest example; passes over shorter ones are quick
AUTOMATIC_SETTINGS = ("micro_batch_size", "recompute")

Pairs = Sequence[TokenizedPair]


@dataclass(frozen=True)
class MicroBatchFit:
    """Settings with a chosen micro-batch size, and the memory of an optimizer step with these."""

    config: DPOConfig
    bytes: int
    room: MemoryBudget
    is_bound: bool = False  # `bytes` is too high; no pass over whole texts was measured
    instead_of: "MicroBatchFit | None" = None  # the preferred settings, which do not fit
    cost: PassProfile | None = None
    is_recorded: bool = False  # read from `run.json`: chosen when the run began
    passes_at_once: int = 1  # 2: every other pass is computed by a second process
    two_need_more: bool = False  # two passes at once would need more memory than there is

    @property
    def fits(self) -> bool:
        """Whether an optimizer step fits into memory; always true for a resumed run."""
        return self.is_recorded or self.bytes <= self.room.bytes

    def automatic_settings(self) -> dict[str, Any]:
        """Return the settings that were chosen automatically, by name, for `run.json`."""
        return {name: getattr(self.config, name) for name in AUTOMATIC_SETTINGS}

    def describe(self) -> str:
        """Return the text, printed before training, with the chosen settings and the reason."""
        if self.is_recorded:
            return f"as when the run began: {_describe(self.config)}"
        about = "at most about" if self.is_bound else "about"
        text = f"{about} {format_bytes(self.bytes, is_estimate=True)} at the longest pairs"
        text += f", of {format_bytes(self.room.bytes, is_estimate=True)} ({self.room.description})"
        if self.cost is not None and self.cost.text_share < 1:
            text += ", extrapolated from shorter ones"
        if self.instead_of is not None:
            text += f"; {_describe(self.config)}, because {_describe(self.instead_of.config)} "
            text += f"would need {format_bytes(self.instead_of.bytes, is_estimate=True)}"
        if self.passes_at_once > 1:
            text += "; two passes at once, each in its own process, need up to twice as much"
        if self.two_need_more:
            text += "; one pass at a time, because two at once may need twice as much"
        return text if self.fits else f"{text}: more than there is, started by --force"


def choose_passes(
    inputs: Inputs,
    config: DPOConfig,
    earlier: Mapping[str, Any] | None,
    *,
    force: bool,
    peers: Peers,
) -> tuple[ScorerChoice, MicroBatchFit]:
    """Choose the scorer and the micro-batch size of a run, the same on all of its ranks.

    A resumed run keeps those that it began with. The adapters must be attached already.

    Args:
        inputs: base model and pairs.
        config: settings of the run.
        earlier: run record (content of `run.json`) of a run that is resumed.
        force: accept settings that do not fit into memory.
        peers: the ranks of the run.

    Returns:
        The scorer, and the completed settings.

    Raises:
        ConfigError: no micro-batch size that the settings allow fits into memory.
        SharedError: the ranks have chosen different scorers.
    """
    compare_with_whole(inputs.base, peers)
    if is_sharded(inputs.base.model):
        config = replace(config, recompute=True)
    choice = _choose_shared_scorer(inputs, config, earlier, peers)
    check_same_scorer(inputs.base, choice.name, earlier)
    config = with_recorded_scorer(config, choice, earlier)
    room = available_memory().shared_by(peers.on_this_host)
    fitted = _choose_micro_batch_size(inputs, config, choice, earlier, room)
    with peers.sharing_errors():
        if not force:
            can_shard = not peers.ranks.is_alone and not is_sharded(inputs.base.model)
            _check_fits(fitted, longest_row(inputs.train), can_shard=can_shard)
    if fitted.config.recompute and not config.recompute:
        choice = _choose_shared_scorer(inputs, fitted.config, earlier, peers)
    return replace(choice, passes_at_once=fitted.passes_at_once), fitted


def _choose_shared_scorer(
    inputs: Inputs, config: DPOConfig, earlier: Mapping[str, Any] | None, peers: Peers
) -> ScorerChoice:
    choice = choose_scorer(inputs.base, config, earlier)
    name = choice.name if choice.packing is None else f"{choice.name} ({choice.packing})"
    peers.check_same({"the scorer": name}, "choose one with --scorer")
    return replace(choice, ranks=peers.ranks)


def _choose_micro_batch_size(
    inputs: Inputs,
    config: DPOConfig,
    choice: ScorerChoice,
    earlier: Mapping[str, Any] | None,
    room: MemoryBudget,
) -> MicroBatchFit:
    """Return the settings with a micro-batch size: the recorded one, or the first that fits."""
    recorded = (earlier or {}).get("automatic_settings")
    if recorded is not None:  # a resumed run continues bit for bit
        settings = {name: recorded[name] for name in AUTOMATIC_SETTINGS if name in recorded}
        fit = MicroBatchFit(replace(config, **settings), 0, room, is_recorded=True)
        at_once = (earlier or {}).get("passes_at_once") or 1
        is_possible = can_compute_two_passes() and choice.ranks.is_alone
        return replace(fit, passes_at_once=at_once if is_possible else 1)
    with phase("Estimating memory"):
        return fit_micro_batch_size(
            inputs.base, config, choice, inputs.train, room=room, measure=False
        )


def _with_passes_at_once(
    fitted: MicroBatchFit, base: LoadedModel, choice: ScorerChoice
) -> MicroBatchFit:
    """Return the settings with two passes at once, where they are possible and fit into memory.

    With several ranks each computes one pass at a time. Gradients pass between the processes, which
    takes long for all weights of a model.
    """
    is_large = memory.trainable_bytes(base.model) > MAX_GRADIENT_BYTES
    if not can_compute_two_passes() or not choice.ranks.is_alone or is_large:
        return fitted
    if PASSES_AT_ONCE * fitted.bytes > fitted.room.bytes:
        return replace(fitted, two_need_more=True)
    return replace(fitted, passes_at_once=PASSES_AT_ONCE)


def longest_micro_batch(
    config: DPOConfig, choice: ScorerChoice, pairs: Pairs
) -> list[TokenizedPair]:
    """Return the micro-batch that needs most memory: the longest pairs that fit into one.

    The micro-batch contains at most as many pairs as an optimizer step.
    """
    if config.labelled or shares_prefixes(choice.cost):  # by all tokens, not by the longer text
        parts = 2 if config.labelled else 3
        tokens = column(pairs, LENGTHS)[:, :parts].sum(axis=1)
        at = np.argsort(tokens, kind="stable")[-config.batch_size :].tolist()
        longest = [pairs[i] for i in at]
    else:
        longest = longest_pairs(config.batch_size, pairs)
    if config.labelled:  # KL completions have one token in passes with gradients
        longest = skip_kl_completions(longest)
    return largest_micro_batch(longest, config.pass_limit, cost=choice.cost)


def profile_micro_batch(
    base: LoadedModel,
    config: DPOConfig,
    choice: ScorerChoice,
    pairs: Pairs,
    *,
    repeats: int = REPEATS,
) -> PassProfile:
    """Measure time and memory of a forward and backward pass over `pairs`.

    The adapters must be attached already. Each pass runs `repeats` times.
    """
    step = TrainingPass(
        scorer=choice.scorer,
        objective=Objective(config),
        accumulates=_takes_several_passes(config, choice, pairs),
        recompute=bool(config.recompute),
    )
    with measuring(base.model):
        return profile_training_pass(
            base.model, pairs, step, memory=available_memory().bytes, repeats=repeats
        )


def _takes_several_passes(config: DPOConfig, choice: ScorerChoice, pairs: Pairs) -> bool:
    """Return whether a step may need more passes than the largest one, which is over `pairs`."""
    # The last of the pairs may have been cut to fit. A step of whole lists may have more pairs than
    # `batch_size`.
    is_cut = config.micro_batch_tokens is not None and shares_prefixes(choice.cost)
    return is_cut or config.listwise or config.batch_size > len(pairs)


def fit_micro_batch_size(
    base: LoadedModel,
    config: DPOConfig,
    choice: ScorerChoice,
    pairs: Pairs,
    *,
    room: MemoryBudget,
    measure: bool,
) -> MicroBatchFit:
    """Return the first candidate settings that fit into memory, or the last if none fit.

    Large micro-batches are tried first. Gradient checkpointing is tried last, when a single pair
    does not fit without it. With several ranks, settings must fit on each of them.

    Args:
        room: memory that training may use.
        measure: whether to measure passes over whole texts even if it is known to be needless: if a
            rough upper bound fits, or memory that is extrapolated from passes over short texts.
    """
    preferred, *others = candidate_settings(config, _larger_sizes(config, choice, pairs))
    longest = longest_micro_batch(preferred, choice, pairs)
    state = optimizer_state_bytes(base.model, config)
    bound = memory.step_peak_upper_bound(
        base.model, base.config, longest, vocab_size=base.vocab_size, optimizer_bytes=state
    )
    if not measure and bound is not None and _all_have(choice, BOUND_MARGIN * bound, room):
        fit = MicroBatchFit(preferred, bound, room, is_bound=True)
        return _with_passes_at_once(fit, base, choice)
    if not measure and max(map(len, longest)) >= MIN_EXTRAPOLATED:
        run = partial(profile_micro_batch, base, preferred, choice, repeats=1)
        pass_bytes = extrapolate_from_short_texts(run, longest)
        peak = memory.step_peak_bytes(base.model, pass_bytes or 0, state)
        if _all_have(choice, math.inf if pass_bytes is None else BOUND_MARGIN * peak, room):
            fit = MicroBatchFit(preferred, peak, room, is_bound=True)
            return _with_passes_at_once(fit, base, choice)
    preferred_fit = fit = _profiled_fit(base, preferred, choice, pairs, room)
    for candidate in others:
        if _all_have(choice, fit.bytes, room):
            break
        next_fit = _profiled_fit(base, candidate, choice, pairs, room)
        fit = replace(next_fit, instead_of=preferred_fit)
    return _with_passes_at_once(fit, base, choice)


def _all_have(choice: ScorerChoice, needed: float, room: MemoryBudget) -> bool:
    """Return whether each rank has the memory that it needs, in bytes."""
    return not choice.ranks.any("memory", needed > room.bytes)


def _larger_sizes(config: DPOConfig, choice: ScorerChoice, pairs: Pairs) -> Sequence[int]:
    """Return the micro-batch size on the CPU if one larger than SIZES pays, otherwise nothing.

    It pays if such passes are short, or share prefixes that smaller passes run several times. An
    optimizer step keeps at least two passes, which two processes may compute at once. With the
    other scorers and for KTO the sizes are those of earlier versions.
    """
    is_set = config.micro_batch_size is not None or config.micro_batch_tokens is not None
    is_usual = is_set or config.labelled or not shares_prefixes(choice.cost)
    if device_kind() != "cpu" or is_usual or not pairs:
        return ()
    first = first_steps(make_order(config, pairs).epoch_steps(0), SIZED_PAIRS)
    steps = [[pairs[i] for i in indices] for indices in first]

    def pass_tokens(size: int) -> list[int]:
        limit, cost = PassLimit(size, None), choice.cost
        return [
            cost([step[i] for i in indices]).total
            for step in steps
            for indices in micro_batches(range(len(step)), step, limit, cost=cost)
        ]

    usual = sum(pass_tokens(max(SIZES["cpu"])))
    most = max(map(len, steps)) // 2
    for size in LARGER_CPU_SIZES:
        tokens = pass_tokens(size)
        is_short = sum(tokens) <= SHORT_PASS * len(tokens)
        if size <= most and (is_short or sum(tokens) <= FEWER_TOKENS * usual):
            return [size]
    return ()


def candidate_settings(config: DPOConfig, larger: Sequence[int] = ()) -> Iterator[DPOConfig]:
    """Yield copies of the settings with each allowed micro-batch size, the preferred first.

    If `recompute` is not set, all sizes without gradient checkpointing come before those with it.

    Args:
        larger: micro-batch sizes to try before those of the device, without checkpointing.
    """
    sizes: Sequence[int | None] = (config.micro_batch_size,)
    if config.micro_batch_size is None and config.micro_batch_tokens is None:
        sizes = sorted({min(size, config.batch_size) for size in SIZES[device_kind()]})[::-1]
        if not config.recompute:
            yield from (replace(config, micro_batch_size=n, recompute=False) for n in larger)
    for recompute in (False, True) if config.recompute is None else (config.recompute,):
        for size in sizes:
            yield replace(config, micro_batch_size=size, recompute=recompute)


def _check_fits(fitted: MicroBatchFit, longest: int, *, can_shard: bool) -> None:
    """Raise `ConfigError` if the longest pairs do not fit into memory.

    The message says what to change.

    Args:
        longest: number of tokens of the longest example, for the message.
        can_shard: whether the weights could be sharded over the ranks, and are not.
    """
    if fitted.fits:
        return
    config = fitted.config
    less = [
        *(["--shard-base"] if can_shard and config.fine_tune_type != "full" else []),
        f"--max-length below {longest}",
        *(["--recompute"] if not config.recompute else []),
        *(["--micro-batch-size 1"] if config.pass_limit.pairs != 1 else []),
        *(["--bits 4"] if config.bits is None and device_kind() != "cpu" else []),
        "fewer --num-layers",
    ]
    needed = format_bytes(fitted.bytes, is_estimate=True)
    available = format_bytes(fitted.room.bytes, is_estimate=True)
    raise ConfigError(
        f"the longest pairs do not fit into memory, {_describe(config)} "
        f"({needed} needed, {available} is "
        f"{fitted.room.description}); use {', '.join(less)} or a smaller model, "
        "or start anyway with --force"
    )


def _profiled_fit(
    base: LoadedModel, config: DPOConfig, choice: ScorerChoice, pairs: Pairs, room: MemoryBudget
) -> MicroBatchFit:
    """Measure an optimizer step with these settings; return the settings and their peak memory."""
    cost = profile_micro_batch(base, config, choice, longest_micro_batch(config, choice, pairs))
    peak = memory.step_peak_bytes(base.model, cost.bytes, optimizer_state_bytes(base.model, config))
    return MicroBatchFit(config, peak, room, cost=cost)


def _describe(config: DPOConfig) -> str:
    """Describe the micro-batch size and the use of gradient checkpointing as text."""
    pairs, tokens = config.pass_limit
    size = f"{tokens:,} tokens" if pairs is None else "1 pair" if pairs == 1 else f"{pairs} pairs"
    return f"{size} per pass{', recomputed' if config.recompute else ''}"
