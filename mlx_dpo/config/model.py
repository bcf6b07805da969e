"""Which model is trained, and how it is held."""

import math
from dataclasses import dataclass

from mlx_dpo.config.option import option
from mlx_dpo.errors import ConfigError

MODEL = "Model"
BITS = (2, 3, 4, 5, 6, 8)
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model is trained, and how it is held."""

    model: str = option("", "Model to train: a folder or a Hub id.", str, MODEL, path=True)
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


LORA = "LoRA"


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """What is trained: adapters beside the frozen model, or weights of the model itself."""

    fine_tune_type: str | None = option(
        None,
        "`lora`; `dora`: also a magnitude per output (arXiv:2402.09353); `full`: the blocks' own "
        "weights, for a model that is not quantised. [default: lora]",
        str,
        LORA,
        choices=("lora", "dora", "full"),
    )
    lora_r: int | None = option(None, "Rank of the adapters. [default: 16]", int, LORA, low=1)
    lora_alpha: float | None = option(
        None, "Adapters are scaled by alpha / rank. [default: 32]", float, LORA, low=0,
        open_low=True,
    )  # fmt: skip
    use_rslora: bool = option(
        False, "Scale by alpha / sqrt(rank) instead (arXiv:2312.03732).", bool, LORA
    )
    lora_dropout: float | None = option(
        None, "Dropout on the adapters' input. [default: 0]", float, LORA, low=0, high=1,
        open_high=True,
    )  # fmt: skip
    lora_target_modules: tuple[str, ...] = option(
        (),
        "Names of the layers to adapt; repeat it. Experts, `embed_tokens` and `lm_head` only if "
        "named. With `full`, parts of the blocks. [default: all linear layers of the blocks]",
        str,
        LORA,
        many=True,
    )
    num_layers: int | None = option(
        None, "Train only the last so many blocks. [default: all]", int, LORA, low=1
    )
    start_adapter: str | None = option(
        None,
        "Go on from the adapter in this folder, of a run, mlx-lm or PEFT. It decides what is "
        "trained, and the model with it is the reference.",
        str,
        LORA,
        path=True,
    )

    @property
    def rank(self) -> int:
        """Rank of fresh adapters."""
        return 16 if self.lora_r is None else self.lora_r

    @property
    def alpha(self) -> float:
        """Alpha of fresh adapters."""
        return 32.0 if self.lora_alpha is None else self.lora_alpha

    @property
    def dropout(self) -> float:
        """Dropout on the adapters' input."""
        return 0.0 if self.lora_dropout is None else self.lora_dropout

    @property
    def lora_scale(self) -> float:
        """What the adapters' product is multiplied by, as PEFT and TRL define it."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def refuse_idle_adapter_settings(self) -> None:
        """Settings of what is trained that have no effect beside others.

        Raises:
            ConfigError: names the setting and what takes it its effect.
        """
        decided: dict[str, object] = {
            "lora_r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "use_rslora": self.use_rslora or None,
        }
        if self.start_adapter is not None:
            decided |= {
                "fine_tune_type": self.fine_tune_type,
                "lora_target_modules": self.lora_target_modules or None,
                "num_layers": self.num_layers,
            }
            beside = "beside `start_adapter`: the adapter decides it"
        elif self.fine_tune_type == "full":
            decided["lora_dropout"] = self.lora_dropout
            beside = "with fine_tune_type `full`: there are no adapters"
        else:
            return
        for name, value in decided.items():
            if value is not None:
                raise ConfigError(f"`{name}` has no effect {beside}")


REFERENCE = "Reference"


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """What the policy is held against."""

    reference_model: str | None = option(
        None,
        "Another model of the same vocabulary as the reference, asked once and freed before "
        "training. [default: the model as it starts]",
        str,
        REFERENCE,
    )
    sync_ref_model: bool = option(
        False,
        "Let the reference follow the policy (TR-DPO, arXiv:2404.09656); a pass more per step.",
        bool,
        REFERENCE,
    )
    ref_model_mixup_alpha: float | None = option(
        None,
        "The policy's share when the reference follows; 1 replaces it. [default: 0.6]",
        float,
        REFERENCE,
        low=0,
        high=1,
        open_low=True,
    )
    ref_model_sync_steps: int | None = option(
        None, "Steps after which the reference follows. [default: 512]", int, REFERENCE, low=1
    )

    @property
    def mixup_alpha(self) -> float:
        """The policy's share when the reference follows it."""
        return 0.6 if self.ref_model_mixup_alpha is None else self.ref_model_mixup_alpha

    @property
    def sync_steps(self) -> int:
        """Steps after which the reference follows the policy."""
        return 512 if self.ref_model_sync_steps is None else self.ref_model_sync_steps

    def refuse_idle_reference_settings(self, *, needed: bool, watched: bool) -> None:
        """Settings of the reference that have no effect beside others, or where none is needed.

        Raises:
            ConfigError: names the setting and what takes it its effect.
        """
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if getattr(self, name) is not None and not self.sync_ref_model:
                raise ConfigError(f"`{name}` has no effect without `sync_ref_model`")
        for name in ("reference_model", "sync_ref_model"):
            if getattr(self, name) and not needed:
                raise ConfigError(f"`{name}` has no effect: `loss_type` needs no reference")
        if self.sync_ref_model and watched:
            raise ConfigError(
                "`metric_for_best_model` compares evaluations, and `sync_ref_model` holds each "
                "against another reference; leave one of them out"
            )
        if self.sync_ref_model and self.reference_model is not None:
            raise ConfigError(
                "`sync_ref_model` moves the model as it starts towards the policy, and "
                "`reference_model` is another one; leave one of them out"
            )
