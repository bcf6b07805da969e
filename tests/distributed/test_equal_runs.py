"""A run over several ranks has the results of the same run on one, bit for bit."""

import pytest

from tests.distributed.run_cases import CASES, LABELLED, SYNCED, differences

# Much of what ranks share, in one run; the slow tests have it one by one.
GATE = LABELLED | SYNCED | {"lora_dropout": 0.3, "eval_steps": 4}


def test_a_run_of_kto_is_equal_over_one_two_and_three_ranks(runs):
    expected = runs[1].results("gate", GATE)
    for count in (2, 3):
        assert differences(expected, runs[count].results("gate", GATE)) == [], count


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
