"""What settings of the loss mean for the rest of a run: its cache, its header, its evaluation."""

import json

import pytest

from mlx_dpo import DPOConfig
from mlx_dpo.losses.divergences import Divergence
from mlx_dpo.runs.build import make_on_policy_weights
from mlx_dpo.runs.folder import reference_provenance
from mlx_dpo.runs.summary import describe_loss
from mlx_dpo.scoring.scorers import plain_scorer
from mlx_dpo.scoring.select_scorer import ScorerChoice
from mlx_dpo.training.objective import Objective

CHOICE = ScorerChoice(plain_scorer, plain_scorer, "plain", "as asked")


def provenance(**settings):
    record = {"settings": DPOConfig(**settings).to_dict(), "provenance": {"model": "m"}}
    return reference_provenance(record, "cpu float32")


def test_only_what_changes_the_references_numbers_is_part_of_their_name():
    plain = provenance()
    assert provenance(loss_type="ipo", beta=0.3) == plain
    assert "ld_alpha" not in json.loads(plain)  # what was cached before stays good
    assert len({plain, provenance(ld_alpha=0.5), provenance(ld_alpha=0.0)}) == 3


def test_the_objective_has_every_setting_of_the_loss():
    config = DPOConfig(
        loss_type=["robust", "sft"], loss_weights=[1, 0.3], beta=0.2, label_smoothing=0.3,
        f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7, use_weighting=True,
    )  # fmt: skip
    objective = Objective(config)
    assert objective.divergence == Divergence("alpha_divergence", 0.7)
    robust, sft = objective.settings.losses
    assert vars(config.get_hyperparameters(robust)) == {"beta": 0.2, "label_smoothing": 0.3}
    assert vars(config.get_hyperparameters(sft)) == {}
    assert objective.settings.weights_of_losses == (1.0, 0.3)


def test_pairs_are_weighted_only_with_a_setting():
    assert make_on_policy_weights(DPOConfig(), CHOICE) is None
    assert make_on_policy_weights(DPOConfig(use_weighting=True), CHOICE) is not None


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "sigmoid, beta 0.1"),
        ({"label_smoothing": 0.2}, "sigmoid, beta 0.1, label_smoothing 0.2"),
        (
            {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1]},
            "0.8 sigmoid + 0.2 bco_pair + sft, beta 0.1",
        ),
        ({"loss_type": "simpo"}, "simpo, beta 2, simpo_gamma 0.5"),
        ({"loss_type": "sft"}, "sft"),
        (
            {"f_divergence_type": "js_divergence", "ld_alpha": 0.0, "use_weighting": True},
            "sigmoid, beta 0.1, js_divergence, ld_alpha 0, weighted by on-policy probability (WPO)",
        ),
        (
            {"f_divergence_type": "alpha_divergence"},
            "sigmoid, beta 0.1, alpha_divergence 0.5",
        ),
    ],
)
def test_the_header_says_the_loss_and_all_that_acts_on_it(given, line):
    assert describe_loss(DPOConfig(**given)) == line
