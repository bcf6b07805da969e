"""A file -> the pairs to train on, with a report of what became of it."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.preferences.faults import TOO_LONG, BadPair
from mlx_dpo.preferences.report import PairsReport
from mlx_dpo.preferences.schemas import FIELDS, schema_of, to_preference
from mlx_dpo.preferences.sources import Row, read_rows
from mlx_dpo.preferences.tokens import TokenRules, check_rules, tokenize_pair
from mlx_dpo.types import TokenizedPair


@dataclass(frozen=True)
class PairSet:
    """The pairs of a file in file order, and what became of the others."""

    pairs: tuple[TokenizedPair, ...]
    report: PairsReport


def load_pairs(
    path: Path, tokenizer: Any, rules: TokenRules, *, bad_pairs: str = "error"
) -> PairSet:
    """Read and tokenize a file; `bad_pairs` says whether a bad one is an `error` or a `drop`.

    Raises:
        DataError: a row cannot be read as a pair, a bad pair is an error, or none is left.
        ConfigError: a setting has no effect on this file with this tokenizer.
        ModelError: the tokenizer has no stop token.
    """
    check_rules(tokenizer, rules)
    report = PairsReport(source=str(path), max_length=rules.max_length)
    pairs = []
    for row in read_rows(path):
        try:
            pairs.append(_load(row, tokenizer, rules, report))
        except BadPair as bad:
            asked_for = bad.reason == TOO_LONG  # only `truncation: drop` says so
            if bad_pairs == "error" and not asked_for:
                raise
            report.drop(row.where, bad.reason)
    if not pairs:
        raise DataError(f"{path}: no pair left {_why(report)}; give other pairs")
    if rules.thinking is not None and not report.as_chat:
        raise ConfigError("`thinking` has no effect; no pair goes through the chat template")
    return PairSet(tuple(pairs), report)


def hold_out(
    pairs: Sequence[TokenizedPair], *, share: float, seed: int
) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """Training and held-out pairs, each in the order of `pairs`; no prompt is in both.

    About `share` of the pairs is held out, at least one and never all, where `share` is
    above 0 and there are two pairs. Depends on the prompts, their order and `seed` alone.

    Raises:
        ConfigError: all pairs have the same prompt, so none can be held out.
    """
    if not share or len(pairs) < 2:
        return list(pairs), []
    by_prompt: defaultdict[object, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        by_prompt[pair.asked or pair.prompt].append(index)
    if len(by_prompt) == 1:
        raise ConfigError(
            "`valid_fraction` cannot be met; all pairs have the same prompt, and held-out pairs "
            "must not share one with training pairs; give --valid, or --valid-fraction 0"
        )
    groups = list(by_prompt.values())
    wanted = min(max(1, round(share * len(pairs))), len(pairs) - 1)
    held: set[int] = set()
    for at in np.random.default_rng(seed % 2**64).permutation(len(groups)):
        if len(held) + len(groups[at]) <= wanted:
            held.update(groups[at])
    if not held:  # every prompt has more pairs than are wanted
        smallest = min(groups, key=len)
        held.update(smallest)
    train = [pair for index, pair in enumerate(pairs) if index not in held]
    return train, [pairs[index] for index in sorted(held)]


def digest(pairs: Sequence[TokenizedPair]) -> str:
    """SHA-256 over the token ids in order, as hex; the places they came from do not matter."""
    hashed = sha256()
    for pair in pairs:
        parts = (pair.prompt, pair.chosen, pair.rejected)
        # The lengths come first, so that no two sets of pairs read the same.
        numbers = [*map(len, parts), *(token for part in parts for token in part)]
        hashed.update(np.array(numbers, "<i8").tobytes())
    return hashed.hexdigest()


def _load(row: Row, tokenizer: Any, rules: TokenRules, report: PairsReport) -> TokenizedPair:
    schema = schema_of(row)
    report.read += 1
    report.schemas[schema.name] += 1
    report.unused_fields.update(row.record.keys() - set(FIELDS))
    preference = to_preference(row, schema)
    encoded = tokenize_pair(tokenizer, preference, rules, is_dialogue=schema.is_dialogue)
    report.keep(encoded, was_text=isinstance(preference.prompt, str))
    asked = sha256(json.dumps(preference.prompt, sort_keys=True).encode()).hexdigest()
    return replace(encoded.pair, asked=asked)


def _why(report: PairsReport) -> str:
    if not report.read:
        return "(the file holds none)"
    counts = ", ".join(f"{len(places)}: {why}" for why, places in report.dropped.items())
    return f"of {report.read} ({counts})"
