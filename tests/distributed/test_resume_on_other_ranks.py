"""A run that stops on some number of ranks goes on, on any other, as if nothing had happened."""

import shutil

import pytest

from tests.distributed.run_cases import CASES, LABELLED, SYNCED, differences, results

EVERY_STEP = {"save_steps": 1}
RESUMED = {
    "dropout": {"lora_dropout": 0.3},
    "moving reference, wpo, evaluations": SYNCED | {"use_weighting": True, "eval_steps": 2},
    "kto": LABELLED | {"lora_dropout": 0.2},
    "best": CASES["best"],
    "early stopping": CASES["early stopping"],
    "samples": {"samples": 2, "eval_steps": 2},
    "full": CASES["full"],
    "chosen by the run": CASES["chosen by the run"],
}


def stopped_run(runs, count, changes, step):
    """Train on `count` ranks until the last of them asks for a stop after `step`."""
    name = f"stopped {step}"
    run = runs[count].train(name, changes, stop_after=step, stop_rank=count - 1)
    state = results(run)
    assert state["run.json state"] == "unfinished"
    assert f"checkpoints/step-{step:06d}/optimizer.safetensors" in state
    return run


def test_a_run_stopped_on_two_ranks_goes_on_with_three_and_with_one(runs):
    changes = EVERY_STEP | RESUMED["dropout"] | {"epochs": 2}
    expected = runs[1].results("straight", changes)
    run = stopped_run(runs, 2, changes, 2)
    for count in (1, 3):
        found = runs[count].results("resumed", changes, start=run)
        assert differences(expected, found) == [], count
    shutil.rmtree(run.parents[2])


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_at_any_checkpoint_ends_like_the_uninterrupted_one(runs, name, before):
    changes = EVERY_STEP | RESUMED[name]
    expected = runs[1].results("straight", changes)
    last = expected["run.json stopped_early_at"] or expected["run.json steps"]
    for step in range(1, last):
        run = stopped_run(runs, before, changes, step)
        for after in (1, 2, 3):
            found = runs[after].results("resumed", changes, start=run)
            assert differences(expected, found) == [], f"{before} -> {after} at {step}"
        shutil.rmtree(run.parents[2])
