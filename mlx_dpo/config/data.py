"""Settings of the dataset and its tokenization."""

from dataclasses import dataclass

from mlx_dpo.config.setting import NoEffect, setting
from mlx_dpo.errors import ConfigError
from mlx_dpo.schemas import SCHEMA_NAMES, SCHEMAS

DATA = "Pairs"
DEFAULT_MAX_LENGTH = 1024  # tokens


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Settings of the dataset and its tokenization."""

    pairs: tuple[str, ...] = setting(
        (),
        "Preference pairs: files, folders, Hub datasets (`org/name[:config][@revision]`), or "
        "`-` for standard input.",
        str,
        DATA,
        is_path=True,
        is_list=True,
        metavar="PAIRS",
        required=True,
    )
    mix: tuple[float, ...] = setting(
        (),
        "Weight of each source, in order: 2 uses its pairs twice per epoch, 0.5 uses half of "
        "them. Repeat it for each source.",
        float,
        DATA,
        is_list=True,
        minimum=0,
        exclusive_minimum=True,
        maximum=1000,
        metavar="WEIGHT",
        default_text="1 each",
    )
    split: str | None = setting(
        None,
        "Split of folders and Hub datasets to train on.",
        str,
        DATA,
        metavar="SPLIT",
        default_text="train",
    )
    valid: str | None = setting(
        None,
        "Held-out pairs: a file, or the held-out split of a folder or Hub dataset.",
        str,
        DATA,
        is_path=True,
        metavar="FILE|SPLIT",
        default_text="part of the pairs",
    )
    valid_fraction: float | None = setting(
        None,
        "Fraction of the pairs to hold out if there are no other held-out pairs.",
        float,
        DATA,
        minimum=0,
        maximum=1,
        exclusive_maximum=True,
        metavar="FRACTION",
        default_text="0.05",
    )
    schema: str | None = setting(
        None,
        "Dataset schema of the rows.",
        str,
        DATA,
        choices=SCHEMA_NAMES,
        metavar="SCHEMA",
        default_text="detected",
    )
    column: tuple[str, ...] = setting(
        (),
        "Column of a field, as `prompt=question`; dots reach into objects "
        "(`prompt=input.question`). Repeat it for several fields.",
        str,
        DATA,
        is_list=True,
        metavar="FIELD=COLUMN",
    )
    ranked: str | None = setting(
        None,
        "Pairs to make from a list of rated completions.",
        str,
        DATA,
        choices=("best_worst", "all", "adjacent"),
        metavar="PAIRING",
        default_text="best_worst; all for losses of lists",
    )
    pair_labelled: bool = setting(
        False,
        "Make pairs from completions labelled good and bad for the same prompt.",
        bool,
        DATA,
    )
    assistant_turns: str | None = setting(
        None,
        "Turns of the assistant that instruction tuning scores in a conversation: all of them, or "
        "the last one.",
        str,
        DATA,
        choices=("all", "last"),
        metavar="TURNS",
        default_text="all",
    )
    system: str | None = setting(
        None,
        "System message for conversations that have none.",
        str,
        DATA,
        metavar="MESSAGE",
    )
    margin_column: str | None = setting(
        None,
        "Column with the target reward margin of each pair (ODPO).",
        str,
        DATA,
        metavar="COLUMN",
    )
    weight_column: str | None = setting(
        None,
        "Column with the weight of each row in the loss; 1 is neutral.",
        str,
        DATA,
        metavar="COLUMN",
    )
    chat_template: str = setting(
        "auto",
        "`chat`: a plain prompt becomes a user turn and its completion an assistant turn, "
        "HH-RLHF dialogues become turns; `text`: texts stay as they are, and special tokens "
        "in them take effect; `auto`: `chat` if the model has a template, except for other "
        "whole texts.",
        str,
        DATA,
        choices=("auto", "chat", "text"),
        metavar="FORMAT",
    )
    thinking: bool | None = setting(
        None,
        "Turn the chat template's thinking mode on or off.",
        bool,
        DATA,
        default_text="off",
    )
    max_length: int | None = setting(
        None,
        "Maximum number of tokens of prompt and completion together.",
        int,
        DATA,
        minimum=2,
        default_text=f"{DEFAULT_MAX_LENGTH}, or the model's context length if that is less",
        essential=True,
    )
    truncation: str = setting(
        "keep_start",
        "How to shorten long rows: cut the completion's end, cut the prompt's start, or drop "
        "the pair.",
        str,
        DATA,
        choices=("keep_start", "keep_end", "drop"),
    )
    bad_pairs: str = setting(
        "error",
        "What to do with unusable pairs, such as an empty completion or equal completions.",
        str,
        DATA,
        choices=("error", "drop"),
    )

    @property
    def length_limit(self) -> int:
        """Maximum number of tokens of prompt + completion, as far as the model is not known."""
        return DEFAULT_MAX_LENGTH if self.max_length is None else self.max_length

    @property
    def columns(self) -> dict[str, str]:
        """Setting `column` as a dictionary from the field's name to the name of its column.

        Raises:
            ConfigError: an item is not NAME=COLUMN, or a name appears twice.
        """
        columns: dict[str, str] = {}
        for text in self.column:
            name, equals, column = text.partition("=")
            if not (name and equals and column) or name in columns:
                raise ConfigError(f"`column` must be NAME=COLUMN, each name once, got {text!r}")
            columns[name] = column
        return columns


DATA_NO_EFFECT: tuple[NoEffect[PairSettings], ...] = (
    NoEffect(("valid_fraction",), lambda s: s.valid is not None, "together with `valid`"),
    NoEffect(
        ("column",),
        lambda s: any(name == column for name, column in s.columns.items()),
        "if both names are the same",
    ),
    NoEffect(
        ("mix",),
        lambda s: set(s.mix) == {1.0},
        "with weights of 1: every pair is used once",
    ),
    NoEffect(
        ("system",),
        lambda s: s.chat_template == "text" or not (s.system or "").strip(),
        "if it is empty or `chat_template` is text",
    ),
)


def check_pair_settings(
    settings: PairSettings, *, labelled: bool, supervised: bool = False
) -> None:
    """Raise `ConfigError` for data settings that contradict each other.

    Args:
        settings: the settings of a run.
        labelled: whether the loss takes single completions with a label, good or bad (KTO),
            instead of preference pairs.
        supervised: whether the run is instruction tuning, which takes one answer of each row.
    """
    if settings.mix and settings.pairs and len(settings.mix) != len(settings.pairs):
        raise ConfigError(
            f"`mix` has {len(settings.mix)} weights for {len(settings.pairs)} sources"
        )
    if settings.pair_labelled:
        unfit = {
            "a `loss_type` that takes labels itself": labelled,
            "loss_type `sft` alone, which takes one answer of each row": supervised,
            "`margin_column`": settings.margin_column is not None,
            "`weight_column`": settings.weight_column is not None,
        }
        for reason, is_unfit in unfit.items():
            if is_unfit:
                raise ConfigError(f"`pair_labelled` cannot go with {reason}")
    elif settings.schema == "labelled" and not labelled:
        raise ConfigError("`schema` labelled needs --loss-type kto, or --pair-labelled")
    if supervised and settings.ranked not in (None, "best_worst"):
        raise ConfigError(
            f"`ranked` {settings.ranked} cannot go with loss_type `sft` alone, which takes the "
            "best answer of each row; leave it out"
        )
    if not supervised:
        _check_not_supervised(settings)


def _check_not_supervised(settings: PairSettings) -> None:
    """Raise `ConfigError` for settings of instruction tuning in a run on preferences."""
    if settings.schema is not None and settings.schema not in SCHEMAS:
        raise ConfigError(
            f"`schema` {settings.schema} has rows of one answer, and needs --loss-type sft"
        )
    if settings.assistant_turns is not None:
        raise ConfigError(
            "`assistant_turns` acts on instruction tuning only, which is --loss-type sft alone; "
            "leave it out"
        )
