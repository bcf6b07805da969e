"""A run over several ranks has the results of the same run on one, bit for bit."""

import pytest

from tests.distributed.run_cases import CASES, LABELLED, SYNCED, differences

# Each has several of what is shared out among ranks; the slow tests have them one by one.
GATE = {
    "dropout, evaluations": {"lora_dropout": 0.3, "eval_steps": 4},
    "kto, moving reference": LABELLED | SYNCED | {"epochs": 2},
}


def test_some_runs_are_equal_over_one_two_and_three_ranks(runs):
    for name, changes in GATE.items():
        expected = runs[1].results(name, changes)
        for count in (2, 3):
            assert differences(expected, runs[count].results(name, changes)) == [], (name, count)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_is_equal_over_one_two_and_three_ranks(runs, name):
    expected = runs[1].results(name, CASES[name])
    if name == "early stopping":
        assert expected["run.json stopped_early_at"], "the case no longer does what it is for"
    if name == "best":
        assert expected["run.json best_checkpoint"]["step"] < expected["run.json steps"]
    for count in (2, 3):
        assert differences(expected, runs[count].results(name, CASES[name])) == [], count
