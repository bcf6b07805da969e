"""Show pairs as the model sees them (`mlx-dpo data show`)."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.curation.check import make_scan_settings
from mlx_dpo.data.examples import parse_rows
from mlx_dpo.data.inspect.raw_rows import RawRow, read_raw_rows
from mlx_dpo.data.inspect.scan import Example, ScanSettings, strip_location, tokenize_example
from mlx_dpo.data.inspect.segments import Segment, segment_pair
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import SplitSources, find_sources
from mlx_dpo.errors import BadPairError, ConfigError, DataError
from mlx_dpo.schemas.schema import Row
from mlx_dpo.types import UnpairedExample


@dataclass(frozen=True)
class PairPreview:
    """Text of a pair as the model sees it, or the reason why training drops the pair."""

    location: str
    notes: list[str]
    segments: list[Segment]


def show_pairs(config: DPOConfig, *, count: int, row: int | None) -> Iterator[PairPreview]:
    """Yield previews of the first `count` training pairs, or of all pairs made from one row.

    `row` is the number of that row in its location, such as 12 in `file:12`.

    Raises:
        DataError: a row cannot be read, or no row has the number.
        ConfigError: no model is configured, or a setting has no effect.
    """
    if not config.model:
        raise ConfigError("--model is missing; see `mlx-dpo data show --help`")
    sources = find_sources(config.pairs, config.valid, config.split)
    settings = make_scan_settings(config)
    # The number at the end of a location such as `file:12` or `file[12]`.
    location = None if row is None else re.compile(rf"(?:.*[:\[ ])?{row}\]?", re.DOTALL)
    shown = 0
    for preview in _preview_sources(sources, settings, location):
        yield preview
        shown += 1
        if location is None and shown == count:
            return
    if not shown:
        raise DataError(
            f"{sources.train[0].name}: " + ("no row" if row is None else f"no row {row}")
        )


def _preview_sources(
    sources: SplitSources, settings: ScanSettings, location: re.Pattern[str] | None
) -> Iterator[PairPreview]:
    for source in sources.train:
        rows = (
            raw
            for raw in read_raw_rows(source)
            if location is None or location.fullmatch(raw.location)
        )
        # `pair_labelled` makes pairs of several rows; otherwise rows are independent.
        groups: Iterable[list[RawRow]]
        groups = [list(rows)] if settings.rows.pair_labelled else ([raw] for raw in rows)
        for group in groups:
            yield from _preview_rows(group, source.name, settings)


def _preview_rows(rows: list[RawRow], source: str, settings: ScanSettings) -> Iterator[PairPreview]:
    report = PairsReport(source, 0)
    try:
        for parsed in parse_rows(map(_get_row, rows), settings.rows, report, bad_pairs="drop"):
            yield _preview_example(parsed.example, settings)
    except DataError as error:
        location = rows[0].location
        note = f"training stops here: {strip_location(error, location)}"
        yield PairPreview(location, [note], [])
    for reason, locations in report.dropped.items():
        for location in locations:
            yield PairPreview(location, [f"left out: {reason}"], [])


def _get_row(raw: RawRow) -> Row:
    if isinstance(raw.row, DataError):
        raise raw.row
    return raw.row


def _preview_example(example: Example, settings: ScanSettings) -> PairPreview:
    assert settings.tokens is not None
    try:
        full = tokenize_example(example, settings, unlimited=True).pair
        tokenized = tokenize_example(example, settings)
    except BadPairError as bad:
        return PairPreview(example.location, [f"left out: {bad.reason}"], [])
    notes = []
    if isinstance(example, UnpairedExample) and settings.rows.judged:
        notes.append(f"judged {'good' if example.desirable else 'bad'}")
    if not tokenized.as_chat:
        notes.append("plain text: no chat template")
    if tokenized.was_dialogue:
        notes.append("marked text that became turns")
    if tokenized.with_system:
        notes.append("with the system message of --system")
    if tokenized.specials:
        notes.append(f"encoded as plain text: {' '.join(sorted(tokenized.specials))}")
    if tokenized.stops_added:
        notes.append("the stop token at the end is added by training")
    segments = segment_pair(settings.tokenizer, full, tokenized.pair)
    return PairPreview(example.location, notes, segments)
