"""Settings of the model, of its adapters and of the reference."""

import math
from dataclasses import dataclass

from mlx_dpo.config.setting import NoEffect, setting
from mlx_dpo.errors import ConfigError

MODEL = "Model"
BITS = (2, 3, 4, 5, 6, 8)
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Settings of the base model and of loading it."""

    model: str = setting("", "Model to train: a folder or a Hub id.", str, MODEL, is_path=True)
    revision: str | None = setting(None, "Hub revision of the model.", str, MODEL)
    bits: int | None = setting(
        None, "Quantize the model to this many bits when loading it.", int, MODEL, choices=BITS
    )
    group_size: int | None = setting(
        None, "Quantization group size, with --bits. [default: 64]", int, MODEL, minimum=16
    )
    dtype: str | None = setting(
        None,
        "Compute dtype. [default: the model's own; float32 on the CPU]",
        str,
        MODEL,
        choices=DTYPES,
    )
    trust_remote_code: bool = setting(
        False, "Run Python code that comes with the model.", bool, MODEL
    )


MODEL_NO_EFFECT: tuple[NoEffect[ModelSettings], ...] = (
    NoEffect(("group_size",), lambda s: s.bits is None, "without `bits`"),
)

LORA = "LoRA"


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Settings of the trained weights: LoRA or DoRA adapters, or the model's own weights."""

    fine_tune_type: str | None = setting(
        None,
        "`lora`; `dora`: also a magnitude per output (arXiv:2402.09353); `full`: all weights "
        "of the layers, for a model that is not quantized. [default: lora]",
        str,
        LORA,
        choices=("lora", "dora", "full"),
    )
    lora_r: int | None = setting(
        None, "Rank of the adapters. [default: 16]", int, LORA, minimum=1, maximum=65_536
    )
    lora_alpha: float | None = setting(
        None, "LoRA alpha; adapters are scaled by alpha / rank. [default: 32]", float, LORA,
        minimum=0,
        exclusive_minimum=True,
    )  # fmt: skip
    use_rslora: bool = setting(
        False, "Scale by alpha / sqrt(rank) instead (arXiv:2312.03732).", bool, LORA
    )
    lora_dropout: float | None = setting(
        None, "Dropout on the adapters' input. [default: 0]", float, LORA, minimum=0, maximum=1,
        exclusive_maximum=True,
    )  # fmt: skip
    lora_target_modules: tuple[str, ...] = setting(
        (),
        "Names of the modules to adapt; repeat it. Experts, `embed_tokens` and `lm_head` only if "
        "named. With `full`, modules to train. [default: all linear modules of the layers]",
        str,
        LORA,
        is_list=True,
    )
    num_layers: int | None = setting(
        None, "Train only the last N layers. [default: all]", int, LORA, minimum=1
    )
    start_adapter: str | None = setting(
        None,
        "Continue training the adapter in this folder (of a run, mlx-lm or PEFT). It decides what "
        "is trained, and the model with this adapter is the reference.",
        str,
        LORA,
        is_path=True,
    )

    @property
    def rank(self) -> int:
        """Rank of new adapters, 16 by default."""
        return 16 if self.lora_r is None else self.lora_r

    @property
    def alpha(self) -> float:
        """LoRA alpha of new adapters, 32 by default."""
        return 32.0 if self.lora_alpha is None else self.lora_alpha

    @property
    def dropout(self) -> float:
        """Dropout probability on the adapters' input, 0 by default."""
        return 0.0 if self.lora_dropout is None else self.lora_dropout

    @property
    def lora_scale(self) -> float:
        """Factor by which the adapters' output is multiplied, as PEFT and TRL define it."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


LORA_NO_EFFECT: tuple[NoEffect[LoRASettings], ...] = (
    NoEffect(
        (
            "lora_r",
            "lora_alpha",
            "use_rslora",
            "fine_tune_type",
            "lora_target_modules",
            "num_layers",
        ),
        lambda s: s.start_adapter is not None,
        "together with `start_adapter`, whose own settings apply",
    ),
    NoEffect(
        ("lora_r", "lora_alpha", "use_rslora", "lora_dropout"),
        lambda s: s.fine_tune_type == "full",
        "with fine_tune_type `full`, which has no adapters",
    ),
)

REFERENCE = "Reference"


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """Settings of the reference model."""

    reference_model: str | None = setting(
        None,
        "Separate reference model with the same vocabulary; it scores the pairs once and is freed "
        "before training. [default: the initial model]",
        str,
        REFERENCE,
    )
    sync_ref_model: bool = setting(
        False,
        "Update the reference towards the policy (TR-DPO, arXiv:2404.09656); one more forward pass "
        "per step.",
        bool,
        REFERENCE,
    )
    ref_model_mixup_alpha: float | None = setting(
        None,
        "Weight of the policy in a reference update; 1 replaces the reference. [default: 0.6]",
        float,
        REFERENCE,
        minimum=0,
        maximum=1,
        exclusive_minimum=True,
    )
    ref_model_sync_steps: int | None = setting(
        None, "Steps between reference updates. [default: 512]", int, REFERENCE, minimum=1
    )

    @property
    def mixup_alpha(self) -> float:
        """Weight of the policy when it is mixed into the reference (TR-DPO), 0.6 by default."""
        return 0.6 if self.ref_model_mixup_alpha is None else self.ref_model_mixup_alpha

    @property
    def sync_steps(self) -> int:
        """Optimizer steps between updates of the reference (TR-DPO), 512 by default."""
        return 512 if self.ref_model_sync_steps is None else self.ref_model_sync_steps


REFERENCE_NO_EFFECT: tuple[NoEffect[ReferenceSettings], ...] = (
    NoEffect(
        ("ref_model_mixup_alpha", "ref_model_sync_steps"),
        lambda s: not s.sync_ref_model,
        "without `sync_ref_model`",
    ),
)


def check_reference_settings(settings: ReferenceSettings) -> None:
    """Raise `ConfigError` if `sync_ref_model` is set together with `reference_model`."""
    if settings.sync_ref_model and settings.reference_model is not None:
        raise ConfigError(
            "`sync_ref_model` updates the initial model towards the policy, and "
            "`reference_model` names another model; leave out one of them"
        )
