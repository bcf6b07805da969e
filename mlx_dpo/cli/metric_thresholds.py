"""`--fail-below` and `--fail-above`: thresholds on the metrics of `mlx-dpo eval`, for scripts."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import click

from mlx_dpo.cli.output import echo
from mlx_dpo.errors import ConfigError

FAILED = 3  # exit status of a failed threshold; 1 is an error, 2 a wrong command line
METAVAR = "METRIC=VALUE"
LISTED = 60  # names in an error
ROUNDING = 1e-6  # relative, of a float32 metric: about eight units in its last place


@dataclass(frozen=True, slots=True)
class Threshold:
    """A bound on a metric."""

    metric: str
    value: float
    is_lower: bool  # the metric must be at least `value`; otherwise at most

    def is_met(self, value: float) -> bool:
        """Return whether a value of the metric meets the threshold; NaN meets none.

        Metrics are computed in float32, in which 7 of 10 is 0.69999999: a value that differs from
        the threshold by rounding alone meets it.
        """
        if math.isclose(value, self.value, rel_tol=ROUNDING):
            return True
        return value >= self.value if self.is_lower else value <= self.value


def threshold_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags `--fail-below` and `--fail-above` to a command."""
    for name, verb in (("--fail-above", "above"), ("--fail-below", "below")):
        command = click.option(
            name,
            multiple=True,
            metavar=METAVAR,
            help=f"End with exit status {FAILED} if the metric, by its name in --json, is {verb} "
            "the value. Repeatable.",
        )(command)
    return command


def parse_thresholds(below: Sequence[str], above: Sequence[str]) -> list[Threshold]:
    """Return the thresholds of `--fail-below` and `--fail-above`.

    Raises:
        ConfigError: a text is not METRIC=VALUE.
    """
    return [
        *(_parse("fail-below", text, is_lower=True) for text in below),
        *(_parse("fail-above", text, is_lower=False) for text in above),
    ]


def _parse(flag: str, text: str, *, is_lower: bool) -> Threshold:
    metric, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if not metric.strip() or value != value:
        raise ConfigError(
            f"--{flag}: must be {METAVAR} with a number, such as "
            f"eval_rewards/accuracies=0.7, found {text!r}"
        )
    return Threshold(metric.strip(), value, is_lower)


def flatten_numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a nested record by their dotted names, such as `drift.kl.tokens`.

    Lists, texts and truth values are left out.
    """
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers |= flatten_numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[prefix + name] = value
    return numbers


def check_thresholds(thresholds: Sequence[Threshold], record: Mapping[str, Any]) -> None:
    """End the program with status `FAILED` if a metric of the record does not meet its threshold.

    Raises:
        ConfigError: a metric is not in the record; the message lists those that are.
    """
    numbers = flatten_numbers(record)
    for threshold in thresholds:
        if threshold.metric not in numbers:
            raise ConfigError(_unknown(threshold.metric, list(numbers)))
    missed = [
        threshold for threshold in thresholds if not threshold.is_met(numbers[threshold.metric])
    ]
    for threshold in missed:
        relation = "below" if threshold.is_lower else "above"
        value = numbers[threshold.metric]
        echo(f"Failed: {threshold.metric} is {value:.6g}, {relation} {threshold.value:g}", err=True)
    if missed:
        sys.exit(FAILED)


def _unknown(metric: str, names: Sequence[str]) -> str:
    close = get_close_matches(metric, names, n=1)
    hint = f"did you mean `{close[0]}`? " if close else ""
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return (
        f"--fail-below or --fail-above: unknown metric {metric!r}; {hint}"
        f"measured were {', '.join(names[:LISTED])}{more}"
    )
