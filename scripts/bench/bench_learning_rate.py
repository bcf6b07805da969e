"""Held-out margins and losses of short runs at several learning rates.

    python -m scripts.bench.bench_learning_rate --data PAIRS --rates auto
    python -m scripts.bench.bench_learning_rate --model DIR --data PAIRS --pairs 40,200 \\
        --rates 1e-4,1e-3 --loss-type ipo --set fine_tune_type=full

Each run trains on the first rows of PAIRS and is evaluated on the last ones. `auto` is the rate
that mlx-dpo chooses if none is set. One line per run: steps, rate, training loss at the first and
at the last steps, held-out margin with its standard error, accuracy, and the verdict.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.errors import DPOError
from mlx_dpo.paths import tiny_chat

AUTO = "auto"
HEADER = (
    f"{'model':<20} {'loss':<14} {'pairs':>5} {'steps':>5} {'rate':>9}  {'loss first → last':<19} "
    f"{'margin ± error':<18} {'acc.':>6}  {'s':>5}  verdict"
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_learning_rate",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, default=tiny_chat(), help="model folder (default: models/tiny-chat)")
    add("--data", type=Path, required=True, help="pairs: a JSONL or JSON file")
    add("--valid", type=Path, help="held-out pairs (default: the last rows of --data)")
    add("--held-out", type=int, default=100, help="number of held-out pairs (default: 100)")
    add("--pairs", default="1000", help="numbers of training pairs, with commas (default: 1000)")
    add("--steps", default="", help="numbers of steps, with commas (default: one epoch)")
    add("--epochs", type=int, help="epochs (default: 1)")
    add("--rates", default=AUTO, help="learning rates or auto, with commas (default: auto)")
    add("--loss-type", default="sigmoid", help="losses, with commas; a+b is a sum")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")
    return parser.parse_args(arguments)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL or JSON file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return list(json.loads(text))
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def configurations(options: argparse.Namespace, folder: Path) -> Iterator[tuple[int, DPOConfig]]:
    """Yield the number of training pairs and the settings of every run; write their pairs."""
    rows = read_rows(options.data)
    held_out = read_rows(options.valid)[: options.held_out] if options.valid else []
    if not held_out:
        rows, held_out = rows[: -options.held_out], rows[-options.held_out :]
    more = {key: yaml.safe_load(value) for key, _, value in (s.partition("=") for s in options.set)}
    valid = _write(folder / "valid.jsonl", held_out)
    grid = itertools.product(
        options.loss_type.split(","),
        map(int, options.pairs.split(",")),
        [int(steps) if steps else None for steps in options.steps.split(",")],
        options.rates.split(","),
    )
    for loss, pairs, steps, rate in grid:
        settings: dict[str, Any] = {
            "model": str(options.model),
            "pairs": [_write(folder / f"train-{pairs}.jsonl", rows[:pairs])],
            "valid": valid,
            "output": str(folder / "run"),
            "loss_type": loss.split("+"),
            "samples": 0,
            "bad_pairs": "drop",
        }
        settings |= {"max_steps": steps} if steps else {}
        settings |= {"epochs": options.epochs} if options.epochs else {}
        settings |= {} if rate == AUTO else {"learning_rate": float(rate)}
        yield pairs, DPOConfig.from_dict(settings | more)


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def train(pairs: int, config: DPOConfig) -> str:
    """Train once and return a line with the results."""
    shutil.rmtree(config.output, ignore_errors=True)
    began = time.perf_counter()
    with DPOTrainer(config) as run:
        rows = [row for row in run.train() if "loss" in row]
    seconds = time.perf_counter() - began
    last = rows[-max(1, min(10, len(rows) // 4)) :]
    losses = f"{rows[0]['loss']:.4f} → {sum(row['loss'] for row in last) / len(last):.4f}"
    row = run.evaluation or {}
    margin, error = row.get("eval_rewards/margins"), row.get("eval_rewards/margins_stderr", 0.0)
    margins = "–" if margin is None else f"{margin:+.4f} ± {error:.4f}"
    verdict = run.verdict.kind if run.verdict else "ok"
    warned = f", {len(run.warnings)} warnings" if run.warnings else ""
    return (
        f"{Path(config.model).name:<20} {'+'.join(config.loss_type):<14} {pairs:>5} {len(rows):>5} "
        f"{run.config.learning_rate:>9.2g}  {losses:<19} {margins:<18} "
        f"{row.get('eval_rewards/accuracies', float('nan')):>6.1%}  {seconds:>5.0f}  "
        f"{verdict}{warned}"
    )


def main() -> None:
    """Run the grid and print one line per run."""
    options = parse()
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        for pairs, config in configurations(options, Path(folder)):
            print(train(pairs, config), flush=True)


if __name__ == "__main__":
    try:
        main()
    except DPOError as error:
        sys.exit(f"Error: {error}")
