"""Options of the command `fuse`, checked before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path

from mlx_dpo.adapters.merge import AffineQuantization
from mlx_dpo.errors import ConfigError
from mlx_dpo.models.quantize import DEFAULT_GROUP_SIZE


@dataclass(frozen=True)
class FuseOptions:
    """Options of the command `fuse`.

    Raises:
        ConfigError: an option has no effect in combination with the other options.
    """

    to: str = "mlx"  # one of `FUSE_TARGETS`
    bits: int | None = None
    group_size: int | None = None
    dtype: str | None = None
    base: str | None = None  # the folder of the Hugging Face checkpoint
    pairs: str | None = None
    min_retained: float = 0.9
    force: bool = False
    gguf: Path | None = None
    converter: str | None = None
    name: str | None = None  # of the model in LM Studio or Ollama
    gguf_type: str | None = None
    quantizer: str | None = None
    ollama_base: str | None = None  # Ollama's model that the adapter is applied to, unmerged

    def __post_init__(self) -> None:
        is_mlx, ollama = self.to in ("mlx", "lmstudio"), self.to == "ollama"
        merges_for_ollama = ollama and self.ollama_base is None
        has_gguf = self.gguf is not None or merges_for_ollama
        target = f"with `--to {self.to}`"
        ollama_only = f"{target} and without `--to ollama`" if not ollama else "with --ollama-base"
        for name, value, works, why in (
            ("bits", self.bits, is_mlx, self._why_no_bits(target)),
            ("dtype", self.dtype, is_mlx, f"{target}: every tensor keeps its dtype"),
            ("group-size", self.group_size, self.bits is not None, "without `--bits`"),
            ("base-model", self.base, self.to in ("hf", "ollama"), "without `--to hf`"),
            (
                "gguf",
                self.gguf,
                self.to == "hf",
                "without `--to hf`, because GGUF is converted from that checkpoint",
            ),
            ("converter", self.converter, has_gguf, "without `--gguf` or `--to ollama`"),
            ("gguf-type", self.gguf_type, merges_for_ollama, ollama_only),
            ("quantizer", self.quantizer, merges_for_ollama, ollama_only),
            ("name", self.name, self.to in ("lmstudio", "ollama"), target),
            ("ollama-base", self.ollama_base, ollama, "without `--to ollama`"),
        ):
            if value is not None and not works:
                raise ConfigError(f"`--{name}` has no effect {why}")

    def _why_no_bits(self, target: str) -> str:
        if self.to == "ollama":
            return f"{target}: use --gguf-type"
        return f"{target}: transformers cannot read MLX's quantized weights"

    @property
    def quantization(self) -> AffineQuantization | None:
        """Quantization of the fused model's weights; None if they are not quantized."""
        return (
            AffineQuantization(self.bits, self.group_size or DEFAULT_GROUP_SIZE)
            if self.bits
            else None
        )
