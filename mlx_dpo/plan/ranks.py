"""Memory, traffic and speed of a run on several ranks, each on a machine of its own."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.nn as nn

from mlx_dpo.adapters.targets import block_paths
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.distributed import costs
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.profiling import memory
from mlx_dpo.profiling.device_memory import MemoryBudget
from mlx_dpo.runs.auto_batch_size import MicroBatchFit
from mlx_dpo.runs.distributed.shard_base import LARGEST_SHARE
from mlx_dpo.units import format_bytes


@dataclass(frozen=True)
class LinkEstimate:
    """What a step takes with one kind of link between the machines.

    The fields are keys of `mlx-dpo plan --json`.
    """

    name: str
    seconds: float  # per step, in which ranks send and do not compute
    speedup: float  # against one rank
    exactness: float  # share of the step that exact sums take beyond what an all-reduce would take


@dataclass(frozen=True)
class RanksEstimate:
    """Estimate of a run on several ranks. The fields are keys of `mlx-dpo plan --json`.

    The averages are over the first steps of the run.
    """

    ranks: int
    shard_base: bool  # whether each rank has to hold a part of the frozen weights only
    fits: bool
    memory: int  # of each rank in bytes, in the way that `shard_base` says
    memory_whole: int  # with all frozen weights on each rank
    passes: float  # per step
    rounds: float  # per step
    idle: float  # share of the turns in which a rank has no pass
    sent: int  # bytes per step and rank
    sent_by_all_reduce: int  # bytes per step and rank, with a sum that is not exact
    bound: float  # speed-up if sending took no time
    links: tuple[LinkEstimate, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as values for JSON, in bytes and seconds."""
        return asdict(self)


@dataclass(frozen=True)
class RanksFit:
    """The passes of a run on several ranks, and the memory of a rank without what ranks exchange.

    Attributes:
        fitted: settings and memory, of which `absent` is taken off.
        whole_bytes: memory of a rank that holds all frozen weights, with what ranks exchange.
        absent: bytes of frozen weights that a rank does not hold; 0 if it holds all.
    """

    fitted: MicroBatchFit
    whole_bytes: int
    absent: int


@dataclass(frozen=True)
class FrozenWeights:
    """The frozen weights of a model in bytes, as `--shard-base` shards them."""

    shared: int  # in the blocks: each rank holds a part
    whole: int  # embeddings, head and norms outside of the blocks
    largest_block: int

    @classmethod
    def of(cls, model: nn.Module) -> "FrozenWeights":
        """Count the frozen weights of `model`, with adapters attached or without."""
        trained = set(named_arrays(model.trainable_parameters()))
        sizes = {
            name: array.nbytes
            for name, array in named_arrays(model.parameters()).items()
            if name not in trained
        }
        blocks = [
            sum(size for name, size in sizes.items() if name.startswith(f"{path}."))
            for path in block_paths(model)
        ]
        return cls(sum(blocks), sum(sizes.values()) - sum(blocks), max(blocks))

    def absent_from(self, ranks: int) -> int:
        """Return the bytes that a rank does not hold, while it holds a whole block."""
        held = costs.held_weight_bytes(ranks, self.shared, self.whole, self.largest_block)
        return max(0, self.shared + self.whole - held)


def fit_ranks(
    ranks: int,
    model: nn.Module,
    config: DPOConfig,
    fit: Callable[[DPOConfig, MemoryBudget], MicroBatchFit],
    room: MemoryBudget,
) -> RanksFit:
    """Choose the passes of a run on `ranks` ranks, and whether the frozen weights are sharded.

    Args:
        fit: chooses the passes of a run in a single process, with so much memory.
        room: memory of each rank.
    """
    buffers = costs.exchange_buffers(ranks, memory.trainable_bytes(model))
    whole = fit(config, replace(room, bytes=room.bytes - buffers))
    if ranks == 1:
        return RanksFit(whole, whole.bytes, 0)
    frozen = FrozenWeights.of(model)
    absent = frozen.absent_from(ranks)
    # `train` shards large weights by itself; `plan` also names `--shard-base` where it must be set.
    is_large = frozen.shared + frozen.whole > LARGEST_SHARE * room.bytes
    is_wanted = config.shard_base
    if is_wanted is None:
        is_wanted = config.recompute is not False and (is_large or not whole.fits)
    if not is_wanted or not absent:
        return RanksFit(_on_ranks(whole, whole.bytes, room), whole.bytes + buffers, 0)
    # Sharded weights are gathered again in the backward pass, with recomputed activations.
    more = replace(room, bytes=room.bytes - buffers + absent)
    sharded = fit(replace(config, recompute=True), more)
    chosen = _on_ranks(sharded, sharded.bytes - absent, room)
    return RanksFit(chosen, whole.bytes + buffers, absent)


def _on_ranks(fitted: MicroBatchFit, size: int, room: MemoryBudget) -> MicroBatchFit:
    """Return the settings with memory of a rank, which computes one pass at a time."""
    return replace(fitted, bytes=size, room=room, passes_at_once=1, two_need_more=False)


def estimate_ranks(
    ranks: int,
    model: nn.Module,
    fit: RanksFit,
    steps: Sequence[Sequence[int]],
    step_seconds: float,
) -> RanksEstimate:
    """Estimate a run on `ranks` ranks.

    Args:
        model: the policy, with adapters attached.
        fit: the passes, and whether the frozen weights are sharded.
        steps: tokens of each pass, for the first steps.
        step_seconds: time of an average step in a single process.
    """
    frozen, gradient = FrozenWeights.of(model), memory.trainable_bytes(model)
    needed = fit.fitted.bytes + costs.exchange_buffers(ranks, gradient)
    sent = _mean([costs.gathered_gradient_bytes(len(step), ranks, gradient) for step in steps])
    all_reduced = costs.all_reduced_gradient_bytes(ranks, gradient)
    shared = frozen.shared if fit.absent else 0
    forwards = fit.fitted.config.extra_forward_passes
    moved = _mean(
        [costs.gathered_weight_bytes(len(step), ranks, shared, forwards) for step in steps]
    )
    share, passes = costs.busiest_share(steps, ranks), [len(step) for step in steps]
    return RanksEstimate(
        ranks=ranks,
        shard_base=fit.absent > 0,
        fits=needed <= fit.fitted.room.bytes,
        memory=needed,
        memory_whole=fit.whole_bytes,
        passes=sum(passes) / len(passes),
        rounds=sum(costs.count_rounds(count, ranks) for count in passes) / len(passes),
        idle=costs.idle_share(passes, ranks),
        sent=round(sent + moved),
        sent_by_all_reduce=round(all_reduced + moved),
        bound=1 / share,
        links=tuple(
            LinkEstimate(
                name=link.name,
                seconds=(sent + moved) / link.bytes_per_second,
                speedup=costs.speedup(step_seconds, share, sent + moved, link),
                exactness=costs.exactness_share(
                    step_seconds * share, sent + moved, all_reduced + moved, link
                ),
            )
            for link in costs.LINKS
        ),
    )


def describe_ranks(
    estimate: RanksEstimate, fitted: MicroBatchFit, pairs_that_fit: int
) -> list[str]:
    """Return the lines that the terminal shows for an estimate.

    Args:
        pairs_that_fit: how many of the longest pairs fit into one pass.
    """
    ranks = estimate.ranks
    idle = f"; {estimate.idle:.0%} of the ranks' turns have no pass" if estimate.idle else ""
    alone = "one rank with room for the model" if estimate.shard_base else "one rank"
    lines = [
        f"{ranks}, each on a machine of its own; {estimate.passes:.2g} pass"
        f"{'es' * (estimate.passes != 1)} per step, in {estimate.rounds:.2g} round"
        f"{'s' * (estimate.rounds != 1)}{idle}",
        _describe_memory(estimate, fitted),
        f"each rank sends {format_bytes(estimate.sent)} per step; by the tokens of the passes, "
        f"{ranks} ranks are at most {estimate.bound:.2f} times as fast as {alone}",
        *[
            f"{link.name}: {link.seconds:.2g} s to send per step, {link.speedup:.2f} times as fast "
            f"as {alone}"
            for link in estimate.links
        ],
    ]
    return lines + _warn_of_exactness(estimate, fitted, pairs_that_fit) + _warn_of_idle(estimate)


def _describe_memory(estimate: RanksEstimate, fitted: MicroBatchFit) -> str:
    """Describe the memory of a rank, and whether the frozen weights have to be sharded."""
    room = f"{format_bytes(fitted.room.bytes, is_estimate=True)} ({fitted.room.description})"
    needed = format_bytes(estimate.memory, is_estimate=True)
    whole = format_bytes(estimate.memory_whole, is_estimate=True)
    text = f"{needed} per rank, of {room}"
    if estimate.shard_base:
        text += f", with --shard-base; without it {whole}"
    return text if estimate.fits else f"more than there is: {text}"


def _warn_of_exactness(
    estimate: RanksEstimate, fitted: MicroBatchFit, pairs_that_fit: int
) -> list[str]:
    """Return a warning if exact sums take more than a tenth of a step, and what makes it less."""
    slow = [link for link in estimate.links if link.exactness > costs.EXACTNESS_LIMIT]
    if not slow:
        return []
    shares = " and ".join(f"{link.exactness:.0%} of a step with {link.name}" for link in slow)
    wanted = min(-(-fitted.config.batch_size // estimate.ranks), pairs_that_fit)
    size = fitted.config.micro_batch_size
    if size is not None and wanted > size:
        remedy = f"fewer, larger passes send less, such as --micro-batch-size {wanted}"
    else:
        remedy = "fewer, larger passes would send less, but are not possible here"
    return [f"compared with an all-reduce, exact sums cost {shares}: {remedy}"]


def _warn_of_idle(estimate: RanksEstimate) -> list[str]:
    if estimate.passes >= estimate.ranks:
        return []
    return [
        "steps have fewer passes than there are ranks: a smaller --micro-batch-size or a larger "
        "--batch-size gives each rank a pass"
    ]


def _mean(numbers: Sequence[int]) -> float:
    return sum(numbers) / len(numbers)
