"""Time and memory of preparing a large dataset: tokenization, and a second start from the cache.

    python -m scripts.bench.bench_data                      200,000 pairs of about 300 tokens
    python -m scripts.bench.bench_data --pairs 20000        fewer

Synthetic pairs are prepared for the chat model in this repository, each start in its own process,
with an empty cache at first. A start ends when the first micro-batch could run; reference
log-probs are not computed. A row per start is appended to docs/bench/data.csv.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX

# isort: split

from scripts.bench import machine, tables
from scripts.bench.tables import Row

if TYPE_CHECKING:
    from mlx_dpo import DPOConfig

CSV = machine.ROOT / "docs" / "bench" / "data.csv"
MODEL = machine.ROOT / "models" / "tiny-chat"
STARTS = ("first", "second", "second", "second", "second", "second")
WORDS_PER_TEXT = 26  # of a text; three texts are about 300 tokens of this model
TABLE_COLUMNS = ("start", "pairs", "tokens", "seconds", "load_s", "resident_mb", "whole_epoch_mb")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=200_000, help="how many [200000]")
    parser.add_argument("--csv", type=Path, default=CSV, help="file to append rows to")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)  # one start, as JSON
    return parser.parse_args(arguments)


def write_pairs(path: Path, count: int) -> None:
    """Write distinct pairs of random words."""
    draw = random.Random(0)
    letters = "aeioulnrstdm"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(5000)]

    def text() -> str:
        return " ".join(
            draw.choices(words, k=draw.randint(WORDS_PER_TEXT // 2, WORDS_PER_TEXT * 3 // 2))
        )

    with path.open("w") as lines:
        for _ in range(count):
            row = {name: text() for name in ("prompt", "chosen", "rejected")}
            lines.write(json.dumps(row) + "\n")


def measure_start(folder: Path) -> dict[str, float]:
    """Measure the start of a run on the pairs of the folder."""
    from mlx_dpo import DPOConfig

    output, pairs = tempfile.mkdtemp(dir=folder), str(folder / "pairs.jsonl")
    config = DPOConfig(model=str(MODEL), pairs=pairs, output=output, max_steps=100)
    return {**measure_seconds(config), **measure_memory(config)}


def measure_seconds(config: "DPOConfig") -> dict[str, float]:
    """Return the time of all that `train` does and prints before the first micro-batch."""
    import mlx.core as mx

    from mlx_dpo import DPOTrainer
    from mlx_dpo.data.batches.collate import collate
    from mlx_dpo.data.batches.micro_batches import micro_batches
    from mlx_dpo.runs.summary import summarize_inputs, summarize_training
    from mlx_dpo.types import PairLogps

    with DPOTrainer(config) as run:
        started = perf_counter()
        run.load()
        loaded = perf_counter() - started
        summarize_inputs(run)
        run.attach()
        zeros = {split: mx.zeros((len(pairs),)) for split, pairs in run.inputs.splits.items()}
        run.reference = {split: PairLogps(logps, logps) for split, logps in zeros.items()}
        run.restore()
        summarize_training(run)
        settings, pairs = run.config, run.inputs.train
        indices = run.order.step(0)
        group = micro_batches(indices, pairs, settings.pass_limit, cost=run.choice.cost)[0]
        mx.eval(collate([pairs[i] for i in group]))
        done = perf_counter() - started
    counts = [(r.prompt_tokens, r.chosen_tokens, r.rejected_tokens) for r in run.inputs.reports]
    return {"seconds": done, "load_s": loaded, "tokens": sum(map(sum, counts))}


def measure_memory(config: "DPOConfig") -> dict[str, float]:
    """Return the memory of the dataset: at the start of a run, and after reading every pair."""
    from mlx_dpo.runs.inputs import load_configured_base, load_inputs

    base = load_configured_base(config)
    before = machine.resident_bytes()
    inputs = load_inputs(config, read=lambda _: base)
    inputs.provenance(config)
    resident = machine.resident_bytes() - before
    for _ in inputs.train:
        pass
    whole = machine.resident_bytes() - before
    return {"resident_mb": resident / 1e6, "whole_epoch_mb": whole / 1e6}


def run_start(name: str, folder: Path, pairs: int) -> Row:
    """Measure one start in its own process and return its row."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench.bench_data", "--start", str(folder)],
        cwd=machine.ROOT, env=os.environ | {"MLX_DPO_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    return {
        "versions": machine.versions("mlx-dpo", "mlx", "mlx-lm", "transformers"),
        "start": name,
        "pairs": str(pairs),
        "tokens": f"{result['tokens'] / pairs:.0f}",
        "seconds": f"{result['seconds']:.2f}",
        "load_s": f"{result['load_s']:.2f}",
        "resident_mb": f"{result['resident_mb']:.0f}",
        "whole_epoch_mb": f"{result['whole_epoch_mb']:.0f}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    if options.start is not None:
        print(json.dumps(measure_start(options.start)))
        return 0
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "pairs.jsonl", options.pairs)
        for start_name in STARTS:
            rows.append(run_start(start_name, folder, options.pairs))
            tables.append_csv(options.csv, [machine.describe_machine() | rows[-1]])
            print(" ".join(rows[-1][name] for name in TABLE_COLUMNS), file=sys.stderr)
    print(tables.text_table(rows, TABLE_COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
