"""Runs on several sources, on standard input, and with weights."""

import io
import json
from dataclasses import replace

import pytest

from mlx_dpo import DPOTrainer, evaluate_run
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.runs.inputs import load_inputs


def rows(start, count):
    return [
        {"prompt": f"{i}?", "chosen": f"{i} yes", "rejected": f"{i} no"}
        for i in range(start, start + count)
    ]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def sources(config, tmp_path):
    """Ten pairs and twenty others."""
    names = (write(tmp_path / "a.jsonl", rows(0, 10)), write(tmp_path / "b.jsonl", rows(100, 20)))
    return replace(config, pairs=names)


def places(pairs):
    return [pair.location.rpartition("/")[2] for pair in pairs]


def test_sources_are_joined_in_their_order(sources):
    inputs = load_inputs(replace(sources, valid_fraction=0.0))
    assert places(inputs.train) == [f"a.jsonl:{i}" for i in range(1, 11)] + [
        f"b.jsonl:{i}" for i in range(1, 21)
    ]
    assert [report.used for report in inputs.reports] == [10, 20]


def test_weights_say_how_often_and_held_out_pairs_stay_apart(sources):
    inputs = load_inputs(replace(sources, mix=(2, 0.5), valid_fraction=0.2))
    found, held = places(inputs.train), places(inputs.valid)
    assert len(held) == len(set(held)) == 6
    assert not set(held) & set(found)
    train_counts = [
        10 - sum(place[0] == "a" for place in held),
        20 - sum(p[0] == "b" for p in held),
    ]
    once = [place for place in found if place[0] == "a"]
    assert sorted(once) == sorted(2 * [*dict.fromkeys(once)])
    assert len(once) == 2 * train_counts[0]
    half = [place for place in found if place[0] == "b"]
    assert len(half) == len(set(half)) == round(train_counts[1] / 2)
    assert places(load_inputs(replace(sources, mix=(2, 0.5), valid_fraction=0.2)).train) == found
    lines = [line for report in inputs.reports for line in report.lines()]
    assert f"used 2 times per epoch: {len(once)} pairs" in lines
    assert f"used 0.5 times per epoch: {len(half)} pairs" in lines


def test_nothing_else_is_held_out_if_a_folder_has_its_own_split(config, tmp_path):
    write(tmp_path / "train.jsonl", rows(0, 10))
    write(tmp_path / "test.jsonl", rows(50, 3))
    inputs = load_inputs(replace(config, pairs=(str(tmp_path),), valid_fraction=None))
    assert (len(inputs.train), len(inputs.valid)) == (10, 3)


def test_which_half_is_drawn_depends_on_the_seed_and_is_each_sources_own(config, tmp_path):
    alike = rows(0, 20)
    names = tuple(write(tmp_path / f"{name}.jsonl", alike) for name in "ab")
    config = replace(config, pairs=names, mix=(0.5, 0.5), valid_fraction=0.0)
    drawn = [places(load_inputs(replace(config, seed=seed)).train) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    halves = [[place.split(":")[1] for place in drawn[0] if place[0] == name] for name in "ab"]
    assert halves[0] != halves[1]


def test_a_prompt_of_two_sources_is_not_in_both_splits(config, tmp_path):
    names = tuple(
        write(tmp_path / f"{name}.jsonl", [row | {"chosen": name} for row in rows(0, 10)])
        for name in "ab"
    )
    inputs = load_inputs(replace(config, pairs=names, valid_fraction=0.3))
    assert len(inputs.valid) == 6
    assert not {p.prompt for p in inputs.train} & {p.prompt for p in inputs.valid}


def test_a_run_reads_standard_input_once_and_is_not_measured_on_it_again(config, monkeypatch):
    text = "".join(json.dumps(row) + "\n" for row in rows(0, 8)).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    config = replace(config, pairs=("-",), epochs=1)
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        list(trainer.steps())
    assert json.loads((trainer.paths.record).read_text())["settings"]["pairs"] == ["-"]
    with pytest.raises(
        ConfigError, match="read its pairs from standard input, which cannot be read again"
    ):
        evaluate_run(config.output)


def test_a_setting_that_any_source_uses_has_an_effect(sources, tmp_path):
    rated = [{"prompt": "x", "completions": ["a", "b"], "scores": [1, 2]}]
    names = (*sources.pairs, write(tmp_path / "c.jsonl", rated))
    assert len(load_inputs(replace(sources, pairs=names, ranked="all")).reports) == 3
    with pytest.raises(ConfigError, match="`ranked` has no effect"):
        load_inputs(replace(sources, ranked="all"))


def test_a_column_that_one_source_lacks_is_named_with_its_place(sources):
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column `q` \(found `chosen`, `prompt`, "):
        load_inputs(replace(sources, column=("prompt=q",)))
