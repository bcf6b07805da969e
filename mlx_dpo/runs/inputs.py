"""What a run starts from: the base, the pairs as tokens, and where both came from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dpo.config import DPOConfig
from mlx_dpo.errors import ConfigError
from mlx_dpo.policy.device import device_kind, number_type
from mlx_dpo.policy.generation import context_length
from mlx_dpo.policy.load import Base, fingerprint, load_base, tokenizer_fingerprint
from mlx_dpo.preferences.pairs import PairSet, digest, hold_out, load_pairs
from mlx_dpo.preferences.report import PairsReport
from mlx_dpo.preferences.sources import Sources, find
from mlx_dpo.preferences.tokens import TokenRules
from mlx_dpo.types import TokenizedPair


@dataclass(frozen=True)
class Inputs:
    """The base and the pairs of a run."""

    base: Base
    train: Sequence[TokenizedPair]
    valid: Sequence[TokenizedPair]
    reports: Sequence[PairsReport]  # one per file
    passed_over: Path | None = None  # held-out pairs of the folder that typed ones replace

    def provenance(self, config: DPOConfig) -> dict[str, Any]:
        """What the results depend on beside the settings, by content."""
        return {
            "model": fingerprint(self.base.path),
            "tokenizer": tokenizer_fingerprint(self.base.path),
            "held": held(self.base),
            "train": digest(self.train),
            "valid": digest(self.valid),
        }


def held(base: Base) -> str:
    """The device and the number type in which the base is computed with."""
    return f"{device_kind()} {number_type(base.model)}"


def token_rules(config: DPOConfig, base: Base) -> TokenRules:
    """The settings that decide how text becomes tokens."""
    return TokenRules(
        chat_template=config.chat_template,
        thinking=config.thinking,
        max_length=config.max_length,
        truncation=config.truncation,
        vocab_size=base.vocab_size,
    )


def read_base(config: DPOConfig, load: Callable[..., Base] = load_base) -> Base:
    """The frozen base that the settings name; `load` is `policy.outline` where shapes do."""
    return load(
        config.model,
        revision=config.revision,
        bits=config.bits,
        group_size=config.group_size,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )


def read_pairs(config: DPOConfig, base: Base, path: Path) -> PairSet:
    """One file of pairs, as the settings say."""
    return load_pairs(path, base.tokenizer, token_rules(config, base), bad_pairs=config.bad_pairs)


def read_inputs(config: DPOConfig, *, read: Callable[[DPOConfig], Base] = read_base) -> Inputs:
    """Find the pairs, load the base, tokenise; files are found before anything large is loaded.

    `read` says how the base is loaded.

    Raises:
        ConfigError: a setting has no effect, or rows are longer than what the model can place.
    """
    sources = find(config.pairs, config.valid)
    refuse_without_effect(config, sources)
    base = read(config)
    train = read_pairs(config, base, sources.train)
    if sources.valid is not None:
        valid = read_pairs(config, base, sources.valid)
        reports = [train.report, valid.report]
        inputs = Inputs(base, train.pairs, valid.pairs, reports, sources.passed_over)
    else:
        kept, held_out = hold_out(train.pairs, share=config.held_out_share, seed=config.seed)
        inputs = Inputs(base, kept, held_out, [train.report])
    refuse_beyond_context(config, base, [*inputs.train, *inputs.valid])
    return inputs


def refuse_beyond_context(config: DPOConfig, base: Base, pairs: Sequence[TokenizedPair]) -> None:
    """Positions that a model never saw in its training give numbers that mean nothing.

    Raises:
        ConfigError: a row is longer than what the model can place.
    """
    context = context_length(base.config)
    longest = max((len(pair) for pair in pairs), default=0)
    if context is not None and longest > context:
        raise ConfigError(
            f"`max_length` is {config.max_length}, but the model places no more than {context} "
            f"tokens and the longest row has {longest}; use --max-length {context}"
        )


def refuse_without_effect(config: DPOConfig, sources: Sources) -> None:
    """Settings about held-out pairs that the files leave no room for.

    Raises:
        ConfigError: names the setting.
    """
    if sources.valid is not None and config.valid_fraction is not None:
        raise ConfigError(
            f"`valid_fraction` has no effect beside {sources.valid}; name the training file alone"
        )
    if sources.valid is None and config.held_out_share == 0 and config.eval_steps is not None:
        raise ConfigError("`eval_steps` has no effect with `valid_fraction` 0: none are held out")
