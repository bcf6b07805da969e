"""Split a data set into a training file and a held-out file (`mlx-dpo data split`)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.examples import parse_rows
from mlx_dpo.data.inspect.raw_rows import (
    JSON_LINES,
    check_new_path,
    check_rereadable,
    check_row_count,
    check_rows_independent,
    read_all_raw_rows,
    read_raw_rows,
    write_row,
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
class SplitResult:
    """Result of splitting a data set: rows written to each file, and what was left out."""

    rows: dict[str, int]  # of `train` and of `valid`
    reports: Sequence[PairsReport]  # dropped pairs and the reasons
    ignored_sources: Sequence[str]  # held-out splits that the sources have already
    columns_of_bytes: Mapping[str, int]  # rows by column that was left out, as JSON has no bytes


def split_pairs(config: DPOConfig, *, share: float, output: Path) -> SplitResult:
    """Write `train.jsonl` and `valid.jsonl` to a new folder; no prompt is in both files.

    `train --valid-fraction` holds out the same rows if the seed is the same.

    Raises:
        DataError: a row cannot be read, or makes no pair and `bad_pairs` is `error`.
        ConfigError: all rows have the same prompt, or the output folder exists.
    """
    check_new_path(output)
    check_rows_independent(config)
    sources = find_sources(config.pairs, None, config.split)
    check_rereadable(sources.train)
    kind = config.labelled, config.supervised
    reports = [PairsReport(source.name, 0, *kind) for source in sources.train]
    prompts, rows = _read_prompts(config, sources.train, reports)
    held_out = {rows[i] for i in hold_out_prompts(prompts, share=share, seed=config.seed)}
    if not held_out:
        raise ConfigError(
            f"{sources.train[0].name}: contains only one pair; a split needs at least two"
        )
    splits = {number: VALID if number in held_out else TRAIN for number in rows}
    with atomic_folder(output) as folder:
        left_out = _write_splits(sources.train, splits, folder)
    counts = Counter(splits.values())
    return SplitResult(
        {name: counts[name] for name in (TRAIN, VALID)},
        reports,
        [source.name for source in sources.valid],
        left_out,
    )


def _write_splits(
    sources: Sequence[Source], splits: Mapping[int, str], folder: Path
) -> Counter[str]:
    """Write each row to the file of its split; rows without a pair are in no split.

    Returns:
        The number of rows by column that was left out, because it holds bytes.
    """
    written = 0
    left_out: Counter[str] = Counter()
    with ExitStack() as stack:
        files = {
            name: stack.enter_context((folder / f"{name}{JSON_LINES}").open("wb"))
            for name in (TRAIN, VALID)
        }
        for number, raw in enumerate(read_all_raw_rows(sources)):
            if number in splits:
                left_out.update(write_row(files[splits[number]], raw))
                written += 1
    check_row_count(written, len(splits), sources[0])
    return left_out


def _read_prompts(
    config: DPOConfig, sources: Sequence[Source], reports: Sequence[PairsReport]
) -> tuple[list[str], list[int]]:
    """Return the prompt digests of all pairs, and the number of each pair's row, from 0."""
    rules = row_rules(config)
    prompts, rows, number = [], [], 0
    for source, report in zip(sources, reports, strict=True):
        for raw in read_raw_rows(source):
            if isinstance(raw.row, DataError):
                raise raw.row
            for parsed in parse_rows([raw.row], rules, report, bad_pairs=config.bad_pairs):
                prompts.append(prompt_digest(parsed.example))
                rows.append(number)
            number += 1
    if not prompts:
        raise DataError(f"{sources[0].name}: contains no pairs")
    return prompts, rows
