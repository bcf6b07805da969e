"""Parse and tokenize data set rows; count the resulting pairs and the dropped ones."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from mlx_dpo.data.examples import ParsedExample, drop_or_raise, parse_rows
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.tokenize import tokenize_pair, tokenize_unpaired
from mlx_dpo.errors import UNPAIRED, BadPairError, DataError
from mlx_dpo.schemas.messages import prompt_digest
from mlx_dpo.schemas.schema import DEFAULT_RULES, Row, RowRules
from mlx_dpo.types import NO_LIST, PreferenceExample, TokenizedPair

Pairs = TypeVar("Pairs", bound=Sequence[TokenizedPair])


@dataclass(frozen=True)
class LoadedPairs(Generic[Pairs]):
    """The tokenized pairs of one data source, in order, and the report that counts them."""

    pairs: Pairs
    report: PairsReport


@dataclass(frozen=True)
class PairRules:
    """All settings that decide how a row is parsed and tokenized into pairs."""

    tokens: TokenRules
    rows: RowRules = DEFAULT_RULES
    bad_pairs: str = "error"  # or `drop`


def tokenize_rows(
    rows: Iterable[Row], tokenizer: Any, rules: PairRules, report: PairsReport
) -> Iterator[TokenizedPair]:
    """Yield the tokenized pairs of the rows, and count them in the report.

    Raises:
        DataError: a row cannot be read as a pair.
        BadPairError: a pair is bad, and `rules.bad_pairs` is `error`.
    """
    for example in parse_rows(rows, rules.rows, report, bad_pairs=rules.bad_pairs):
        try:
            yield tokenize_example(example, tokenizer, rules.tokens, report)
        except BadPairError as bad:
            drop_or_raise(bad, report, rules.bad_pairs)


def tokenize_example(
    parsed: ParsedExample, tokenizer: Any, rules: TokenRules, report: PairsReport
) -> TokenizedPair:
    """Tokenize a parsed example and count it in the report.

    Raises:
        DataError, BadPairError: as `tokenize_pair`.
    """
    example, ranking = parsed.example, NO_LIST
    if isinstance(example, PreferenceExample):
        tokenized, ranking = tokenize_pair(tokenizer, example, rules), example.ranking
    else:
        tokenized = tokenize_unpaired(tokenizer, example, rules)
    report.keep(tokenized, was_text=isinstance(example.prompt, str), ranking=ranking)
    return replace(
        tokenized.pair,
        prompt_digest=prompt_digest(example),
        margin=parsed.margin,
        weight=parsed.weight,
        ranking=ranking,
    )


def new_report(source: str, rules: TokenRules, rows: RowRules) -> PairsReport:
    """Return an empty report on the data source named `source`."""
    is_text = rules.chat_template == "text"
    return PairsReport(
        source,
        rules.max_length,
        judged=rows.judged,
        supervised=rows.supervised,
        specials_act=is_text,
    )


def check_any_pair(report: PairsReport) -> None:
    """Raise `DataError` if the source has no usable pair; the message counts the reasons."""
    if report.used:
        return
    if not report.read:
        raise DataError(f"{report.source}: contains no pairs")
    counts = ", ".join(
        f"{len(rows)} of {report.read}: {reason}" for reason, rows in report.dropped.items()
    )
    is_labelled = max(report.dropped, key=lambda why: len(report.dropped[why])) == UNPAIRED
    advice = "use --loss-type kto, which needs no pairs" if is_labelled else "give other pairs"
    raise DataError(f"{report.source}: no usable pair ({counts}); {advice}")
