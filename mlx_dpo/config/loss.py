"""Settings of the loss: names, weights and hyper-parameters."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from types import SimpleNamespace

from mlx_dpo.config.other_trainers import check_loss_name
from mlx_dpo.config.setting import NoEffect, is_set, setting
from mlx_dpo.errors import ConfigError
from mlx_dpo.losses.catalogue import LOSSES
from mlx_dpo.losses.divergences import DIVERGENCES
from mlx_dpo.losses.loss import Loss, RewardKind

LOSS = "Loss"
SMOOTHED = ("cdpo", "robust", "exo_pair")  # undefined or another loss without label smoothing


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of the loss; a hyper-parameter that is None has the default of its loss."""

    loss_type: tuple[str, ...] = setting(
        ("sigmoid",),
        "Loss function (see `mlx-dpo losses`); repeat to sum several.",
        str,
        LOSS,
        is_list=True,
        metavar="LOSS",
        essential=True,
    )
    loss_weights: tuple[float, ...] = setting(
        (),
        "Weights of the losses in a sum, in order. Repeat it for each loss.",
        float,
        LOSS,
        is_list=True,
        minimum=0,
        exclusive_minimum=True,
        metavar="WEIGHT",
        default_text="1 each",
    )
    beta: float | None = setting(
        None,
        "KL strength β; higher keeps the model closer to the reference.",
        float,
        LOSS,
        minimum=0,
        exclusive_minimum=True,
        default_text="0.1 for most losses",
        essential=True,
    )
    label_smoothing: float | None = setting(
        None,
        "Assumed fraction of flipped labels.",
        float,
        LOSS,
        minimum=0,
        maximum=0.5,
        exclusive_maximum=True,
        metavar="FRACTION",
        default_text="by loss",
    )
    discopop_tau: float | None = setting(
        None,
        "Temperature τ of the DiscoPOP loss.",
        float,
        LOSS,
        minimum=0,
        maximum=1,
        exclusive_minimum=True,
        default_text="0.05",
    )
    dpop_lambda: float | None = setting(
        None,
        "DPOP penalty weight λ.",
        float,
        LOSS,
        minimum=0,
        exclusive_minimum=True,
        default_text="50",
    )
    simpo_gamma: float | None = setting(
        None,
        "SimPO's target reward margin γ.",
        float,
        LOSS,
        minimum=0,
        default_text="0.5",
    )
    cpo_alpha: float | None = setting(
        None,
        "Weight of the SFT term in CPO.",
        float,
        LOSS,
        minimum=0,
        metavar="WEIGHT",
        default_text="1",
    )
    rpo_eta: float | None = setting(
        None,
        "Log-odds η of a preference whose score gap is 1, in RPO.",
        float,
        LOSS,
        minimum=0,
        exclusive_minimum=True,
        metavar="ETA",
        default_text="1",
    )
    desirable_weight: float | None = setting(
        None,
        "Weight of rows labelled good in KTO.",
        float,
        LOSS,
        minimum=0,
        exclusive_minimum=True,
        metavar="WEIGHT",
        default_text="1",
    )
    undesirable_weight: float | None = setting(
        None,
        "Weight of rows labelled bad in KTO.",
        float,
        LOSS,
        minimum=0,
        exclusive_minimum=True,
        metavar="WEIGHT",
        default_text="1",
    )
    f_divergence_type: str | None = setting(
        None,
        "f-divergence used as regularizer.",
        str,
        LOSS,
        choices=DIVERGENCES,
        metavar="DIVERGENCE",
        default_text="reverse_kl",
    )
    f_alpha_divergence_coef: float | None = setting(
        None,
        "α of `alpha_divergence`: 0 = forward KL, 1 = reverse KL.",
        float,
        LOSS,
        minimum=0,
        maximum=1,
        exclusive_maximum=True,
        default_text="0.5",
    )
    ld_alpha: float | None = setting(
        None,
        "Weight of tokens beyond the length of the shorter completion (LD-DPO).",
        float,
        LOSS,
        minimum=0,
        maximum=1,
        exclusive_maximum=True,
        metavar="WEIGHT",
        default_text="1",
    )
    use_weighting: bool = setting(
        False,
        "Weight pairs by their probability under the policy (WPO); one more forward pass per step.",
        bool,
        LOSS,
    )

    @property
    def losses(self) -> tuple[Loss, ...]:
        """Catalogue entries of the losses in `loss_type`, which are summed."""
        return tuple(LOSSES[name] for name in self.loss_type)

    @property
    def weights_of_losses(self) -> tuple[float, ...]:
        """Weight of each loss in the sum."""
        return self.loss_weights or (1.0,) * len(self.loss_type)

    @property
    def common_beta(self) -> float:
        """Value of beta for all summed losses; if it is not set, the first loss's default."""
        if self.beta is not None:
            return self.beta
        defaults = [loss.defaults["beta"] for loss in self.losses if "beta" in loss.defaults]
        return defaults[0] if defaults else 0.1

    @property
    def reward_kind(self) -> RewardKind:
        """Quantity that is multiplied by beta to give the implicit reward, such as the log-ratio.

        If losses are summed, the first loss that defines an implicit reward decides.
        """
        implied = [loss.reward for loss in self.losses if loss.reward]
        return implied[0] if implied else "log-probability"

    @property
    def divergence_alpha(self) -> float:
        """Alpha of the alpha divergence, from forward KL (0) to reverse KL (1); 0.5 by default."""
        return 0.5 if self.f_alpha_divergence_coef is None else self.f_alpha_divergence_coef

    @property
    def needs_reference(self) -> bool:
        """Whether one of the losses needs the reference's log-probabilities."""
        return any(loss.needs_reference for loss in self.losses)

    @property
    def uses_whole_batch(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its optimizer step."""
        return any(loss.uses_whole_batch for loss in self.losses)

    @property
    def labelled(self) -> bool:
        """Whether the loss takes single completions with a label (KTO) instead of pairs."""
        return any(loss.labelled for loss in self.losses)

    @property
    def supervised(self) -> bool:
        """Whether the run is instruction tuning (SFT): the loss takes one answer of each row."""
        return self.loss_type == ("sft",)

    @property
    def listwise(self) -> bool:
        """Whether one of the losses takes whole ranked lists (`ranked: all`)."""
        return any(loss.listwise for loss in self.losses)

    @property
    def unit(self) -> str:
        """Word that messages use for training examples: `pairs`, `answers` (KTO), `rows` (SFT)."""
        return "answers" if self.labelled else "rows" if self.supervised else "pairs"

    def get_hyperparameters(self, loss: Loss) -> SimpleNamespace:
        """Return the hyper-parameters of a loss; those that are not set have its defaults."""
        values = {
            name: float(getattr(self, name)) if is_set(self, name) else default
            for name, default in loss.defaults.items()
        }
        if "beta" in values:
            values["beta"] = self.common_beta
        return SimpleNamespace(**values)


LOSS_NO_EFFECT: tuple[NoEffect[LossSettings], ...] = (
    NoEffect(
        ("f_alpha_divergence_coef",),
        lambda s: s.f_divergence_type != "alpha_divergence",
        "without f_divergence_type `alpha_divergence`",
    ),
)


def check_losses(settings: LossSettings) -> None:
    """Check the names of the losses, their sum, and the settings that act on the losses.

    Raises:
        ConfigError: a loss is unknown, the losses cannot be summed, or a setting does not act on
            them.
    """
    if not settings.loss_type:
        raise ConfigError("`loss_type` is empty; `mlx-dpo losses` lists them")
    for name in settings.loss_type:
        check_loss_name(name)
    _check_sum(settings)
    _check_lists(settings)
    _check_hyperparameters(settings)
    _check_divergence(settings)
    _check_weighting(settings)


def _check_sum(settings: LossSettings) -> None:
    names = settings.loss_type
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"`loss_type` names `{repeated[0]}` twice; use `loss_weights`")
    if settings.loss_weights and len(settings.loss_weights) != len(names):
        raise ConfigError(
            "`loss_weights` must have as many entries as `loss_type` "
            f"(found {len(settings.loss_weights)} and {len(names)})"
        )
    if settings.labelled and len(names) > 1:
        [labelled] = [loss.name for loss in settings.losses if loss.labelled]
        raise ConfigError(
            f"`{labelled}` takes labelled rows and cannot be summed with losses of pairs"
        )


def _check_lists(settings: LossSettings) -> None:
    """Raise `ConfigError` for losses and settings that do not go with losses of ranked lists."""
    if settings.listwise:
        listwise = _quoted(loss.name for loss in settings.losses if loss.listwise)
        for loss in settings.losses:
            if not loss.needs_reference and loss.reward is not None:
                raise ConfigError(
                    f"`loss_type` {listwise} has rewards relative to a reference and cannot be "
                    f"summed with the reference-free `{loss.name}`; leave one of them out"
                )
        if settings.ld_alpha is not None:
            raise ConfigError(
                f"`ld_alpha` is not defined for loss_type {listwise}: a completion would have "
                "another log-probability in each of its pairs; leave it out"
            )
    if "rpo_bwd_kl" in settings.loss_type:
        offset = [loss.name for loss in settings.losses if loss.uses_margins]
        if len(offset) > 1:
            raise ConfigError(
                f"`loss_type` {_quoted(offset)} cannot be summed: the margin column is a score gap "
                "for `rpo_bwd_kl` and is subtracted in the other; leave one of them out"
            )


def _check_hyperparameters(settings: LossSettings) -> None:
    """Raise `ConfigError` for a hyper-parameter that is set but that none of the losses reads.

    Losses that are undefined without label smoothing need it above 0.
    """
    for name in sorted({name for loss in LOSSES.values() for name in loss.defaults}):
        if is_set(settings, name):
            readers = {loss.name for loss in LOSSES.values() if name in loss.defaults}
            _check_acts_on_any(settings, name, readers)
    for name in SMOOTHED:
        if settings.label_smoothing == 0 and name in settings.loss_type:
            raise ConfigError(f"`label_smoothing` must be above 0 with loss_type `{name}`, got 0.0")


def _check_acts_on_any(settings: LossSettings, name: str, readers: Collection[str]) -> None:
    if not set(settings.loss_type) & set(readers):
        raise ConfigError(
            f"`{name}` has no effect with loss_type {_quoted(settings.loss_type)}; "
            f"it acts on {_shorter_list(readers)}"
        )


def _check_divergence(settings: LossSettings) -> None:
    divergence = settings.f_divergence_type
    if divergence is None:
        return
    if divergence == "reverse_kl":  # every log-ratio is a score of reverse KL
        referenced = {loss.name for loss in LOSSES.values() if loss.needs_reference}
        _check_acts_on_any(settings, "f_divergence_type", referenced)
        return
    defined = {loss.name for loss in LOSSES.values() if loss.uses_divergence}
    _check_acts_on_any(settings, "f_divergence_type", defined)
    # Losses of more than a difference of rewards keep a term that cannot be computed.
    for loss in settings.losses:
        if loss.needs_reference and not loss.uses_divergence:
            raise ConfigError(
                f"`f_divergence_type` {divergence} is not defined for loss_type `{loss.name}`; "
                f"use {_shorter_list(defined)}"
            )


def _check_weighting(settings: LossSettings) -> None:
    for loss in settings.losses:
        if settings.ld_alpha is not None and (loss.labelled or not loss.needs_reference):
            raise ConfigError(
                f"`ld_alpha` is not defined for loss_type `{loss.name}`, which uses the "
                "likelihood of whole completions"
            )
        if settings.use_weighting and settings.supervised:
            raise ConfigError(
                "`use_weighting` has no effect with loss_type `sft` alone: it weights pairs; leave "
                "it out"
            )
        if settings.use_weighting and loss.uses_whole_batch:
            raise ConfigError(
                f"`use_weighting` is not defined for loss_type `{loss.name}`, whose terms compare "
                "several pairs; use a loss of single pairs"
            )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _shorter_list(names: Collection[str]) -> str:
    """Return text that lists the losses in `names`, or the other losses after "all but".

    The shorter of the two lists is chosen.
    """
    listed = [name for name in LOSSES if name in names]
    others = [name for name in LOSSES if name not in names]
    return _quoted(listed) if len(listed) <= len(others) else f"all but {_quoted(others)}"
