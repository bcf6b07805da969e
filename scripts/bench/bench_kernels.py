"""Kernels of a training pass, counted on its graph, which is built as for a GPU and never run.

    python -m scripts.bench.bench_kernels                               SmolLM2-135M's shape
    python -m scripts.bench.bench_kernels --point 950:250:250:4         other lengths

The pass is the loss and the gradients of rank-8 adapters on all linear layers. Layers have the same
number of kernels, so models of 2 and 3 layers are counted. A last row has clipping and AdamW. Rows
are appended to docs/bench/kernels.csv.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX
from mlx_dpo.errors import DPOError

# isort: split
import mlx.core as mx

from mlx_dpo.profiling.bench.shapes import SHAPES, PassShape
from scripts.bench import kernels, machine, tables
from scripts.bench.tables import Row

CSV = machine.ROOT / "docs" / "bench" / "kernels.csv"
POINTS = "512:128:128:8 106:38:46:8"
PACKINGS = [name for name in get_args(kernels.Packing) if name in ("trie", "row")]
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
TABLE_COLUMNS = ("lengths", "pairs", "dtype", "packing", "kernels", "kernels_per_layer", "scores")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2-135m", help="shape of the model")
    add(
        "--point",
        type=PassShape.parse,
        action="append",
        metavar="PROMPT:CHOSEN:REJECTED:PAIRS",
        help=f"lengths in tokens, and pairs in a pass; repeat it (default: {POINTS})",
    )
    add("--csv", type=Path, default=CSV, help="file to append rows to")
    options = parser.parse_args(arguments)
    options.point = options.point or [PassShape.parse(text) for text in POINTS.split()]
    return options


def row(shape: str, point: PassShape, dtype: str, packing: kernels.Packing) -> Row:
    """Return the row of one pass."""
    cost = kernels.pass_kernels(
        SHAPES[shape], point.draw(SHAPES[shape].vocab_size), dtype=DTYPES[dtype], packing=packing
    )
    return {
        "versions": machine.versions("mlx-dpo", "mlx", "mlx-lm"),
        "shape": shape,
        "lengths": f"{point.prompt} + {point.chosen}, {point.rejected}",
        "pairs": str(point.pairs),
        "dtype": dtype,
        "packing": packing,
        "kernels": str(cost.kernels),
        "kernels_per_layer": str(cost.per_layer),
        "scores": str(cost.scores),
    }


def update_row(shape: str) -> Row:
    """Return the row of an optimizer step's clipping and update."""
    return {
        "versions": machine.versions("mlx-dpo", "mlx", "mlx-lm"),
        "shape": shape,
        "lengths": "update",
        "dtype": "float32",
        "kernels": str(kernels.update_kernels(SHAPES[shape])),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the count."""
    try:
        options = parse(arguments)
        rows = [
            row(options.shape, point, dtype, packing)
            for point in options.point
            for dtype in DTYPES
            for packing in PACKINGS
        ]
        rows.append(dict.fromkeys(rows[0], "") | update_row(options.shape))
        tables.append_csv(options.csv, [machine.describe_machine() | row for row in rows])
        print(tables.text_table(rows, TABLE_COLUMNS))
    except DPOError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
