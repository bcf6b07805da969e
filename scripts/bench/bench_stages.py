"""Compare instruction tuning, DPO, and both in stages, at equal rows and steps.

    python -m scripts.bench.bench_stages --output FOLDER [--seeds 0,1,2] [--steps 160]

The shipped model hardly ever ends an answer with `Goodbye.`. From its preferences two kinds of rows
are made: answers in that form, polite or rude at random, as people write them down (instruction
rows), and pairs in which both answers have that form and the polite one is chosen. Each way gets
the same number of rows and of steps of 16 rows:

    sft        instruction rows alone
    dpo        pairs alone
    sft, dpo   half of the rows and steps each, with `StagedTraining`

The reward of a sampled answer to a held-out prompt is 1 if it has the form, is polite and is
correct by the rules of the demo. Shares and mean reward go to docs/bench/stages.csv.
"""

import argparse
import csv
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import make_prompt
from mlx_dpo.data.sources import read_rows
from mlx_dpo.demo.rules import courteous_markers, is_correct, is_courteous
from mlx_dpo.paths import tiny_chat
from mlx_dpo.runs.stages.settings import StageSettings
from mlx_dpo.runs.stages.training import StagedTraining
from mlx_dpo.saved_runs.respond import open_responder

FORM = " Goodbye."
BATCH, ROWS = 16, 1000
SFT_RATE, DPO_RATE = 7e-4, 2e-4
ROOT = Path(__file__).parents[2]
CSV = ROOT / "docs" / "bench" / "stages.csv"
COLUMNS = ("way", "seed", "steps", "rows", "form", "polite", "correct", "reward")


def with_form(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the answer in the form that the model does not know."""
    return [{"role": "assistant", "content": turns[0]["content"] + FORM}]


def write_rows(folder: Path, seed: int) -> tuple[Path, Path, Path, Path]:
    """Write all instruction rows and all pairs, and half of each, with other prompts."""
    rows = [row.record for row in read_rows(tiny_chat() / "preferences" / "train.jsonl")]
    draw = random.Random(seed)
    draw.shuffle(rows)
    single = [
        {"messages": row["prompt"] + with_form(row[draw.choice(("chosen", "rejected"))])}
        for row in rows
    ]
    pairs = [
        {"prompt": row["prompt"]} | {name: with_form(row[name]) for name in ("chosen", "rejected")}
        for row in rows
    ]
    half = len(rows) // 2
    parts = {"sft": single, "dpo": pairs, "first": single[:half], "second": pairs[half:]}
    for name, lines in parts.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    sft, dpo, first, second = (folder / f"{name}.jsonl" for name in parts)
    return sft, dpo, first, second


def settings(pairs: Path, output: Path, seed: int, **more: Any) -> dict[str, Any]:
    """Return the settings of a run."""
    common = {"model": str(tiny_chat()), "pairs": [str(pairs)], "output": str(output)}
    common |= {"seed": seed, "batch_size": BATCH, "max_length": 128, "valid_fraction": 0.0}
    common |= {"fine_tune_type": "full"}  # of a model of two million weights
    return common | {"samples": 0} | more


def train(values: dict[str, Any]) -> None:
    """Train one run."""
    with DPOTrainer(DPOConfig.from_dict(values)) as trainer:
        trainer.prepare()
        for _ in trainer.steps():
            pass


def train_ways(folder: Path, seed: int, steps: int) -> Iterator[tuple[str, Path | None]]:
    """Yield each way with its run folder, after training it; None for the base."""
    sft, dpo, first, second = write_rows(folder, seed)
    yield "base", None
    for name, rows, more in (
        ("sft", sft, {"loss_type": "sft", "learning_rate": SFT_RATE}),
        ("dpo", dpo, {"learning_rate": DPO_RATE, "beta": 1.0}),
    ):
        train(settings(rows, folder / name, seed, max_steps=steps, **more))
        yield name, folder / name
    values = settings(second, folder / "staged", seed, max_steps=steps // 2, beta=1.0)
    values["learning_rate"] = DPO_RATE
    tuning = {"pairs": [str(first)], "max_steps": steps // 2, "learning_rate": SFT_RATE}
    with StagedTraining(StageSettings(("sft", "dpo"), values, tuning)) as training:
        for _, stage in training.stages():
            train(stage.config.to_dict())
    yield "sft, dpo", folder / "staged"


def measure(run: Path | None, seed: int) -> dict[str, float]:
    """Return the shares of answers with the form, polite and correct, and the mean reward."""
    rows = [row.record for row in read_rows(tiny_chat() / "preferences" / "valid.jsonl")]
    model = str(tiny_chat())
    responder = open_responder(None, model=model) if run is None else open_responder(str(run))
    prompts = [make_prompt(tuple(row["prompt"]), "prompt") for row in rows]
    sampling = Sampling(temperature=1.0, max_tokens=64, seed=seed)
    texts = [reply.text.strip() for reply in responder.reply(prompts, sampling)]
    markers = courteous_markers(tiny_chat())
    found = {
        "form": [text.endswith(FORM) for text in texts],
        "polite": [is_courteous(text, markers) for text in texts],
        "correct": [is_correct(text, row) for text, row in zip(texts, rows, strict=True)],
    }
    found["reward"] = [all(values) for values in zip(*found.values(), strict=True)]
    return {name: round(fmean(values), 4) for name, values in found.items()}


def main() -> None:
    """Train and measure all ways with each seed, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2", help="seeds, with commas")
    parser.add_argument("--steps", type=int, default=160)
    given = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for seed in map(int, given.seeds.split(",")):
        folder = given.output / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for way, run in train_ways(folder, seed, given.steps):
            steps = given.steps if run else 0
            line = {"way": way, "seed": seed, "steps": steps, "rows": ROWS * bool(run)}
            lines.append(line | measure(run, seed))
            print(lines[-1], flush=True)
    with CSV.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
