"""A real model on real pairs: two ranks end with the bits of one."""

import shutil
from pathlib import Path

import pytest

from tests.distributed.run_cases import differences, results

MATERIAL = Path(__file__).parents[2] / ".." / "shared" / "material"
PAIRS = MATERIAL / "data" / "hh-harmless-test" / "test.jsonl"
SETTINGS = {
    "valid_fraction": None, "batch_size": 16, "micro_batch_size": None, "scorer": "auto",
    "recompute": None, "max_length": 192, "truncation": "keep_end", "bad_pairs": "drop",
    "epochs": 1, "save_steps": 10, "eval_steps": 10, "lora_r": 8, "lora_dropout": 0.1,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not MATERIAL.is_dir(), reason="no real data and models next to the checkout")
def test_two_ranks_train_500_real_pairs_to_the_bits_of_one(runs, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(PAIRS.read_text().splitlines()[:500]) + "\n")
    model = str((MATERIAL / "models" / "stories260K").resolve())
    changes = SETTINGS | {"model": model, "pairs": [str(pairs)]}
    found = {}
    for count in (1, 2):
        run = runs[count].train("real", changes)
        found[count] = results(run)
        shutil.rmtree(run.parents[2])
    assert found[1]["run.json steps"] > 20
    assert differences(found[1], found[2]) == []
