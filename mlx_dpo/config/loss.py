"""What is made small, and which settings act on it."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mlx_dpo.config.option import option, refuse_unknown
from mlx_dpo.errors import ConfigError
from mlx_dpo.losses.catalogue import LOSS_KINDS, LossKind, Reward

LOSS = "Loss"
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
SMOOTHED = ("cdpo", "robust", "exo_pair")  # nothing, or another loss, without label smoothing


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is made small. None: as the loss has it, see `settings.loss_kinds`."""

    loss_type: tuple[str, ...] = option(
        ("sigmoid",), "What is made small, as `mlx-dpo losses` lists it; repeat it for a sum.",
        str, LOSS, many=True,
    )  # fmt: skip
    loss_weights: tuple[float, ...] = option(
        (), "Weights of the losses in a sum, in their order. [default: 1 each]", float, LOSS,
        many=True, low=0, open_low=True,
    )  # fmt: skip
    beta: float | None = option(
        None, "Pull back to the reference; higher stays closer. [default: 0.1; by loss]",
        float, LOSS, low=0, open_low=True,
    )  # fmt: skip
    label_smoothing: float | None = option(
        None, "Share of labels taken to be flipped. [default: by loss]",
        float, LOSS, low=0, high=0.5, open_high=True,
    )  # fmt: skip
    discopop_tau: float | None = option(
        None, "Temperature at which discopop's two parts are mixed. [default: 0.05]",
        float, LOSS, low=0, high=1, open_low=True,
    )  # fmt: skip
    dpop_lambda: float | None = option(
        None, "How much dpop minds that chosen gets less likely. [default: 50]",
        float, LOSS, low=0, open_low=True,
    )  # fmt: skip
    simpo_gamma: float | None = option(
        None, "Margin that simpo wants, in units of the reward. [default: 0.5]",
        float, LOSS, low=0,
    )  # fmt: skip
    cpo_alpha: float | None = option(
        None, "Weight of the likelihood of chosen in cpo. [default: 1]", float, LOSS, low=0
    )
    desirable_weight: float | None = option(
        None, "Weight of kto's desirable rows. [default: 1]", float, LOSS, low=0, open_low=True
    )
    undesirable_weight: float | None = option(
        None, "Weight of kto's undesirable rows. [default: 1]", float, LOSS, low=0, open_low=True
    )
    f_divergence_type: str | None = option(
        None, "What keeps the policy near the reference. [default: reverse_kl]", str, LOSS,
        choices=DIVERGENCES,
    )  # fmt: skip
    f_alpha_divergence_coef: float | None = option(
        None, "Of alpha_divergence, between forward (0) and reverse KL (1). [default: 0.5]",
        float, LOSS, low=0, high=1, open_high=True,
    )  # fmt: skip
    ld_alpha: float | None = option(
        None, "Weight of tokens beyond the length of the shorter completion (LD-DPO). [default: 1]",
        float, LOSS, low=0, high=1, open_high=True,
    )  # fmt: skip
    use_weighting: bool = option(
        False, "Weigh pairs by how likely the policy is to write them (WPO): one more pass a step.",
        bool, LOSS,
    )  # fmt: skip

    @property
    def loss_kinds(self) -> tuple[LossKind, ...]:
        """What is known of each loss of the sum."""
        return tuple(LOSS_KINDS[name] for name in self.loss_type)

    @property
    def weights_of_losses(self) -> tuple[float, ...]:
        """One for each loss."""
        return self.loss_weights or (1.0,) * len(self.loss_type)

    @property
    def loss_beta(self) -> float:
        """That of all losses: unless set, what the first that reads it has."""
        if self.beta is not None:
            return self.beta
        known = [kind.defaults["beta"] for kind in self.loss_kinds if "beta" in kind.defaults]
        return known[0] if known else 0.1

    @property
    def rewarded(self) -> Reward:
        """What rewards are beta times of: as the first loss implies that implies any."""
        kinds = [kind.rewards for kind in self.loss_kinds if kind.rewards]
        return kinds[0] if kinds else "log-probability"

    @property
    def alpha_of_divergence(self) -> float:
        """Where between forward KL (0) and reverse KL (1) `alpha_divergence` lies."""
        return 0.5 if self.f_alpha_divergence_coef is None else self.f_alpha_divergence_coef

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probabilities matter to a loss."""
        return any(kind.needs_reference for kind in self.loss_kinds)

    @property
    def couples(self) -> bool:
        """Whether a pair's loss depends on the other pairs of its step."""
        return any(kind.couples for kind in self.loss_kinds)

    @property
    def labelled(self) -> bool:
        """Whether single judged completions are taken in place of pairs."""
        return any(kind.labelled for kind in self.loss_kinds)

    def read_by(self, kind: LossKind, name: str) -> float:
        """The value of a setting for one loss: as it is set, or as the loss has it."""
        if name == "beta":
            return self.loss_beta
        value = getattr(self, name)
        return kind.defaults[name] if value is None else float(value)

    def refuse_idle_losses(self) -> None:
        """Refuse losses that are unknown or do not go together, and settings none of them reads.

        Raises:
            ConfigError: names the setting, and the losses it acts on.
        """
        if not self.loss_type:
            raise ConfigError("`loss_type` names no loss; `mlx-dpo losses` lists them")
        for name in self.loss_type:
            refuse_unknown(name, LOSS_KINDS, "loss", see="`mlx-dpo losses` lists them")
        self._refuse_unfit_sums()
        self._refuse_unread()
        self._refuse_unfit_smoothing()
        self._refuse_unfit_divergence()
        self._refuse_unfit_weighing()

    def _refuse_unfit_sums(self) -> None:
        names = self.loss_type
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"`loss_type` names `{twice[0]}` twice; use `loss_weights`")
        if self.loss_weights and len(self.loss_weights) != len(names):
            raise ConfigError(
                f"`loss_weights` must be as many as `loss_type` (found {len(self.loss_weights)} "
                f"and {len(names)})"
            )
        if self.labelled and len(names) > 1:
            [kto] = [kind.name for kind in self.loss_kinds if kind.labelled]
            raise ConfigError(
                f"`{kto}` takes labelled rows and cannot be summed with losses of pairs"
            )

    def _refuse_unread(self) -> None:
        known = {name for kind in LOSS_KINDS.values() for name in kind.defaults}
        for name in sorted(known):
            if getattr(self, name) is not None:
                readers = {kind.name for kind in LOSS_KINDS.values() if name in kind.defaults}
                self._refuse_unless_any(name, readers)

    def _refuse_unless_any(self, setting: str, readers: Collection[str]) -> None:
        if not set(self.loss_type) & set(readers):
            raise ConfigError(
                f"`{setting}` has no effect with loss_type {_listed(self.loss_type)}; "
                f"it acts on {_listed_or_others(readers)}"
            )

    def _refuse_unfit_smoothing(self) -> None:
        for name in SMOOTHED:
            if self.label_smoothing == 0 and name in self.loss_type:
                raise ConfigError(
                    f"`label_smoothing` must be above 0 with loss_type `{name}`, got 0.0"
                )

    def _refuse_unfit_divergence(self) -> None:
        if self.f_alpha_divergence_coef is not None and (
            self.f_divergence_type != "alpha_divergence"
        ):
            raise ConfigError(
                "`f_alpha_divergence_coef` has no effect without f_divergence_type "
                "`alpha_divergence`"
            )
        if self.f_divergence_type is None:
            return
        if self.f_divergence_type == "reverse_kl":  # what every log-ratio is of
            referenced = {kind.name for kind in LOSS_KINDS.values() if kind.needs_reference}
            self._refuse_unless_any("f_divergence_type", referenced)
            return
        defined = {kind.name for kind in LOSS_KINDS.values() if kind.divergences}
        self._refuse_unless_any("f_divergence_type", defined)
        # What depends on more than a difference of rewards keeps a term that nobody can compute.
        for kind in self.loss_kinds:
            if kind.needs_reference and not kind.divergences:
                raise ConfigError(
                    f"`f_divergence_type` {self.f_divergence_type} is not defined for loss_type "
                    f"`{kind.name}`; it is for {_listed_or_others(defined)}"
                )

    def _refuse_unfit_weighing(self) -> None:
        for kind in self.loss_kinds:
            if self.ld_alpha is not None and (kind.labelled or not kind.needs_reference):
                raise ConfigError(
                    f"`ld_alpha` is not defined for loss_type `{kind.name}`, which takes "
                    "the likelihood of whole completions"
                )
            if self.use_weighting and kind.couples:
                raise ConfigError(
                    f"`use_weighting` is not defined for loss_type `{kind.name}`, whose terms "
                    "are of several pairs; it is for losses of one pair"
                )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _listed_or_others(names: Collection[str]) -> str:
    """The losses of these names, or, if that is shorter, those that are not among them."""
    those = [name for name in LOSS_KINDS if name in names]
    others = [name for name in LOSS_KINDS if name not in names]
    return _listed(those) if len(those) <= len(others) else f"all but {_listed(others)}"
