"""Pairs -> a new file without the rows that a check found fault with, and a report beside it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.config.setting import check_known
from mlx_dpo.curation.check import check_pairs
from mlx_dpo.data.inspect.check import Checked
from mlx_dpo.data.inspect.findings import RULES, Rule
from mlx_dpo.data.inspect.raw_rows import (
    LINES,
    all_rows,
    new_file,
    refuse_changed,
    refuse_pairing,
    refuse_read_once,
    refuse_taken,
    write_row,
)
from mlx_dpo.data.inspect.scan import Tick
from mlx_dpo.data.sources import Source, find_sources
from mlx_dpo.errors import ConfigError, DataError


@dataclass(frozen=True)
class Cleaned:
    """How many rows went, and for which findings; a row may have several."""

    rows: int
    kept: int
    dropped: dict[str, int]
    report: Path
    not_looked_for: list[str]  # faults that take a model, or held-out pairs, to be found


def clean_pairs(
    config: DPOConfig, *, drop: Sequence[str], output: Path, tick: Tick = lambda more: None
) -> Cleaned:
    """Write the rows that none of the rules finds to a new file, and a report beside it.

    Without rules all faults are dropped that can be looked for.

    Raises:
        DataError: a source cannot be read on.
        ConfigError: a rule is unknown or cannot be looked for, or the file is there already.
    """
    report = output.with_suffix(".report.json")
    if output.suffix != LINES:
        raise ConfigError(f"{output}: rows are written as lines of JSON; give a `{LINES}` file")
    for path in (output, report):
        refuse_taken(path)
    refuse_pairing(config)
    wanted = _rules(drop)
    sources = find_sources(config.pairs, config.valid, config.split)
    refuse_read_once([*sources.train, *sources.valid])
    _refuse_twice(sources.train)
    _, checked = check_pairs(config, tick)
    _refuse_blind(drop, checked)
    gone = _gone(checked, wanted)
    with new_file(output) as lines, new_file(report) as record:  # the report is there first
        kept = 0
        for one in all_rows(sources.train):
            if one.location not in gone:
                write_row(lines, one)
                kept += 1
        refuse_changed(kept + len(gone), checked.train.rows, sources.train[0])
        if not kept:
            raise DataError(f"{sources.train[0].name}: no row would be left; drop fewer")
        facts = _facts(sources.train, checked, wanted, gone) | {"output": str(output)}
        record.write((json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())
    unseen = [rule.name for rule in wanted if rule.name in _blind(checked)]
    return Cleaned(checked.train.rows, kept, facts["dropped"], report, unseen)


def _facts(
    sources: Sequence[Source],
    checked: Checked,
    wanted: Sequence[Rule],
    gone: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """What the report says."""
    return {
        "sources": [one.name for one in sources],
        "looked_for": [rule.name for rule in wanted if rule.name not in _blind(checked)],
        "rows": checked.train.rows,
        "kept": checked.train.rows - len(gone),
        "dropped": dict(Counter(name for names in gone.values() for name in names)),
        "dropped_rows": [{"where": where, "findings": names} for where, names in gone.items()],
    }


def _rules(drop: Sequence[str]) -> list[Rule]:
    for name in drop:
        check_known(name, RULES, "finding", hint="docs/data.md lists them")
        if not RULES[name].drops:
            raise ConfigError(f"`drop` {name} has no effect; it is found of all pairs, not of rows")
    return [rule for rule in RULES.values() if (rule.name in drop if drop else rule.fault)]


def _gone(checked: Checked, wanted: Sequence[Rule]) -> dict[str, list[str]]:
    """The place of each row that goes, with the names of what was found there."""
    found: dict[str, list[str]] = {}
    for rule in wanted:
        for where, _ in checked.train.hits.where(rule.name):
            names = found.setdefault(where, [])
            if rule.name not in names:
                names.append(rule.name)
    return found


def _blind(checked: Checked) -> list[str]:
    """Findings that could not be looked for."""
    return [name for names in checked.not_looked_for.values() for name in names]


def _refuse_blind(drop: Sequence[str], checked: Checked) -> None:
    for need, names in checked.not_looked_for.items():
        for name in drop:
            if name in names:
                raise ConfigError(f"`drop` {name} has no effect without {need}")


def _refuse_twice(sources: Sequence[Source]) -> None:
    named = [source.name for source in sources]
    named += [str(path) for source in sources for path in source.files if str(path) != source.name]
    twice = [name for name, count in Counter(named).items() if count > 1]
    if twice:
        raise ConfigError(f"{twice[0]}: is named twice, so rows have no place of their own")
