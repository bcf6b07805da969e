"""`mlx-dpo fuse`: write a run as a plain model and report how much training it retains."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FILE, FOLDER, Command, missing_message
from mlx_dpo.config.model import BITS, DEFAULT_GGUF_TYPE, DTYPES, FUSE_TARGETS, GGUF_TYPES

if TYPE_CHECKING:
    from rich.console import Console

    from mlx_dpo.export.chat_apps import OllamaModel
    from mlx_dpo.export.fuse import FusedModel
    from mlx_dpo.export.retention import Retention


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo fuse run --output fused",
        "mlx-dpo fuse run --to lmstudio --name polite",
        "mlx-dpo fuse run --to ollama --output polite",
        "mlx-dpo fuse run --output fused --to hf --gguf model.gguf \\",
        "  --converter llama.cpp/convert_hf_to_gguf.py",
    ),
    renamed={"--base": "use --base-model FOLDER"},
)
@click.argument("run", type=FOLDER)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="New folder to write.",
    show_default="with --to lmstudio: in its models folder",
)
@click.option(
    "--to",
    type=click.Choice(FUSE_TARGETS),
    default="mlx",
    help="`mlx`: MLX's layout; `hf`: the Hugging Face checkpoint with the trained weights; "
    "`lmstudio`: MLX's layout in LM Studio's models folder; `ollama`: a GGUF file and a Modelfile.",
)
@click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in BITS]),
    help="Quantize the result to this many bits, which may undo the training.",
    show_default="not quantized; with --to lmstudio 8, if that keeps the training",
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
    "--name",
    metavar="ORG/NAME",
    help="With --to lmstudio or ollama: name of the model there; ORG/ may be left out.",
    show_default="that of the run's folder",
)
@click.option(
    "--gguf-type",
    type=click.Choice(GGUF_TYPES, case_sensitive=False),
    help="With --to ollama: llama.cpp's type of the quantized weights.",
    show_default=DEFAULT_GGUF_TYPE,
)
@click.option(
    "--ollama-base",
    metavar="MODEL",
    help="With --to ollama: do not merge; apply the adapter to this model of Ollama, which must be "
    "the model that was trained.",
)
@click.option("--quantizer", type=FILE, metavar="FILE", help="Path of llama.cpp's llama-quantize.")
@click.option(
    "--converter", type=FILE, metavar="FILE", help="Path of llama.cpp's convert_hf_to_gguf.py."
)
def fuse(run: str, output: Path | None, bits: str | None, **settings: Any) -> None:
    """Merge the adapter of RUN into the weights and verify the result.

    Quantized layers are dequantized, because a change as small as that of preference training is
    lost when weights are quantized again. The written model is compared with the policy on held-out
    pairs: the retained shares of the margin and of the adapter's change are printed, and a model
    that lost too much is not kept.

    With --to lmstudio the model appears in LM Studio. With --to ollama, llama.cpp converts and
    quantizes the model, and the printed command brings it into Ollama.
    """
    from mlx_dpo.export.chat_apps import fuse_for_lmstudio, fuse_for_ollama
    from mlx_dpo.export.fuse import convert_to_gguf, fuse_run
    from mlx_dpo.export.options import FuseOptions
    from mlx_dpo.reporting.terminal.console import make_console, print_label_table
    from mlx_dpo.units import format_bytes

    console = make_console()
    options = FuseOptions(bits=int(bits) if bits else None, **settings)
    if options.to == "lmstudio":
        print_label_table(console, facts(fuse_for_lmstudio(run, output, options)))
        return
    if output is None:
        raise click.UsageError(missing_message(["--output"]))
    if options.to == "ollama":
        _print_ollama(console, fuse_for_ollama(run, output, options))
        return
    fused = fuse_run(run, output, options)
    print_label_table(console, facts(fused))
    if options.gguf is not None:
        convert_to_gguf(fused, options)
        print_label_table(
            console, [("gguf", f"{options.gguf}, {format_bytes(options.gguf.stat().st_size)}")]
        )


def _print_ollama(console: "Console", model: "OllamaModel") -> None:
    from mlx_dpo.reporting.terminal.console import print_label_table
    from mlx_dpo.units import format_bytes

    lines = [("model", f"{model.folder}, {format_bytes(model.bytes)}, {model.kind}")]
    if model.fused is None or model.retention is None:
        lines.append(("note", "not measured: mlx-dpo does not see the weights of Ollama's model"))
    else:
        lines += retention_lines(model.retention, model.fused.measured_on)
        lines += [("note", note) for note in model.fused.notes]
    print_label_table(console, [*lines, ("next", model.command)])


def facts(fused: "FusedModel") -> list[tuple[str, str]]:
    """Return the lines (label, value) that summarize a fused model for the user."""
    from mlx_dpo.units import format_bytes

    merged = fused.merge_retention
    lines = [
        ("model", f"{fused.output}, {format_bytes(fused.bytes)}, {fused.kind}"),
        *retention_lines(fused.retention, fused.measured_on),
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


def retention_lines(retention: "Retention", measured_on: str) -> list[tuple[str, str]]:
    """Return the lines (label, value) that say how much of the training a model retains."""
    name = "log-ratio" if retention.of_answers else "margin"
    what = "mean log-ratio of the answers" if retention.of_answers else "mean log-ratio margin"
    return [
        (
            name,
            f"{retention.margin:.2%} retained: {retention.margin_before:.3f} before, "
            f"{retention.margin_after:.3f} after ({what} in nats, {measured_on})",
        ),
        (
            "change",
            f"{retention.change:.2%} of the adapters' change of log-probabilities retained; the "
            f"two models are {retention.mean_difference:.2g} nats per token apart",
        ),
    ]
