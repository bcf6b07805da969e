"""Memory estimated by `mlx-dpo plan` against memory measured, over a grid of shapes and lengths.

    python -m scripts.bench.bench_plan                                the whole grid, some minutes
    python -m scripts.bench.bench_plan --only moe                     one shape of it

The peak memory of a step of two passes is estimated from a profile of a few layers, and then
measured with the whole model. Rows are appended to docs/bench/plan.csv.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX
from mlx_dpo.errors import DPOError

# isort: split

from mlx_dpo.profiling.bench.shapes import PassShape
from scripts.bench import machine, tables
from scripts.bench.plans import CONFIGS, Case, MemoryComparison, compare_memory
from scripts.bench.tables import Row, format_gigabytes

CSV = machine.ROOT / "docs" / "bench" / "plan.csv"
SHORT, MIDDLE, LONG = (
    PassShape(32, 32, 32, 2),
    PassShape(96, 64, 64, 4),
    PassShape(384, 128, 128, 1),
)
GRID = (
    Case("smollm2-135m", SHORT),
    Case("smollm2-135m", SHORT, recompute=True),
    Case("smollm2-135m", SHORT, scorer="plain"),
    Case("smollm2-135m", LONG),
    Case("smollm2-135m", LONG, recompute=True),
    Case("smollm2-135m", SHORT, bits=4),
    Case("qwen3-152k", SHORT),
    Case("qwen3-152k", LONG),
    Case("qwen3-152k", LONG, recompute=True),
    Case("qwen3-152k", SHORT, scorer="plain"),
    Case("qwen3-152k", MIDDLE, bits=8),
    Case("moe", MIDDLE),
    Case("moe", LONG, recompute=True),
    Case("moe", MIDDLE, scorer="plain", recompute=True),
    Case("hybrid", SHORT),
    Case("hybrid", LONG),
    Case("hybrid", MIDDLE, recompute=True),
)
TABLE_COLUMNS = (
    "shape", "lengths", "pairs", "scorer", "bits", "recompute", "planned_gb", "measured_gb",
    "ratio", "ratio_beyond",
)  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=CONFIGS, help="one shape of the grid")
    parser.add_argument("--csv", type=Path, default=CSV, help="file to append rows to")
    return parser.parse_args(arguments)


def row(case: Case, comparison: MemoryComparison) -> Row:
    """Return the row of one grid point."""
    point = case.point
    return {
        "versions": machine.versions("mlx-dpo", "mlx", "mlx-lm"),
        "shape": case.shape,
        "lengths": f"{point.prompt} + {point.chosen}, {point.rejected}",
        "pairs": str(point.pairs),
        "scorer": comparison.scorer,
        "bits": str(case.bits or ""),
        "recompute": "yes" if case.recompute else "no",
        "planned_gb": format_gigabytes(comparison.planned),
        "measured_gb": format_gigabytes(comparison.measured),
        "held_gb": format_gigabytes(comparison.resident),
        "ratio": f"{comparison.ratio:.3f}",
        "ratio_beyond": f"{comparison.ratio_beyond:.3f}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    try:
        options = parse(arguments)
        rows: list[Row] = []
        for case in GRID:
            if options.only in (None, case.shape):
                rows.append(row(case, compare_memory(case)))
                tables.append_csv(options.csv, [machine.describe_machine() | rows[-1]])
                print(" ".join(rows[-1][name] for name in TABLE_COLUMNS), file=sys.stderr)
        print(tables.text_table(rows, TABLE_COLUMNS))
    except DPOError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
