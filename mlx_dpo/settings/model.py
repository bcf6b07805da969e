"""Which model is trained, and how it is held."""

from dataclasses import dataclass

from mlx_dpo.options import option

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
