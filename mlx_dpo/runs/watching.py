"""What the monitor has to know of a run, and what it said before."""

from collections.abc import Sequence

from mlx_dpo.config import DPOConfig
from mlx_dpo.preferences.columns import LENGTHS, column
from mlx_dpo.training.monitor import Facts, Monitor
from mlx_dpo.types import TokenizedPair


def make_monitor(config: DPOConfig, pairs: Sequence[TokenizedPair], *, total_steps: int) -> Monitor:
    """A monitor for a run on these pairs."""
    return Monitor(
        Facts(
            total_steps=total_steps,
            warmup_steps=config.warmup(total_steps),
            batch_size=min(config.batch_size, len(pairs)),
            beta=config.loss_beta,
            learning_rate=config.learning_rate,
            max_grad_norm=config.max_grad_norm,
            chosen_tokens=float(column(pairs, LENGTHS)[:, 1].mean()),
            referenced=config.rewarded == "log-ratio" and config.reference_model is None,
            from_start=config.reference_model is None and not config.sync_ref_model,
        )
    )
