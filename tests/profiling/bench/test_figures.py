"""Speeds, shares and savings by hand, and the table from them."""

import csv
import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_dpo.profiling.bench.device_speed import CopySpeed, ProductSpeed
from mlx_dpo.profiling.bench.figures import Figures, ModelFacts, Round, Sharing, Spread, Work
from mlx_dpo.profiling.bench.table import bench_table

ROOT = Path(__file__).parents[3]
FIGURES = Figures(
    model=ModelFacts("shape of tiny", 138_480, 2, "float32", None, "shared", ("random weights",)),
    lengths=(106, 38, 46),
    work=Work(4, 2, 1, 752, step_flops=8_000, reference_flops=2_000, evaluation_flops=3_000),
    rounds=(
        Round(step=9.0, gradients=8.0, waiting=6.0, reference=2.0, evaluation=3.0),
        Round(step=10.0, gradients=9.0, waiting=6.5, reference=4.0, evaluation=3.0),
        Round(step=11.0, gradients=7.0, waiting=6.0, reference=3.0, evaluation=4.0),
    ),
    products=(ProductSpeed(4, 4, 4, 1_500.0), ProductSpeed(2, 3, 4, 2_000.0)),
    copy=CopySpeed(2**24, 1e10),
    generated_tokens_per_second=61.03,
    sharing=(Sharing("4 ranked answers, all pairs", 6, 1908, 636),),
    peak_bytes=7_086_986,
    held_out_fraction=0.2,
    seconds=15.15,
)
MACHINE = {
    "date": "2026-11-29",
    "versions": {
        "mlx-dpo": "0.1.0", "mlx": "0.32.4", "mlx-lm": "0.32.2",
        "python": "3.13.1", "system": "macOS 26.2 (arm64)",
    },
    "machine": {
        "device": "metal", "name": "Apple M5 Max", "cores": 18, "memory": 128 * 2**30,
        "neural_accelerators": True, "load": 2.31, "is_busy": False,
    },
}  # fmt: skip


def test_a_speed_is_work_over_the_median_time():
    speed = FIGURES.speed("step")
    assert speed.seconds == Spread(median=10.0, low=9.0, high=11.0)
    assert (speed.pairs_per_second, speed.tokens_per_second) == (0.4, 75.2)
    assert speed.flops_per_second == 800.0
    assert speed.share_of_products == 0.4  # of 2,000, the faster product
    assert FIGURES.speed("reference").flops_per_second == pytest.approx(2_000 / 3)
    assert FIGURES.speed("evaluation").flops_per_second == 1_000.0


def test_time_shares_add_up_to_the_whole_epoch():
    """Medians 2 (build), 6 (device), 1 (update), 3 (evaluation); a fifth of the pairs is held out.

    So 0.8 x (2 + 6 + 1) + 0.2 x 3 = 7.8.
    """
    shares = FIGURES.time_shares()
    assert shares.build == pytest.approx(1.6 / 7.8)
    assert shares.device == pytest.approx(4.8 / 7.8)
    assert shares.update == pytest.approx(0.8 / 7.8)
    assert shares.evaluation == pytest.approx(0.6 / 7.8)
    parts = (shares.build, shares.device, shares.update, shares.evaluation)
    assert sum(parts) == pytest.approx(1)


def test_a_report_becomes_a_row_of_the_page():
    """Columns of the page are fields of the row; numbers have three digits."""
    made = runpy.run_path(str(ROOT / "scripts" / "tools" / "docs" / "benchmarks_page.py"))
    row = made["make_row"](MACHINE | FIGURES.to_dict())
    assert (row["name"], row["device"], row["model"]) == ("Apple M5 Max", "Metal", "shape of tiny")
    assert (row["step_tokens_per_s"], row["step_share"], row["remark"]) == ("75.2", "40", "")
    assert all(text.format_map(row) for name, text in made["HEADERS"].items() if name != "remark")
    with made["ROWS"].open() as file:
        assert next(csv.reader(file)) == list(row)


def test_saved_tokens():
    assert FIGURES.sharing[0].saved == pytest.approx(2 / 3)


SPEED = {
    "seconds", "pairs_per_second", "tokens_per_second", "flops_per_second", "share_of_products",
}  # fmt: skip
KEYS = {  # scripts read them: a changed meaning needs another `format`
    "format": 1,
    "model": {"name", "parameters", "layers", "dtype", "bits", "scorer", "notes"},
    "pass": {
        "pairs_per_step", "pairs_per_pass", "passes_at_once", "prompt_tokens",
        "chosen_tokens", "rejected_tokens", "layer_tokens_per_step",
    },
    "step": SPEED,
    "reference": SPEED,
    "evaluation": SPEED,
    "generation": {"tokens_per_second"},
    "products": [{"rows", "inner", "columns", "flops"}] * 2,
    "copy": {"size", "bytes_per_second"},
    "time_shares": {"build", "device", "update", "evaluation"},
    "sharing": [{"name", "pairs", "whole", "computed", "saved"}],
    "peak_bytes": 7_086_986,
    "rounds": 3,
    "seconds": 15.15,
}  # fmt: skip


def keys_of(value):
    if isinstance(value, list):
        return [keys_of(each) for each in value]
    return set(value) if isinstance(value, dict) else value


def test_the_keys_of_the_json_object_are_stable():
    record = json.loads(json.dumps(FIGURES.to_dict(), allow_nan=False))
    assert {name: keys_of(value) for name, value in record.items()} == KEYS
    assert set(record["step"]["seconds"]) == {"median", "low", "high"}


def test_the_page_names_every_key():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert {key for key in (*KEYS, *MACHINE) if f"`{key}`" not in page} == set()


def test_the_table_by_hand():
    products = (ProductSpeed(4, 4, 4, 1.5e12), ProductSpeed(2, 3, 4, 2e9))
    table = bench_table(MACHINE, replace(FIGURES, products=products).to_dict())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert set("".join(rows[1])) == {"-"}
    assert ["machine", "Apple M5 Max, 18 CPU cores, 137.4 GB"] in rows
    assert ["device", "Metal, with neural accelerators"] in rows
    assert ["load", "2.3 before the start"] in rows
    assert ["", "10 s (9 to 11), median of 3"] in rows
    assert ["products", "1.5 TFLOP/s: 4 × 4 × 4 in float32"] in rows
    assert ["", "2 GFLOP/s: 2 × 3 × 4 in float32"] in rows
    assert ["memory", "7.1 MB, the peak of MLX's arrays"] in rows
    assert ["time", "build 21%, device 62%, update 10%, evaluation 8% of an epoch"] in rows
    assert ["sharing", "67% of 1,908 tokens saved: 4 ranked answers, all pairs"] in rows


def test_a_single_round_has_no_spread():
    once = replace(FIGURES, rounds=FIGURES.rounds[:1])
    assert "9 s, measured once " in bench_table(MACHINE, once.to_dict())


def test_a_busy_machine_and_long_names_stay_within_80_columns():
    facts = MACHINE["machine"] | {"name": "x" * 90, "is_busy": True, "device": "cpu"}
    names = replace(FIGURES.model, name="some-organisation/" + "a-model-" * 20, bits=4)
    table = bench_table(MACHINE | {"machine": facts}, replace(FIGURES, model=names).to_dict())
    assert "so the speeds are too low" in " ".join(table.replace("|", "").split())
    assert "accelerators" not in table
    assert {len(line) for line in table.splitlines()} == {79}
