"""Sentences on the results of a measurement: what changed, and whether for the worse."""

from typing import NamedTuple

from mlx_dpo.reporting.evaluations.table import Results


class Finding(NamedTuple):
    """A sentence on a result; `is_worse` if training made the model worse."""

    is_worse: bool
    text: str

    @property
    def label(self) -> str:
        """Word before the sentence: `flagged` or `not flagged`."""
        return "flagged" if self.is_worse else "not flagged"


def read_findings(results: Results) -> list[Finding]:
    """Return the sentences in the results of a measurement, as JSON values; most have none."""
    return [Finding(entry["is_worse"], entry["text"]) for entry in results.get("findings", ())]
