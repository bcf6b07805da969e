"""What a run is going to need, as it is said before anything large is loaded."""

from dataclasses import asdict, dataclass
from typing import Any

from mlx_dpo.policy.probe import Choice
from mlx_dpo.runs.fitting import Fitted
from mlx_dpo.runs.inputs import Inputs


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longer row of a pair."""

    median: int
    most: int  # nine in ten have no more
    longest: int


@dataclass(frozen=True)
class Parts:
    """Memory of a training step, in bytes; they add up to it."""

    weights: int
    adapters: int  # with gradient and moments
    activations: int  # what the blocks keep
    head: int  # logits, and what does not grow with the blocks


@dataclass(frozen=True)
class Most:
    """What fits into the memory there is."""

    pairs: int  # as long as the longest, in one pass
    tokens: int  # of a pair that is alone
    context: bool  # as many as the model places


@dataclass(frozen=True)
class Epoch:
    """One pass over the training pairs."""

    steps: int
    passes: int
    tokens: int  # through the blocks
    whole_rows: int  # tokens that whole rows would need
    rows: int  # through the head
    operations: int
    seconds: float
    reference_operations: int  # the same pairs, and those held out
    reference_seconds: float


@dataclass(frozen=True)
class Forecast:
    """All of it."""

    inputs: Inputs
    choice: Choice
    fitted: Fitted
    lengths: Lengths
    parameters: int
    parts: Parts
    reference: int  # bytes at the peak of the reference pass
    without: Most  # without recomputation
    recomputed: Most
    epoch: Epoch

    def to_dict(self) -> dict[str, Any]:
        """Plain values; bytes, tokens, operations and seconds."""
        fitted = self.fitted
        return {
            "model": self.inputs.base.source,
            "parameters": self.parameters,
            "pairs": len(self.inputs.train),
            "held_out": len(self.inputs.valid),
            "lengths": asdict(self.lengths),
            "scorer": self.choice.name,
            "memory": {
                **asdict(self.parts),
                "training": fitted.bytes,
                "reference": self.reference,
                "available": fitted.room.bytes,
                "available_is": fitted.room.what,
            },
            "most": {"stored": asdict(self.without), "recomputed": asdict(self.recomputed)},
            "chosen": {**fitted.settled(), "fits": fitted.fits},
            "epoch": asdict(self.epoch),
        }
