"""What a run is about to do, in lines for a person."""

from typing import TYPE_CHECKING

from mlx_dpo.policy import memory
from mlx_dpo.policy.adapters import adapted_modules
from mlx_dpo.preferences.batches import epoch_passes
from mlx_dpo.types import TokenizedPair

if TYPE_CHECKING:
    from mlx_dpo.runs.training import Run

Fact = tuple[str, str]

QUANTISED_ON_LOAD = (
    "they belong to the base as it is quantised here; for mlx-lm and others, write that base "
    "with `mlx-dpo convert --bits` first and train on it"
)


def facts_of_inputs(run: "Run") -> list[Fact]:
    """What was loaded."""
    base, inputs = run.inputs.base, run.inputs
    count = counted(memory.total_parameters(base.model))
    lines = [("model", f"{base.source}, {count} parameters")]
    lines += [("", note) for note in base.notes]
    lines += [("pairs", f"{len(inputs.train):,} to train on, {len(inputs.valid):,} held out")]
    lines += [("", line) for report in inputs.reports for line in report.lines()]
    if leaked := len(set(map(_ids, inputs.valid)) & set(map(_ids, inputs.train))):
        lines.append(("", f"{leaked:,} of the held-out pairs are trained on as well"))
    if inputs.passed_over is not None:
        lines.append(("", f"{inputs.passed_over}: not used, for --valid was given"))
    return lines


def facts_of_training(run: "Run") -> list[Fact]:
    """What is about to be done with it."""
    quantised = run.config.bits is not None
    return [
        ("reference", "the model without adapters, scored once before the first step"),
        ("adapters", _adapters(run)),
        *([("", QUANTISED_ON_LOAD)] if quantised else []),
        ("scorer", f"{run.choice.name}: {run.choice.reason}"),
        ("loss", _loss(run)),
        ("steps", _steps(run)),
        *_passes(run),
        ("memory", run.fitted.line()),
        ("output", run.config.output + _resumed(run)),
    ]


def _ids(pair: TokenizedPair) -> tuple[tuple[int, ...], ...]:
    return pair.prompt, pair.chosen, pair.rejected


def _adapters(run: "Run") -> str:
    config, policy = run.config, run.policy
    trained = memory.trainable_parameters(policy)
    share = trained / (memory.total_parameters(policy) - trained)
    return (
        f"rank {config.lora_r}, alpha {config.lora_alpha:g} on {len(adapted_modules(policy))} "
        f"linear layers: {counted(trained)} parameters trained, {share:.2%} of the model"
    )


def _loss(run: "Run") -> str:
    config = run.config
    smoothing = f", label smoothing {config.label_smoothing:g}" if config.label_smoothing else ""
    return f"sigmoid (DPO), beta {config.beta:g}{smoothing}"


def _steps(run: "Run") -> str:
    config = run.config
    return (
        f"{run.total_steps} of {config.batch_size} pairs; "
        f"AdamW, learning rate {config.learning_rate:g}, {config.lr_scheduler_type}, "
        f"{config.warmup:.0%} warm-up"
    )


def _passes(run: "Run") -> list[Fact]:
    """How the steps of an epoch are cut into passes."""
    config, limit = run.config, run.config.pass_limit
    found = epoch_passes(
        run.inputs.train,
        limit,
        batch_size=config.batch_size,
        seed=config.seed,
        cost=run.choice.cost,
    )
    named = ((limit.pairs, "pairs"), (limit.tokens, "tokens"))
    bounds = [f"{bound:,} {what}" for bound, what in named if bound is not None]
    lines = [
        (
            "passes",
            f"of up to {' and '.join(bounds)}: {found.passes / found.steps:.3g} a step, "
            f"{found.tokens.total / found.passes:,.0f} tokens each on average, "
            f"{found.tokens.padding / found.tokens.total:.1%} of them padding",
        )
    ]
    if found.alone:
        pairs = "1 pair takes" if found.alone == 1 else f"{found.alone:,} pairs take"
        lines.append(("", f"{pairs} more and go alone; the longest takes {found.longest:,} tokens"))
    return lines


def _resumed(run: "Run") -> str:
    return f", going on after step {run.start.step}" if run.start.step else ""


def counted(number: int) -> str:
    """A number with three digits and a letter for thousands, millions, billions."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
