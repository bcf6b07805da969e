"""Sources -> the pairs to train on, with a report of what became of each."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from mlx_dpo.data.dataset import prompt_keys
from mlx_dpo.data.examples import ParsedExample, drop_or_raise, parse_rows
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import Source, resolve_source
from mlx_dpo.data.tokenization.chat_template import TokenRules
from mlx_dpo.data.tokenization.tokenize import (
    check_token_rules,
    tokenize_pair,
    tokenize_unpaired,
)
from mlx_dpo.errors import BadPairError, ConfigError, DataError
from mlx_dpo.schemas.messages import prompt_digest
from mlx_dpo.schemas.schema import DEFAULT, Row, RowRules
from mlx_dpo.types import PreferenceExample, TokenizedPair

Pairs = TypeVar("Pairs", bound=Sequence[TokenizedPair])


@dataclass(frozen=True)
class LoadedPairs(Generic[Pairs]):
    """The pairs of a source in its order, and what became of the others."""

    pairs: Pairs
    report: PairsReport


@dataclass(frozen=True)
class PairRules:
    """Everything that decides which pairs a row becomes, beside the tokenizer."""

    tokens: TokenRules
    rows: RowRules = DEFAULT
    bad_pairs: str = "error"  # or `drop`


def load_pairs(
    source: Source | Path,
    tokenizer: Any,
    rules: TokenRules,
    *,
    rows: RowRules = DEFAULT,
    bad_pairs: str = "error",
) -> LoadedPairs[tuple[TokenizedPair, ...]]:
    """Read and tokenize a source; `bad_pairs` says whether a bad one is an `error` or a `drop`.

    Raises:
        DataError: a row cannot be read as a pair, a bad pair is an error, or none is left.
        ConfigError: a setting has no effect with this tokenizer.
        ModelError: the tokenizer has no stop token.
    """
    check_token_rules(tokenizer, rules)
    source = source if isinstance(source, Source) else resolve_source(str(source))
    report = new_report(source.name, rules, rows)
    every = PairRules(rules, rows, bad_pairs)
    pairs = tuple(tokenize_rows(source.rows(), tokenizer, every, report))
    check_any_pair(report)
    return LoadedPairs(pairs, report)


def tokenize_rows(
    rows: Iterable[Row], tokenizer: Any, rules: PairRules, report: PairsReport
) -> Iterator[TokenizedPair]:
    """The pairs of rows, one after the other; `report` counts.

    Raises:
        DataError: a row cannot be read as a pair.
        BadPairError: a pair is bad, and `rules.bad_pairs` is `error`.
    """
    for one in parse_rows(rows, rules.rows, report, bad_pairs=rules.bad_pairs):
        try:
            yield tokenize_example(one, tokenizer, rules.tokens, report)
        except BadPairError as bad:
            drop_or_raise(bad, report, rules.bad_pairs)


def check_any_pair(report: PairsReport) -> None:
    """DataError if no pair of a source was kept; says why."""
    if not report.kept:
        raise DataError(f"{report.source}: no pair left {_why(report)}; give other pairs")


def new_report(source: str, rules: TokenRules, rows: RowRules) -> PairsReport:
    """A report with nothing counted yet."""
    controls = rules.chat_template == "text"
    return PairsReport(source, rules.max_length, judged=rows.judged, specials_act=controls)


def tokenize_example(
    one: ParsedExample, tokenizer: Any, rules: TokenRules, report: PairsReport
) -> TokenizedPair:
    """What a row says as token ids; it is counted.

    Raises:
        DataError, BadPairError: as `tokenize_pair`.
    """
    said = one.example
    if isinstance(said, PreferenceExample):
        encoded = tokenize_pair(tokenizer, said, rules)
    else:
        encoded = tokenize_unpaired(tokenizer, said, rules)
    report.keep(encoded, was_text=isinstance(said.prompt, str))
    return replace(
        encoded.pair, prompt_digest=prompt_digest(said), margin=one.margin, weight=one.weight
    )


def check_settings_used(rules: TokenRules, rows: RowRules, reports: Sequence[PairsReport]) -> None:
    """ConfigError for a setting that did nothing to any pair of any source."""
    seen = {name for report in reports for name in report.schemas}
    if rows.ranked is not None and "ranked" not in seen:
        raise ConfigError("`ranked` has no effect; no row is a list of rated completions")
    if rows.pair_labelled and "labelled" not in seen:
        raise ConfigError("`pair_labelled` has no effect; no row has a `label`")
    if rules.thinking is not None and not any(report.as_chat for report in reports):
        raise ConfigError("`thinking` has no effect; no pair goes through the chat template")
    if rules.system is not None and not any(report.with_system for report in reports):
        raise ConfigError("`system` has no effect; every row has a system turn of its own")


def hold_out(
    pairs: Sequence[TokenizedPair], *, share: float, seed: int
) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """Training and held-out pairs, each in the order of `pairs`; no prompt is in both.

    About `share` of the pairs is held out, at least one and never all, where `share` is
    above 0 and there are two pairs. Depends on the prompts, their order and `seed` alone.

    Raises:
        ConfigError: all pairs have the same prompt, so none can be held out.
    """
    held = held_out_indices(pairs, share=share, seed=seed)
    train = [pair for index, pair in enumerate(pairs) if index not in held]
    return train, [pairs[index] for index in sorted(held)]


def held_out_indices(pairs: Sequence[TokenizedPair], *, share: float, seed: int) -> set[int]:
    """Places of the pairs that `hold_out` holds out."""
    return hold_out_prompts(prompt_keys(pairs), share=share, seed=seed)


def hold_out_prompts(keys: Sequence[object], *, share: float, seed: int) -> set[int]:
    """Places of the pairs that are held out, from the prompt of each."""
    if not share or len(keys) < 2:
        return set()
    by_prompt: defaultdict[object, list[int]] = defaultdict(list)
    for index, prompt in enumerate(keys):
        by_prompt[prompt].append(index)
    if len(by_prompt) == 1:
        raise ConfigError(
            "`valid_fraction` cannot be met; all pairs have the same prompt, and held-out pairs "
            "must not share one with training pairs; give --valid, or --valid-fraction 0"
        )
    groups = list(by_prompt.values())
    wanted = min(max(1, round(share * len(keys))), len(keys) - 1)
    held: set[int] = set()
    for at in np.random.default_rng(seed % 2**64).permutation(len(groups)):
        if len(held) + len(groups[at]) <= wanted:
            held.update(groups[at])
    if not held:  # every prompt has more pairs than are wanted
        smallest = min(groups, key=len)
        held.update(smallest)
    return held


def mixed(
    pairs: Sequence[TokenizedPair], weight: float, *, seed: Sequence[int]
) -> list[TokenizedPair]:
    """A source's pairs as often as `weight` says; see `mixed_places`."""
    return [pairs[i] for i in mix_indices(len(pairs), weight, seed=seed)]


def mix_indices(count: int, weight: float, *, seed: Sequence[int]) -> list[int]:
    """Places of a source's pairs: each of them for every whole of `weight`, some for the rest.

    Which some depends on `seed` and the number of pairs alone; at least one pair is left.
    """
    whole, rest = divmod(weight, 1)
    extra = round(rest * count)
    if not whole and count:
        extra = max(1, extra)
    drawn = np.random.default_rng([n % 2**64 for n in seed]).permutation(count)[:extra]
    return [*range(count)] * int(whole) + sorted(drawn.tolist())


def _why(report: PairsReport) -> str:
    if not report.read:
        return "(it holds none)"
    counts = ", ".join(f"{len(places)}: {why}" for why, places in report.dropped.items())
    return f"of {report.read} ({counts})"
