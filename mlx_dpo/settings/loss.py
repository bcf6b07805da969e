"""What is made small."""

from dataclasses import dataclass

from mlx_dpo.options import option

LOSS = "Loss"


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is made small."""

    beta: float = option(
        0.1, "Pull back to the reference; higher stays closer.", float, LOSS, low=0, open_low=True
    )
    label_smoothing: float = option(
        0.0,
        "Share of labels taken to be flipped (conservative DPO).",
        float,
        LOSS,
        low=0,
        high=0.5,
        open_high=True,
    )
