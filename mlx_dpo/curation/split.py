"""Pairs -> a folder with pairs to train on and pairs to hold out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.examples import parse_rows
from mlx_dpo.data.inspect.raw_rows import (
    LINES,
    all_rows,
    refuse_changed,
    refuse_pairing,
    refuse_read_once,
    refuse_taken,
    write_row,
    written,
)
from mlx_dpo.data.load import hold_out_prompts
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import Source, find_sources
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.io.atomic import atomic_folder
from mlx_dpo.runs.inputs import row_rules
from mlx_dpo.schemas.messages import prompt_digest

TRAIN, VALID = "train", "valid"


@dataclass(frozen=True)
class Divided:
    """How many rows went where."""

    rows: dict[str, int]  # of `train` and of `valid`
    reports: Sequence[PairsReport]  # what was left out, and why
    passed_over: Sequence[str]  # held-out splits that the sources have already


def split_pairs(config: DPOConfig, *, share: float, output: Path) -> Divided:
    """Write `train.jsonl` and `valid.jsonl` to a new folder; no prompt is in both.

    Held out are the rows that `train --valid-fraction` with the same seed would hold out.

    Raises:
        DataError: a row cannot be read, or makes no pair and `bad_pairs` is `error`.
        ConfigError: all rows have the same prompt, or the folder is there already.
    """
    refuse_taken(output)
    refuse_pairing(config)
    sources = find_sources(config.pairs, None, config.split)
    refuse_read_once(sources.train)
    reports = [PairsReport(one.name, 0, judged=config.labelled) for one in sources.train]
    prompts, rows = _prompts(config, sources.train, reports)
    held = {rows[i] for i in hold_out_prompts(prompts, share=share, seed=config.seed)}
    if not held:
        raise ConfigError(f"{sources.train[0].name}: holds one pair, and two make a split")
    sides = {number: VALID if number in held else TRAIN for number in rows}
    with atomic_folder(output) as folder:
        _write_sides(sources.train, sides, folder)
    counts = Counter(sides.values())
    named = {name: counts[name] for name in (TRAIN, VALID)}
    return Divided(named, reports, [one.name for one in sources.valid])


def _write_sides(sources: Sequence[Source], sides: Mapping[int, str], folder: Path) -> None:
    """Each row to the file of its side; those without one make no pair."""
    written_rows = 0
    with ExitStack() as stack:
        files = {
            name: stack.enter_context((folder / f"{name}{LINES}").open("wb"))
            for name in (TRAIN, VALID)
        }
        for number, one in enumerate(all_rows(sources)):
            if number in sides:
                write_row(files[sides[number]], one)
                written_rows += 1
    refuse_changed(written_rows, len(sides), sources[0])


def _prompts(
    config: DPOConfig, sources: Sequence[Source], reports: Sequence[PairsReport]
) -> tuple[list[str], list[int]]:
    """Of every pair the prompt's digest and the number of its row."""
    prompts, rows, number = [], [], 0
    for source, report in zip(sources, reports, strict=True):
        for one in written(source):
            if isinstance(one.row, DataError):
                raise one.row
            for pair in parse_rows(
                [one.row], row_rules(config), report, bad_pairs=config.bad_pairs
            ):
                prompts.append(prompt_digest(pair.example))
                rows.append(number)
            number += 1
    if not prompts:
        raise DataError(f"{sources[0].name}: no pair in it; give other pairs")
    return prompts, rows
