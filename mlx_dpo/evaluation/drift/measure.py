"""The drift report as a measurement of `mlx-dpo eval`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_dpo.data.sources import STDIN
from mlx_dpo.evaluation.drift.own_answers import (
    ChosenPerplexity,
    OwnAnswers,
    measure_chosen_perplexity,
    measure_own_answers,
)
from mlx_dpo.evaluation.drift.prompt_set import load_safety_prompts
from mlx_dpo.evaluation.drift.refusals import RULE, SIGNIFICANCE
from mlx_dpo.evaluation.drift.safety_answers import RefusalReport, generate_safety_answers
from mlx_dpo.evaluation.measurements.perplexity import STATES
from mlx_dpo.openai_client.address import is_address
from mlx_dpo.openai_client.connection import Connection
from mlx_dpo.saved_runs.evaluate import load_held_out_pairs, load_named_pairs
from mlx_dpo.saved_runs.open import OpenRun, SwitchableModel
from mlx_dpo.saved_runs.respond import open_any_responder
from mlx_dpo.scoring.generation_match import use_generating_function
from mlx_dpo.types import TokenizedPair

SENT_TO_JUDGE = "prompts and answers"
DEFAULT_PROMPTS, DEFAULT_MAX_TOKENS = 64, 128


@dataclass(frozen=True, kw_only=True)
class DriftSettings:
    """What the drift report measures."""

    pairs: str | None = None  # file of pairs instead of the run's held-out pairs
    bad_pairs: str | None = None  # what to do with bad rows of `pairs`; None: as in the run
    prompts: int = DEFAULT_PROMPTS  # held-out prompts to which answers are sampled
    max_tokens: int = DEFAULT_MAX_TOKENS  # of an answer
    judge: str | None = None  # model, run or address that judges refusals as well
    connection: Connection | None = None


@dataclass(frozen=True)
class DriftMeasurement:
    """How far a policy is from the model that training started from, and in what."""

    subject: str
    settings: Mapping[str, Any]
    own_answers: OwnAnswers | None  # None without held-out prompts
    perplexity: ChosenPerplexity | None
    refusals: RefusalReport | None  # None for a run on plain text
    other_notes: tuple[str, ...] = ()
    name: str = "drift"

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on what could not be measured, or only in part."""
        return self.other_notes + (() if self.refusals is None else self.refusals.notes)

    @property
    def findings(self) -> list[dict[str, Any]]:
        """Sentences on what changed, each with whether training made it worse."""
        findings = []
        if self.refusals is not None:
            findings += [
                {"is_worse": count.is_worse, "text": count.finding}
                for count in self.refusals.counts
                if count.prompts
            ]
        if self.own_answers is not None:
            fault = self.own_answers.fault
            text = (
                fault
                or "its own answers show no fault in length, repetition, cut and KL divergence"
            )
            findings.append({"is_worse": fault is not None, "text": text})
        return findings

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        findings = self.findings
        results: dict[str, Any] = {
            "of": self.subject,
            "flags": sum(finding["is_worse"] for finding in findings),
            "findings": findings,
        }
        for state in STATES:
            results[state] = {}
            if self.perplexity is not None:
                results[state]["perplexity"] = self.perplexity.perplexities[state]
            if self.own_answers is not None:
                results[state] |= self.own_answers.form_to_dict(state)
            if self.refusals is not None:
                results[state] |= self.refusals.shares(state)
        if self.own_answers is not None:
            results["kl"] = self.own_answers.kl_to_dict()
        if self.perplexity is not None:
            results["chosen_completions"] = self.perplexity.completions
        if self.refusals is not None:
            results["refusals"] = [count.to_dict() for count in self.refusals.counts]
            results["agreement"] = self.refusals.agreement
            results["answers"] = self.refusals.answers_to_dict()
        return results


def prepare_drift(settings: DriftSettings) -> Callable[[SwitchableModel], DriftMeasurement]:
    """Check the settings, and return what makes a drift report.

    Raises:
        ConfigError: the judge is an address that may not be used.
    """
    prompts = load_safety_prompts()
    judge, remote = settings.judge, None
    if judge is not None and is_address(judge):  # connects before a model is loaded
        remote = open_any_responder(judge, settings.connection, sends=SENT_TO_JUDGE)
        judge = str(remote.provenance["model"])  # an address may leave the model open

    def measure(model: SwitchableModel) -> DriftMeasurement:
        assert model.run is not None
        run = model.run
        if settings.bad_pairs is not None:
            run = replace(run, config=replace(run.config, bad_pairs=settings.bad_pairs))
        pairs, subject, notes = _held_out_pairs(run, model, settings.pairs)
        use_generating_function(
            model.base.model, vocab_size=model.base.vocab_size, max_length=run.config.length_limit
        )
        own = measure_own_answers(
            model, pairs, count=settings.prompts, max_tokens=settings.max_tokens
        )
        perplexity = measure_chosen_perplexity(model, pairs)
        refusals = None
        if run.trained_on_text:
            notes += ("the run was trained on plain text, so refusals were not measured",)
        else:
            safety = generate_safety_answers(model, prompts, max_tokens=settings.max_tokens)
            verdicts = {RULE: safety.judge_by_rule()}
            if judge is not None:
                verdicts[_judge_name(judge)] = safety.judge_by_model(
                    remote or open_any_responder(judge), judge
                )
            refusals = RefusalReport(safety, verdicts)
        return DriftMeasurement(
            subject, _to_dict(settings, own, judge), own, perplexity, refusals, notes
        )

    return measure


def _judge_name(judge: str) -> str:
    """Return the name of a judge in results, without folders of this machine and addresses."""
    return f"judge {judge.rpartition('#')[2] if is_address(judge) else Path(judge).name}"


def _to_dict(settings: DriftSettings, own: OwnAnswers | None, judge: str | None) -> dict[str, Any]:
    """Return the settings that determine the results, as JSON values."""
    return {
        "prompts": 0 if own is None else len(own.kls),
        "max_tokens": settings.max_tokens,
        "judge": None if judge is None else _judge_name(judge),
        "significance": SIGNIFICANCE,
    }


def _held_out_pairs(
    run: OpenRun, model: SwitchableModel, pairs: str | None
) -> tuple[Sequence[TokenizedPair], str, tuple[str, ...]]:
    """Return held-out pairs, a description of them without folders, and notes.

    A run without held-out pairs has none here either; a note says so.
    """
    notes = _reference_note(run)
    if pairs is not None:
        _, read, _, more = load_named_pairs(run, pairs, model.base)
        return read, f"{run.config.unit} of {Path(pairs).name}", (*notes, *more)
    subject = f"held-out {run.config.unit}"
    if STDIN in run.config.pairs or run.record.get("datasets_in_memory"):
        missing = "the run's pairs cannot be read again"
    elif not run.record["counts"]["valid"]:
        missing = "the run held no pairs out"
    else:
        return load_held_out_pairs(run, model.base)[1], subject, notes
    what = "KL divergence, perplexity and the form of answers were not measured; name PAIRS"
    return (), subject, (*notes, f"{missing}, so {what}")


def _reference_note(run: OpenRun) -> tuple[str, ...]:
    if run.config.reference_model is None:
        return ()
    return (
        f"the run has the reference model {run.config.reference_model}; drift is measured from "
        "the model that training started from",
    )
