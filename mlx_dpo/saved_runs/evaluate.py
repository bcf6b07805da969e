"""Evaluate saved runs on their held-out pairs or on other pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_dpo.data.chat_templates.template_date import set_day
from mlx_dpo.data.columns import prompt_keys as prompts_of_pairs
from mlx_dpo.data.examples import parse_rows
from mlx_dpo.data.prompts import Prompt, check_no_template_kwargs, collect_prompts, make_prompt
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import STDIN, find_sources, resolve_held_out_source
from mlx_dpo.errors import ConfigError
from mlx_dpo.losses.metrics import to_public_names
from mlx_dpo.models.files import model_fingerprint, tokenizer_fingerprint
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.phases import phase
from mlx_dpo.runs.build import (
    choose_scorer,
    make_dataset_scorer,
    make_on_policy_weights,
    with_recorded_scorer,
)
from mlx_dpo.runs.folder import check_provenance
from mlx_dpo.runs.inputs import (
    add_kl_completions,
    check_context_length,
    check_lists,
    device_and_dtype,
    digest_of_split,
    load_configured_base,
    load_configured_source,
    load_inputs,
    row_rules,
)
from mlx_dpo.runs.reference import (
    compute_logps_of_splits,
    load_reference_model,
    reference_cache,
)
from mlx_dpo.runs.trackers import monitored_run
from mlx_dpo.saved_runs.open import (
    OpenRun,
    load_adapter_into,
    load_reference_into,
    load_synced_reference_into,
    open_run,
)
from mlx_dpo.schemas.messages import prompt_digest
from mlx_dpo.scoring.kernels.gated_delta import use_fused_gated_delta
from mlx_dpo.scoring.score_pairs import DatasetScorer
from mlx_dpo.training.monitor.verdict import DEGENERATE, Verdict, judge_policy
from mlx_dpo.training.objective import Objective, evaluate
from mlx_dpo.training.reference_logps import reference_logps
from mlx_dpo.types import PairLogps, PreferenceMetrics, TokenizedPair
from mlx_dpo.units import format_items


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a run's policy on a set of pairs, with notes about the pairs."""

    run: OpenRun
    name: str  # description of the pairs
    pairs: int
    metrics: PreferenceMetrics
    notes: tuple[str, ...]  # skipped and truncated rows of a named file
    verdict: Verdict | None = None  # on the policy, by these metrics; None if nothing is wrong

    @property
    def description(self) -> str:
        """Number and description of the pairs, such as `50 held-out pairs`."""
        return format_items(self.pairs, self.name)


def evaluate_run(
    folder: str, pairs: str | None = None, *, bad_pairs: str | None = None
) -> Evaluation:
    """Compute the metrics of a run's policy against its reference, with the run's loss and beta.

    `pairs` is a file of pairs, or a folder or dataset whose held-out split is read. Without it, the
    run's own held-out pairs are used.

    Raises:
        ConfigError: no pairs are given and the run held none out, or rows are too long.
        RunError, DataError, ModelError: the run, the pairs or the model are at fault.
    """
    run = open_run(folder)
    if bad_pairs is not None:
        if pairs is None:
            raise ConfigError("`bad_pairs` has no effect without a file of pairs")
        run = replace(run, config=replace(run.config, bad_pairs=bad_pairs))
    base, measured, name, notes = (
        load_held_out_pairs(run) if pairs is None else load_named_pairs(run, pairs)
    )
    if not measured:
        raise ConfigError(f"{folder}: the run has no held-out pairs; name a file of pairs")
    now = {"model": model_fingerprint(base.path), "tokenizer": tokenizer_fingerprint(base.path)}
    check_provenance(run.paths, run.record, now)
    metrics = _compute_metrics(run, base, measured)
    facts = monitored_run(run.config, measured, total_steps=run.record["steps"])
    is_single_pair = metrics.margins_stderr is None
    found = judge_policy(facts, to_public_names(metrics), is_single_pair=is_single_pair)
    verdict = found or _verdict_on_answers(run)
    return Evaluation(run, name, len(measured), metrics, notes, verdict)


def _verdict_on_answers(run: OpenRun) -> Verdict | None:
    """Return what the run itself found wrong with answers that it sampled."""
    verdict = Verdict.from_record(run.record)
    return verdict if verdict is not None and verdict.kind == DEGENERATE else None


EvaluationPairs = tuple[LoadedModel, Sequence[TokenizedPair], str, tuple[str, ...]]


def load_held_out_pairs(run: OpenRun, base: LoadedModel | None = None) -> EvaluationPairs:
    """Load a run's model and held-out pairs; return both, a description and no notes.

    `base` is the run's model if it is loaded already.

    Raises:
        ConfigError: the run read its pairs from standard input or from memory.
        RunError: the pairs have changed since the run.
    """
    if STDIN in run.config.pairs or run.record.get("datasets_in_memory"):
        source = "standard input" if STDIN in run.config.pairs else "memory"
        raise ConfigError(
            f"{run.paths.folder}: the run read its pairs from {source}, which cannot be read "
            "again; name a file of pairs"
        )
    inputs = load_inputs(
        run.config, read=load_configured_base if base is None else lambda _: base, day=run.day
    )
    check_provenance(run.paths, run.record, {"valid": digest_of_split(run.config, inputs.valid)})
    return inputs.base, inputs.valid, f"held-out {run.config.unit}", ()


def load_named_pairs(run: OpenRun, pairs: str, base: LoadedModel | None = None) -> EvaluationPairs:
    """Load a run's model and the pairs from the file or data set that `pairs` names.

    Return the model, the pairs, a description of them, and notes such as skipped rows. `base` is
    the run's model if it is loaded already.
    """
    source = resolve_held_out_source(pairs)
    if base is None:
        base = load_configured_base(run.config)
    set_day(base.tokenizer, run.day)
    read = load_configured_source(run.config, base, source)
    pairs_read = add_kl_completions(run.config, read.pairs)
    check_context_length(run.config, base, pairs_read)
    check_lists(run.config, pairs_read)
    notes = tuple(read.report.lines())
    if digest_of_split(run.config, pairs_read) == run.record["provenance"]["train"]:
        notes += ("the run was trained on these pairs; the result says nothing about unseen pairs",)
    return base, pairs_read, f"{run.config.unit} of {source.name}", notes


def _compute_metrics(
    run: OpenRun,
    base: LoadedModel,
    pairs: Sequence[TokenizedPair],
) -> PreferenceMetrics:
    config = run.config
    with use_fused_gated_delta(base.model):
        load_reference_into(run, base)
        choice = choose_scorer(base, config, run.record)
        config = with_recorded_scorer(config, choice, run.record)
        score = make_dataset_scorer(config, choice)
        reference = _reference_logps(run, base, pairs, score)
        load_adapter_into(run, base)
        return evaluate(
            base.model,
            pairs,
            reference,
            Objective(config),
            score=score,
            on_policy=make_on_policy_weights(config, choice),
        )


def _reference_logps(
    run: OpenRun, base: LoadedModel, pairs: Sequence[TokenizedPair], score: DatasetScorer
) -> PairLogps:
    """Return log-probs of chosen and rejected completions under the reference. (len(pairs),) each

    The adapters of `base` must be those that the run started from.
    """
    config = run.config
    if not config.needs_reference:
        return PairLogps(mx.zeros((len(pairs),)), mx.zeros((len(pairs),)))
    if config.reference_model is not None:
        other = load_reference_model(config)
        answers, now = compute_logps_of_splits(config, other, base.tokenizer, {"valid": pairs})
        check_provenance(run.paths, run.record, {"reference_model": now})
        return answers["valid"]
    if not load_synced_reference_into(run, base):
        cache = reference_cache(base.model, run.record, device_and_dtype(base))
        with phase("Computing reference log-probs", len(pairs), unit=config.unit) as advance:
            return reference_logps(base.model, pairs, cache=cache, score=score, progress=advance)
    return score(base.model, pairs)


def held_out_prompts(run: OpenRun, base: LoadedModel) -> list[Prompt]:
    """Return the prompts of a run's held-out pairs without duplicates, in the order of the pairs.

    Raises:
        ConfigError: the run has no held-out pairs, or read its pairs from memory.
        RunError, DataError: the pairs are gone, cannot be read any more, or pass values to the chat
            template (such as tools).
    """
    config = run.config
    if run.record.get("datasets_in_memory"):
        raise ConfigError(
            f"{run.paths.folder}: the run read its pairs from memory; name a file of prompts"
        )
    wanted = set(prompts_of_pairs(load_inputs(config, read=lambda _: base, day=run.day).valid))
    if not wanted:
        raise ConfigError(
            f"{run.paths.folder}: the run has no held-out pairs; name a file of prompts"
        )
    sources = find_sources(config.pairs, config.valid, config.split)
    prompts = []
    for source in (*sources.train, *sources.valid):
        report = PairsReport(source.name, config.length_limit, judged=config.labelled)
        for parsed in parse_rows(source.rows(), row_rules(config), report, bad_pairs="drop"):
            example = parsed.example
            if bytes.fromhex(prompt_digest(example)) in wanted:
                check_no_template_kwargs(example.template_kwargs, example.location)
                implicit = example.implicit_prompt
                prompts.append(
                    make_prompt(example.prompt, example.location, implicit_prompt=implicit)
                )
    return collect_prompts(prompts, str(run.paths.folder))
