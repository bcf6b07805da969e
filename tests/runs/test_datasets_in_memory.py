"""Runs on pairs in memory: lists of dictionaries and `datasets.Dataset`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from mlx_dpo import DPOTrainer, evaluate_run
from mlx_dpo.errors import ConfigError, DataError, RunError
from tests.runs.train_helper import weights


@pytest.fixture
def rows(pairs_file):
    return [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]


def run(config, stop_after=None, **datasets):
    with DPOTrainer(config, **datasets) as trainer:
        trainer.prepare()
        for row in trainer.steps():
            if row["step"] == stop_after:
                trainer.request_stop()
    return trainer


@pytest.mark.parametrize("make", [list, Dataset.from_list], ids=["list", "dataset"])
def test_pairs_in_memory_train_the_same_adapters_as_a_file(config, rows, make, tmp_path):
    run(config)
    in_memory = replace(config, pairs=(), output=str(tmp_path / "memory"))
    trainer = run(in_memory, train_dataset=make(rows))
    assert trainer.record["datasets_in_memory"] == ["train"]
    expected = weights(config)
    for name, value in weights(in_memory).items():
        assert value.tolist() == expected[name].tolist(), name


def test_eval_dataset_is_held_out(config, rows):
    config = replace(config, pairs=(), valid_fraction=None)
    trainer = run(config, train_dataset=rows[:9], eval_dataset=rows[9:])
    assert (len(trainer.inputs.train), len(trainer.inputs.valid)) == (9, 3)
    assert trainer.inputs.valid[0].location.startswith("eval_dataset[")
    with pytest.raises(ConfigError, match="read its pairs from memory"):
        evaluate_run(config.output)


def test_resuming_checks_the_pairs_in_memory(config, rows):
    config = replace(config, pairs=())
    run(config, stop_after=2, train_dataset=rows)
    with (
        DPOTrainer(config, resume=True, train_dataset=rows[::-1]) as trainer,
        pytest.raises(RunError, match="the training pairs changed"),
    ):
        trainer.load()
    assert run(config, resume=True, train_dataset=rows).record["state"] == "finished"


def test_pairs_are_given_once(config, rows):
    with pytest.raises(ConfigError, match="`pairs` has no effect together with `train_dataset`"):
        DPOTrainer(config, train_dataset=rows)
    with pytest.raises(ConfigError, match="`pairs` is not set"):
        DPOTrainer(replace(config, pairs=()))
    with pytest.raises(DataError, match="train_dataset: expected a list of dictionaries"):
        DPOTrainer(replace(config, pairs=()), train_dataset={"prompt": ["a"]})
