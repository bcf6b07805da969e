"""Write docs/benchmarks.md from the rows of docs/bench/machines.csv, or add a row to them.

python scripts/tools/docs/benchmarks_page.py
python scripts/tools/docs/benchmarks_page.py bench.json     add the output of `mlx-dpo bench --json`
"""

import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "benchmarks.md"
ROWS = ROOT / "docs" / "bench" / "machines.csv"
Row = dict[str, str]

LINES = {  # of the table, and what each means
    "`load`": "Load average before the start. Above 0.3 per CPU core the table says that other "
    "programs were running.",
    "`pairs`": "Pairs in an optimizer step and in a pass; passes that run at once; lengths of "
    "the texts; tokens that the scorer puts through the layers. All texts are random tokens.",
    "`training`": "A whole optimizer step of DPO with LoRA on all linear layers, through the "
    "scorer and the loop of `train`. Tokens are those through the layers: a shared prompt counts "
    "once.",
    "`reference`": "Log-probs of the same pairs without adapters and gradients.",
    "`evaluation`": "The same with adapters.",
    "`… of products`": "FLOPs of the pass ([counted from shapes](architecture.md)) per second, as "
    "a share of the fastest line of `products`.",
    "second line": "Seconds over all pairs of a step: median, minimum and maximum of the rounds. "
    "The rates are those of the median.",
    "`generation`": "Tokens per second of one greedy answer of 32 tokens (8 if time is short), its "
    "prompt included.",
    "`products`": "Matrix products in the dtype of the model: a large square one, and the model's "
    "own shape with 512 rows. The fastest of repeated batches.",
    "`copy`": "Bytes read and written per second while an array is negated.",
    "`memory`": "Peak of MLX's memory counter in the rounds, weights included.",
    "`time`": "Shares of an epoch with one evaluation of 5 % held-out pairs. `build`: Python "
    "builds graphs. `device`: Python waits for MLX, or for the second process. `update`: clipping, "
    "the optimizer and metrics.",
    "`sharing`": "Share of the tokens of whole sequences that the scorer does not compute, if a "
    "set of pairs goes through the model in one pass.",
}
HEAD = """# Benchmarks

<!-- made by scripts/tools/docs/benchmarks_page.py from docs/bench/machines.csv -->

`mlx-dpo bench` measures how fast your machine trains, in about two minutes and without downloads:

```sh
mlx-dpo bench
mlx-dpo bench mlx-community/Qwen3-4B-4bit
mlx-dpo bench --json > bench.json
```

Without MODEL it measures a model of the shape of SmolLM2-135M with random weights, so that rows of
different machines can be compared. MODEL is a folder, or a Hub id that is in the Hub's cache
already. `--seconds` is the approximate duration; the number of pairs in a step adapts to it. The
command estimates memory first, and refuses a model that does not fit. Close other programs before
you start.

## What each line means

| line | meaning |
|---|---|
"""
JSON = """
`--json` prints the same as one object, in seconds, tokens, bytes and FLOPs. If a key
changes its meaning or goes away, the number `format` is raised.

| key | value |
|---|---|
| `format` | version of the keys |
| `date`, `versions`, `machine` | day, packages and system, facts of the machine and its load |
| `model`, `pass` | the measured model; pairs, passes and lengths of a step |
| `step`, `reference`, `evaluation` | the lines `training`, `reference` and `evaluation` |
| `generation`, `products`, `copy` | the lines of these names |
| `time_shares`, `sharing` | the lines `time` and `sharing`; shares are from 0 to 1 |
| `peak_bytes`, `rounds`, `seconds` | the line `memory`, repeats, and the time of the benchmark |

## Collected results

"""
TAIL = """
Rates are tokens per second through the layers.{note}

## Send a row

Run `mlx-dpo bench --json > bench.json` on an idle machine, and paste the file into an issue; of
folders it has only the name of MODEL, without its path. To add it in a pull request,
run `python scripts/tools/docs/benchmarks_page.py bench.json`, which also writes this page.
"""
NO_GPU = """ No row from a GPU has been collected yet: nothing on this
page says how fast Metal or CUDA is."""
HEADERS = {  # columns of the page, and the text of a row in each
    "machine": "{name}, {cores} cores",
    "device": "{device}",
    "model": "{model}, {dtype}",
    "training": "{step_tokens_per_s}",
    "reference": "{reference_tokens_per_s}",
    "generation": "{generation_tokens_per_s}",
    "of products": "{step_share} %",
    "products, TFLOP/s": "{products_tflops}",
    "date, version": "{date}, mlx-dpo {version}, mlx {mlx}",
    "remark": "{remark}",
}


def make_row(report: Mapping[str, Any]) -> Row:
    """Return the row of a report, the output of `mlx-dpo bench --json`."""
    machine, model = report["machine"], report["model"]
    shares = report["time_shares"]
    busy = f"busy machine (load {machine['load']})" if machine["is_busy"] else ""
    return {
        "date": report["date"],
        "version": report["versions"]["mlx-dpo"],
        "mlx": report["versions"]["mlx"],
        "system": report["versions"]["system"],
        "name": machine["name"] or "unknown",
        "cores": str(machine["cores"]),
        "memory_gb": _number(machine["memory"] / 1e9),
        "device": {"cpu": "CPU", "metal": "Metal", "cuda": "CUDA"}[machine["device"]],
        "load": str(machine["load"]),
        "model": model["name"],
        "dtype": model["dtype"] if model["bits"] is None else f"{model['bits']}-bit",
        "pairs_per_step": str(report["pass"]["pairs_per_step"]),
        "step_tokens_per_s": _number(report["step"]["tokens_per_second"]),
        "reference_tokens_per_s": _number(report["reference"]["tokens_per_second"]),
        "generation_tokens_per_s": _number(report["generation"]["tokens_per_second"]),
        "step_tflops": _number(report["step"]["flops_per_second"] / 1e12),
        "step_share": _number(100 * report["step"]["share_of_products"], 2),
        "products_tflops": _number(max(p["flops"] for p in report["products"]) / 1e12),
        "copy_gb_per_s": _number(report["copy"]["bytes_per_second"] / 1e9),
        **{f"{name}_share": _number(100 * share, 2) for name, share in shares.items()},
        "peak_gb": _number(report["peak_bytes"] / 1e9),
        "remark": busy,
    }


def page() -> str:
    """Return the page as Markdown."""
    with ROWS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = [HEADERS, ["---"] * len(HEADERS)]
    lines += [[text.format_map(row) for text in HEADERS.values()] for row in rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    meanings = "".join(f"| {name} | {meaning} |\n" for name, meaning in LINES.items())
    note = "" if {row["device"] for row in rows} - {"CPU"} else NO_GPU
    return HEAD + meanings + JSON + table + TAIL.format(note=note)


def add_row(row: Row) -> None:
    """Append a row to the collected ones; a new file gets a header."""
    is_new = not ROWS.exists()
    with ROWS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _number(value: float, digits: int = 3) -> str:
    """Format a number with so many significant digits, without an exponent."""
    return f"{float(f'{value:.{digits}g}'):f}".rstrip("0").rstrip(".")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        add_row(make_row(json.loads(Path(name).read_text(encoding="utf-8"))))
    PAGE.write_text(page(), encoding="utf-8")
