"""Figures of a benchmark, computed from measured seconds and counts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from mlx_dpo.profiling.bench.device_speed import CopySpeed, ProductSpeed

FORMAT = 1  # of the JSON object; raised if a key changes its meaning or goes away


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of one or more values."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Round:
    """Seconds of one round of measurements, over the same pairs each.

    Attributes:
        step: a whole optimizer step.
        gradients: part of `step` until all gradients are there.
        waiting: part of `gradients` in which Python waited for the device.
        reference: log-probs of the pairs without adapters and gradients.
        evaluation: log-probs of the pairs with adapters, without gradients.
    """

    step: float
    gradients: float
    waiting: float
    reference: float
    evaluation: float


@dataclass(frozen=True)
class Work:
    """Tokens through the layers and FLOPs over the pairs of a step, as computed by the scorer."""

    pairs: int
    pairs_per_pass: int
    passes_at_once: int
    tokens: int
    step_flops: int
    reference_flops: int  # without adapters
    evaluation_flops: int


@dataclass(frozen=True)
class PassSpeed:
    """Speed of one kind of pass; rates are those of the median time."""

    seconds: Spread
    pairs_per_second: float
    tokens_per_second: float
    flops_per_second: float
    share_of_products: float  # of the fastest measured matrix product in the same dtype


@dataclass(frozen=True)
class TimeShares:
    """Shares of the time of an epoch with one evaluation; they add up to 1."""

    build: float  # Python builds graphs, and the device may idle
    device: float  # Python waits for the device in passes with gradients
    update: float  # optimizer update, clipping and metrics of a step
    evaluation: float  # held-out pairs


@dataclass(frozen=True)
class Sharing:
    """Tokens of a set of pairs as whole sequences, and tokens that the scorer computes."""

    name: str
    pairs: int
    whole: int
    computed: int

    @property
    def saved(self) -> float:
        """Share of the tokens that are not computed, from 0 to 1; negative with more padding."""
        return 1 - self.computed / self.whole


@dataclass(frozen=True)
class ModelFacts:
    """The measured model: its name, size, dtype and scorer."""

    name: str
    parameters: int
    layers: int
    dtype: str
    bits: int | None  # of the weights as they are held; None if they are not quantized
    scorer: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Figures:
    """All results of a benchmark. `to_dict` has them as values for JSON."""

    model: ModelFacts
    lengths: Sequence[int]  # tokens of prompt, chosen and rejected
    work: Work
    rounds: Sequence[Round]
    products: Sequence[ProductSpeed]
    copy: CopySpeed
    generated_tokens_per_second: float
    sharing: Sequence[Sharing]
    peak_bytes: int
    held_out_fraction: float
    seconds: float  # that the benchmark took

    @property
    def product_flops(self) -> float:
        """FLOPs per second of the fastest measured matrix product."""
        return max(product.flops for product in self.products)

    def speed(self, kind: str) -> PassSpeed:
        """Return the speed of a kind of pass: `step`, `reference` or `evaluation`."""
        seconds = Spread.of([getattr(each, kind) for each in self.rounds])
        work, typical = self.work, seconds.median
        flops = getattr(work, f"{kind}_flops")
        return PassSpeed(
            seconds,
            pairs_per_second=work.pairs / typical,
            tokens_per_second=work.tokens / typical,
            flops_per_second=flops / typical,
            share_of_products=flops / typical / self.product_flops,
        )

    def time_shares(self) -> TimeShares:
        """Return the shares of the time of an epoch with one evaluation of the held-out pairs."""
        build, device, update, evaluation = (
            median(part(each) for each in self.rounds) for part in PARTS
        )
        held_out = self.held_out_fraction
        parts = [*(part * (1 - held_out) for part in (build, device, update))]
        parts.append(evaluation * held_out)
        return TimeShares(*(part / sum(parts) for part in parts))

    def to_dict(self) -> dict[str, Any]:
        """Return the results as values for JSON, in seconds, tokens, bytes and FLOPs."""
        return {
            "format": FORMAT,
            "model": {**asdict(self.model), "notes": list(self.model.notes)},
            "pass": {
                "pairs_per_step": self.work.pairs,
                "pairs_per_pass": self.work.pairs_per_pass,
                "passes_at_once": self.work.passes_at_once,
                "prompt_tokens": self.lengths[0],
                "chosen_tokens": self.lengths[1],
                "rejected_tokens": self.lengths[2],
                "layer_tokens_per_step": self.work.tokens,
            },
            **{kind: asdict(self.speed(kind)) for kind in ("step", "reference", "evaluation")},
            "generation": {"tokens_per_second": self.generated_tokens_per_second},
            "products": [asdict(product) for product in self.products],
            "copy": asdict(self.copy),
            "time_shares": asdict(self.time_shares()),
            "sharing": [{**asdict(each), "saved": each.saved} for each in self.sharing],
            "peak_bytes": self.peak_bytes,
            "rounds": len(self.rounds),
            "seconds": self.seconds,
        }


# Build, device and update of a step, and evaluation of as many pairs, from a round's seconds.
PARTS: tuple[Callable[[Round], float], ...] = (
    lambda each: each.gradients - each.waiting,
    lambda each: each.waiting,
    lambda each: each.step - each.gradients,
    lambda each: each.evaluation,
)
