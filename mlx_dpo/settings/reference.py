"""What the policy is held against."""

from dataclasses import dataclass

from mlx_dpo.errors import ConfigError
from mlx_dpo.options import option

REFERENCE = "Reference"


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """What the policy is held against."""

    reference_model: str | None = option(
        None,
        "Another model of the same vocabulary as the reference, asked once and freed before "
        "training. [default: the model as it starts]",
        str,
        REFERENCE,
    )
    sync_ref_model: bool = option(
        False,
        "Let the reference follow the policy (TR-DPO, arXiv:2404.09656); a pass more per step.",
        bool,
        REFERENCE,
    )
    ref_model_mixup_alpha: float | None = option(
        None,
        "The policy's share when the reference follows; 1 replaces it. [default: 0.6]",
        float,
        REFERENCE,
        low=0,
        high=1,
        open_low=True,
    )
    ref_model_sync_steps: int | None = option(
        None, "Steps after which the reference follows. [default: 512]", int, REFERENCE, low=1
    )

    @property
    def mixup_alpha(self) -> float:
        """The policy's share when the reference follows it."""
        return 0.6 if self.ref_model_mixup_alpha is None else self.ref_model_mixup_alpha

    @property
    def sync_steps(self) -> int:
        """Steps after which the reference follows the policy."""
        return 512 if self.ref_model_sync_steps is None else self.ref_model_sync_steps

    def refuse_idle_reference_settings(self, *, needed: bool, watched: bool) -> None:
        """Settings of the reference that have no effect beside others, or where none is needed.

        Raises:
            ConfigError: names the setting and what takes it its effect.
        """
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if getattr(self, name) is not None and not self.sync_ref_model:
                raise ConfigError(f"`{name}` has no effect without `sync_ref_model`")
        for name in ("reference_model", "sync_ref_model"):
            if getattr(self, name) and not needed:
                raise ConfigError(f"`{name}` has no effect: `loss_type` needs no reference")
        if self.sync_ref_model and watched:
            raise ConfigError(
                "`metric_for_best_model` compares evaluations, and `sync_ref_model` holds each "
                "against another reference; leave one of them out"
            )
        if self.sync_ref_model and self.reference_model is not None:
            raise ConfigError(
                "`sync_ref_model` moves the model as it starts towards the policy, and "
                "`reference_model` is another one; leave one of them out"
            )
