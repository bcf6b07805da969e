"""`mlx-dpo fuse`: write a run as a plain model and report how much training it retains."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FILE, FOLDER, Command
from mlx_dpo.config.model import BITS, DTYPES

if TYPE_CHECKING:
    from mlx_dpo.export.fuse import FusedModel


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo fuse run --output fused",
        "mlx-dpo fuse run --output fused --to hf --gguf model.gguf \\",
        "  --converter llama.cpp/convert_hf_to_gguf.py",
    ),
    renamed={"--base": "use --base-model FOLDER"},
)
@click.argument("run", type=FOLDER)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="New folder to write.",
)
@click.option(
    "--to",
    type=click.Choice(["mlx", "hf"]),
    default="mlx",
    help="`mlx`: MLX's layout; `hf`: the Hugging Face checkpoint with the trained weights.",
)
@click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in BITS]),
    help="Quantize the result to this many bits, which may undo the training.",
    show_default="not quantized",
)
@click.option(
    "--group-size",
    type=int,
    help="Weights that share a quantization scale, with --bits.",
    show_default="64",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of the weights.",
    show_default="the compute dtype of the run",
)
@click.option(
    "--base-model",
    "base",
    type=FOLDER,
    metavar="FOLDER",
    help="With --to hf: the Hugging Face checkpoint that the run's model was made from.",
)
@click.option(
    "--pairs",
    type=FILE,
    metavar="PAIRS",
    help="Pairs to measure on.",
    show_default="the held-out pairs of the run",
)
@click.option(
    "--min-retained",
    type=click.FloatRange(0, 1),
    metavar="FRACTION",
    default=0.9,
    help="Fraction of the margin and of the adapter's change that the model must retain.",
)
@click.option(
    "--force", is_flag=True, help="Write the model even if it retains less than --min-retained."
)
@click.option(
    "--gguf",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --to hf: also write this GGUF file, with llama.cpp's converter.",
)
@click.option(
    "--converter", type=FILE, metavar="FILE", help="Path of llama.cpp's convert_hf_to_gguf.py."
)
def fuse(run: str, output: Path, bits: str | None, **settings: Any) -> None:
    """Merge the adapter of RUN into the weights and verify the result.

    Quantized layers are dequantized, because a change as small as that of preference training is
    lost when weights are quantized again. The written model is compared with the policy on held-out
    pairs: the retained shares of the margin and of the adapter's change are printed, and a model
    that lost too much is not kept.
    """
    from mlx_dpo.export.fuse import FuseOptions, convert_to_gguf, fuse_run
    from mlx_dpo.reporting.terminal.console import make_console, print_label_table
    from mlx_dpo.units import format_bytes

    console = make_console()
    options = FuseOptions(bits=int(bits) if bits else None, **settings)
    fused = fuse_run(run, output, options)
    print_label_table(console, facts(fused))
    if options.gguf is not None:
        convert_to_gguf(fused, options)
        print_label_table(
            console, [("gguf", f"{options.gguf}, {format_bytes(options.gguf.stat().st_size)}")]
        )


def facts(fused: "FusedModel") -> list[tuple[str, str]]:
    """Return the lines (label, value) that summarize a fused model for the user."""
    from mlx_dpo.units import format_bytes

    retention, merged = fused.retention, fused.merge_retention
    lines = [
        ("model", f"{fused.output}, {format_bytes(fused.bytes)}, {fused.kind}"),
        (
            "margin",
            f"{retention.margin:.2%} retained: {retention.margin_before:.3f} before, "
            f"{retention.margin_after:.3f} after (mean log-ratio margin in nats, "
            f"{fused.measured_on})",
        ),
        (
            "change",
            f"{retention.change:.2%} of the adapters' change of log-probabilities retained; the "
            "two "
            f"models are {retention.mean_difference:.2g} nats per token apart",
        ),
    ]
    if merged is not None:
        lines.append(
            (
                "weights",
                f"{merged.retained:.2%} of the adapters' change retained after rounding, cosine "
                f"{merged.cosine:.4f}",
            )
        )
    return lines + [("note", note) for note in fused.notes]
