"""A run measured again, on its own held-out pairs or on others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_dpo.data.columns import pairs_digest
from mlx_dpo.data.columns import prompt_keys as prompts_of_pairs
from mlx_dpo.data.examples import parse_rows
from mlx_dpo.data.prompts import Prompt, check_no_template_kwargs, check_prompts, make_prompt
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import STDIN, find_sources, resolve_held_out_source
from mlx_dpo.errors import ConfigError, RunError
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.models.files import model_fingerprint, tokenizer_fingerprint
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.runs.build import choose_scorer, forward_only, make_objective, weigher
from mlx_dpo.runs.folder import check_contents
from mlx_dpo.runs.inputs import (
    completed,
    held,
    read_base,
    read_inputs,
    read_pairs,
    refuse_beyond_context,
    row_rules,
)
from mlx_dpo.runs.reference import ask_about, ask_reference, load_other, uncounted
from mlx_dpo.saved_runs.open import Opened, open_run, put_policy, put_reference
from mlx_dpo.schemas.messages import prompt_digest
from mlx_dpo.scoring.kernels.gated_delta import use_fused_gated_delta
from mlx_dpo.scoring.score_pairs import DatasetScorer
from mlx_dpo.training import checkpoint
from mlx_dpo.training.objective import evaluate
from mlx_dpo.types import PairLogps, PreferenceMetrics, TokenizedPair


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

    `pairs` is a file, or a folder or dataset whose held-out split is taken; without it, the
    run's own held-out pairs.

    Raises:
        ConfigError: no pairs are given and the run held none out, or rows are too long.
        RunError, DataError, ModelError: the run, the pairs or the model are at fault.
    """
    run = open_run(folder)
    if bad_pairs is not None:
        if pairs is None:
            raise ConfigError("`bad_pairs` has no effect without a file of pairs")
        run = replace(run, config=replace(run.config, bad_pairs=bad_pairs))
    base, measured, name, notes = own_pairs(run) if pairs is None else named_pairs(run, pairs)
    if not measured:
        raise ConfigError(f"{folder}: the run held no pairs out; name a file of pairs")
    now = {"model": model_fingerprint(base.path), "tokenizer": tokenizer_fingerprint(base.path)}
    check_contents(run.paths, run.record, now)
    metrics = _metrics(run, base, measured)
    return Evaluation(run, name, len(measured), metrics, notes)


Measured = tuple[LoadedModel, Sequence[TokenizedPair], str, tuple[str, ...]]


def own_pairs(run: Opened) -> Measured:
    """The model of a run, and the pairs that it held out.

    Raises:
        ConfigError, RunError: they were read from standard input, or are others now.
    """
    if STDIN in run.config.pairs:
        raise ConfigError(
            f"{run.paths.folder}: the run read its pairs from standard input, which is gone; "
            "name a file of pairs"
        )
    inputs = read_inputs(run.config)
    check_contents(run.paths, run.record, {"valid": pairs_digest(inputs.valid)})
    return inputs.base, inputs.valid, f"held-out {run.config.unit}", ()


def named_pairs(run: Opened, pairs: str) -> Measured:
    """The model of a run, and the pairs of a file, or of a held-out split."""
    source = resolve_held_out_source(pairs)
    base = read_base(run.config)
    read = read_pairs(run.config, base, source)
    pairs_read = completed(run.config, read.pairs)
    refuse_beyond_context(run.config, base, pairs_read)
    notes = tuple(read.report.lines())
    if pairs_digest(pairs_read) == run.record["provenance"]["train"]:
        notes += ("the run was trained on these pairs; this says nothing of unseen ones",)
    return base, pairs_read, f"{run.config.unit} of {source.name}", notes


def _metrics(
    run: Opened,
    base: LoadedModel,
    pairs: Sequence[TokenizedPair],
) -> PreferenceMetrics:
    config = run.config
    with use_fused_gated_delta(base.model):
        put_reference(run, base)
        choice = choose_scorer(base, config)
        score = forward_only(config, choice)
        reference = _reference(run, base, pairs, score)
        put_policy(run, base)
        return evaluate(
            base.model,
            pairs,
            reference,
            make_objective(config),
            score=score,
            on_policy=weigher(config, choice),
        )


def _reference(
    run: Opened, base: LoadedModel, pairs: Sequence[TokenizedPair], score: DatasetScorer
) -> PairLogps:
    """What the run's reference says of the pairs; `base` is put as it. (len(pairs),) each"""
    config = run.config
    if not make_objective(config).needs_reference:
        return PairLogps(mx.zeros((len(pairs),)), mx.zeros((len(pairs),)))
    if config.reference_model is not None:
        other = load_other(config)
        answers, now = ask_about(config, other, base.tokenizer, {"valid": pairs}, uncounted)
        check_contents(run.paths, run.record, {"reference": now})
        return answers["valid"]
    moved = checkpoint.moved_reference(run.paths.checkpoints)
    if moved is None:
        if config.sync_ref_model and run.finished:  # a run without a move is refused
            raise RunError(
                f"{run.paths.checkpoints}: the reference has moved, and its weights are gone "
                "with the checkpoints; put them back"
            )
        return ask_reference(base.model, pairs, run.record, held=held(base), score=score)
    put_policy(run, base)
    types = {name: value.dtype for name, value in named_arrays(base.model.parameters()).items()}
    weights = [(name, value.astype(types[name])) for name, value in moved.items()]
    base.model.load_weights(weights, strict=False)
    return score(base.model, pairs)


def prompts_held_out(run: Opened, base: LoadedModel) -> list[Prompt]:
    """Each prompt once, in the order of the pairs; `base` is the run's model, however adapted.

    Raises:
        ConfigError: the run held none out.
        RunError, DataError: its pairs are gone, cannot be read any more, or ask with tools.
    """
    config = run.config
    wanted = set(prompts_of_pairs(read_inputs(config, read=lambda _: base).valid))
    if not wanted:
        raise ConfigError(f"{run.paths.folder}: the run held no pairs out; name a file of prompts")
    sources = find_sources(config.pairs, config.valid, config.split)
    prompts = []
    for source in (*sources.train, *sources.valid):
        report = PairsReport(source.name, config.max_length, judged=config.labelled)
        for one in parse_rows(source.rows(), row_rules(config), report, bad_pairs="drop"):
            if bytes.fromhex(prompt_digest(one.example)) in wanted:
                check_no_template_kwargs(one.example.template_kwargs, one.example.location)
                prompts.append(
                    make_prompt(
                        one.example.prompt, one.example.location, whole=one.example.implicit_prompt
                    )
                )
    return check_prompts(prompts, str(run.paths.folder))
