"""Settings turned into the parts of training: adapters, optimizer, loss and plan."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import mlx.nn as nn
import mlx.optimizers as optim

from mlx_dpo.config import DPOConfig
from mlx_dpo.errors import ConfigError
from mlx_dpo.objective.mixture import Objective
from mlx_dpo.policy import adapters
from mlx_dpo.policy.device import on_cpu
from mlx_dpo.policy.load import Base
from mlx_dpo.policy.probe import Choice, Wanted, choose
from mlx_dpo.policy.scoring import Score, score_pairs
from mlx_dpo.policy.sparing import sparing_memory
from mlx_dpo.preferences.batches import PassLimit
from mlx_dpo.training.loop import Plan
from mlx_dpo.training.schedule import learning_rate
from mlx_dpo.types import PairLogps, TokenizedPair

# A pass without a backward one may be so many times as large: it keeps nothing of the layers.
FORWARD_ONLY = 4


def attach_adapters(model: nn.Module, config: DPOConfig) -> dict[str, Any]:
    """Fresh adapters on `model`; returns what mlx-lm has to know of them."""
    keys = adapters.attach(
        model,
        rank=config.lora_r,
        scale=config.lora_scale,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        num_layers=config.num_layers,
        seed=config.seed,
    )
    return adapters.adapter_config(
        keys=keys,
        rank=config.lora_r,
        scale=config.lora_scale,
        dropout=config.lora_dropout,
        num_layers=config.num_layers or len(model.layers),
    )


def make_optimizer(policy: nn.Module, config: DPOConfig) -> optim.Optimizer:
    """AdamW as in PyTorch: with bias correction, which MLX leaves out unless asked."""
    optimizer = optim.AdamW(
        config.learning_rate, weight_decay=config.weight_decay, bias_correction=True
    )
    optimizer.init(policy.trainable_parameters())
    return optimizer


def choose_scorer(base: Base, config: DPOConfig) -> Choice:
    """How the pairs of a run are scored; adapters have to be attached.

    Raises:
        ModelError: a scorer is wanted that is not exact for this model.
    """
    wanted = cast(Wanted, config.scorer)
    with sparing_memory(base.model, recompute=bool(config.recompute)):  # as in training
        return choose(base.model, vocab_size=base.vocab_size, wanted=wanted)


def forward_limit(config: DPOConfig, choice: Choice) -> PassLimit:
    """The most that one pass without gradients holds."""
    # Whole rows of logits, or a training pass that keeps no more either, leave no room for it;
    # and on the CPU larger arrays leave its caches, so that long pairs take four times as long.
    roomy = choice.name == "shared" and not config.recompute
    more = roomy and not on_cpu()
    return config.pass_limit.times(FORWARD_ONLY if more else 1)


def forward_only(config: DPOConfig, choice: Choice) -> Score:
    """How the reference is asked and the policy is measured."""
    return partial(
        score_pairs,
        limit=forward_limit(config, choice),
        scorer=choice.forward_only,
        cost=choice.cost,
    )


def make_objective(config: DPOConfig) -> Objective:
    """What the settings make small."""
    return Objective(beta=config.beta, label_smoothing=config.label_smoothing)


def refuse_standstill(config: DPOConfig, total_steps: int) -> None:
    """The first update of a warm-up has rate 0: a run must be longer than that.

    Raises:
        ConfigError: no update of the run would change anything.
    """
    if total_steps == 1 and config.warmup > 0:
        raise ConfigError(
            "the run has 1 step, and a warm-up begins at learning rate 0, so nothing would be "
            "trained; use --warmup-ratio 0, more pairs, --max-steps, or a smaller --batch-size"
        )


def make_plan(
    config: DPOConfig,
    pairs: Sequence[TokenizedPair],
    reference: PairLogps,
    *,
    choice: Choice,
    total_steps: int,
) -> Plan:
    """What each step sees and does."""
    return Plan(
        pairs=pairs,
        reference=reference,
        objective=make_objective(config),
        learning_rate=partial(
            learning_rate,
            peak=config.learning_rate,
            total=total_steps,
            warmup=config.warmup,
            kind=config.lr_scheduler_type,
        ),
        total_steps=total_steps,
        batch_size=config.batch_size,
        limit=config.pass_limit,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        scorer=choice.scorer,
        cost=choice.cost,
        score=forward_only(config, choice),
        recompute=bool(config.recompute),
    )
