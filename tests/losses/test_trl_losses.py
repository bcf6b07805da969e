"""Every loss that TRL has against TRL's own code: value, gradients and rewards, from the logits.

TRL's values come from `scripts/tools/goldens/trl_losses.py`, which documents its requirements.
"""

import json

import mlx_dpo  # noqa: F401  (first: it loads OpenBLAS before MLX is imported)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.batches.metadata import pair_metadata
from mlx_dpo.losses.catalogue import LOSSES
from mlx_dpo.losses.log_ratios import log_ratios
from mlx_dpo.scoring.logps import pair_log_weights, pair_logps
from mlx_dpo.training.objective import Objective
from mlx_dpo.types import PairBatch, PairLogps, ScoredPairs, TokenizedPair
from scripts.tools.goldens import trl_losses as trl

TOLERANCE = 1e-6  # of the largest number there is to be had
NOT_IN_TRL = {"cdpo", "dpop", "plackett_luce", "lipo_lambda", "rpo_bwd_kl"}


def settings_of_all():
    """Return the cases of the script as mlx-dpo settings."""
    cases = {}
    for name, settings in trl.DPO.items():
        cases[name] = settings
    for name, settings in trl.CPO.items():
        loss = "simpo" if settings["loss_type"] == "simpo" else "cpo"
        idle = {"loss_type", "cpo_alpha"} if loss == "simpo" else {"loss_type"}
        own = {key: value for key, value in settings.items() if key not in idle}
        cases[name] = {"loss_type": [loss], **own}
    cases |= {name: {"loss_type": ["orpo"], **settings} for name, settings in trl.ORPO.items()}
    cases |= {name: {"loss_type": ["kto"], **settings} for name, settings in trl.KTO.items()}
    return {
        name: settings if settings["loss_type"] == ["sft"] else {"beta": trl.BETA} | settings
        for name, settings in cases.items()
    }


CASES = settings_of_all()
TEXTS = trl.texts()


@pytest.fixture(scope="module")
def golden():
    golden = json.loads(trl.GOLDEN.read_text())
    assert golden["versions"].keys() >= {"trl", "torch"}
    return golden["cases"]


def ours(name):
    """Loss, slopes along each row's direction, and rewards."""
    config = DPOConfig(**CASES[name])
    objective = Objective(config)
    batch = PairBatch(mx.array(TEXTS.tokens.astype(np.int32)), mx.array(TEXTS.mask))
    logits, reference, direction = (
        mx.array(value.astype(np.float32))
        for value in (TEXTS.policy, TEXTS.reference, TEXTS.direction)
    )
    labels = trl.DESIRABLE if objective.labelled else (None,) * len(trl.LENGTHS)
    metadata = pair_metadata(
        [
            TokenizedPair((0,), (1,) * chosen, (1,) * rejected, desirable=label)
            for (chosen, rejected), label in zip(trl.LENGTHS, labels, strict=True)
        ]
    )
    weights = mx.ones((len(labels),))
    if config.use_weighting:
        weights = mx.exp(sum(pair_log_weights(lambda tokens: logits, batch)))

    def scored(along):
        moved = logits + along[:, None, None] * direction
        policy = pair_logps(lambda tokens: moved, batch, ld_alpha=config.ld_alpha)
        base = pair_logps(lambda tokens: reference, batch, ld_alpha=config.ld_alpha)
        if objective.labelled and trl.labelled_rows(name)[0].start:
            policy, base = PairLogps(*reversed(policy)), PairLogps(*reversed(base))
        return ScoredPairs(policy, base, metadata, weights)

    zero = mx.zeros((len(TEXTS.tokens),))

    def with_ratios(pairs):
        return pairs, log_ratios(pairs.policy, pairs.reference)

    loss, slopes = mx.value_and_grad(
        lambda along: objective.compute_losses(*with_ratios(scored(along))).mean()
    )(zero)
    rewards = objective.compute_rewards(*with_ratios(scored(zero)))
    return loss.item(), np.array(slopes), [r.tolist() for r in rewards]


def test_every_loss_that_trl_has_is_compared():
    alone = {settings["loss_type"][0] for settings in CASES.values()}
    assert alone == LOSSES.keys() - NOT_IN_TRL


@pytest.mark.parametrize("name", CASES)
def test_value_and_slopes_are_trls(golden, name):
    theirs = golden[name]
    loss, slopes, _ = ours(name)
    assert loss == pytest.approx(theirs["loss"], rel=TOLERANCE, abs=TOLERANCE)
    largest = max(1.0, *map(abs, theirs["slopes"]))
    assert np.abs(slopes - theirs["slopes"]).max() <= TOLERANCE * largest


# Of `sft` alone TRL logs log-ratios, for which it runs a reference that the loss does not need.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"sft"}))
def test_rewards_are_what_trl_logs(golden, name):
    _, _, (chosen, rejected) = ours(name)
    if CASES[name]["loss_type"] == ["kto"]:
        good = np.array(trl.DESIRABLE)
        chosen, rejected = np.array(chosen)[good], np.array(chosen)[~good]
    assert np.mean(chosen) == pytest.approx(golden[name]["rewards/chosen"], rel=1e-5, abs=1e-6)
    assert np.mean(rejected) == pytest.approx(golden[name]["rewards/rejected"], rel=1e-5, abs=1e-6)


def test_the_golden_values_can_reveal_an_error(golden):
    """No two cases agree, no row is without a slope where the loss reads it."""
    losses = [case["loss"] for case in golden.values()]
    assert len({round(loss, 5) for loss in losses}) == len(losses)
    for name, case in golden.items():
        silent = len(trl.LENGTHS) * (name == "sft" or name.startswith("kto"))
        assert sum(abs(slope) < 30 * TOLERANCE for slope in case["slopes"]) <= silent + 1, name
