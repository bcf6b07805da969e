"""Load the inputs of a run: the base model and the tokenized pairs."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, cast

from mlx_dpo.config.data import DEFAULT_MAX_LENGTH
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.chat_templates.template_date import get_day, set_day, today
from mlx_dpo.data.columns import RANKINGS, column, longest_row, pairs_digest
from mlx_dpo.data.dataset import PairDataset, concatenate, with_mismatched_completions
from mlx_dpo.data.hf_datasets import InMemoryRows
from mlx_dpo.data.load import check_settings_used, held_out_indices, mix_indices
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import Source, SplitSources, find_sources
from mlx_dpo.data.tokenization.cache import TokenCache, load_source
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.parallel import TokenizerWorkers
from mlx_dpo.data.tokenization.tokenize_rows import LoadedPairs, PairRules
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.generation.context import check_max_length, context_length
from mlx_dpo.losses.listwise import LARGEST_SCORE
from mlx_dpo.models.device import device_kind, main_dtype
from mlx_dpo.models.files import code_fingerprint, model_fingerprint, tokenizer_fingerprint
from mlx_dpo.models.load import LoadedModel, load_model, load_tokenizer
from mlx_dpo.paths import token_cache_folder
from mlx_dpo.phases import phase
from mlx_dpo.schemas.schema import Ranking, RowRules
from mlx_dpo.types import TokenizedPair

MAX_PROCESSES = 8  # each loads a tokenizer and its libraries


@dataclass(frozen=True)
class Inputs:
    """The base model and the tokenized pairs of a run, and reports on reading the pairs."""

    base: LoadedModel
    train: Sequence[TokenizedPair]
    valid: Sequence[TokenizedPair]
    reports: Sequence[PairsReport]  # one per source
    unused_splits: Sequence[str] = ()  # held-out splits that `valid` replaces
    held_out_share: float = 0.0  # share to hold out of the training sources; 0: valid has its own

    @property
    def splits(self) -> dict[str, Sequence[TokenizedPair]]:
        """The training and the held-out pairs, by name."""
        return {"train": self.train, "valid": self.valid}

    def provenance(self, config: DPOConfig) -> dict[str, Any]:
        """Return what determines the results besides the settings: model, tokenizer, pairs, device.

        Device and dtype are given by name, everything else by its digest.
        """
        return {
            "model": model_fingerprint(self.base.path),
            "tokenizer": tokenizer_fingerprint(self.base.path),
            "device_and_dtype": device_and_dtype(self.base),
            "train": digest_of_split(config, self.train),
            "valid": digest_of_split(config, self.valid),
        }


def digest_of_split(config: DPOConfig, pairs: Sequence[TokenizedPair]) -> str:
    """Return a digest of all pairs of a split; lists and scores are part of it if they matter."""
    return pairs_digest(pairs, rankings=config.listwise)


def device_and_dtype(base: LoadedModel) -> str:
    """Return the device and the dtype with which the model computes, such as `cpu float32`."""
    return f"{device_kind()} {main_dtype(base.model)}"


def token_rules(config: DPOConfig, base: LoadedModel) -> TokenRules:
    """Return the settings that decide how texts are tokenized."""
    return TokenRules(
        chat_template=config.chat_template,
        thinking=config.thinking,
        system=config.system,
        max_length=config.length_limit,
        truncation=config.truncation,
        vocab_size=base.vocab_size,
        context=context_length(base.config),
    )


def load_configured_base(
    config: DPOConfig, load: Callable[..., LoadedModel] = load_model
) -> LoadedModel:
    """Load the base model that the settings name.

    Args:
        load: function that loads the model, with its weights (default) or only their shapes.
    """
    return load(
        config.model,
        revision=config.revision,
        bits=config.bits,
        group_size=config.group_size,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )


def load_trainable_base(
    config: DPOConfig, load: Callable[..., LoadedModel] = load_model
) -> LoadedModel:
    """Load the base model as `load_configured_base` does, to train it with these settings.

    Raises:
        ConfigError: `max_length` is beyond the positions that the model has learned.
    """
    base = load_configured_base(config, load)
    if config.max_length is not None:
        check_max_length(config.max_length, base.config)
    return base


def with_max_length(config: DPOConfig, base: LoadedModel) -> DPOConfig:
    """Return the settings with a `max_length`: their own, else at most the model's context."""
    if config.max_length is not None:
        return config
    context = context_length(base.config) or DEFAULT_MAX_LENGTH
    return replace(config, max_length=min(DEFAULT_MAX_LENGTH, context))


def row_rules(config: DPOConfig) -> RowRules:
    """Return the settings that decide how dataset rows are parsed into examples."""
    return RowRules(
        judged=config.labelled,
        supervised=config.supervised,
        assistant_turns=config.assistant_turns or "all",
        pair_labelled=config.pair_labelled,
        margin=config.margin_column,
        weight=config.weight_column,
        schema=config.schema,
        ranked=cast(Ranking | None, config.pairing),
        renamed=config.columns,
    )


@dataclass(frozen=True)
class Datasets:
    """Pairs passed as Python objects instead of named in the settings `pairs` and `valid`."""

    train: InMemoryRows | None = None
    valid: InMemoryRows | None = None

    @classmethod
    def in_memory(
        cls,
        config: DPOConfig,
        train: Iterable[Mapping[str, Any]] | None,
        valid: Iterable[Mapping[str, Any]] | None,
    ) -> "Datasets":
        """Create the datasets from rows that were passed to the trainer as Python objects.

        Raises:
            ConfigError: the settings also name pairs, or a required setting is missing.
            DataError: a dataset is not an iterable of rows.
        """
        for name in ("model", "pairs", "output"):
            if not getattr(config, name) and not (name == "pairs" and train is not None):
                raise ConfigError(f"`{name}` is not set")
        given = (("train_dataset", train, "pairs"), ("eval_dataset", valid, "valid"))
        for name, rows, setting in given:
            if rows is not None and getattr(config, setting):
                raise ConfigError(f"`{setting}` has no effect together with `{name}`")
        return cls(
            *(
                None if rows is None else InMemoryRows.from_iterable(rows, name)
                for name, rows, _ in given
            )
        )

    @property
    def splits(self) -> list[str]:
        """Names of the splits that were passed: `train`, `valid` or both."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]


NO_DATASETS = Datasets()


def load_configured_source(
    config: DPOConfig,
    base: LoadedModel,
    source: Source,
) -> LoadedPairs[PairDataset]:
    """Load and tokenize one source of pairs (file, folder or dataset) with the run's settings."""
    path, code = base.path, config.trust_remote_code
    day = get_day(base.tokenizer)
    load = partial(load_tokenizer_of_day, day, path, base.source, trust_remote_code=code)
    files = tokenizer_fingerprint(path) + (code_fingerprint(path) if code else "")
    local = Path(base.source).expanduser().is_dir()
    name = os.path.basename(os.path.abspath(path)) if local else base.source
    folder = token_cache_folder()
    title = f"Tokenizing {Path(source.name).name if source.files else source.name}"
    with phase(title):
        return load_source(
            source,
            TokenizerWorkers(base.tokenizer, load, count_processes()),
            PairRules(token_rules(config, base), row_rules(config), config.bad_pairs),
            None if folder is None else TokenCache(folder, files, name),
            progress=partial(phase, title, unit="rows"),
        )


def load_tokenizer_of_day(
    day: date | None, path: Path, source: str, *, trust_remote_code: bool
) -> Any:
    """Load a tokenizer whose chat template prints `day`, as in a worker process."""
    tokenizer = load_tokenizer(path, source, trust_remote_code=trust_remote_code)
    set_day(tokenizer, day)
    return tokenizer


def count_processes() -> int:
    """Return the number of processes to use for tokenizing large sources.

    This is the number of CPU cores, but at most MAX_PROCESSES.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MAX_PROCESSES)


def add_kl_completions(
    config: DPOConfig, pairs: Sequence[TokenizedPair]
) -> Sequence[TokenizedPair]:
    """Return unpaired examples with the KL completions that KTO needs; return pairs unchanged.

    KL completions are mismatched completions from which KTO estimates the KL divergence.
    """
    return with_mismatched_completions(pairs, config.length_limit) if config.labelled else pairs


def load_inputs(
    config: DPOConfig,
    *,
    read: Callable[[DPOConfig], LoadedModel] = load_trainable_base,
    datasets: Datasets = NO_DATASETS,
    day: date | None = None,
) -> Inputs:
    """Find the pairs, load the base model and tokenize the pairs.

    Args:
        read: function that loads the base model.
        datasets: pairs passed as Python objects.
        day: day that the chat template prints; None: today.

    Raises:
        ConfigError: a setting has no effect, or an example is longer than the context length.
        DataError: the loss needs ranked lists, and the rows are none.
    """
    pairs, valid = datasets.train or config.pairs, datasets.valid or config.valid
    sources = find_sources(pairs, valid, config.split)
    check_held_out_settings(config, sources)
    check_score_gap(config)
    base = read(config)
    config = with_max_length(config, base)
    set_day(base.tokenizer, day or today())
    train = [load_configured_source(config, base, source) for source in sources.train]
    held_out = [load_configured_source(config, base, source) for source in sources.valid]
    check_lists(config, *(loaded.pairs for loaded in (*train, *held_out)))
    reports = [loaded.report for loaded in (*train, *held_out)]
    check_settings_used(token_rules(config, base), row_rules(config), reports)
    share = 0.0 if held_out else config.held_out_fraction
    splits = _split_pairs(config, train, held_out, share)
    training, valid_pairs = (add_kl_completions(config, pairs) for pairs in splits)
    check_context_length(config, base, training, valid_pairs)
    unused = [source.name for source in sources.unused_valid]
    return Inputs(base, training, valid_pairs, reports, unused, share)


def _split_pairs(
    config: DPOConfig,
    train: Sequence[LoadedPairs[PairDataset]],
    valid: Sequence[LoadedPairs[PairDataset]],
    share: float,
) -> tuple[PairDataset, PairDataset]:
    """Return the training pairs and the held-out pairs.

    Without `valid`, the given share of the training sources is held out. The setting `mix` decides
    how often each source is used in an epoch.
    """
    all_pairs = concatenate([loaded.pairs for loaded in train])
    held_out = held_out_indices(all_pairs, share=share, seed=config.seed)
    training: list[int] = []
    begin = 0
    for number, loaded in enumerate(train):
        indices = [i for i in range(begin, begin + len(loaded.pairs)) if i not in held_out]
        if config.mix:
            loaded.report.weight = weight = config.mix[number]
            drawn = mix_indices(len(indices), weight, seed=(config.seed, number))
            indices = [indices[i] for i in drawn]
            loaded.report.per_epoch = len(indices)
        training += indices
        begin += len(loaded.pairs)
    if valid:
        return all_pairs.select(training), concatenate([loaded.pairs for loaded in valid])
    return all_pairs.select(training), all_pairs.select(sorted(held_out))


def check_context_length(
    config: DPOConfig, base: LoadedModel, *splits: Sequence[TokenizedPair]
) -> None:
    """Raise `ConfigError` if a prompt with its completion exceeds the model's context length."""
    context = context_length(base.config)
    longest = longest_row(*splits)
    if context is not None and longest > context:
        raise ConfigError(
            f"`max_length` is {config.length_limit}, but the model's context length is {context} "
            f"tokens and the longest row has {longest}; use --max-length {context}"
        )


def check_score_gap(config: DPOConfig) -> None:
    """Raise `ConfigError` if the loss needs the gap of the scores and no setting names them."""
    if "rpo_bwd_kl" in config.loss_type and config.margin_column is None:
        raise ConfigError(
            "loss_type `rpo_bwd_kl` needs the gap of the scores; name the column of the scores "
            "with --margin-column, for ranked rows --margin-column score"
        )


def check_lists(config: DPOConfig, *splits: Sequence[TokenizedPair]) -> None:
    """Check that the pairs are those of ranked lists, if the loss needs such lists.

    Raises:
        DataError: there are plain pairs, or scores that the loss cannot take.
    """
    if not config.listwise:
        return
    rankings = [column(pairs, RANKINGS) for pairs in splits if len(pairs)]
    losses = ", ".join(f"`{loss.name}`" for loss in config.losses if loss.listwise)
    if plain := sum(int((values[:, 6] == 0).sum()) for values in rankings):
        raise DataError(
            f"loss_type {losses} needs ranked lists, rows with `completions` and their scores "
            f"(found {plain:,} plain pairs); use --loss-type sigmoid, or other rows"
        )
    largest = max((float(abs(values[:, 3:5]).max()) for values in rankings), default=0.0)
    if "lipo_lambda" in config.loss_type and largest > LARGEST_SCORE:
        raise DataError(
            "loss_type `lipo_lambda` weights pairs by 2 to the power of the scores, which must be "
            f"within ±{LARGEST_SCORE:g} (found {largest:g}); divide the scores, for instance so "
            "that the best possible one is 1"
        )


def check_held_out_settings(config: DPOConfig, sources: SplitSources) -> None:
    """Raise `ConfigError` if a setting for held-out pairs has no effect."""
    if sources.valid and config.valid_fraction is not None:
        raise ConfigError(
            f"`valid_fraction` has no effect together with {sources.valid[0].name}; "
            "name the training file alone"
        )
    if not sources.valid and config.held_out_fraction == 0 and config.eval_steps is not None:
        raise ConfigError("`eval_steps` has no effect with `valid_fraction` 0: none are held out")
