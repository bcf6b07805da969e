"""What is trained: adapters beside the frozen model, or weights of the model itself."""

import math
from dataclasses import dataclass

from mlx_dpo.errors import ConfigError
from mlx_dpo.options import option

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
