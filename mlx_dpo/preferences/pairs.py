"""Sources -> the pairs to train on, with a report of what became of each."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.preferences.faults import BadPair
from mlx_dpo.preferences.reading import Told, keep_or_raise, told
from mlx_dpo.preferences.report import PairsReport
from mlx_dpo.preferences.schemas import DEFAULT, RowRules, asked
from mlx_dpo.preferences.sources import Source, source_of
from mlx_dpo.preferences.tokens import (
    TokenRules,
    check_rules,
    tokenize_judgement,
    tokenize_pair,
)
from mlx_dpo.types import Preference, TokenizedPair

UNTOLD = (0.0, 1.0, None)  # margin, weight and judgement where the data says nothing


@dataclass(frozen=True)
class PairSet:
    """The pairs of a source in its order, and what became of the others."""

    pairs: tuple[TokenizedPair, ...]
    report: PairsReport


def load_pairs(
    source: Source | Path,
    tokenizer: Any,
    rules: TokenRules,
    *,
    rows: RowRules = DEFAULT,
    bad_pairs: str = "error",
) -> PairSet:
    """Read and tokenize a source; `bad_pairs` says whether a bad one is an `error` or a `drop`.

    Raises:
        DataError: a row cannot be read as a pair, a bad pair is an error, or none is left.
        ConfigError: a setting has no effect with this tokenizer.
        ModelError: the tokenizer has no stop token.
    """
    check_rules(tokenizer, rules)
    source = source if isinstance(source, Source) else source_of(str(source))
    report = new_report(source.name, rules, rows)
    pairs = []
    for one in told(source.rows(), rows, report, bad_pairs=bad_pairs):
        try:
            pairs.append(tokenized(one, tokenizer, rules, report))
        except BadPair as bad:
            keep_or_raise(bad, report, bad_pairs)
    if not pairs:
        raise DataError(f"{source.name}: no pair left {_why(report)}; give other pairs")
    return PairSet(tuple(pairs), report)


def new_report(source: str, rules: TokenRules, rows: RowRules) -> PairsReport:
    """A report with nothing counted yet."""
    controls = rules.chat_template == "text"
    return PairsReport(source, rules.max_length, judged=rows.judged, specials_act=controls)


def tokenized(one: Told, tokenizer: Any, rules: TokenRules, report: PairsReport) -> TokenizedPair:
    """What a row says as token ids; it is counted.

    Raises:
        DataError, BadPair: as `tokenize_pair`.
    """
    said = one.said
    if isinstance(said, Preference):
        encoded = tokenize_pair(tokenizer, said, rules)
    else:
        encoded = tokenize_judgement(tokenizer, said, rules)
    report.keep(encoded, was_text=isinstance(said.prompt, str))
    return replace(encoded.pair, asked=asked(said), margin=one.margin, weight=one.weight)


def refuse_idle(rules: TokenRules, rows: RowRules, reports: Sequence[PairsReport]) -> None:
    """ConfigError for a setting that did nothing to any pair of any source."""
    seen = {name for report in reports for name in report.schemas}
    if rows.ranked is not None and "ranked" not in seen:
        raise ConfigError("`ranked` has no effect; no row is a list of rated completions")
    if rows.pair_labelled and "labelled" not in seen:
        raise ConfigError("`pair_labelled` has no effect; no row has a `label`")
    if rules.thinking is not None and not any(report.as_chat for report in reports):
        raise ConfigError("`thinking` has no effect; no pair goes through the chat template")
    if rules.system is not None and not any(report.system_added for report in reports):
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
    held = held_out(pairs, share=share, seed=seed)
    train = [pair for index, pair in enumerate(pairs) if index not in held]
    return train, [pairs[index] for index in sorted(held)]


def held_out(pairs: Sequence[TokenizedPair], *, share: float, seed: int) -> set[int]:
    """Places of the pairs that `hold_out` holds out."""
    return apart([pair.asked or pair.prompt for pair in pairs], share=share, seed=seed)


def apart(prompts: Sequence[object], *, share: float, seed: int) -> set[int]:
    """Places of the pairs that are held out, from the prompt of each."""
    if not share or len(prompts) < 2:
        return set()
    by_prompt: defaultdict[object, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_prompt[prompt].append(index)
    if len(by_prompt) == 1:
        raise ConfigError(
            "`valid_fraction` cannot be met; all pairs have the same prompt, and held-out pairs "
            "must not share one with training pairs; give --valid, or --valid-fraction 0"
        )
    groups = list(by_prompt.values())
    wanted = min(max(1, round(share * len(prompts))), len(prompts) - 1)
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
    """A source's pairs as often as `weight` says: each of them for every whole, some for the rest.

    Which some depends on `seed` and the number of pairs alone; at least one pair is left.
    """
    whole, rest = divmod(weight, 1)
    extra = round(rest * len(pairs))
    if not whole and pairs:
        extra = max(1, extra)
    drawn = np.random.default_rng([n % 2**64 for n in seed]).permutation(len(pairs))[:extra]
    return [*pairs] * int(whole) + [pairs[i] for i in sorted(drawn.tolist())]


def digest(pairs: Sequence[TokenizedPair]) -> str:
    """SHA-256 over the pairs in order, as hex; the places they came from do not matter.

    Over the token ids, and margin, weight and judgement where the data says any.
    """
    hashed = sha256()
    for pair in pairs:
        parts = (pair.prompt, pair.chosen, pair.rejected)
        # The lengths come first, so that no two sets of pairs read the same.
        numbers = [*map(len, parts), *(token for part in parts for token in part)]
        hashed.update(np.array(numbers, "<i8").tobytes())
        told = (pair.margin, pair.weight, pair.desirable)
        if told != UNTOLD:
            hashed.update(repr(told).encode())
    return hashed.hexdigest()


def _why(report: PairsReport) -> str:
    if not report.read:
        return "(it holds none)"
    counts = ", ".join(f"{len(places)}: {why}" for why, places in report.dropped.items())
    return f"of {report.read} ({counts})"
