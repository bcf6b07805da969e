"""Losses by name: which of the facts of scored pairs each is a function of.

What else is to be known of them stands in `settings.loss_kinds`; each is called with the settings
that it reads according to that.
"""

from collections.abc import Callable, Mapping

import mlx.core as mx

from mlx_dpo.objective import losses, reference_free, separate, transport

LOSSES: Mapping[str, Callable[..., mx.array]] = {
    "sigmoid": lambda v, **s: losses.sigmoid_loss(v.margin, more=v.facts.margins, **s),
    "cdpo": lambda v, **s: losses.sigmoid_loss(v.margin, more=v.facts.margins, **s),
    "robust": lambda v, **s: losses.robust_loss(v.margin, more=v.facts.margins, **s),
    "hinge": lambda v, **s: losses.hinge_loss(v.margin, more=v.facts.margins, **s),
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
    "sigmoid_norm": lambda v, **s: losses.sigmoid_loss(v.average_margin, more=v.facts.margins, **s),
    "sft": lambda v, **s: reference_free.sft_loss(
        v.scored.policy.chosen, v.facts.mean_chosen_tokens, **s
    ),
    "dpop": lambda v, **s: losses.dpop_loss(v.margin, v.ratios.chosen, more=v.facts.margins, **s),
    "simpo": lambda v, **s: reference_free.simpo_loss(
        v.own_average_margin, more=v.facts.margins, **s
    ),
    "cpo": lambda v, **s: reference_free.cpo_loss(
        v.scored.policy, v.facts.mean_chosen_tokens, more=v.facts.margins, **s
    ),
    "orpo": lambda v, **s: reference_free.orpo_loss(
        v.scored.policy,
        v.facts.chosen_tokens,
        v.facts.rejected_tokens,
        v.facts.mean_chosen_tokens,
        **s,
    ),
    "kto": lambda v, **s: separate.kto_loss(
        v.ratios.chosen, v.ratios.rejected, v.facts.desirable, **s
    ),
}
