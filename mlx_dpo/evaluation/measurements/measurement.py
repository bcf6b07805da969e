"""Measure base and aligned model of a run on one set of weights, and store the results.

A measurement has two parts: a function `prepare_*` reads its files and checks its settings before
a model is loaded, and returns a `Measure`, which takes the model and returns a `Measurement`.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from mlx_dpo.adapters.adapter_files import adapter_digest
from mlx_dpo.saved_runs.evaluate import Evaluation
from mlx_dpo.saved_runs.open import OpenRun, SwitchableModel, open_switchable
from mlx_dpo.saved_runs.stored_evaluations import StoredEvaluation
from mlx_dpo.scoring.generation_match import use_generating_function


class Measurement(Protocol):
    """The results of one measurement of base and aligned model."""

    @property
    def name(self) -> str:
        """Kind of the measurement, such as `perplexity`; its key in JSON."""

    @property
    def subject(self) -> str:
        """What was measured on, such as the name of a file; without folders."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings that determine the results, as JSON values."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user: dropped rows, truncated texts, and what makes results doubtful."""

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON values; `reporting.evaluations` makes tables of them."""


Measure = Callable[[SwitchableModel], Measurement]


def measure_run(run: str, measures: Sequence[Measure]) -> tuple[SwitchableModel, list[Measurement]]:
    """Load a run once, and return its model with the results of all measurements.

    Raises:
        RunError: the folder is not a run folder, or the model has changed since the run.
        ModelError: the model or the adapter cannot be read.
    """
    model = open_switchable(run)
    max_length = None if model.run is None else model.run.config.length_limit
    use_generating_function(
        model.base.model, vocab_size=model.base.vocab_size, max_length=max_length
    )
    return model, [measure(model) for measure in measures]


class PairsMeasurement:
    """The evaluation of a run on pairs, as a measurement that can be stored.

    Args:
        evaluation: the evaluation.
        row: its metrics by their public names.
    """

    name = "pairs"
    notes: tuple[str, ...] = ()

    def __init__(self, evaluation: Evaluation, row: Mapping[str, float]) -> None:
        self.evaluation, self.row = evaluation, row
        kind, _, source = evaluation.name.partition(" of ")
        # Without folders: the record may be published with the run.
        self.subject = f"{kind} of {Path(source).name}" if source else kind
        self.settings = {"pairs": evaluation.pairs}

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics and the verdict on the policy."""
        verdict = self.evaluation.verdict
        facts = {"pairs": self.evaluation.pairs, "of": self.subject}
        return {**facts, "verdict": verdict and verdict.to_dict(), **self.row}


def to_stored(run: OpenRun, measurement: Measurement) -> StoredEvaluation:
    """Return a measurement of the run's present adapters as a record for its folder."""
    return StoredEvaluation(
        measurement=measurement.name,
        subject=measurement.subject,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        adapter_digest=adapter_digest(run.adapter),
        versions={name: version(name) for name in ("mlx-dpo", "mlx", "mlx-lm")},
        settings=dict(measurement.settings),
        results=measurement.to_dict(),
    )
