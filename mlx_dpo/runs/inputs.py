"""What a run starts from: the base, the pairs as tokens, and where both came from."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.columns import longest_row, pairs_digest
from mlx_dpo.data.dataset import PairDataset, concatenate, with_mismatched_completions
from mlx_dpo.data.load import check_settings_used, held_out_indices, mix_indices
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import Source, SplitSources, find_sources
from mlx_dpo.data.tokenization.cache import RowProgress, TokenCache, load_source
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.parallel import TokenizerWorkers
from mlx_dpo.data.tokenization.tokenize_rows import LoadedPairs, PairRules
from mlx_dpo.errors import ConfigError
from mlx_dpo.generation.generate import context_length
from mlx_dpo.models.device import device_kind, main_dtype
from mlx_dpo.models.files import code_fingerprint, model_fingerprint, tokenizer_fingerprint
from mlx_dpo.models.load import LoadedModel, load_model, load_tokenizer
from mlx_dpo.paths import token_cache
from mlx_dpo.schemas.schema import Ranking, RowRules
from mlx_dpo.types import TokenizedPair

MAX_PROCESSES = 8  # each holds a tokenizer and the libraries that it comes with


@dataclass(frozen=True)
class Inputs:
    """The base and the pairs of a run."""

    base: LoadedModel
    train: Sequence[TokenizedPair]
    valid: Sequence[TokenizedPair]
    reports: Sequence[PairsReport]  # one per source
    passed_over: Sequence[str] = ()  # held-out splits that typed pairs replace

    def provenance(self, config: DPOConfig) -> dict[str, Any]:
        """What the results depend on beside the settings, by content."""
        return {
            "model": model_fingerprint(self.base.path),
            "tokenizer": tokenizer_fingerprint(self.base.path),
            "held": device_and_dtype(self.base),
            "train": pairs_digest(self.train),
            "valid": pairs_digest(self.valid),
        }


def device_and_dtype(base: LoadedModel) -> str:
    """The device and the number type in which the base is computed with."""
    return f"{device_kind()} {main_dtype(base.model)}"


def token_rules(config: DPOConfig, base: LoadedModel) -> TokenRules:
    """The settings that decide how text becomes tokens."""
    return TokenRules(
        chat_template=config.chat_template,
        thinking=config.thinking,
        system=config.system,
        max_length=config.max_length,
        truncation=config.truncation,
        vocab_size=base.vocab_size,
    )


def load_configured_base(
    config: DPOConfig, load: Callable[..., LoadedModel] = load_model
) -> LoadedModel:
    """The frozen base that the settings name; `load` is `load_empty_model` where shapes do."""
    return load(
        config.model,
        revision=config.revision,
        bits=config.bits,
        group_size=config.group_size,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )


def row_rules(config: DPOConfig) -> RowRules:
    """The settings that decide how rows become preferences."""
    return RowRules(
        judged=config.labelled,
        pair_labelled=config.pair_labelled,
        margin=config.margin_column,
        weight=config.weight_column,
        schema=config.schema,
        ranked=cast(Ranking | None, config.ranked),
        renamed=config.columns,
    )


@contextmanager
def no_progress(rows: int | None) -> Iterator[Callable[[int], None]]:
    """Nobody hears how many rows are done."""
    yield lambda more: None


def load_configured_source(
    config: DPOConfig, base: LoadedModel, source: Source, counting: RowProgress = no_progress
) -> LoadedPairs[PairDataset]:
    """One source of pairs, as the settings say."""
    path, code = base.path, config.trust_remote_code
    load = partial(load_tokenizer, path, base.source, trust_remote_code=code)
    files = tokenizer_fingerprint(path) + (code_fingerprint(path) if code else "")
    local = Path(base.source).expanduser().is_dir()
    name = os.path.basename(os.path.abspath(path)) if local else base.source
    return load_source(
        source,
        TokenizerWorkers(base.tokenizer, load, count_processes()),
        PairRules(token_rules(config, base), row_rules(config), config.bad_pairs),
        TokenCache(token_cache(), files, name),
        progress=counting,
    )


def count_processes() -> int:
    """How many tokenize at once where there is enough to do."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MAX_PROCESSES)


def add_kl_completions(
    config: DPOConfig, pairs: Sequence[TokenizedPair]
) -> Sequence[TokenizedPair]:
    """The pairs of a split; judged answers get what KTO holds them against."""
    return with_mismatched_completions(pairs, config.max_length) if config.labelled else pairs


def load_inputs(
    config: DPOConfig,
    *,
    read: Callable[[DPOConfig], LoadedModel] = load_configured_base,
    counting: RowProgress = no_progress,
) -> Inputs:
    """Find the pairs, load the base, tokenise; files are found before anything large is loaded.

    `read` says how the base is loaded, `counting` hears of rows where there are many.

    Raises:
        ConfigError: a setting has no effect, or rows are longer than what the model can place.
    """
    sources = find_sources(config.pairs, config.valid, config.split)
    check_held_out_settings(config, sources)
    base = read(config)
    train = [load_configured_source(config, base, source, counting) for source in sources.train]
    valid = [load_configured_source(config, base, source, counting) for source in sources.valid]
    reports = [read.report for read in (*train, *valid)]
    check_settings_used(token_rules(config, base), row_rules(config), reports)
    kept, apart = (
        add_kl_completions(config, split) for split in _split_pairs(config, train, valid)
    )
    inputs = Inputs(base, kept, apart, reports, [one.name for one in sources.unused_valid])
    check_context_length(config, base, inputs.train, inputs.valid)
    return inputs


def _split_pairs(
    config: DPOConfig,
    train: Sequence[LoadedPairs[PairDataset]],
    valid: Sequence[LoadedPairs[PairDataset]],
) -> tuple[PairDataset, PairDataset]:
    """Pairs to train on, each source as often as it is wanted, and pairs to measure on."""
    every = concatenate([read.pairs for read in train])
    held = held_out_indices(
        every, share=0.0 if valid else config.held_out_fraction, seed=config.seed
    )
    apart = concatenate([read.pairs for read in valid]) if valid else every.select(sorted(held))
    kept: list[int] = []
    begin = 0
    for number, read in enumerate(train):
        places = [i for i in range(begin, begin + len(read.pairs)) if i not in held]
        if config.mix:
            read.report.weight = weight = config.mix[number]
            drawn = mix_indices(len(places), weight, seed=(config.seed, number))
            places = [places[i] for i in drawn]
            read.report.per_epoch = len(places)
        kept += places
        begin += len(read.pairs)
    return every.select(kept), apart


def check_context_length(
    config: DPOConfig, base: LoadedModel, *splits: Sequence[TokenizedPair]
) -> None:
    """Positions that a model never saw in its training give numbers that mean nothing.

    Raises:
        ConfigError: a row is longer than what the model can place.
    """
    context = context_length(base.config)
    longest = longest_row(*splits)
    if context is not None and longest > context:
        raise ConfigError(
            f"`max_length` is {config.max_length}, but the model places no more than {context} "
            f"tokens and the longest row has {longest}; use --max-length {context}"
        )


def check_held_out_settings(config: DPOConfig, sources: SplitSources) -> None:
    """Settings about held-out pairs that the files leave no room for.

    Raises:
        ConfigError: names the setting.
    """
    if sources.valid and config.valid_fraction is not None:
        raise ConfigError(
            f"`valid_fraction` has no effect beside {sources.valid[0].name}; "
            "name the training file alone"
        )
    if not sources.valid and config.held_out_fraction == 0 and config.eval_steps is not None:
        raise ConfigError("`eval_steps` has no effect with `valid_fraction` 0: none are held out")
