"""`mlx-dpo convert`: convert a model of the Hub or of a folder to MLX, optionally quantized."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.config.model import BITS, DTYPES, MODES

if TYPE_CHECKING:
    from mlx_dpo.export.convert import ConvertReport

RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")


@click.command()
@click.argument("source")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in BITS]),
    help="Quantize the weights to this many bits.",
)
@click.option(
    "--group-size", type=int, help="Weights that share a scale: 32, 64 or 128. [default: 64]"
)
@click.option(
    "--mode", type=click.Choice(MODES), default="affine", help="How quantized weights are packed."
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of weights that are not quantized. [default: the model's own]",
)
@click.option("--revision", metavar="TEXT", help="Hub revision of the model.")
@click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    help="Mixed precision: most layers at the first width, sensitive layers at the second.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with SOURCE.")
def convert(source: str, output: Path, bits: str | None, **options: Any) -> None:
    """Convert SOURCE, a Hub id or a folder, to MLX's layout, and check the result.

    Only safetensors files are read. The output folder is written complete or not at all. The
    log-probabilities of an English text are computed before and after the conversion, and the
    difference is printed.
    """
    from mlx_dpo.export import convert as conversion
    from mlx_dpo.reporting.console import make_console, print_label_table

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
