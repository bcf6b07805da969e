"""One pass over the rows of a split: what is lost, how long, what is odd. Keeps no texts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mlx_dpo.data.examples import ParsedExample, parse_rows
from mlx_dpo.data.inspect.duplicates import Digests
from mlx_dpo.data.inspect.findings import LOST, Hits
from mlx_dpo.data.inspect.lengths import Lengths
from mlx_dpo.data.inspect.raw_rows import written
from mlx_dpo.data.inspect.text_anomalies import find_odd_characters, find_refusal
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import Source
from mlx_dpo.data.tokenization.chat_template import TokenRules
from mlx_dpo.data.tokenization.special_tokens import iterate_texts, stop_tokens
from mlx_dpo.data.tokenization.tokenize import TokenizedExample, tokenize_pair, tokenize_unpaired
from mlx_dpo.data.tokenization.tokenize_rows import new_report
from mlx_dpo.errors import (
    NO_ROOM,
    SAME_AFTER_TRUNCATION,
    TOO_LONG,
    BadPairError,
    DataError,
    PromptBoundaryError,
)
from mlx_dpo.schemas.messages import as_turns
from mlx_dpo.schemas.schema import Row, RowRules
from mlx_dpo.types import PreferenceExample, Text, TokenizedPair, UnpairedExample

UNCUT = 1 << 40
CUT = (TOO_LONG, NO_ROOM, SAME_AFTER_TRUNCATION)  # reasons that a larger `max_length` would mend
Said = PreferenceExample | UnpairedExample
Tick = Callable[[int], None]  # told of further rows


@dataclass(frozen=True, kw_only=True)
class Eyes:
    """How rows are looked at: as training would read them."""

    rows: RowRules
    tokens: TokenRules | None = None  # None without a model
    tokenizer: Any = None
    context: int | None = None  # tokens that the model places


class Split:
    """What was found of training or of held-out pairs."""

    def __init__(self, eyes: Eyes, hits: Hits) -> None:
        parts = ("prompt", "answer") if eyes.rows.judged else ("prompt", "chosen", "rejected")
        self.eyes, self.hits = eyes, hits
        self.reports: list[PairsReport] = []
        self.digests = Digests()
        self.lengths = Lengths("tokens" if eyes.tokens else "characters", parts)

    @property
    def rows(self) -> int:
        """Rows that were read, unreadable ones among them."""
        return sum(report.read for report in self.reports)

    @property
    def pairs(self) -> int:
        """Pairs, or judged answers, that would be used."""
        return sum(report.kept for report in self.reports)


def pass_over(sources: Sequence[Source], split: Split, tick: Tick) -> None:
    """Read all rows of the sources into a split; prints nothing and stops at no fault of a row.

    Raises:
        DataError: a source cannot be read on.
        ConfigError: a setting has no effect.
    """
    for source in sources:
        report = _new_report(source.name, split.eyes)
        split.reports.append(report)
        unreadable = _Unreadable(source, split, tick)
        for one in parse_rows(unreadable.others(), split.eyes.rows, report, bad_pairs="drop"):
            _look(one, split, report)
        report.read += unreadable.count
        for reason, places in report.dropped.items():
            for where in dict.fromkeys(places):  # a row may lose several pairs
                split.hits.add(LOST[reason], split.hits.places.add(where))


def _new_report(source: str, eyes: Eyes) -> PairsReport:
    if eyes.tokens is None:
        return PairsReport(source, 0, judged=eyes.rows.judged)
    return new_report(source, eyes.tokens, eyes.rows)


class _Unreadable:
    """Sets aside the rows at which training would stop, and hands on the others."""

    def __init__(self, source: Source, split: Split, tick: Tick) -> None:
        self.source, self.split, self.tick = source, split, tick
        self.count = 0

    def others(self) -> Iterator[Row]:
        rules, hits = self.split.eyes.rows, self.split.hits
        for one in written(self.source):
            self.tick(1)
            try:
                if isinstance(one.row, DataError):
                    raise one.row
                for _ in parse_rows([one.row], rules, PairsReport("", 0), bad_pairs="drop"):
                    pass
            except DataError as error:
                self.count += 1
                at = hits.places.add(one.location)
                hits.add("unreadable", at, detail=without_place(error, one.location))
            else:
                yield one.row


def _look(one: ParsedExample, split: Split, report: PairsReport) -> None:
    said, hits = one.example, split.hits
    at = hits.places.add(said.location)
    if split.eyes.tokens is None:
        report.kept += 1
        report.desirable += isinstance(said, UnpairedExample) and said.desirable
        split.lengths.add(*(_characters(text) for text in _parts(said)))
    elif not _look_at_tokens(said, at, split, report):
        return
    split.digests.add(said, at)
    for name, characters in find_odd_characters(
        iterate_texts([*_parts(said), said.template_kwargs])
    ):
        hits.add(name, at)
        for found in characters:
            hits.detail(name, found)
    answer = said.chosen if isinstance(said, PreferenceExample) else said.completion
    good = isinstance(said, PreferenceExample) or said.desirable
    if good and (phrase := find_refusal(as_turns(answer, "assistant")[0]["content"])):
        hits.add("refusal", at, detail=phrase)


def _look_at_tokens(said: Said, at: int, split: Split, report: PairsReport) -> bool:
    """Tokenize as training would; whether the pair would be used."""
    try:
        found = encoded(said, split.eyes)
    except BadPairError as bad:
        report.drop(bad.location, bad.reason)
        if bad.reason in CUT:
            split.lengths.add(*_lens(encoded(said, split.eyes, uncut=True).pair))
        return False
    except PromptBoundaryError as error:
        split.hits.add("prompt-not-prefix", at, detail=without_place(error, said.location))
        return False
    except DataError as error:
        split.hits.add("untrainable", at, detail=without_place(error, said.location))
        return False
    report.keep(found, was_text=isinstance(said.prompt, str))
    whole = encoded(said, split.eyes, uncut=True) if found.truncated else found
    split.lengths.add(*_lens(whole.pair))
    for name, detail in _odd(found, split.eyes):
        split.hits.add(name, at, detail=detail)
    return True


def _odd(found: TokenizedExample, eyes: Eyes) -> Iterator[tuple[str, str]]:
    pair, stops = found.pair, stop_tokens(eyes.tokenizer)
    if pair.prompt[:2] == (eyes.tokenizer.bos_token_id,) * 2:
        yield "double-bos", ""
    if any(len(ids) > 1 and stops.issuperset(ids[-2:]) for ids in (pair.chosen, pair.rejected)):
        yield "double-stop", ""
    if eyes.context is not None and len(pair) > eyes.context:
        yield "beyond-context", ""
    if found.specials:
        yield "special-token", " ".join(sorted(found.specials))
    if found.as_chat and found.stops_added:
        yield "missing-stop", ""
    if found.truncated:
        parts = ["prompt"] * found.prompt_cut + ["answers"] * (found.completions_cut > 0)
        yield "truncated", " and ".join(parts)


def encoded(said: Said, eyes: Eyes, *, uncut: bool = False) -> TokenizedExample:
    """A pair as training would tokenize it, or as it would be without a limit.

    Raises:
        DataError, BadPairError: as training.
    """
    assert eyes.tokens is not None
    rules = replace(eyes.tokens, max_length=UNCUT) if uncut else eyes.tokens
    if isinstance(said, PreferenceExample):
        return tokenize_pair(eyes.tokenizer, said, rules)
    return tokenize_unpaired(eyes.tokenizer, said, rules)


def _lens(pair: TokenizedPair) -> list[int]:
    parts = [pair.prompt, pair.chosen, pair.rejected]
    return [len(ids) for ids in (parts if pair.desirable is None else parts[:2])]


class _Parts(NamedTuple):
    prompt: Text
    chosen: Text
    rejected: Text


def _parts(said: Said) -> Sequence[Text]:
    if isinstance(said, PreferenceExample):
        return _Parts(said.prompt, said.chosen, said.rejected)
    return said.prompt, said.completion


def _characters(text: Text) -> int:
    if isinstance(text, str):
        return len(text)
    return sum(len(turn["content"]) for turn in text)


def without_place(error: DataError, location: str) -> str:
    """What an error says beside its place."""
    return str(error).removeprefix(f"{location}: ")
