"""Settings of the model, of its adapters and of the reference."""

import math
from dataclasses import dataclass

from mlx_dpo.config.setting import NoEffect, setting
from mlx_dpo.errors import ConfigError

MODEL = "Model"
BITS = (2, 3, 4, 5, 6, 8)
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
DTYPES = ("float32", "bfloat16", "float16")
FUSE_TARGETS = ("mlx", "hf", "lmstudio", "ollama")
GGUF_TYPES = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")  # of llama-quantize
DEFAULT_GGUF_TYPE = "q8_0"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Settings of the base model and of loading it."""

    model: str = setting(
        "",
        "Model to train: a folder or a Hub id.",
        str,
        MODEL,
        is_path=True,
        metavar="MODEL",
        essential=True,
        required=True,
    )
    revision: str | None = setting(
        None,
        "Hub revision of the model: a branch, tag or commit.",
        str,
        MODEL,
        metavar="REVISION",
        default_text="main",
    )
    bits: int | None = setting(
        None,
        "Quantize the model to this many bits when it is loaded.",
        int,
        MODEL,
        choices=BITS,
        metavar="N",
        default_text="as it is",
    )
    group_size: int | None = setting(
        None,
        "Weights that share a quantization scale, with `bits`: 32, 64 or 128.",
        int,
        MODEL,
        minimum=16,
        default_text="64",
    )
    dtype: str | None = setting(
        None,
        "Compute dtype.",
        str,
        MODEL,
        choices=DTYPES,
        default_text="the model's own; float32 on the CPU",
    )
    trust_remote_code: bool = setting(
        False,
        "Run Python code that comes with the model.",
        bool,
        MODEL,
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
        "`lora`: LoRA adapters; `dora`: LoRA with a trained magnitude per output "
        "(arXiv:2402.09353); `full`: all weights of the layers, for a model that is not "
        "quantized.",
        str,
        LORA,
        choices=("lora", "dora", "full"),
        metavar="TYPE",
        default_text="lora",
    )
    lora_r: int | None = setting(
        None,
        "Rank of the adapters.",
        int,
        LORA,
        minimum=1,
        maximum=65_536,
        default_text="16",
        essential=True,
    )
    lora_alpha: float | None = setting(
        None,
        "LoRA alpha; the adapters' output is scaled by alpha / rank.",
        float,
        LORA,
        minimum=0,
        exclusive_minimum=True,
        default_text="32",
    )
    use_rslora: bool = setting(
        False,
        "Scale the adapters' output by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732).",
        bool,
        LORA,
    )
    lora_dropout: float | None = setting(
        None,
        "Dropout on the adapters' input.",
        float,
        LORA,
        minimum=0,
        maximum=1,
        exclusive_maximum=True,
        metavar="FRACTION",
        default_text="0",
    )
    lora_target_modules: tuple[str, ...] = setting(
        (),
        "Modules to adapt, or to train with `full`; repeat it for several. Experts, "
        "`embed_tokens` and `lm_head` are adapted only if named.",
        str,
        LORA,
        is_list=True,
        metavar="MODULE",
        default_text="all linear modules of the layers",
    )
    num_layers: int | None = setting(
        None,
        "Train only the last N layers.",
        int,
        LORA,
        minimum=1,
        default_text="all",
    )
    start_adapter: str | None = setting(
        None,
        "Continue training the adapter in this folder (of a run, mlx-lm or PEFT). Its rank "
        "and modules are used, and the model with this adapter is the reference.",
        str,
        LORA,
        is_path=True,
        metavar="FOLDER",
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
        "Separate reference model with the same vocabulary; it scores the pairs once and is "
        "freed before training.",
        str,
        REFERENCE,
        metavar="MODEL",
        default_text="the initial model",
    )
    sync_ref_model: bool = setting(
        False,
        "Update the reference towards the policy during training (TR-DPO, arXiv:2404.09656); "
        "one more forward pass per step.",
        bool,
        REFERENCE,
    )
    ref_model_mixup_alpha: float | None = setting(
        None,
        "Weight of the policy in a reference update; 1 replaces the reference.",
        float,
        REFERENCE,
        minimum=0,
        maximum=1,
        exclusive_minimum=True,
        metavar="WEIGHT",
        default_text="0.6",
    )
    ref_model_sync_steps: int | None = setting(
        None,
        "Steps between reference updates.",
        int,
        REFERENCE,
        minimum=1,
        default_text="512",
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
