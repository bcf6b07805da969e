"""Which pairs it is trained on, and how they become tokens."""

from dataclasses import dataclass

from mlx_dpo.options import option

DATA = "Pairs"


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Which pairs it is trained on, and how they become tokens."""

    pairs: str = option(
        "", "Preference pairs: a JSONL or JSON file or a folder.", str, DATA, path=True
    )
    valid: str | None = option(None, "Held-out pairs: a file.", str, DATA, path=True)
    valid_fraction: float | None = option(
        None,
        "Share of the pairs to hold out where none are given. [default: 0.05]",
        float,
        DATA,
        low=0,
        high=1,
        open_high=True,
    )
    chat_template: str = option(
        "auto",
        "`chat`: strings become one user and one assistant turn; `text`: they stay plain text; "
        "`auto`: chat where the model has a template and rows have a prompt field.",
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
        "What gives way in longer rows: completion's end, prompt's start (with BOS), or the pair.",
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
