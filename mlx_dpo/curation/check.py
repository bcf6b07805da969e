"""Pairs looked at before anything is trained: as a table of findings, or pair by pair."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_dpo.config.dpo_config import DPOConfig, get_settings
from mlx_dpo.data.examples import parse_rows
from mlx_dpo.data.inspect.check import Checked, check
from mlx_dpo.data.inspect.raw_rows import Written, written
from mlx_dpo.data.inspect.scan import Eyes, Said, Tick, encoded, without_place
from mlx_dpo.data.inspect.show import Part, parts_of
from mlx_dpo.data.load import check_settings_used
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import SplitSources, find_sources
from mlx_dpo.data.tokenization.tokenize import check_token_rules
from mlx_dpo.errors import BadPairError, ConfigError, DataError
from mlx_dpo.runs.inputs import load_configured_base, row_rules, token_rules
from mlx_dpo.schemas.schema import Row
from mlx_dpo.types import UnpairedExample

OF_MODELS = (
    "chat_template", "thinking", "system", "max_length", "truncation", "revision",
    "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True)
class Page:
    """A pair as the model sees it, or why it never does."""

    location: str
    notes: list[str]
    parts: list[Part]


def check_pairs(config: DPOConfig, tick: Tick = lambda more: None) -> tuple[SplitSources, Checked]:
    """Everything that is to be said of the pairs that the settings name.

    Without a model, what takes tokens is not looked for.

    Raises:
        DataError: a source cannot be read on.
        ConfigError: a setting has no effect.
    """
    sources = find_sources(config.pairs, config.valid, config.split)
    eyes = eyes_of(config)
    checked = check(sources, eyes, tick)
    if eyes.tokens is not None:
        splits = checked.splits.values()
        reports = [report for split in splits for report in split.reports]
        check_settings_used(eyes.tokens, eyes.rows, reports)
    return sources, checked


def show_pairs(config: DPOConfig, *, count: int, row: int | None) -> Iterator[Page]:
    """The first pairs to train on, or those of the row with a number, as the model sees them.

    Raises:
        DataError: a row cannot be read, or there is none with the number.
    """
    if not config.model:
        raise ConfigError("--model is missing; see `mlx-dpo data show --help`")
    sources = find_sources(config.pairs, config.valid, config.split)
    eyes = eyes_of(config)
    wanted = None if row is None else re.compile(rf"(?:.*[:\[ ])?{row}\]?", re.DOTALL)
    shown = 0
    for page in _pages(sources, eyes, wanted):
        yield page
        shown += 1
        if wanted is None and shown == count:
            return
    if not shown:
        raise DataError(
            f"{sources.train[0].name}: " + ("no row" if row is None else f"no row {row}")
        )


def eyes_of(config: DPOConfig) -> Eyes:
    """How the settings look at rows; the model's weights are not read.

    Raises:
        ConfigError: a setting has no effect with this model, or without one.
    """
    if not config.model:
        known = get_settings()
        for name in OF_MODELS:
            if getattr(config, name) != known[name].default:
                raise ConfigError(f"`{name}` has no effect without --model")
        return Eyes(rows=row_rules(config))

    from mlx_dpo.generation.generate import context_length
    from mlx_dpo.models.empty_weights import load_empty_model

    base = load_configured_base(config, load_empty_model)
    rules = token_rules(config, base)
    check_token_rules(base.tokenizer, rules)
    return Eyes(
        rows=row_rules(config),
        tokens=rules,
        tokenizer=base.tokenizer,
        context=context_length(base.config),
    )


def _pages(sources: SplitSources, eyes: Eyes, wanted: re.Pattern[str] | None) -> Iterator[Page]:
    for source in sources.train:
        rows = (one for one in written(source) if wanted is None or wanted.fullmatch(one.location))
        # Labelled answers find each other across rows; any other row stands by itself.
        groups = [list(rows)] if eyes.rows.pair_labelled else ([one] for one in rows)
        for group in groups:
            report = PairsReport(source.name, 0, judged=eyes.rows.judged)
            try:
                for one in parse_rows(map(_readable, group), eyes.rows, report, bad_pairs="drop"):
                    yield _page(one.example, eyes)
            except DataError as error:
                yield Page(
                    group[0].location,
                    [f"training stops here: {without_place(error, group[0].location)}"],
                    [],
                )
            for reason, places in report.dropped.items():
                yield from (Page(where, [f"left out: {reason}"], []) for where in places)


def _readable(one: Written) -> Row:
    if isinstance(one.row, DataError):
        raise one.row
    return one.row


def _page(said: Said, eyes: Eyes) -> Page:
    assert eyes.tokens is not None
    try:
        whole = encoded(said, eyes, uncut=True).pair
        kept = encoded(said, eyes)
    except BadPairError as bad:
        return Page(said.location, [f"left out: {bad.reason}"], [])
    notes = []
    if isinstance(said, UnpairedExample):
        notes.append(f"judged {'good' if said.desirable else 'bad'}")
    if not kept.as_chat:
        notes.append("plain text: no chat template")
    if kept.was_dialogue:
        notes.append("marked text that became turns")
    if kept.with_system:
        notes.append("with the system turn of --system")
    if kept.specials:
        notes.append(f"kept as characters: {' '.join(sorted(kept.specials))}")
    if kept.stops_added:
        notes.append("the stop token at the end is added by training")
    return Page(said.location, notes, parts_of(eyes.tokenizer, whole, kept.pair))
