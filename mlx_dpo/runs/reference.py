"""Compute the reference log-probs of a run, or read them from the cache that all runs share."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_dpo import paths as places
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.batches.order import PairOrder
from mlx_dpo.data.sources import STDIN
from mlx_dpo.distributed.ranks import SINGLE_PROCESS, Ranks
from mlx_dpo.errors import ConfigError, RunError, reason
from mlx_dpo.io.atomic import remove_abandoned
from mlx_dpo.io.notices import notify_once
from mlx_dpo.losses.metrics import EVAL_PREFIX, to_public_names
from mlx_dpo.models.download import resolve_model
from mlx_dpo.models.empty_weights import load_empty_model
from mlx_dpo.models.files import model_fingerprint
from mlx_dpo.models.load import LoadedModel
from mlx_dpo.phases import Advance, phase
from mlx_dpo.runs.build import (
    choose_scorer,
    make_dataset_scorer,
    make_on_policy_weights,
    make_order,
    with_grouping,
)
from mlx_dpo.runs.distributed.handshake import check_inputs
from mlx_dpo.runs.distributed.peers import Peers
from mlx_dpo.runs.distributed.shard_base import compare_with_whole, model_loader
from mlx_dpo.runs.folder import RunPaths, reference_provenance
from mlx_dpo.runs.inputs import (
    Datasets,
    Inputs,
    check_context_length,
    device_and_dtype,
    digest_of_split,
    load_inputs,
    load_trainable_base,
    with_max_length,
)
from mlx_dpo.scoring.generation_match import computes_with_caches
from mlx_dpo.scoring.select_scorer import ScorerChoice
from mlx_dpo.startup import openblas
from mlx_dpo.training.logps_cache import labels, read_logps, write_logps
from mlx_dpo.training.objective import Objective, evaluate
from mlx_dpo.training.reference_logps import (
    ReferenceCache,
    are_scored,
    broadcast_logps,
    reference_logps,
)
from mlx_dpo.types import MetricsRow, PairLogps, TokenizedPair


class PreparedRun(Protocol):
    """What of a `DPOTrainer` the functions of this module read."""

    config: DPOConfig
    inputs: Inputs
    paths: RunPaths
    record: dict[str, Any]
    policy: nn.Module
    choice: ScorerChoice
    reference: dict[str, PairLogps]
    reference_model_logps: dict[str, PairLogps]


def reference_cache(
    model: nn.Module,
    record: dict[str, Any],
    device_and_dtype: str,
    ranks: Ranks = SINGLE_PROCESS,
) -> ReferenceCache:
    """Return the cache of reference log-probs that all runs on this machine share.

    Args:
        model: the reference: the policy with its adapters disabled, or a separate model.
        record: run record (content of `run.json`), which identifies model and settings in the
            cache.
        device_and_dtype: device and dtype with which the reference computes now.
        ranks: processes that share the work; the cache is that of rank 0.
    """
    function = " with KV caches" if computes_with_caches(model) else ""
    return ReferenceCache(
        folder=warn_if_no_cache(places.reference_cache_folder()),
        provenance=reference_provenance(record, device_and_dtype) + function + _threads(),
        labels=labels(_model_name(record), device_and_dtype),
        ranks=ranks,
    )


def _threads() -> str:
    """Return the number of BLAS threads, on which last bits depend, if it is not the default."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = openblas.num_threads()
    # Earlier versions did not write the number, so that their caches have the default.
    return f" with {threads} BLAS threads" if threads not in (0, cores) else ""


def warn_if_no_cache(cache: Path | None) -> Path | None:
    """Return the folder of a cache; log a notice once if there is none."""
    if cache is None:
        notify_once(
            "nothing is cached: the home folder is unknown; set HOME or "
            f"{places.CACHE_VARIABLE} to a folder"
        )
    return cache


def _model_name(record: dict[str, Any]) -> str:
    """Return the name of the model of a run; for a local folder, only the last part of its path."""
    model: str = record["settings"]["model"]
    local = record.get("model_folder") is not None
    return os.path.basename(os.path.abspath(os.path.expanduser(model))) if local else model


def count_steps(config: DPOConfig, order: PairOrder) -> int:
    """Return the number of optimizer steps of a whole run that sees its pairs in `order`."""
    return config.max_steps or order.total_steps(config.epochs or 1)


def needed_pairs(
    config: DPOConfig, splits: Mapping[str, Sequence[TokenizedPair]]
) -> dict[str, Sequence[int]]:
    """Return the indices of the pairs whose reference log-probs a run needs, by split.

    These are the training pairs that its steps see, and all held-out pairs. From its first update
    on, a synced reference is scored in each step instead.
    """
    needed: dict[str, Sequence[int]] = {split: range(len(splits[split])) for split in splits}
    if "train" in splits:
        order = make_order(config, splits["train"])
        steps = count_steps(config, order)
        if config.sync_ref_model:
            steps = min(steps, config.sync_steps)
        needed["train"] = order.first_steps(steps)
    return needed


def reference_logps_of_split(
    run: PreparedRun, split: str, indices: Sequence[int], progress: Callable[[int], None]
) -> PairLogps:
    """Return the reference log-probs of split `train` or `valid` of a run. (len(pairs),) each

    Reference-free losses get zeros, and pairs that are not at `indices` get NaN.
    """
    pairs = run.inputs.splits[split]
    if not run.config.needs_reference:
        return PairLogps(mx.zeros((len(pairs),)), mx.zeros((len(pairs),)))

    path = run.paths.reference_logps(split)

    def compute() -> PairLogps:
        if run.config.reference_model is not None:
            if split not in run.reference_model_logps:  # stored, but not for these pairs
                raise RunError(f"{path}: lacks pairs that the run needs; remove the file")
            return run.reference_model_logps[split]
        device, ranks = run.record["provenance"]["device_and_dtype"], run.choice.ranks
        return reference_logps(
            run.policy,
            pairs,
            indices,
            cache=reference_cache(run.policy, run.record, device, ranks),
            score=make_dataset_scorer(run.config, run.choice),
            progress=progress,
        )

    store = LogpsFile(path, len(pairs), run.choice.ranks)
    return stored_logps(store, indices, compute, progress)


def evaluate_before(run: PreparedRun) -> MetricsRow | None:
    """Return the metrics on the held-out pairs before the first step; None if there are no pairs.

    A policy that starts as its own reference is not scored again.
    """
    config, valid, reference = run.config, run.inputs.valid, run.reference["valid"]
    if not valid:
        return None

    def score(model: nn.Module, pairs: Sequence[TokenizedPair], **_: Any) -> PairLogps:
        if config.needs_reference and config.reference_model is None:
            return reference
        return make_dataset_scorer(config, run.choice)(model, pairs)

    metrics = evaluate(
        run.policy,
        valid,
        reference,
        Objective(config),
        score=score,
        on_policy=make_on_policy_weights(config, run.choice),
    )
    return to_public_names(metrics, prefix=EVAL_PREFIX)


class LogpsFile(NamedTuple):
    """A file of the run folder with the reference log-probs of a split, which rank 0 has."""

    path: Path
    num_pairs: int
    ranks: Ranks = SINGLE_PROCESS


def stored_logps(
    file: LogpsFile,
    indices: Sequence[int],
    compute: Callable[[], PairLogps],
    progress: Callable[[int], None],
) -> PairLogps:
    """Return the reference log-probs in a file of the run folder. (num_pairs,) each

    If the file is missing or damaged, or lacks one of the pairs at `indices`, the log-probs are
    computed and the file is written.

    Raises:
        RunError: the file cannot be written.
    """
    path, is_main = file.path, file.ranks.is_main
    stored = read_logps(path, file.num_pairs) if is_main else None
    stored = broadcast_logps(file.ranks, stored)
    if stored is not None and are_scored(stored, indices):
        progress(len(indices))
        return stored
    logps = compute()
    if not is_main:
        return logps
    remove_abandoned(path.parent)  # of this run when it was killed; shared caches are left alone
    try:
        write_logps(path, logps)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({reason(error)})") from error
    return logps


ProgressCallback = Callable[[int], None]


def reference_phase(
    config: DPOConfig, needed: Mapping[str, Sequence[int]]
) -> AbstractContextManager[Advance]:
    """Show the phase of computing reference log-probs, if the run computes them here."""
    if not config.needs_reference or config.reference_model is not None:
        return nullcontext(lambda pairs: None)
    total = sum(map(len, needed.values()))
    return phase("Computing reference log-probs", total, unit=config.unit)


Splits = dict[str, Sequence[TokenizedPair]]


def load_reference_model(config: DPOConfig, peers: Peers | None = None) -> LoadedModel:
    """Load the model that the setting `reference_model` names.

    The model is not quantized, because the setting `bits` applies to the policy only. It is sharded
    over the ranks as the policy is.
    """
    assert config.reference_model is not None
    return model_loader(config, peers)(
        config.reference_model, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )


class StartedRun(Protocol):
    """What of a `DPOTrainer` `compute_reference_model_logps` reads."""

    config: DPOConfig
    datasets: Datasets
    paths: RunPaths
    peers: Peers
    earlier: dict[str, Any] | None


def compute_reference_model_logps(run: StartedRun, day: date) -> tuple[dict[str, PairLogps], str]:
    """Return the log-probs of the training and held-out pairs under the setting `reference_model`.

    The log-probs are given by split name, `train` or `valid`, (len(pairs),) each; those of training
    pairs that no step sees are NaN. They are empty for a resumed run that has stored all of them.
    The second result is the digest of the reference model. The weights of the policy are not
    loaded.

    Args:
        day: day that the chat template prints.

    Raises:
        ConfigError: the tokenizers of the two models differ, an example is longer than a model's
            context length, or pairs come from standard input.
    """
    config = run.config
    if _has_stored_logps(run):
        assert config.reference_model is not None
        trusted = config.trust_remote_code
        path = resolve_model(config.reference_model, trust_remote_code=trusted)
        return {}, model_fingerprint(path)
    if STDIN in (*config.pairs, config.valid):
        raise ConfigError(
            f"`{STDIN}`: pairs are read twice with `reference_model`, and standard input once; "
            "write them to a file"
        )
    load_shapes = partial(load_trainable_base, load=load_empty_model)
    inputs = load_inputs(config, read=load_shapes, datasets=run.datasets, day=day)
    config = with_max_length(config, inputs.base)
    if run.earlier is None:  # a resumed run keeps the order that it began with
        config, _ = with_grouping(config, inputs.train)
    other, tokenizer = load_reference_model(config, run.peers), inputs.base.tokenizer
    return compute_logps_of_splits(config, other, tokenizer, inputs.splits, run.peers)


def _has_stored_logps(run: StartedRun) -> bool:
    """Return whether the folder of a resumed run has the reference log-probs of each split."""
    counts: Mapping[str, int] = (run.earlier or {}).get("counts") or {}
    found = bool(counts) and all(
        read_logps(run.paths.reference_logps(split), count) is not None
        for split, count in counts.items()
    )
    return bool(run.peers.ranks.broadcast_json("stored log-probs", found))


def compute_logps_of_splits(
    config: DPOConfig,
    other: LoadedModel,
    tokenizer: TokenizerWrapper,
    splits: Splits,
    peers: Peers | None = None,
) -> tuple[dict[str, PairLogps], str]:
    """Return log-probs of the pairs under the model `other`, and the digest of this model.

    Of the split `train` only the pairs that the run's steps see are scored; the others are NaN.

    Args:
        other: the reference model.
        tokenizer: tokenizer of the policy, with which the pairs were tokenized.
        splits: training and held-out pairs, by the name of the split.
        peers: the ranks of the run, which share the work; None is a single process.
    """
    check_same_tokens(other, tokenizer, chain.from_iterable(splits.values()))
    check_context_length(config, other, *splits.values())
    digest = model_fingerprint(other.path)
    compare_with_whole(other, peers)
    choice = choose_scorer(other, config)
    if peers is not None:
        digests = {split: digest_of_split(config, pairs) for split, pairs in splits.items()}
        check_inputs(peers, digests | {"reference_model": digest})
        choice = replace(choice, ranks=peers.ranks)
    score = make_dataset_scorer(config, choice)
    record = _reference_model_record(config, digest) | {
        "automatic_settings": {"scorer": choice.name}
    }
    cache = reference_cache(other.model, record, device_and_dtype(other), choice.ranks)
    needed = needed_pairs(config, splits)
    total = sum(map(len, needed.values()))
    with phase("Scoring the reference model", total, unit=config.unit) as advance:
        answers = {
            split: reference_logps(
                other.model, pairs, needed[split], cache=cache, score=score, progress=advance
            )
            for split, pairs in splits.items()
        }
    mx.eval(list(answers.values()))
    del other, score
    mx.clear_cache()
    return answers, digest


def _reference_model_record(config: DPOConfig, digest: str) -> dict[str, Any]:
    """Return a run record with the reference model instead of the base model.

    The record gives the log-probs of the reference model their own key in the cache.
    """
    overrides = {"model": config.reference_model, "bits": None, "group_size": None}
    folder = Path(str(config.reference_model)).expanduser()
    return {
        "settings": config.to_dict() | overrides,
        "provenance": {"model": digest},
        "model_folder": str(folder) if folder.is_dir() else None,
    }


def check_same_tokens(
    other: LoadedModel, tokenizer: TokenizerWrapper, pairs: Iterable[TokenizedPair]
) -> None:
    """Raise `ConfigError` if a token id in `pairs` means another token in the model `other`."""
    used = sorted({t for p in pairs for part in (p.prompt, p.chosen, p.rejected) for t in part})
    ours = tokenizer.convert_ids_to_tokens(used)
    known = [t for t in used if t < other.vocab_size]
    theirs = dict(zip(known, other.tokenizer.convert_ids_to_tokens(known), strict=True))
    for token, piece in zip(used, ours, strict=True):
        if (other_piece := theirs.get(token)) != piece:
            what = "has no such token" if other_piece is None else f"reads `{other_piece}`"
            raise ConfigError(
                f"`reference_model` {other.source}: its tokenizer differs from the model's (token "
                f"{token} is `{piece}` in the model; the reference model {what}); use a model "
                "with the same tokenizer"
            )
