"""What one pass costs under the plain scorer and under the engine, by lengths.

    python -m scripts.bench.bench_step                                  SmolLM2-135M's shape
    python -m scripts.bench.bench_step --point 950:250:250:1            one point of your own
    python -m scripts.bench.bench_step --shape tiny --repeats 1         a try in seconds

Two passes: `reference`, scores alone with the adapters off, and `training`, the loss and the
gradients of rank-8 adapters on all linear layers. Rows are appended to docs/bench/step.csv.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX
from mlx_dpo.errors import DPOError

# isort: split
import mlx.nn as nn

from scripts.bench import machine, steps, tables
from scripts.bench.shapes import SHAPES
from scripts.bench.steps import Cost, Point, Way
from scripts.bench.tables import Row, figure, gigabytes

CSV = machine.ROOT / "docs" / "bench" / "step.csv"
POINTS = "64:64:64:2 192:64:64:4 256:128:128:2 950:250:250:1 1024:256:256:1"
SHOWN = ("lengths", "pass", "scorer", "pairs_per_s", "peak_gb", "trunk_tokens", "head_rows")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="bench_step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2-135m", help="shape of the model")
    add(
        "--point",
        type=Point.parse,
        action="append",
        metavar="PROMPT:CHOSEN:REJECTED:PAIRS",
        help=f"lengths in tokens, and pairs in a pass; repeat it (default: {POINTS})",
    )
    add("--repeats", type=int, default=3, help="timed runs; the fastest counts (default: 3)")
    add("--csv", type=Path, default=CSV, help="file to append rows to")
    options = parser.parse_args(arguments)
    options.point = options.point or [Point.parse(text) for text in POINTS.split()]
    return options


def costs(
    model: nn.Module, ways: Sequence[Way], point: Point, *, vocab_size: int, repeats: int
) -> Iterator[tuple[str, str, Cost]]:
    """Name of the pass, name of the scorer, cost; scorers take turns within a pass."""
    pairs = point.draw(vocab_size)
    passes = {"reference": steps.reference_pass, "training": steps.training_pass}
    for name, make in passes.items():
        for way in ways:
            run = make(model, way, pairs)
            yield name, way.name, steps.measure(model, run, repeats=repeats)


def row(shape: str, point: Point, kind: str, scorer: str, cost: Cost) -> Row:
    """The columns of one measurement."""
    return {
        "versions": machine.versions("mlx-dpo", "mlx", "mlx-lm"),
        "shape": shape,
        "lengths": f"{point.prompt} + {point.chosen}, {point.rejected}",
        "pairs": str(point.pairs),
        "pass": kind,
        "scorer": scorer,
        "pairs_per_s": figure(point.pairs / cost.seconds),
        "peak_gb": gigabytes(cost.peak_bytes),
        "trunk_tokens": str(cost.trunk_tokens),
        "head_rows": str(cost.head_rows),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    try:
        options = parse(arguments)
        shape = SHAPES[options.shape]
        model = steps.build(shape)
        found: list[Row] = []
        ways = steps.ways(model, shape.vocab_size)
        for point in options.point:
            for kind, scorer, cost in costs(
                model, ways, point, vocab_size=shape.vocab_size, repeats=options.repeats
            ):
                found.append(row(options.shape, point, kind, scorer, cost))
                tables.append_csv(options.csv, [machine.facts() | found[-1]])
                print(f"{scorer}: {' '.join(found[-1][name] for name in SHOWN)}", file=sys.stderr)
        print(tables.text_table(found, SHOWN))
    except DPOError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
