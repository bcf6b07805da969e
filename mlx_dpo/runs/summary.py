"""Summarize a run for the terminal, before and after training. Each line has a label and a text.

Before training the lines that matter come by default: model, pairs, what is trained, steps, output,
and whatever is lost, slower or different from what was asked for. With `verbose` all of them come.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from mlx_dpo.adapters.attach import adapted_layers, get_fine_tune_type
from mlx_dpo.adapters.layers import LoRAEmbedding, LoRASwitchLinear, adapter_rank
from mlx_dpo.adapters.master_weights import forward_dtypes
from mlx_dpo.adapters.targets import block_paths, has_tied_embeddings
from mlx_dpo.config.data import DEFAULT_MAX_LENGTH
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.training import SCORED_BY_PAIRS
from mlx_dpo.data.batches.micro_batches import EpochMicroBatches, count_micro_batches
from mlx_dpo.data.batches.token_counts import shares_prefixes
from mlx_dpo.data.columns import LENGTHS, column, count_shared_pairs, prompt_keys
from mlx_dpo.generation.context import context_length
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.models.device import dtype_name
from mlx_dpo.optim.optimizers import OPTIMIZERS
from mlx_dpo.profiling import memory
from mlx_dpo.runs.distributed.describe import describe_ranks, describe_traffic
from mlx_dpo.runs.inputs import Inputs
from mlx_dpo.runs.reference import needed_pairs
from mlx_dpo.units import format_items

if TYPE_CHECKING:
    from mlx_dpo.runs.trainer import DPOTrainer

EMBEDDINGS = "the embeddings"

SummaryLine = tuple[str, str]


def describe_reference(policy: nn.Module, config: DPOConfig) -> str:
    """Return a description of the reference model and of when its log-probs are computed."""
    if not config.needs_reference:
        return "none: the loss needs none"
    if config.reference_model is not None:
        return f"{config.reference_model}, scored once before the policy was loaded, then freed"
    if config.start_adapter is not None:
        what = f"with the adapter of {config.start_adapter}"
    else:
        what = (
            "before it is trained" if get_fine_tune_type(policy) == "full" else "without adapters"
        )
    if config.sync_ref_model:
        return (
            f"the model {what}; every {config.sync_steps} steps it moves "
            f"{config.mixup_alpha:.0%} of the way to the policy and is scored in each step"
        )
    return f"the model {what}, scored once before the first step"


def summarize_trainable(
    policy: nn.Module, config: DPOConfig, entries: Mapping[str, Any]
) -> list[SummaryLine]:
    """Return the summary lines about the trainable parameters.

    Args:
        policy: model with adapters attached.
        config: settings of the run.
        entries: content of the base model's `config.json`.
    """
    count, trainable = memory.base_parameters(policy), memory.trainable_parameters(policy)
    share = f"{format_count(trainable)} parameters trained, {trainable / count:.2%} of the model"
    if get_fine_tune_type(policy) == "full":
        narrow = " and ".join(sorted(dtype_name(dtype) for dtype in forward_dtypes(policy)))
        note = ("", f"stored in float32, computed in {narrow}")
        what = f"full fine-tuning, in {_describe_trained_layers(policy)}: {share}"
        return [("weights", what), *[note] * bool(narrow)]
    lines = [("adapters", f"{_describe_adapters(policy, config)}: {share}")]
    if any(isinstance(module, LoRAEmbedding) for module in adapted_layers(policy).values()):
        note = ("", "the LM head is tied to the embeddings and adapted with them")
        lines += [note] * has_tied_embeddings(policy)
    if unread := _unsupported_by_mlx_lm(policy, entries):
        lines.append(("", f"mlx-lm itself cannot load DoRA on {unread}; mlx-dpo can"))
    return lines


def _unsupported_by_mlx_lm(policy: nn.Module, entries: Mapping[str, Any]) -> str | None:
    """Return a name for the DoRA layers that mlx-lm cannot load; None if there are none.

    mlx-lm computes a wrong width for DoRA on quantized embeddings and with some bit widths.
    """
    packed = entries.get("quantization") or {}
    if get_fine_tune_type(policy) != "dora" or not packed:
        return None
    kinds = {_layer_kind(module) for module in adapted_layers(policy).values()}
    if EMBEDDINGS in kinds:
        return "quantized embeddings"
    return f"{packed['bits']}-bit layers" if packed["bits"] not in (2, 4, 8) else None


def _describe_adapters(policy: nn.Module, config: DPOConfig) -> str:
    adapted = adapted_layers(policy)
    kinds = Counter(_layer_kind(module) for module in adapted.values())
    layers = " and ".join(
        f"{number} {kind}" for kind, number in kinds.items() if kind != EMBEDDINGS
    )
    layers += f"{' and ' * bool(layers)}{EMBEDDINGS}" * (EMBEDDINGS in kinds)
    layer = next(iter(adapted.values()))
    rank, rooted = adapter_rank(layer), config.start_adapter is None and config.use_rslora
    alpha = f"{config.alpha:g} / sqrt(rank)" if rooted else f"{layer.scale * rank:g}"
    method = "DoRA" if get_fine_tune_type(policy) == "dora" else "LoRA"
    return f"{method}, rank {rank}, alpha {alpha} on {layers}"


def _layer_kind(module: nn.Module) -> str:
    if isinstance(module, LoRASwitchLinear):
        return "layers of experts"
    return EMBEDDINGS if isinstance(module, LoRAEmbedding) else "linear layers"


def _describe_trained_layers(policy: nn.Module) -> str:
    """Describe which layers full fine-tuning trains."""
    names, paths = named_arrays(policy.trainable_parameters()), block_paths(policy)
    blocks = sum(any(name.startswith(f"{path}.") for name in names) for path in paths)
    inside = tuple(f"{path}." for path in paths)
    outside = sorted({n.rpartition(".")[0] for n in names if not n.startswith(inside)})
    return " and ".join([f"{blocks} of {len(paths)} blocks"] * bool(blocks) + outside)


def format_count(number: int) -> str:
    """Return a number as text: with three digits and K, M or B from 1000 on, else unchanged."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


QUANTIZED_ON_LOAD = (
    "they belong to the base as quantized here; to use them in mlx-lm and others, write that base "
    "with `mlx-dpo convert --bits` first and train on it"
)


def summarize_inputs(run: "DPOTrainer", *, verbose: bool = True) -> list[SummaryLine]:
    """Return the summary lines about the model and the pairs."""
    base, inputs = run.inputs.base, run.inputs
    count = format_count(memory.total_parameters(base.model))
    lines = [("model", f"{base.source}, {count} parameters")]
    lines += [("", note) for note in (*base.notes, *(base.storage_notes if verbose else ()))]
    lines += [
        (run.config.unit, f"{len(inputs.train):,} to train on, {len(inputs.valid):,} held out")
    ]
    for report in inputs.reports:
        lines += [("", line) for line in (report.lines() if verbose else report.warning_lines())]
    limit, context = run.config.length_limit, context_length(base.config)
    if limit < DEFAULT_MAX_LENGTH and limit == context:
        lines += [("", f"max length {limit:,} tokens: the model's context length")]
    elif context is not None and limit > context:
        lines += [("", f"max length {limit:,} is above the model's context length of {context:,}")]
    if leaked := count_shared_pairs(inputs.valid, inputs.train):
        lines.append(("", f"{leaked:,} of the held-out {run.config.unit} are also trained on"))
    lines += [("", note) for note in describe_held_out_prompts(run.config, inputs)]
    lines += [("", f"{name}: not used, for --valid was given") for name in inputs.unused_splits]
    return lines


def describe_held_out_prompts(config: DPOConfig, inputs: Inputs) -> list[str]:
    """Return notes on prompts in both splits, and on more held-out pairs than the settings ask for.

    Pairs with the same prompt are held out together, so a prompt of many pairs takes them all.
    """
    held_out = set(prompt_keys(inputs.valid))
    shared = sum(key in held_out for key in prompt_keys(inputs.train)) if held_out else 0
    notes = []
    if shared:
        notes.append(
            f"{shared:,} of the training {config.unit} have a prompt that is also held out, so "
            "held-out metrics are too optimistic; `mlx-dpo data clean` removes these rows"
        )
    total, share = len(inputs.train) + len(inputs.valid), inputs.held_out_share
    wanted = max(1, round(share * total))
    if share and not config.mix and len(inputs.valid) >= wanted + max(2, wanted):
        notes.append(
            f"{len(inputs.valid):,} {config.unit} are held out, but --valid-fraction {share:g} "
            f"asks for {wanted:,}: {config.unit} with the same prompt are held out together; use "
            "--valid FILE, or --valid-fraction 0"
        )
    return notes


def summarize_training(run: "DPOTrainer", *, verbose: bool = True) -> list[SummaryLine]:
    """Return the summary lines about the training that is about to start."""
    quantized = run.config.bits is not None
    oversized = _summarize_oversized(run)
    is_fallback = run.choice.name == "plain" and run.config.scorer == "auto"
    scorer = [("scorer", f"{run.choice.name}: {run.choice.reason}")]
    is_tight = run.fitted.instead_of is not None or not run.fitted.fits
    memory_needed = [("memory", run.fitted.describe())]
    return [
        *(_summarize_reference(run) if verbose else []),
        *summarize_trainable(run.policy, run.config, run.inputs.base.config),
        *([("", QUANTIZED_ON_LOAD)] if quantized else []),
        *(scorer if verbose or is_fallback else []),
        *([("loss", describe_loss(run.config))] if verbose else []),
        ("steps", _describe_steps(run)),
        *_summarize_order(run),
        *_summarize_ranks(run),
        *([*_summarize_best(run), _summarize_micro_batches(run)] if verbose else []),
        *[("" if verbose else "micro-batches", line) for line in oversized],
        *(_summarize_samples(run) if verbose or run.answer_sampler is None else []),
        *(memory_needed if verbose or is_tight else []),
        ("output", run.config.output + _describe_resume(run)),
        *[("logging", f"{tracker.name}: {tracker.location}") for tracker in run.trackers.trackers],
    ]


def _summarize_reference(run: "DPOTrainer") -> list[SummaryLine]:
    reference = describe_reference(run.policy, run.config)
    return [("reference", reference), *_summarize_needed_pairs(run)]


def _summarize_needed_pairs(run: "DPOTrainer") -> list[SummaryLine]:
    """Return a summary line if the reference is scored on some of the training pairs only."""
    scored, count = needed_pairs(run.config, run.inputs.splits)["train"], len(run.inputs.train)
    if not run.config.needs_reference or len(scored) == count:
        return []
    unit = run.config.unit
    text = f"scored on {len(scored):,} of {count:,} training {unit}: those that the steps use"
    return [("", text)]


def summarize_end(run: "DPOTrainer") -> list[SummaryLine]:
    """Return the summary lines about the result: adapter, ranks, early stop, best checkpoint."""
    best, step = run.best, run.stopped_early_at
    traffic = [("ranks", text) for text in describe_traffic(run.peers)]
    lines = [("adapter", run.adapter_support), *traffic]
    if best.rule is None:
        return lines
    if step is not None:
        waited = best.state.num_without_improvement
        none = f"{waited} evaluation{'s' * (waited != 1)} in a row without an improvement"
        lines.append(("early stop", f"after step {step} of {run.total_steps}: {none}"))
    if best.step is not None:
        lines.append(
            ("best checkpoint", f"step {best.step}, {best.rule.metric} {best.state.value:.4f}")
        )
    return lines


def summarize_findings(warnings: Sequence[str], result: str) -> list[SummaryLine]:
    """Return the summary lines about the result of a run and the warnings of its training."""
    label = format_items(len(warnings), "warnings")
    return [
        ("result", result),
        *[("" if number else label, text) for number, text in enumerate(warnings)],
    ]


def describe_loss(config: DPOConfig) -> str:
    """Return a description of the loss and of the settings that it uses."""
    terms = zip(config.weights_of_losses, config.loss_type, strict=True)
    total = " + ".join(name if weight == 1 else f"{weight:g} {name}" for weight, name in terms)
    parts = _loss_settings(config)
    if config.f_divergence_type is not None:
        parts.append(config.f_divergence_type)
    if config.f_divergence_type == "alpha_divergence":
        parts[-1] += f" {config.divergence_alpha:g}"
    if config.ld_alpha is not None:
        parts.append(f"ld_alpha {config.ld_alpha:g}")
    wpo = ["weighted by on-policy probability (WPO)"] if config.use_weighting else []
    return ", ".join([total, *parts, *wpo])


def _loss_settings(config: DPOConfig) -> list[str]:
    """Return the hyper-parameters that the losses use, as text.

    A hyper-parameter whose value differs between losses is listed once per loss.
    """
    read: dict[str, dict[str, float]] = {}
    for loss in config.losses:
        for name, value in vars(config.get_hyperparameters(loss)).items():
            read.setdefault(name, {})[loss.name] = value
    parts: list[str] = []
    for name, values in read.items():
        if len(set(values.values())) > 1:
            parts += [f"{name} {value:g} of {loss}" for loss, value in values.items()]
        elif any(values.values()) or getattr(config, name) is not None:
            parts.append(f"{name} {next(iter(values.values())):g}")
    return parts


def _describe_steps(run: "DPOTrainer") -> str:
    config, rising = run.config, run.config.count_warmup_steps(run.total_steps)
    reason = run.record["chosen_settings"].get("learning_rate", "")
    warmup = f"warm-up over {rising} step{'s' * (rising != 1)}" if rising else "no warm-up"
    return (
        f"{run.total_steps} of {'up to ' * run.order.whole_prompts}{config.batch_size} "
        f"{config.unit}; "
        f"{OPTIMIZERS[config.optim].title}, "
        f"{describe_learning_rate(config, reason)}, "
        f"{config.lr_scheduler_type}, {warmup}"
    )


def _summarize_order(run: "DPOTrainer") -> list[SummaryLine]:
    """Return a line about the order of the pairs, if prompts have several pairs or are grouped."""
    config, train, order = run.config, run.inputs.train, run.order
    prompts = len(set(prompt_keys(train)))
    counts = f"{len(train):,} {config.unit} of {prompts:,} prompts"
    if order.whole_prompts:
        large, steps = order.count_oversized_prompts(), "each a step of its own"
        text = f"{counts}; a step has whole lists"
        return [("order", text + f"; {large:,} above `batch_size`, {steps}" * (large > 0))]
    if order.prompts is not None:
        text = f"{counts}; those of one prompt stay together"
        if not shares_prefixes(run.choice.cost):  # also where the model has no trie scorer
            text += f", without gain with the scorer {run.choice.name}"
        is_grouped = order.count_groups() < len(train)
        return [("order", text if is_grouped else f"{counts}: nothing to group")]
    if prompts == len(train):
        return []
    return [("order", f"{counts}, shuffled one by one: {_reason_for_no_groups(run)}")]


def _reason_for_no_groups(run: "DPOTrainer") -> str:
    config = run.config
    if run.earlier is not None:
        return "as when the run began"
    if config.group_by_prompt is False:
        return "as requested"
    if config.uses_whole_batch:
        return "the loss compares the pairs of a step"
    if config.scorer in SCORED_BY_PAIRS:
        return f"the scorer {config.scorer} would not gain from groups"
    return "those of one prompt are copies"


def describe_learning_rate(config: DPOConfig, reason: str) -> str:
    """Return the learning rate and, if it was chosen, what it was chosen by."""
    chosen = f" (chosen: {reason})" if reason else ""
    return f"learning rate {config.peak_learning_rate:g}{chosen}"


def _summarize_ranks(run: "DPOTrainer") -> list[SummaryLine]:
    """Return lines on the ranks of a run, their hosts and what they send, if it has several."""
    if run.ranks.is_alone:
        return []
    counts = _count_micro_batches(run)
    lines = describe_ranks(
        run.peers, counts.micro_batches / counts.steps, memory.trainable_bytes(run.policy)
    )
    return [("" if number else "ranks", line) for number, line in enumerate(lines)]


def _summarize_best(run: "DPOTrainer") -> list[SummaryLine]:
    best = run.best
    if best.rule is None:
        return []
    return [("best checkpoint", best.rule.describe(load_best_at_end=best.load_best_at_end))]


def _count_micro_batches(run: "DPOTrainer") -> EpochMicroBatches:
    config = run.config
    return count_micro_batches(
        run.inputs.train,
        config.pass_limit,
        order=run.order,
        cost=run.choice.cost,
    )


def _summarize_micro_batches(run: "DPOTrainer") -> SummaryLine:
    """Return the summary line about the micro-batches: size limit, number, tokens and padding."""
    config, limit, counts = run.config, run.config.pass_limit, _count_micro_batches(run)
    named = ((limit.pairs, config.unit), (limit.tokens, "tokens"))
    bounds = [f"{bound:,} {what}" for bound, what in named if bound is not None]
    return (
        "micro-batches",
        f"up to {' and '.join(bounds)}, about {counts.micro_batches / counts.steps:.2g} per step; "
        f"{counts.tokens.total / counts.micro_batches:,.0f} tokens on average, "
        f"{counts.tokens.padding / counts.tokens.total:.1%} padding"
        + _describe_sharing(run, counts),
    )


def _describe_sharing(run: "DPOTrainer", counts: EpochMicroBatches) -> str:
    """Describe the tokens that passes save because texts of different pairs share beginnings."""
    if not shares_prefixes(run.choice.cost):
        return ""
    lengths = column(run.inputs.train, LENGTHS)
    alone = int(lengths.sum()) - 2 * len(lengths)
    saved = 1 - (counts.tokens.total - counts.tokens.padding) / alone
    return f", {saved:.1%} saved by shared beginnings"


def _summarize_oversized(run: "DPOTrainer") -> list[str]:
    """Return a text about pairs that exceed the limit of a micro-batch; none if no pair does."""
    limit, unit = run.config.pass_limit.tokens, run.config.unit
    counts = None if limit is None else _count_micro_batches(run)
    if counts is None or not counts.oversized:
        return []
    is_single = counts.oversized == 1
    pairs = f"1 {unit[:-1]} exceeds" if is_single else f"{counts.oversized:,} {unit} exceed"
    return [
        f"{pairs} the limit of {limit:,} tokens and {'is' if is_single else 'are'} processed "
        f"alone; the longest has {counts.longest:,} tokens"
    ]


def _summarize_samples(run: "DPOTrainer") -> list[SummaryLine]:
    """Return how many held-out prompts are answered, or why none is although it was asked for."""
    config, recorded = run.config, run.answer_sampler
    if recorded is None:
        if not config.samples:
            return []
        reason = "no pairs are held out"
        if run.inputs.valid:
            reason = "no held-out prompt leaves room for an answer in the model's context"
        return [("samples", f"none: {reason}")]
    count, tokens = len(recorded.sampler.prompts), recorded.sampler.sampling.max_tokens
    prompts = f"{count} held-out prompt{'s' * (count != 1)}"
    text = f"{prompts}, answered in up to {tokens} tokens at each evaluation (--samples 0: none)"
    return [("samples", text)]


def _describe_resume(run: "DPOTrainer") -> str:
    if run.start.step:
        return f", resuming after step {run.start.step}"
    return ", from the beginning: there is no checkpoint" if run.earlier else ""
