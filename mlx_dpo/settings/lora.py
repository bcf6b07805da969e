"""What is trained beside the frozen model."""

from dataclasses import dataclass

from mlx_dpo.options import option

LORA = "LoRA"


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """What is trained beside the frozen model."""

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
