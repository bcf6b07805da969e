"""Load preference pairs, choose the held-out pairs, and mix sources by weight."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dpo.data.columns import prompt_keys
from mlx_dpo.data.dataset import PairDataset
from mlx_dpo.data.hf_datasets import InMemoryRows
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import Source, resolve_source
from mlx_dpo.data.tokenization.cache import load_source
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.parallel import TokenizerWorkers
from mlx_dpo.data.tokenization.tokenize_rows import LoadedPairs, PairRules
from mlx_dpo.errors import ConfigError
from mlx_dpo.schemas import SCHEMAS
from mlx_dpo.schemas.schema import DEFAULT_RULES, RowRules
from mlx_dpo.types import TokenizedPair


def load_pairs(
    source: str | Path | Source | InMemoryRows | Iterable[Mapping[str, Any]],
    tokenizer: Any,
    rules: TokenRules | None = None,
    *,
    rows: RowRules = DEFAULT_RULES,
    bad_pairs: str = "error",
    split: str | None = None,
) -> LoadedPairs[PairDataset]:
    """Read and tokenize the pairs of one data source; columns are detected as in training.

    Args:
        source: a file, a folder, a dataset on the Hub (`org/name[:config][@revision]`), or rows
            in memory: an iterable of dictionaries or a `datasets.Dataset`.
        tokenizer: mlx-lm's tokenizer wrapper, or a tokenizer of transformers.
        rules: settings of the tokenization. By default those of training, without the check that
            token ids are within the model's vocabulary.
        rows: settings for parsing rows into examples.
        bad_pairs: `error` raises an exception for a bad pair, `drop` counts it in the report.
        split: the split of a folder or a Hub dataset. [default: train]

    Raises:
        DataError: a row cannot be read as a pair, a bad pair is an error, or no pair is left.
        ConfigError: a setting has no effect with this tokenizer.
        ModelError: the tokenizer has no stop token.
    """
    if not isinstance(source, Source):
        source = resolve_source(str(source) if isinstance(source, Path) else source, split)
    workers = TokenizerWorkers(tokenizer)
    return load_source(source, workers, PairRules(rules or TokenRules(), rows, bad_pairs))


def check_settings_used(rules: TokenRules, rows: RowRules, reports: Sequence[PairsReport]) -> None:
    """Raise `ConfigError` for a setting that had no effect on any pair of any source."""
    names = {name for report in reports for name in report.schemas}
    schemas = [schema for name, schema in SCHEMAS.items() if name in names]
    if rows.ranked is not None and not any(schema.has_ranks for schema in schemas):
        raise ConfigError("`ranked` has no effect; no row is a list of rated completions")
    if rows.pair_labelled and not any(schema.has_labels for schema in schemas):
        raise ConfigError("`pair_labelled` has no effect; no row has a `label`")
    if rules.thinking is not None and not any(report.as_chat for report in reports):
        raise ConfigError("`thinking` has no effect; no pair goes through the chat template")
    if rules.system is not None and not any(report.with_system for report in reports):
        raise ConfigError("`system` has no effect; every row has a system turn of its own")


def held_out_indices(pairs: Sequence[TokenizedPair], *, share: float, seed: int) -> set[int]:
    """Return the indices of the pairs to hold out, so that no prompt is in both splits.

    About `share` of the pairs are held out.
    """
    return hold_out_prompts(prompt_keys(pairs), share=share, seed=seed)


def hold_out_prompts(keys: Sequence[object], *, share: float, seed: int) -> set[int]:
    """Return the indices of the pairs to hold out, so that no prompt is in both splits.

    About `share` of the pairs are held out: at least one and never all, if `share` is above 0 and
    there are at least two pairs. The result depends only on the prompts, their order and `seed`.

    Args:
        keys: a key of the prompt of each pair; equal prompts have equal keys.
        share: fraction of the pairs to hold out.
        seed: seed of the random choice.

    Raises:
        ConfigError: all pairs have the same prompt, so none can be held out.
    """
    if not share or len(keys) < 2:
        return set()
    by_prompt: defaultdict[object, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        by_prompt[key].append(index)
    if len(by_prompt) == 1:
        raise ConfigError(
            "`valid_fraction` cannot be met; all pairs have the same prompt, and held-out pairs "
            "must not share one with training pairs; give --valid, or --valid-fraction 0"
        )
    groups = list(by_prompt.values())
    wanted = min(max(1, round(share * len(keys))), len(keys) - 1)
    held_out: set[int] = set()
    for number in np.random.default_rng(seed % 2**64).permutation(len(groups)):
        if len(held_out) + len(groups[number]) <= wanted:
            held_out.update(groups[number])
    if not held_out:  # every prompt has more pairs than are wanted
        smallest = min(groups, key=len)
        held_out.update(smallest)
    return held_out


def mix_indices(count: int, weight: float, *, seed: Sequence[int]) -> list[int]:
    """Return the indices of a source's `count` pairs, each repeated `weight` times.

    For the fractional part of `weight`, that fraction of the pairs is chosen at random and added
    once more; the choice depends only on `seed` and `count`. At least one pair is chosen.
    """
    whole, fraction = divmod(weight, 1)
    extra = round(fraction * count)
    if not whole and count:
        extra = max(1, extra)
    drawn = np.random.default_rng([n % 2**64 for n in seed]).permutation(count)[:extra]
    return [*range(count)] * int(whole) + sorted(drawn.tolist())
