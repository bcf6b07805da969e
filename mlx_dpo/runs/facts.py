"""What a run is about to do, in lines for a person."""

from typing import TYPE_CHECKING

from mlx_dpo.config import DPOConfig
from mlx_dpo.policy import memory
from mlx_dpo.preferences.batches import epoch_passes
from mlx_dpo.preferences.columns import shared
from mlx_dpo.runs.trained import counted, reference, trained
from mlx_dpo.settings.optimizer import KINDS

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
    lines += [
        (run.config.unit, f"{len(inputs.train):,} to train on, {len(inputs.valid):,} held out")
    ]
    lines += [("", line) for report in inputs.reports for line in report.lines()]
    if leaked := shared(inputs.valid, inputs.train):
        lines.append(("", f"{leaked:,} of the held-out {run.config.unit} are trained on as well"))
    lines += [("", f"{name}: not used, for --valid was given") for name in inputs.passed_over]
    return lines


def facts_of_training(run: "Run") -> list[Fact]:
    """What is about to be done with it."""
    quantised = run.config.bits is not None
    return [
        ("reference", reference(run.policy, run.config)),
        *trained(run.policy, run.config, run.inputs.base.config),
        *([("", QUANTISED_ON_LOAD)] if quantised else []),
        ("scorer", f"{run.choice.name}: {run.choice.reason}"),
        ("loss", loss_line(run.config)),
        ("steps", _steps(run)),
        *_watched(run),
        *_passes(run),
        ("memory", run.fitted.line()),
        ("output", run.config.output + _resumed(run)),
        *[("told", f"{sink.name}: {sink.where}") for sink in run.sinks.open],
    ]


def facts_of_end(run: "Run") -> list[Fact]:
    """How it ended, where that is not at the last step with the last adapters, and with what."""
    best, step = run.best, run.stopped_early_at
    lines = [("adapter", run.shipped)]
    if best.watched is None:
        return lines
    if step is not None:
        waited = best.standing.waited
        none = f"{waited} evaluation{'s' * (waited != 1)} in a row without an improvement"
        lines.append(("stopped", f"early, after step {step} of {run.total_steps}: {none}"))
    if best.kept is not None:
        value = f"{best.watched.name} {best.standing.value:.4f}"
        lines.append(("kept", f"the adapters of step {best.kept}, whose {value} is the best"))
    return lines


def loss_line(config: DPOConfig) -> str:
    """The sum that is made small, and all that acts on it."""
    terms = zip(config.weights_of_losses, config.loss_type, strict=True)
    total = " + ".join(name if weight == 1 else f"{weight:g} {name}" for weight, name in terms)
    said = _read_by_losses(config)
    if config.f_divergence_type is not None:
        said.append(config.f_divergence_type)
    if config.f_divergence_type == "alpha_divergence":
        said[-1] += f" {config.alpha_of_divergence:g}"
    if config.ld_alpha is not None:
        said.append(f"ld_alpha {config.ld_alpha:g}")
    weighed = ["weighed by what the policy would write"] if config.use_weighting else []
    return ", ".join([total, *said, *weighed])


def _read_by_losses(config: DPOConfig) -> list[str]:
    """The settings that losses read, loss by loss where they differ."""
    read: dict[str, dict[str, float]] = {}
    for kind in config.loss_kinds:
        for name in kind.defaults:
            read.setdefault(name, {})[kind.name] = config.read_by(kind, name)
    said: list[str] = []
    for name, values in read.items():
        if len(set(values.values())) > 1:
            said += [f"{name} {value:g} of {loss}" for loss, value in values.items()]
        elif any(values.values()) or getattr(config, name) is not None:
            said.append(f"{name} {next(iter(values.values())):g}")
    return said


def _steps(run: "Run") -> str:
    config, rising = run.config, run.config.warmup(run.total_steps)
    return (
        f"{run.total_steps} of {config.batch_size} {config.unit}; {KINDS[config.optim].title}, "
        f"learning rate {config.learning_rate:g}, {config.lr_scheduler_type}, "
        f"warm-up over {rising} step{'s' * (rising != 1)}"
    )


def _watched(run: "Run") -> list[Fact]:
    best = run.best
    return [("best", best.watched.line(keeps=best.keeps))] if best.watched else []


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
    named = ((limit.pairs, config.unit), (limit.tokens, "tokens"))
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
        one = found.alone == 1
        pairs = f"1 {config.unit[:-1]} takes" if one else f"{found.alone:,} {config.unit} take"
        lines.append(("", f"{pairs} more and go alone; the longest takes {found.longest:,} tokens"))
    return lines


def _resumed(run: "Run") -> str:
    if run.start.step:
        return f", going on after step {run.start.step}"
    return ", from the beginning: there was no checkpoint yet" if run.earlier else ""
