"""A run measured again, on its own held-out pairs or on others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.heldout import evaluate
from mlx_dpo.policy import adapters
from mlx_dpo.policy.gated_delta import fused_gated_delta
from mlx_dpo.policy.load import Base, fingerprint, tokenizer_fingerprint
from mlx_dpo.preferences.pairs import digest
from mlx_dpo.preferences.sources import find
from mlx_dpo.runs.inputs import (
    held,
    read_base,
    read_inputs,
    read_pairs,
    refuse_beyond_context,
)
from mlx_dpo.runs.method import choose_scorer, forward_only, make_objective
from mlx_dpo.runs.policies import Opened, open_run
from mlx_dpo.runs.record import check_contents
from mlx_dpo.runs.reference_cache import ask_reference
from mlx_dpo.types import PreferenceMetrics, TokenizedPair


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a run on a set of pairs."""

    run: Opened
    name: str  # what the pairs are, for a person
    pairs: int
    metrics: PreferenceMetrics
    notes: tuple[str, ...]  # what became of the rows of a named file


def evaluate_run(
    folder: str, pairs: str | None = None, *, bad_pairs: str | None = None
) -> Evaluation:
    """The policy of a run against its reference, with the run's own loss and beta.

    `pairs` is a file, or a folder whose held-out file is taken; without it, the run's own
    held-out pairs.

    Raises:
        ConfigError: no pairs are given and the run held none out, or rows are too long.
        RunError, DataError, ModelError: the run, the pairs or the model are at fault.
    """
    run = open_run(folder)
    if bad_pairs is not None:
        if pairs is None:
            raise ConfigError("`bad_pairs` has no effect without a file of pairs")
        run = replace(run, config=replace(run.config, bad_pairs=bad_pairs))
    base, measured, name, notes = _own(run) if pairs is None else _named(run, pairs)
    if not measured:
        raise ConfigError(f"{folder}: the run held no pairs out; name a file of pairs")
    now = {"model": fingerprint(base.path), "tokenizer": tokenizer_fingerprint(base.path)}
    check_contents(run.paths, run.record, now)
    metrics = _metrics(run, base, measured)
    return Evaluation(run, name, len(measured), metrics, notes)


Measured = tuple[Base, Sequence[TokenizedPair], str, tuple[str, ...]]


def _own(run: Opened) -> Measured:
    inputs = read_inputs(run.config)
    check_contents(run.paths, run.record, {"valid": digest(inputs.valid)})
    return inputs.base, inputs.valid, "held-out pairs", ()


def _named(run: Opened, pairs: str) -> Measured:
    sources = find(pairs)
    path = sources.valid or sources.train
    base = read_base(run.config)
    read = read_pairs(run.config, base, path)
    refuse_beyond_context(run.config, base, read.pairs)
    notes = tuple(read.report.lines())
    if digest(read.pairs) == run.record["provenance"]["train"]:
        notes += ("the run was trained on these pairs; this says nothing of unseen ones",)
    return base, read.pairs, f"pairs of {path}", notes


def _metrics(
    run: Opened,
    base: Base,
    pairs: Sequence[TokenizedPair],
) -> PreferenceMetrics:
    config = run.config
    with fused_gated_delta(base.model):
        adapters.load_adapter(base.model, run.adapter)
        score = forward_only(config, choose_scorer(base, config))
        with adapters.adapters_off(base.model):
            reference = ask_reference(base.model, pairs, run.record, held=held(base), score=score)
        return evaluate(
            base.model,
            pairs,
            reference,
            make_objective(config),
            score=score,
        )
