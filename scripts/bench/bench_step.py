"""Time and memory of one pass with the plain and with the shared scorer, by lengths.

    python -m scripts.bench.bench_step                                  SmolLM2-135M's shape
    python -m scripts.bench.bench_step --point 950:250:250:1            other lengths
    python -m scripts.bench.bench_step --shape tiny --repeats 1         a try in seconds

Two kinds of pass: `reference`, log-probs with the adapters disabled, and `training`, the loss and
the gradients of rank-8 adapters on all linear layers. Rows are appended to docs/bench/step.csv.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX
from mlx_dpo.errors import DPOError

# isort: split
import mlx.nn as nn

from mlx_dpo.profiling.bench.shapes import SHAPES, PassShape
from scripts.bench import machine, steps, tables
from scripts.bench.steps import PassCost, ScorerVariant
from scripts.bench.tables import Row, format_gigabytes, format_number

CSV = machine.ROOT / "docs" / "bench" / "step.csv"
POINTS = "64:64:64:2 192:64:64:4 256:128:128:2 950:250:250:1 1024:256:256:1"
TABLE_COLUMNS = ("lengths", "pass", "scorer", "pairs_per_s", "peak_gb", "trunk_tokens", "head_rows")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
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
    add("--repeats", type=int, default=3, help="timed runs; the fastest counts (default: 3)")
    add("--csv", type=Path, default=CSV, help="file to append rows to")
    options = parser.parse_args(arguments)
    options.point = options.point or [PassShape.parse(text) for text in POINTS.split()]
    return options


def measure_passes(
    model: nn.Module,
    variants: Sequence[ScorerVariant],
    point: PassShape,
    *,
    vocab_size: int,
    repeats: int,
) -> Iterator[tuple[str, str, PassCost]]:
    """Yield names of pass and scorer, and the cost. Scorers take turns within a kind of pass."""
    pairs = point.draw(vocab_size)
    passes = {"reference": steps.reference_pass, "training": steps.training_pass}
    for name, make in passes.items():
        for variant in variants:
            run = make(model, variant, pairs)
            yield name, variant.name, steps.measure(model, run, repeats=repeats)


def row(shape: str, point: PassShape, kind: str, scorer: str, cost: PassCost) -> Row:
    """Return the row of one measurement."""
    return {
        "versions": machine.versions("mlx-dpo", "mlx", "mlx-lm"),
        "shape": shape,
        "lengths": f"{point.prompt} + {point.chosen}, {point.rejected}",
        "pairs": str(point.pairs),
        "pass": kind,
        "scorer": scorer,
        "pairs_per_s": format_number(point.pairs / cost.seconds),
        "peak_gb": format_gigabytes(cost.peak_bytes),
        "trunk_tokens": str(cost.layer_tokens),
        "head_rows": str(cost.head_tokens),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    try:
        options = parse(arguments)
        shape = SHAPES[options.shape]
        model = steps.build(shape)
        rows: list[Row] = []
        variants = steps.scorer_variants(model, shape.vocab_size)
        for point in options.point:
            for kind, scorer, cost in measure_passes(
                model, variants, point, vocab_size=shape.vocab_size, repeats=options.repeats
            ):
                rows.append(row(options.shape, point, kind, scorer, cost))
                tables.append_csv(options.csv, [machine.describe_machine() | rows[-1]])
                print(
                    f"{scorer}: {' '.join(rows[-1][name] for name in TABLE_COLUMNS)}",
                    file=sys.stderr,
                )
        print(tables.text_table(rows, TABLE_COLUMNS))
    except DPOError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
