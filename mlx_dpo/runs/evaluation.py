"""A run measured again, on its own held-out pairs or on others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.nn as nn

from mlx_dpo import paths as places
from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.heldout import evaluate
from mlx_dpo.policy import adapters
from mlx_dpo.policy.load import fingerprint
from mlx_dpo.preferences.pairs import digest
from mlx_dpo.preferences.sources import find
from mlx_dpo.runs.inputs import read_base, read_inputs, read_pairs
from mlx_dpo.runs.method import pair_loss
from mlx_dpo.runs.policies import Opened, open_run
from mlx_dpo.runs.record import check_contents, reference_provenance
from mlx_dpo.training.reference import reference_logps
from mlx_dpo.types import PreferenceMetrics, TokenizedPair


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a run on a set of pairs."""

    run: Opened
    pairs: int
    metrics: PreferenceMetrics


def evaluate_run(
    folder: str,
    pairs: str | None = None,
    *,
    progress: Callable[[int], None] = lambda scored: None,
) -> Evaluation:
    """The policy of a run against its reference, with the run's own loss and beta.

    Raises:
        ConfigError: no pairs are given and the run held none out.
        RunError, DataError, ModelError: the run, the pairs or the model are at fault.
    """
    run = open_run(folder)
    if pairs is None:
        inputs = read_inputs(run.config)
        base, held_out = inputs.base, inputs.valid
    else:
        base = read_base(run.config)
        held_out = read_pairs(run.config, base, find(pairs).train).pairs
    if not held_out:
        raise ConfigError(f"{folder}: the run held no pairs out; name a file of pairs")
    check_contents(run.paths, run.record, {"model": fingerprint(base.path)})
    if pairs is None:
        check_contents(run.paths, run.record, {"valid": digest(held_out)})
    return Evaluation(run, len(held_out), _metrics(run, base.model, held_out, progress))


def _metrics(
    run: Opened,
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    progress: Callable[[int], None],
) -> PreferenceMetrics:
    config = run.config
    reference = reference_logps(
        model,
        pairs,
        provenance=reference_provenance(run.record),
        cache=places.cache_folder() / "reference",
        pairs_per_pass=config.pairs_per_pass,
    )
    adapters.load_adapter(model, run.adapter)
    return evaluate(
        model,
        pairs,
        reference,
        pair_loss(config),
        beta=config.beta,
        pairs_per_pass=config.pairs_per_pass,
        progress=progress,
    )
