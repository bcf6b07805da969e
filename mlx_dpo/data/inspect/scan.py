"""Read the rows of a split once and record dropped rows, lengths and findings.

The texts themselves are not kept in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_dpo.data.examples import parse_rows
from mlx_dpo.data.inspect.duplicates import ExampleDigests
from mlx_dpo.data.inspect.findings import CHECK_OF_REASON, FindingLog
from mlx_dpo.data.inspect.lengths import Lengths
from mlx_dpo.data.inspect.raw_rows import read_raw_rows
from mlx_dpo.data.inspect.refusals import find_refusal
from mlx_dpo.data.inspect.text_anomalies import find_odd_characters
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import Source
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.special_tokens import iterate_texts, stop_tokens
from mlx_dpo.data.tokenization.tokenize import TokenizedExample, tokenize_pair, tokenize_unpaired
from mlx_dpo.data.tokenization.tokenize_rows import new_report
from mlx_dpo.errors import (
    NO_ROOM,
    NOT_WRITTEN,
    SAME_AFTER_TRUNCATION,
    TEMPLATE_ERROR,
    TOO_LONG,
    BadPairError,
    DataError,
    PromptBoundaryError,
)
from mlx_dpo.schemas.messages import to_messages
from mlx_dpo.schemas.schema import Row, RowRules
from mlx_dpo.types import NO_LIST, PreferenceExample, Text, UnpairedExample

UNLIMITED = 1 << 40
# Reasons of a `BadPairError` that a larger `max_length` removes.
LENGTH_REASONS = (TOO_LONG, NO_ROOM, SAME_AFTER_TRUNCATION)
DETAILED_REASONS = (TEMPLATE_ERROR, NOT_WRITTEN)  # what was found says more than the reason
Example = PreferenceExample | UnpairedExample
ProgressCallback = Callable[[int], None]  # called with the number of rows read since the last call


@dataclass(frozen=True, kw_only=True)
class ScanSettings:
    """Settings with which training would parse and tokenize the rows."""

    rows: RowRules
    tokens: TokenRules | None = None  # None without a model
    tokenizer: Any = None
    context_length: int | None = None  # of the model, in tokens


class SplitScan:
    """Data collected by reading one split: reports, lengths, text digests and findings."""

    def __init__(self, settings: ScanSettings, log: FindingLog) -> None:
        is_single = settings.rows.judged or settings.rows.supervised
        parts = ("prompt", "answer") if is_single else ("prompt", "chosen", "rejected")
        self.settings, self.log = settings, log
        self.reports: list[PairsReport] = []
        self.digests = ExampleDigests()
        self.lengths = Lengths("tokens" if settings.tokens else "characters", parts)

    @property
    def rows(self) -> int:
        """Number of rows read, including unreadable ones."""
        return sum(report.read for report in self.reports)

    @property
    def pairs(self) -> int:
        """Number of pairs (or unpaired examples) that training would use."""
        return sum(report.used for report in self.reports)


def scan_sources(sources: Sequence[Source], split: SplitScan, progress: ProgressCallback) -> None:
    """Read all rows of the sources and record them in `split`; bad rows become findings.

    Raises:
        DataError: a source cannot be read to its end.
        ConfigError: a setting has no effect.
    """
    for source in sources:
        report = _new_report(source.name, split.settings)
        split.reports.append(report)
        readable = _ReadableRows(source, split, progress)
        for parsed in parse_rows(readable, split.settings.rows, report, bad_pairs="drop"):
            _scan_example(parsed.example, split, report)
        report.read += readable.unreadable_count
        for reason, locations in report.dropped.items():
            for location in dict.fromkeys(locations):  # a row may lose several pairs
                split.log.add(CHECK_OF_REASON[reason], split.log.row_locations.add(location))


def _new_report(source: str, settings: ScanSettings) -> PairsReport:
    if settings.tokens is None:
        rows = settings.rows
        return PairsReport(source, 0, judged=rows.judged, supervised=rows.supervised)
    return new_report(source, settings.tokens, settings.rows)


class _ReadableRows:
    """Iterable of a source's readable rows; it records each unreadable row as a finding."""

    def __init__(self, source: Source, split: SplitScan, progress: ProgressCallback) -> None:
        self.source, self.split, self.progress = source, split, progress
        self.unreadable_count = 0

    def __iter__(self) -> Iterator[Row]:
        rules, log = self.split.settings.rows, self.split.log
        for raw in read_raw_rows(self.source):
            self.progress(1)
            try:
                if isinstance(raw.row, DataError):
                    raise raw.row
                for _ in parse_rows([raw.row], rules, PairsReport("", 0), bad_pairs="drop"):
                    pass
            except DataError as error:
                self.unreadable_count += 1
                index = log.row_locations.add(raw.location)
                log.add("unreadable", index, detail=strip_location(error, raw.location))
            else:
                yield raw.row


def _scan_example(example: Example, split: SplitScan, report: PairsReport) -> None:
    log = split.log
    index = log.row_locations.add(example.location)
    if split.settings.tokens is None:
        report.used += 1
        report.desirable += isinstance(example, UnpairedExample) and example.desirable
        split.lengths.add(*(_count_characters(text) for text in _texts(example)))
    elif not _scan_tokens(example, index, split, report):
        return
    split.digests.add(example, index)
    texts = iterate_texts([*_texts(example), example.template_kwargs])
    for name, characters in find_odd_characters(texts):
        log.add(name, index)
        for character in characters:
            log.add_detail(name, character)
    completion = _desirable_completion(example)
    if completion is not None:
        phrase = find_refusal(to_messages(completion, "assistant")[0]["content"])
        if phrase is not None:
            log.add("refusal", index, detail=phrase)


def _desirable_completion(example: Example) -> Text | None:
    if isinstance(example, PreferenceExample):
        return example.chosen
    return example.completion if example.desirable else None


def _scan_tokens(example: Example, index: int, split: SplitScan, report: PairsReport) -> bool:
    """Tokenize the example as training would, and return True if training would use it."""
    settings = split.settings
    try:
        tokenized = tokenize_example(example, settings)
    except BadPairError as bad:
        report.drop(bad.location, bad.reason)
        if bad.found and bad.reason in DETAILED_REASONS:
            split.log.add_detail(CHECK_OF_REASON[bad.reason], bad.found)
        if bad.reason in LENGTH_REASONS:
            split.lengths.add(*_count_tokens(tokenize_example(example, settings, unlimited=True)))
        return False
    except PromptBoundaryError as error:
        detail = strip_location(error, example.location)
        split.log.add("prompt-not-prefix", index, detail=detail)
        return False
    except DataError as error:
        split.log.add("untrainable", index, detail=strip_location(error, example.location))
        return False
    ranking = example.ranking if isinstance(example, PreferenceExample) else NO_LIST
    report.keep(tokenized, was_text=isinstance(example.prompt, str), ranking=ranking)
    full = tokenize_example(example, settings, unlimited=True) if tokenized.truncated else tokenized
    split.lengths.add(*_count_tokens(full))
    for name, detail in _token_findings(tokenized, settings):
        split.log.add(name, index, detail=detail)
    _log_missing_parts(tokenized, index, split.log)
    return True


def _log_missing_parts(tokenized: TokenizedExample, index: int, log: FindingLog) -> None:
    """Record what the model does not see: unwritten fields, unknown characters and words."""
    for name in sorted(tokenized.unwritten):
        log.add("template-drops-field", index, detail=name)
    if tokenized.has_unknown:
        log.add("unknown-token", index)
    for character in sorted(tokenized.unknown_characters):
        log.add_detail("unknown-token", f"{character} (U+{ord(character):04X})")


def _token_findings(
    tokenized: TokenizedExample, settings: ScanSettings
) -> Iterator[tuple[str, str]]:
    """Yield the check's name and a detail ("" for none) for each finding in the token ids."""
    pair, stops = tokenized.pair, stop_tokens(settings.tokenizer)
    if pair.prompt[:2] == (settings.tokenizer.bos_token_id,) * 2:
        yield "double-bos", ""
    if any(len(ids) > 1 and stops.issuperset(ids[-2:]) for ids in (pair.chosen, pair.rejected)):
        yield "double-eos", ""
    if settings.context_length is not None and len(pair) > settings.context_length:
        yield "longer-than-context", f"use --max-length {settings.context_length}"
    if tokenized.specials:
        yield "special-token", " ".join(sorted(tokenized.specials))
    if tokenized.as_chat and tokenized.stops_added:
        yield "missing-eos", ""
    if tokenized.truncated:
        parts = ["prompt"] * tokenized.prompt_cut + ["answers"] * (tokenized.completions_cut > 0)
        yield "truncated", " and ".join(parts)


def tokenize_example(
    example: Example, settings: ScanSettings, *, unlimited: bool = False
) -> TokenizedExample:
    """Tokenize the example as training would, or without truncation if `unlimited`.

    Raises:
        DataError, BadPairError: as in training.
    """
    assert settings.tokens is not None
    rules = replace(settings.tokens, max_length=UNLIMITED) if unlimited else settings.tokens
    if isinstance(example, PreferenceExample):
        return tokenize_pair(settings.tokenizer, example, rules)
    return tokenize_unpaired(settings.tokenizer, example, rules)


def _count_tokens(tokenized: TokenizedExample) -> list[int]:
    pair = tokenized.pair
    if pair.desirable is None:
        return [len(ids) for ids in (pair.prompt, pair.chosen, pair.rejected)]
    return [len(pair.prompt) + len(pair.chosen) - pair.num_scored, pair.num_scored]


def _texts(example: Example) -> Sequence[Text]:
    if isinstance(example, PreferenceExample):
        return example.prompt, example.chosen, example.rejected
    return example.prompt, example.completion


def _count_characters(text: Text) -> int:
    if isinstance(text, str):
        return len(text)
    return sum(len(turn["content"]) for turn in text)


def strip_location(error: DataError, location: str) -> str:
    """Return the error's message without the location at its beginning."""
    return str(error).removeprefix(f"{location}: ")
