"""Training monitor: warn about problems of a run, judged by its metrics.

Each kind of warning is given once. The warnings depend on nothing but the metrics rows. A resumed
run passes its earlier rows to the monitor again, so no warning is repeated.
"""

from mlx_dpo.losses.metrics import EVAL_PREFIX
from mlx_dpo.training.monitor.checks import CHECKS
from mlx_dpo.training.monitor.metrics import MonitoredRun, Row, mean
from mlx_dpo.training.monitor.samples import degenerate_answers
from mlx_dpo.training.monitor.verdict import DEGENERATE, Verdict, judge_policy

# Kinds of warnings whose advice does not apply after a warning of another kind.
SUPERSEDED = {
    "diverged": frozenset({*CHECKS, DEGENERATE}),
    "far_away": frozenset({"displaced", "led_by_length"}),
}


class Monitor:
    """Checks the metrics of a run, row by row, and returns each kind of warning once."""

    def __init__(self, facts: MonitoredRun) -> None:
        """Create the monitor of a run, with no metrics rows yet.

        Args:
            facts: settings and statistics of the run that are needed to interpret its metrics.
        """
        self._facts = facts
        self._rows: list[Row] = []  # the first row, and the last two windows
        self._done: set[str] = set()  # kinds of warnings that are given or do not apply any more

    def update(self, row: Row) -> list[str]:
        """Add a metrics row and return the new warnings.

        Of an evaluation, only the answers that were sampled are judged.
        """
        if "loss" not in row:
            return self._judge_answers(row)
        recent = [*self._rows[1:], row][-2 * self._facts.window :]
        first = self._rows[0] if self._rows else row
        self._rows = [first, *recent]
        warnings = []
        for kind, check in CHECKS.items():
            if kind not in self._done and (sentence := check(self._facts, first, recent)):
                self._done |= {kind} | SUPERSEDED.get(kind, frozenset())
                warnings.append(sentence)
        return warnings

    def _judge_answers(self, row: Row) -> list[str]:
        fault = degenerate_answers(_without_prefix(row))
        if fault is None or DEGENERATE in self._done:
            return []
        self._done.add(DEGENERATE)
        return [f"step {int(row['step'])}: {fault}; use {self._facts.gentler}"]

    def judge(self, evaluation: Row | None) -> Verdict | None:
        """Return the verdict on the trained policy; None if nothing is wrong.

        Args:
            evaluation: metrics on held-out pairs. Without them the metrics of the last steps count.
        """
        if evaluation is not None:
            metrics = _without_prefix(evaluation)
            is_single_pair = "rewards/margins_stderr" not in metrics
            return judge_policy(self._facts, metrics, is_single_pair=is_single_pair)
        recent = self._rows[1:][-self._facts.window :]
        means = {name: mean(recent, name) for name in dict.fromkeys(n for r in recent for n in r)}
        return judge_policy(
            self._facts, {n: value for n, value in means.items() if value is not None}
        )


def _without_prefix(evaluation: Row) -> Row:
    return {name.removeprefix(EVAL_PREFIX): value for name, value in evaluation.items()}
