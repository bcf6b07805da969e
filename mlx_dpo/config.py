"""Every setting of a training run, declared once: default, help, bounds, flag and file key.

The command line, the YAML file, `run.json` and the table in the README are made from here.
Names are TRL's where it has the thing, else mlx-lm's.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mlx_dpo.errors import ConfigError
from mlx_dpo.options import Option, coerce, refuse_unknown

BITS = (2, 3, 4, 5, 6, 8)
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
DTYPES = ("float32", "bfloat16", "float16")


def option(default: Any, help: str, kind: type, section: str, **more: Any) -> Any:
    """A dataclass field that carries its `Option`."""
    spec = Option(help=help, kind=kind, section=section, optional=default is None, **more)
    return field(default=default, metadata={"option": spec})


MODEL, DATA, LOSS = "Model", "Pairs", "Loss"
LORA, TRAINING, RUN = "LoRA", "Training", "Run"


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """A training run: what is trained, on which pairs, how, and where it goes."""

    model: str = option("", "Model to train: a folder or a Hub id.", str, MODEL, path=True)
    pairs: str = option(
        "", "Preference pairs: a JSONL or JSON file or a folder.", str, DATA, path=True
    )
    output: str = option("", "Run folder to write.", str, RUN, changes_result=False, path=True)

    revision: str | None = option(None, "Hub revision of the model.", str, MODEL)
    bits: int | None = option(
        None, "Quantise the model to this many bits when loading it.", int, MODEL, choices=BITS
    )
    group_size: int | None = option(
        None, "Weights that share a scale, with --bits. [default: 64]", int, MODEL, low=16
    )
    dtype: str | None = option(
        None,
        "Number type of activations. [default: the model's own; float32 on the CPU]",
        str,
        MODEL,
        choices=DTYPES,
    )
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model.", bool, MODEL
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

    beta: float = option(
        0.1, "Pull back to the reference; higher stays closer.", float, LOSS, low=0, open_low=True
    )
    label_smoothing: float = option(
        0.0,
        "Share of labels taken to be flipped (conservative DPO).",
        float,
        LOSS,
        low=0,
        high=0.5,
        open_high=True,
    )

    lora_r: int = option(16, "Rank of the adapters.", int, LORA, low=1)
    lora_alpha: float = option(
        32.0, "Adapters are scaled by alpha / rank.", float, LORA, low=0, open_low=True
    )
    lora_dropout: float = option(
        0.0, "Dropout on the adapters' input.", float, LORA, low=0, high=1, open_high=True
    )
    lora_target_modules: tuple[str, ...] = option(
        (), "Names of the linear layers to adapt; repeat it. [default: all]", str, LORA, many=True
    )
    num_layers: int | None = option(
        None, "Adapt only the last so many layers. [default: all]", int, LORA, low=1
    )

    learning_rate: float = option(
        5e-6, "Peak learning rate.", float, TRAINING, low=0, open_low=True
    )
    lr_scheduler_type: str = option(
        "cosine",
        "Learning rate after the warm-up; `constant` has none.",
        str,
        TRAINING,
        choices=("cosine", "linear", "constant", "constant_with_warmup"),
    )
    warmup_ratio: float | None = option(
        None,
        "Share of the steps in which the learning rate rises. [default: 0.1]",
        float,
        TRAINING,
        low=0,
        high=1,
    )
    epochs: int | None = option(None, "Passes over the pairs. [default: 1]", int, TRAINING, low=1)
    max_steps: int | None = option(
        None, "Optimizer steps, in place of epochs.", int, TRAINING, low=1
    )
    batch_size: int = option(16, "Pairs per optimizer step.", int, TRAINING, low=1)
    micro_batch_size: int | None = option(
        None, "Pairs per forward pass; for memory, not the result. [default: 2]",
        int, TRAINING, low=1,
    )  # fmt: skip
    scorer: str = option(
        "auto", "`shared`: each prompt once; `plain`: whole rows; `auto`: shared where exact.",
        str, TRAINING, choices=("auto", "plain", "shared"),
    )  # fmt: skip
    recompute: bool = option(
        False, "Compute each block again for its gradient: less memory, more time.", bool, TRAINING
    )
    weight_decay: float = option(0.0, "AdamW's weight decay.", float, TRAINING, low=0)
    max_grad_norm: float = option(
        1.0, "Clip the global gradient norm to this; 0 leaves it.", float, TRAINING, low=0
    )
    seed: int = option(
        42, "Seed of order, adapters, dropout and held-out share.", int, TRAINING, low=0
    )

    eval_steps: int | None = option(
        None, "Steps between evaluations on held-out pairs. [default: at the end]",
        int, RUN, low=1, changes_result=False,
    )  # fmt: skip
    save_steps: int = option(
        50, "Steps between checkpoints.", int, RUN, low=1, changes_result=False
    )
    save_total_limit: int = option(2, "Checkpoints to keep.", int, RUN, low=1, changes_result=False)
    logging_steps: int = option(
        1, "Steps between lines, where there is no live bar.", int, RUN, low=1, changes_result=False
    )
    caffeinate: bool = option(
        True, "Keep a Mac awake while it trains.", bool, RUN, changes_result=False
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value = coerce(f.name, getattr(self, f.name), f.metadata["option"])
            object.__setattr__(self, f.name, value)
        self._refuse_settings_without_effect()

    def _refuse_settings_without_effect(self) -> None:
        if self.group_size is not None and self.bits is None:
            raise ConfigError("`group_size` has no effect without `bits`")
        if self.valid_fraction is not None and self.valid is not None:
            raise ConfigError("`valid_fraction` has no effect beside `valid`")
        if self.warmup_ratio is not None and self.lr_scheduler_type == "constant":
            raise ConfigError(
                "`warmup_ratio` has no effect with lr_scheduler_type `constant`; "
                "use `constant_with_warmup`"
            )
        if self.epochs is not None and self.max_steps is not None:
            raise ConfigError("`epochs` has no effect beside `max_steps`")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ConfigError(
                f"`micro_batch_size` {self.micro_batch_size} is above `batch_size` "
                f"{self.batch_size}"
            )

    @property
    def pairs_per_pass(self) -> int:
        """Pairs that one forward pass holds."""
        return min(self.micro_batch_size or 2, self.batch_size)

    @property
    def warmup(self) -> float:
        """Share of the steps in which the learning rate rises."""
        if self.lr_scheduler_type == "constant":
            return 0.0
        return 0.1 if self.warmup_ratio is None else self.warmup_ratio

    @property
    def lora_scale(self) -> float:
        """What the adapters' product is multiplied by, as PEFT and TRL define it."""
        return self.lora_alpha / self.lora_r

    @property
    def held_out_share(self) -> float:
        """Share of the training pairs to hold out."""
        if self.valid is not None:
            return 0.0
        return 0.05 if self.valid_fraction is None else self.valid_fraction

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DPOConfig":
        """Build from parsed keys; ConfigError names one that is unknown or has an unfit value."""
        known = [f.name for f in fields(cls)]
        for name in values:
            refuse_unknown(str(name), known, "setting")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `run.json`; `from_dict` takes them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def differing(self, other: "DPOConfig") -> str | None:
        """The first setting that would change the result and differs from `other`."""
        for f in fields(self):
            same = getattr(self, f.name) == getattr(other, f.name)
            if f.metadata["option"].changes_result and not same:
                return f.name
        return None


def options() -> dict[str, tuple[Any, Option]]:
    """Every setting by name, with its default and what it is."""
    return {f.name: (f.default, f.metadata["option"]) for f in fields(DPOConfig)}
