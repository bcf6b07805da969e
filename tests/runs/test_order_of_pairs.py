"""The order of the pairs in whole runs: chosen, described, recorded and kept by a resumed run."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from mlx_dpo import DPOTrainer
from mlx_dpo.data.batches.order import PairOrder
from mlx_dpo.errors import RunError
from mlx_dpo.runs.folder import read_record
from mlx_dpo.runs.summary import summarize_training
from tests.edited_files import read_entries
from tests.runs.train_helper import train, weights

PROMPTS = 4  # of three answers each: three pairs a prompt


@pytest.fixture
def repeated(config, tmp_path):
    """Settings of a run on 12 pairs of 4 prompts, without held-out pairs."""
    path = tmp_path / "repeated.jsonl"
    rows = [
        {"prompt": f"What is {i}?", "chosen": answers[a], "rejected": answers[b]}
        for a, b in combinations(range(3), 2)  # the prompts alternate
        for i in range(PROMPTS)
        for answers in [[f"It is {i}.", f"It is {i * 7}, I think.", "No idea."]]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(config, pairs=(str(path),), valid_fraction=0.0, batch_size=5, epochs=2)


def prepared(config, **more):
    with DPOTrainer(config, **more) as trainer:
        trainer.prepare()
        return trainer, dict(summarize_training(trainer, verbose=False)).get("order")


def test_pairs_of_repeated_prompts_are_grouped_and_the_header_says_so(repeated):
    trainer, line = prepared(repeated)
    assert trainer.config.group_by_prompt is True
    assert line == "12 pairs of 4 prompts; those of one prompt stay together"
    assert trainer.record["settings"]["group_by_prompt"] is True
    assert trainer.record["chosen_settings"]["group_by_prompt"] == "12 pairs of 4 prompts"
    order = [i for step in trainer.order.epoch_steps(0) for i in step]
    prompts = [trainer.inputs.train[i].prompt for i in order]
    assert [len(set(prompts[i : i + 3])) for i in (0, 3, 6, 9)] == [1, 1, 1, 1]


def test_other_runs_keep_the_order_of_pairs_shuffled_one_by_one(repeated, config, tmp_path):
    plain = PairOrder(count=12, batch_size=5, seed=repeated.seed).epoch_steps(1)
    reasons = {
        "as requested": {"group_by_prompt": False},
        "the loss compares the pairs of a step": {"loss_type": ("aot",)},
        "the scorer plain would not gain from groups": {"scorer": "plain"},
        "the scorer shared would not gain from groups": {"scorer": "shared"},
    }
    for number, (reason, changes) in enumerate(reasons.items()):
        other = replace(repeated, output=str(tmp_path / f"run-{number}"), **changes)
        trainer, line = prepared(other)
        assert line == f"12 pairs of 4 prompts, shuffled one by one: {reason}"
        assert trainer.order.epoch_steps(1) == plain
    trainer, line = prepared(config)  # distinct prompts
    assert (trainer.config.group_by_prompt, line) == (None, None)
    asked = replace(config, group_by_prompt=True, output=str(tmp_path / "asked"))
    assert prepared(asked)[1] == "9 pairs of 9 prompts: nothing to group"


def test_the_header_says_where_groups_save_no_work(repeated):
    """As where a model has no trie scorer, which a run finds out after it has chosen the order."""
    _, line = prepared(replace(repeated, scorer="plain", group_by_prompt=True))
    together = "12 pairs of 4 prompts; those of one prompt stay together"
    assert line == f"{together}, without gain with the scorer plain"


def test_copies_of_pairs_are_no_reason_to_group(config):
    """`mix` would otherwise fill each step with copies of a few pairs."""
    copied = replace(config, mix=(2.0,), valid_fraction=0.0)
    trainer, line = prepared(copied)
    count = len(trainer.inputs.train)
    about = f"{count} pairs of {count // 2} prompts"
    assert trainer.config.group_by_prompt is None and trainer.order.prompts is None
    assert line == f"{about}, shuffled one by one: those of one prompt are copies"
    asked = replace(copied, group_by_prompt=True, output=f"{config.output}-asked")
    assert prepared(asked)[1] == f"{about}: nothing to group"


def test_a_grouped_run_resumes_bit_for_bit_in_the_middle_of_an_epoch(repeated, tmp_path):
    straight = replace(repeated, output=str(tmp_path / "straight"))
    train(straight)
    train(repeated, stop_after=2)  # of three steps an epoch
    trainer, _ = train(repeated, resume=True)
    assert trainer.start.step == 2 and trainer.order.prompts is not None
    expected = weights(straight)
    for name, value in weights(repeated).items():
        assert value.tolist() == expected[name].tolist(), name


def test_a_run_begun_before_there_were_groups_keeps_its_order(repeated, tmp_path):
    straight = replace(repeated, output=str(tmp_path / "straight"), group_by_prompt=False)
    train(straight)
    train(replace(repeated, group_by_prompt=False), stop_after=2)
    path = Path(repeated.output) / "run.json"
    record = read_entries(path)
    del record["settings"]["group_by_prompt"]  # as earlier versions wrote it
    path.write_text(json.dumps(record))
    with pytest.raises(RunError, match="the run began with group_by_prompt = its default"):
        train(replace(repeated, group_by_prompt=True), resume=True)
    trainer, _ = train(repeated, resume=True)
    assert trainer.order.prompts is None
    assert dict(summarize_training(trainer))["order"].endswith("as when the run began")
    expected = weights(straight)
    for name, value in weights(repeated).items():
        assert value.tolist() == expected[name].tolist(), name
    assert read_record(trainer.paths)["settings"]["group_by_prompt"] is None
