"""`mlx-dpo convert`: convert a model of the Hub or of a folder to MLX, optionally quantized."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FOLDER, Command
from mlx_dpo.config.model import BITS, DTYPES, MODES

if TYPE_CHECKING:
    from mlx_dpo.export.convert import ConvertReport

QUANTIZE_BITS = "4"  # of --quantize, as in mlx-lm
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo convert Qwen/Qwen3-0.6B --bits 4 --output model",
        "mlx-dpo convert checkpoint --dtype bfloat16 --output model",
    ),
    aliases={
        "--hf-path": "",
        "--q-bits": "--bits",
        "--q-group-size": "--group-size",
        "--q-mode": "--mode",
        "--quant-predicate": "--recipe",
        "--mlx-path": "--output",
    },
    renamed={
        "--upload-repo": "upload the folder with `hf upload`",
        "--dequantize": "not supported; convert the unquantized checkpoint",
    },
)
@click.argument("source", type=FOLDER)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="New folder to write.",
)
@click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in BITS]),
    help="Quantize the weights to this many bits.",
    show_default="not quantized",
)
@click.option("-q", "--quantize", is_flag=True, help="Quantize the weights to 4 bits.")
@click.option(
    "--group-size",
    type=int,
    help="Weights that share a quantization scale: 32, 64 or 128.",
    show_default="64",
)
@click.option("--mode", type=click.Choice(MODES), default="affine", help="Quantization format.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of weights that are not quantized.",
    show_default="the model's own",
)
@click.option("--revision", metavar="REVISION", help="Hub revision of the model.")
@click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    help="Mixed-precision recipe: most layers at the first width, sensitive layers at the second.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with SOURCE.")
def convert(
    source: str,
    output: Path,
    bits: str | None,
    quantize: bool,
    **options: Any,
) -> None:
    """Convert SOURCE, a Hub id or a folder, to MLX's layout, and check the result.

    Only safetensors files are read. Output is written atomically. The log-probabilities of an
    English text are computed before and after the conversion, and the difference is printed.
    mlx-lm's flags are accepted as well (-q, --q-bits, --hf-path, --mlx-path).
    """
    bits = bits or (QUANTIZE_BITS if quantize else None)
    from mlx_dpo.export import convert as conversion
    from mlx_dpo.reporting.terminal.console import make_console, print_label_table

    console = make_console()
    report = conversion.convert(source, output, bits=int(bits) if bits else None, **options)
    print_label_table(console, facts(report))
    console.print(f"Next: mlx-dpo train PAIRS --model {shlex.quote(str(output))} --output RUN")


def facts(report: "ConvertReport") -> list[tuple[str, str]]:
    """Return the lines (label, value) that summarize a conversion for the user."""
    from mlx_dpo.units import format_bytes

    before, after = format_bytes(report.bytes_before), format_bytes(report.bytes_after)
    return [
        ("model", f"{report.source} → {report.output}"),
        ("weights", f"{before} → {after}, {report.bits_per_weight:.2f} bits per weight"),
        (
            "check",
            f"log-probabilities differ by {report.conversion_error:.3g} nats per token on average "
            f"({report.tokens} tokens of English)",
        ),
        *(("note", note) for note in report.notes),
    ]
