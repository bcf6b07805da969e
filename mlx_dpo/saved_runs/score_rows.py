"""Score the rows of a data source with a run's implicit rewards, a block of rows at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from mlx_dpo.data.examples import ParsedExample, drop_or_raise, parse_rows
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.tokenization.tokenize_rows import tokenize_example
from mlx_dpo.errors import BadPairError, DataError
from mlx_dpo.saved_runs.implicit_rewards import ImplicitRewards
from mlx_dpo.schemas import SCHEMAS, has_pair_schema
from mlx_dpo.schemas.labelled import LABELLED
from mlx_dpo.schemas.schema import Record, Row, RowRules, rename_columns
from mlx_dpo.schemas.supervised import fits_supervised
from mlx_dpo.types import PreferenceExample, TokenizedPair

BLOCK_SIZE = 256  # examples in memory at once
SUBSET = "subset"  # column of RewardBench with the name of a row's subset
CHOSEN, REJECTED, MARGIN, REWARD = "reward_chosen", "reward_rejected", "reward_margin", "reward"
LABEL = "label"  # column that says whether an answer is good


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row with the rewards of its pair, or with the reward of its only answer."""

    row: Row  # the columns of the data source
    rewards: tuple[float, ...]  # of chosen and rejected, or of the answer

    @property
    def is_pair(self) -> bool:
        """Whether the row has two answers, the chosen and the rejected one."""
        return len(self.rewards) == 2

    @property
    def margin(self) -> float:
        """Reward of chosen minus that of rejected."""
        chosen, rejected = self.rewards
        return chosen - rejected

    @property
    def subset(self) -> str | None:
        """Name of the row's subset, from the column `subset`; None without one."""
        value = self.row.record.get(SUBSET)
        return None if value is None else str(value)

    def with_rewards(self) -> Row:
        """Return the row with columns for its rewards.

        Raises:
            DataError: the row has such a column already.
        """
        names = (CHOSEN, REJECTED, MARGIN) if self.is_pair else (REWARD,)
        for name in names:
            if name in self.row.record:
                raise DataError(
                    f"{self.row.location}: the row has a column `{name}` already; rename it, or "
                    "leave it out"
                )
        values = (*self.rewards, self.margin) if self.is_pair else self.rewards
        return Row(self.row.record | dict(zip(names, values, strict=True)), self.row.location)


@dataclass
class RewardTotals:
    """Counts and sums of rewards, from which accuracy and means are computed.

    A pair is correct if its chosen answer has the higher reward, as in `eval`; equal rewards are
    not correct, and are counted.
    """

    pairs: int = 0
    correct: int = 0
    ties: int = 0
    margins: float = 0.0
    answers: int = 0  # rows with one answer
    rewards: float = 0.0  # of these rows

    def add(self, row: ScoredRow) -> None:
        """Count a row."""
        if not row.is_pair:
            self.answers += 1
            self.rewards += row.rewards[0]
            return
        self.pairs += 1
        self.correct += row.margin > 0
        self.ties += row.margin == 0
        self.margins += row.margin

    @property
    def accuracy(self) -> float:
        """Share of the pairs whose chosen answer has the higher reward."""
        return self.correct / self.pairs

    @property
    def mean_margin(self) -> float:
        """Mean reward of chosen minus mean reward of rejected."""
        return self.margins / self.pairs

    @property
    def mean_reward(self) -> float:
        """Mean reward of the rows with one answer."""
        return self.rewards / self.answers


@dataclass
class RewardSummary:
    """The totals of scored rows: of all rows, and of each subset that they name."""

    total: RewardTotals = field(default_factory=RewardTotals)
    subsets: dict[str, RewardTotals] = field(default_factory=dict)

    def add(self, row: ScoredRow) -> None:
        """Count a row."""
        self.total.add(row)
        if row.subset is not None:
            self.subsets.setdefault(row.subset, RewardTotals()).add(row)


@dataclass(frozen=True)
class _Example:
    row: Row
    pair: TokenizedPair
    is_pair: bool


def score_rows(
    rewards: ImplicitRewards,
    rows: Iterable[Row],
    rules: RowRules,
    report: PairsReport,
    *,
    bad_pairs: str = "error",
) -> Iterator[ScoredRow]:
    """Yield the rows in order with their implicit rewards; `BLOCK_SIZE` of them are in memory.

    A row is a pair of any schema, or one answer in a schema of instruction tuning, such as `prompt`
    and `completion`; of a conversation, the last answer is scored. Of a row with several pairs
    (rated completions), each pair is a row with `prompt`, `chosen` and `rejected`.

    Args:
        rules: the settings for parsing rows; margins and weights are not read.
        report: counts the rows, those that were left out included.
        bad_pairs: what to do with a row that cannot be scored: `error`, or `drop` it. Rows that
            are too long for the model's context are always dropped.

    Raises:
        DataError: a row cannot be read.
        BadPairError: a row cannot be scored, and `bad_pairs` is `error`.
    """
    rules = replace(rules, pair_labelled=False, margin=None, weight=None)
    examples = _tokenize(rewards, rows, rules, report, bad_pairs)
    while block := list(islice(examples, BLOCK_SIZE)):
        yield from _score(rewards, block)


def _score(rewards: ImplicitRewards, block: list[_Example]) -> Iterator[ScoredRow]:
    pairs = [example.pair for example in block if example.is_pair]
    answers = [example.pair for example in block if not example.is_pair]
    of_pairs = iter(np.stack(rewards.of_pairs(pairs), axis=1) if pairs else ())
    alone = iter(rewards.of_completions(answers))
    for example in block:
        found = next(of_pairs) if example.is_pair else (next(alone),)
        yield ScoredRow(example.row, tuple(map(float, found)))


def _tokenize(
    rewards: ImplicitRewards,
    rows: Iterable[Row],
    rules: RowRules,
    report: PairsReport,
    bad_pairs: str,
) -> Iterator[_Example]:
    tokens, tokenizer = rewards.rules, rewards.base.tokenizer
    for row in rows:
        parsed = list(_parse(row, rules, report, bad_pairs))
        for item in parsed:
            try:
                pair = tokenize_example(item, tokenizer, tokens, report)
            except BadPairError as bad:
                drop_or_raise(bad, report, bad_pairs)
                continue
            is_pair = isinstance(item.example, PreferenceExample)
            yield _Example(row if len(parsed) == 1 else _row_of(item, row), pair, is_pair)


def _parse(
    row: Row, rules: RowRules, report: PairsReport, bad_pairs: str
) -> Iterator[ParsedExample]:
    renamed, rules = rename_columns(row, rules.renamed), replace(rules, renamed={})
    is_answer = _is_single_answer(renamed) if rules.schema is None else rules.schema not in SCHEMAS
    if is_answer:  # whatever its label says of it
        record = {name: value for name, value in renamed.record.items() if name != LABEL}
        renamed = Row(record, row.location)
    rules = replace(
        rules,
        judged=rules.schema == LABELLED.name,
        supervised=is_answer,
        assistant_turns="last",
    )
    return parse_rows([renamed], rules, report, bad_pairs=bad_pairs)


def _is_single_answer(row: Row) -> bool:
    is_pair = "chosen" in row.record or has_pair_schema(row)
    return not is_pair and fits_supervised(row.record)


def _row_of(parsed: ParsedExample, row: Row) -> Row:
    """Return one of several pairs that a row makes, as a row of its own."""
    example = parsed.example
    assert isinstance(example, PreferenceExample)
    texts = {
        name: text if isinstance(text, str) else list(text)
        for name, text in (
            ("prompt", example.prompt),
            ("chosen", example.chosen),
            ("rejected", example.rejected),
        )
    }
    record: Record = texts if SUBSET not in row.record else texts | {SUBSET: row.record[SUBSET]}
    return Row(dict(record), row.location)
