"""Losses by name: which of the facts of scored pairs each is a function of.

What else is to be known of them stands in `settings.loss_kinds`; each is called with the settings
that it reads according to that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlx_dpo.losses import optimal_transport as transport
from mlx_dpo.losses import pairwise as losses
from mlx_dpo.losses import pointwise as separate
from mlx_dpo.losses import reference_free

LOSSES: Mapping[str, Callable[..., mx.array]] = {
    "sigmoid": lambda v, **s: losses.sigmoid_loss(v.margin, more=v.metadata.margins, **s),
    "cdpo": lambda v, **s: losses.sigmoid_loss(v.margin, more=v.metadata.margins, **s),
    "robust": lambda v, **s: losses.robust_loss(v.margin, more=v.metadata.margins, **s),
    "hinge": lambda v, **s: losses.hinge_loss(v.margin, more=v.metadata.margins, **s),
    "ipo": lambda v, **s: losses.ipo_loss(v.average_margin, **s),
    "exo_pair": lambda v, **s: losses.exo_pair_loss(v.margin, **s),
    "nca_pair": lambda v, **s: separate.nca_pair_loss(*v.ratios, **s),
    "bco_pair": lambda v, **s: separate.bco_pair_loss(*v.ratios, **s),
    "sppo_hard": lambda v, **s: separate.sppo_hard_loss(*v.ratios, **s),
    "aot": lambda v, **s: transport.aot_loss(v.scored.policy, v.scored.reference, **s),
    "aot_unpaired": lambda v, **s: transport.aot_unpaired_loss(*v.ratios, **s),
    "apo_zero": lambda v, **s: separate.apo_zero_loss(*v.ratios, **s),
    "apo_down": lambda v, **s: separate.apo_down_loss(*v.ratios, **s),
    "discopop": lambda v, **s: losses.discopop_loss(v.margin, **s),
    "sigmoid_norm": lambda v, **s: losses.sigmoid_loss(
        v.average_margin, more=v.metadata.margins, **s
    ),
    "sft": lambda v, **s: reference_free.sft_loss(
        v.scored.policy.chosen, v.metadata.mean_chosen_tokens, **s
    ),
    "dpop": lambda v, **s: losses.dpop_loss(
        v.margin, v.ratios.chosen, more=v.metadata.margins, **s
    ),
    "simpo": lambda v, **s: reference_free.simpo_loss(
        v.own_average_margin, more=v.metadata.margins, **s
    ),
    "cpo": lambda v, **s: reference_free.cpo_loss(
        v.scored.policy, v.metadata.mean_chosen_tokens, more=v.metadata.margins, **s
    ),
    "orpo": lambda v, **s: reference_free.orpo_loss(
        v.scored.policy,
        v.metadata.chosen_tokens,
        v.metadata.rejected_tokens,
        v.metadata.mean_chosen_tokens,
        **s,
    ),
    "kto": lambda v, **s: separate.kto_loss(
        v.ratios.chosen, v.ratios.rejected, v.metadata.desirable, **s
    ),
}


Reward = Literal["log-ratio", "log-probability", "average log-probability"]


@dataclass(frozen=True, kw_only=True)
class LossKind:
    """What is to be known of a loss beside its mathematics."""

    name: str
    equation: str  # of one pair
    source: str
    use: str  # when to take it
    defaults: Mapping[str, float]  # the settings it reads, and their values unless they are set
    rewards: Reward | None = "log-ratio"  # beta times what they are; None: it implies none
    needs_reference: bool = True
    couples: bool = False  # a pair's loss depends on the other pairs of its step
    labelled: bool = False  # it takes single judged completions in place of pairs
    margins: bool = False  # it wants more where the data says how much better chosen is
    divergences: bool = False  # `f_divergence_type` acts on it

    @property
    def needs(self) -> tuple[str, ...]:
        """What it asks for beside a policy and its data."""
        wanted = {
            "a reference": self.needs_reference,
            "labelled rows in place of pairs": self.labelled,
            "a step as a whole": self.couples,
        }
        return tuple(what for what, is_wanted in wanted.items() if is_wanted)


LEGEND = (
    "w is the chosen completion and l the rejected one, |y| the number of tokens of y; logπ(y) is "
    "the policy's log-probability, r(y) = logπ(y) − logπ_ref(y), Δ = r(w) − r(l); β is beta, "
    "ε label_smoothing, and σ(x) = 1 / (1 + exp(−x))"
)
BETA = {"beta": 0.1}

_KINDS = (
    LossKind(
        name="sigmoid",
        equation="−(1−ε) log σ(βΔ) − ε log σ(−βΔ)",
        source="DPO: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7",
        use="The place to start from.",
        defaults=BETA | {"label_smoothing": 0.0},
        margins=True,
        divergences=True,
    ),
    LossKind(
        name="cdpo",
        equation="−(1−ε) log σ(βΔ) − ε log σ(−βΔ)",
        source="conservative DPO: Mitchell 2023, A note on DPO with noisy preferences, Eq. 3",
        use="A share ε of the labels is wrong; the margin stops growing at log((1−ε)/ε)/β.",
        defaults=BETA | {"label_smoothing": 0.1},
        margins=True,
        divergences=True,
    ),
    LossKind(
        name="robust",
        equation="[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε)",
        source="rDPO: Ray Chowdhury et al. 2024, arXiv:2403.00409",
        use="A known share ε of the labels is wrong; its mean is that of DPO on clean ones.",
        defaults=BETA | {"label_smoothing": 0.1},
        margins=True,
        divergences=True,
    ),
    LossKind(
        name="hinge",
        equation="max(0, 1 − βΔ)",
        source="SLiC-HF: Zhao et al. 2023, arXiv:2305.10425; as RSO: Liu et al. 2023, "
        "arXiv:2309.06657",
        use="Pairs that are told apart well enough are to be left alone.",
        defaults=BETA,
        margins=True,
        divergences=True,
    ),
    LossKind(
        name="ipo",
        equation="(r(w)/|w| − r(l)/|l| − 1/(2β))²",
        source="IPO: Azar et al. 2023, arXiv:2310.12036, Eq. 17; an average per token",
        use="Labels are sure, and DPO runs away from the reference.",
        defaults=BETA,
        divergences=True,
    ),
    LossKind(
        name="exo_pair",
        equation="σ(βΔ) [log σ(βΔ) − log(1−ε)] + σ(−βΔ) [log σ(−βΔ) − log ε]",
        source="EXO: Ji et al. 2024, arXiv:2402.00856, Eq. 16",
        use="The policy is to take up a mode of the preferences (reverse KL), not cover them.",
        defaults=BETA | {"label_smoothing": 1e-3},
        divergences=True,
    ),
    LossKind(
        name="nca_pair",
        equation="−log σ(βr(w)) − ½ log σ(−βr(w)) − ½ log σ(−βr(l))",
        source="NCA: Chen et al. 2024, arXiv:2402.05369",
        use="The likelihood of chosen must not fall.",
        defaults=BETA,
    ),
    LossKind(
        name="bco_pair",
        equation="−log σ(βr(w)) − log σ(−βr(l))",
        source="BCO: Jung et al. 2024, arXiv:2404.04656, without its reward shift",
        use="Part of MPO; chosen and rejected are to be good and bad by themselves.",
        defaults=BETA,
    ),
    LossKind(
        name="sppo_hard",
        equation="(r(w) − 1/(2β))² + (r(l) + 1/(2β))²",
        source="SPPO: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with wins of 1 and 0",
        use="A round of self-play on pairs sampled from the policy.",
        defaults={"beta": 0.001},
    ),
    LossKind(
        name="aot",
        equation="−(1−ε) log σ(βδ) − ε log σ(−βδ), δ: policy's margins less the reference's, "
        "both sorted",
        source="AOT, paired: Melnyk et al. 2024, arXiv:2406.05882",
        use="The margins as a whole are to grow, not each; large batches.",
        defaults=BETA | {"label_smoothing": 0.0},
        couples=True,
    ),
    LossKind(
        name="aot_unpaired",
        equation="−(1−ε) log σ(βδ) − ε log σ(−βδ), δ: r(w) less r(l), both sorted",
        source="AOT, unpaired: Melnyk et al. 2024, arXiv:2406.05882",
        use="As aot, where chosen and rejected do not belong together.",
        defaults=BETA | {"label_smoothing": 0.0},
        couples=True,
    ),
    LossKind(
        name="apo_zero",
        equation="1 − σ(βr(w)) + σ(βr(l))",
        source="APO-zero: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7",
        use="Chosen completions are better than what the model writes.",
        defaults=BETA,
    ),
    LossKind(
        name="apo_down",
        equation="σ(βr(w)) + 1 − σ(βΔ)",
        source="APO-down: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8",
        use="Chosen completions are worse than what the model writes.",
        defaults=BETA,
    ),
    LossKind(
        name="discopop",
        equation="(1−μ) (−log σ(βΔ)) + μ exp(−βΔ), μ = σ(βΔ/τ)",
        source="DiscoPOP: Lu et al. 2024, arXiv:2406.08414, Eq. 5",
        use="A loss that was found by search; τ is `discopop_tau`.",
        defaults=BETA | {"discopop_tau": 0.05},
        divergences=True,
    ),
    LossKind(
        name="sigmoid_norm",
        equation="−log σ(β (r(w)/|w| − r(l)/|l|))",
        source="length-normalised DPO: Lambert et al. 2024 (Tülu 3), arXiv:2411.15124",
        use="Length drives the margins.",
        defaults={"beta": 5.0},
        margins=True,
        divergences=True,
    ),
    LossKind(
        name="sft",
        equation="−logπ(w) / mean |w| of the step: the mean cross-entropy of a token",
        source="as a part of RPO: Pang et al. 2024, arXiv:2404.19733",
        use="Beside another loss, so that the likelihood of chosen does not fall.",
        defaults={},
        rewards=None,
        needs_reference=False,
    ),
    LossKind(
        name="dpop",
        equation="−log σ(β (Δ − λ max(0, −r(w))))",
        source="DPO-Positive: Pal et al. 2024 (Smaug), arXiv:2402.13228",
        use="Pairs nearly alike, where DPO lowers both; λ is `dpop_lambda`.",
        defaults=BETA | {"dpop_lambda": 50.0},
        margins=True,
    ),
    LossKind(
        name="simpo",
        equation="as sigmoid, of β (logπ(w)/|w| − logπ(l)/|l|) − γ",
        source="SimPO: Meng et al. 2024, arXiv:2405.14734, Eq. 6",
        use="No reference, and no reward for length; γ is `simpo_gamma`.",
        defaults={"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.0},
        rewards="average log-probability",
        needs_reference=False,
        margins=True,
    ),
    LossKind(
        name="cpo",
        equation="as sigmoid, of β (logπ(w) − logπ(l)), plus α times sft",
        source="CPO: Xu et al. 2024, arXiv:2401.08417, Eq. 3",
        use="No reference; first meant for translation; α is `cpo_alpha`.",
        defaults=BETA | {"cpo_alpha": 1.0, "label_smoothing": 0.0},
        rewards="log-probability",
        needs_reference=False,
        margins=True,
    ),
    LossKind(
        name="orpo",
        equation="sft − β log σ(log odds(w) − log odds(l)), odds of exp(logπ(y)/|y|)",
        source="ORPO: Hong et al. 2024, arXiv:2403.07691, Eqs. 6 and 7",
        use="From a base model in one go, without a round of supervised training before.",
        defaults=BETA,
        rewards="average log-probability",
        needs_reference=False,
    ),
    LossKind(
        name="kto",
        equation="λ (1 − σ(β(r − z))) if desirable, λ (1 − σ(β(z − r))) if not, z: max(0, mean r "
        "of mismatched completions)",
        source="KTO: Ethayarajh et al. 2024, arXiv:2402.01306, Eqs. 7 and 8",
        use="Thumbs up or down on single answers.",
        defaults=BETA | {"desirable_weight": 1.0, "undesirable_weight": 1.0},
        couples=True,
        labelled=True,
    ),
)

LOSS_KINDS: Mapping[str, LossKind] = {kind.name: kind for kind in _KINDS}
