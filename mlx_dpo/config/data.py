"""Which pairs it is trained on, and how they become tokens."""

from dataclasses import dataclass

from mlx_dpo.config.option import option
from mlx_dpo.errors import ConfigError
from mlx_dpo.schemas import SCHEMAS

DATA = "Pairs"


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Which pairs it is trained on, and how they become tokens."""

    pairs: tuple[str, ...] = option(
        (), "Preference pairs: files, folders, Hub datasets (`org/name[:config][@revision]`), `-`.",
        str, DATA, path=True, many=True,
    )  # fmt: skip
    mix: tuple[float, ...] = option(
        (), "How often an epoch uses the pairs of each source, in their order; 0.5: half of them.",
        float, DATA, many=True, low=0, open_low=True,
    )  # fmt: skip
    split: str | None = option(
        None, "Split of folders and Hub datasets to train on. [default: train]", str, DATA
    )
    valid: str | None = option(
        None, "Held-out pairs: a file, or the held-out split of a folder or Hub dataset.",
        str, DATA, path=True,
    )  # fmt: skip
    valid_fraction: float | None = option(
        None,
        "Share of the pairs to hold out where none are given. [default: 0.05]",
        float,
        DATA,
        low=0,
        high=1,
        open_high=True,
    )
    schema: str | None = option(
        None, "Read rows as this kind. [default: by their shape]", str, DATA, choices=tuple(SCHEMAS)
    )
    column: tuple[str, ...] = option(
        (), "NAME=COLUMN: where a field is; dots reach into objects (`prompt=input.question`).",
        str, DATA, many=True,
    )  # fmt: skip
    ranked: str | None = option(
        None, "Which pairs a list of rated completions makes. [default: best_worst]",
        str, DATA, choices=("best_worst", "all", "adjacent"),
    )  # fmt: skip
    pair_labelled: bool = option(
        False, "Pair good with bad labelled answers to the same prompt.", bool, DATA
    )
    system: str | None = option(None, "A system turn for conversations that have none.", str, DATA)
    margin_column: str | None = option(
        None, "Field that says by how much chosen is better; its reward is to lead by that much.",
        str, DATA,
    )  # fmt: skip
    weight_column: str | None = option(
        None, "Field that says how much a row counts; 1 is as without.", str, DATA
    )
    chat_template: str = option(
        "auto",
        "`chat`: strings become a user and an assistant turn, dialogues with marks their turns; "
        "`text`: they stay text, and special tokens in it act; `auto`: chat where the model has a "
        "template, but for other whole texts.",
        str,
        DATA,
        choices=("auto", "chat", "text"),
    )
    thinking: bool | None = option(
        None, "Turn a template's thinking mode on or off. [default: off]", bool, DATA
    )
    max_length: int = option(1024, "Longest prompt + completion, in tokens.", int, DATA, low=2)
    truncation: str = option(
        "keep_start",
        "What gives way in longer rows: completion's end, prompt's first turns, or the pair.",
        str,
        DATA,
        choices=("keep_start", "keep_end", "drop"),
    )
    bad_pairs: str = option(
        "error",
        "What to do with an empty completion, chosen equal to rejected and the like.",
        str,
        DATA,
        choices=("error", "drop"),
    )

    @property
    def columns(self) -> dict[str, str]:
        """The names that fields are read by, and the columns that hold them.

        Raises:
            ConfigError: one is not written NAME=COLUMN, or a name stands there twice.
        """
        found: dict[str, str] = {}
        for text in self.column:
            name, equals, column = text.partition("=")
            if not (name and equals and column) or name in found:
                raise ConfigError(f"`column` must be NAME=COLUMN, each name once, got {text!r}")
            found[name] = column
        return found

    def refuse_idle_pair_settings(self, *, labelled: bool) -> None:
        """Settings of rows that others leave nothing to do; `labelled` if the loss wants labels.

        Raises:
            ConfigError: names the setting.
        """
        if any(name == column for name, column in self.columns.items()):
            raise ConfigError("`column` has no effect where both names are the same")
        if self.mix and self.pairs and len(self.mix) != len(self.pairs):
            raise ConfigError(f"`mix` has {len(self.mix)} weights for {len(self.pairs)} sources")
        if self.mix and set(self.mix) == {1.0}:
            raise ConfigError("`mix` has no effect with weights of 1: every pair is used once")
        if self.system is not None and (self.chat_template == "text" or not self.system.strip()):
            raise ConfigError("`system` has no effect if it is empty or `chat_template` is text")
        if self.pair_labelled:
            idle = {"margin_column": self.margin_column, "weight_column": self.weight_column}
            named = [name for name, value in idle.items() if value is not None]
            if labelled or named:
                what = f"`{named[0]}`" if named else "a `loss_type` that takes labels itself"
                raise ConfigError(f"`pair_labelled` cannot go with {what}")
        elif self.schema == "labelled" and not labelled:
            raise ConfigError("`schema` labelled needs --loss-type kto, or --pair-labelled")
