"""`--fail-below` and `--fail-above` of `mlx-dpo eval`."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.cli.metric_thresholds import (
    Threshold,
    check_thresholds,
    flatten_numbers,
    parse_thresholds,
)
from mlx_dpo.errors import ConfigError

RECORD = {
    "pairs": 3,
    "eval_loss": 0.5,
    "finished": True,
    "of": "held-out pairs",
    "notes": [1, 2],
    "drift": {"flags": 0, "kl": {"exact": {"per_token": {"mean": 0.25, "stderr": None}}}},
}


def test_numbers_have_dotted_names():
    assert flatten_numbers(RECORD) == {
        "pairs": 3,
        "eval_loss": 0.5,
        "drift.flags": 0,
        "drift.kl.exact.per_token.mean": 0.25,
    }


def test_a_share_in_float32_meets_the_bar_of_its_decimal_number():
    found = {"a": float(np.float32(7) / np.float32(10)), "b": float(np.float32(3) / np.float32(5))}
    assert found["a"] < 0.7 and found["b"] > 0.6
    check_thresholds(parse_thresholds(["a=0.7"], ["b=0.6"]), found)
    with pytest.raises(SystemExit):
        check_thresholds(parse_thresholds(["a=0.70001"], []), found)


def test_bars_are_read():
    assert parse_thresholds(["eval_rewards/accuracies=0.7"], ["drift.flags=0", "a=b=-1e3"]) == [
        Threshold("eval_rewards/accuracies", 0.7, is_lower=True),
        Threshold("drift.flags", 0.0, is_lower=False),
        Threshold("a=b", -1000.0, is_lower=False),
    ]


@pytest.mark.parametrize("text", ["eval_loss", "eval_loss=", "=1", "eval_loss=low", "x=nan", ""])
def test_a_threshold_without_name_or_number_is_an_error(text):
    with pytest.raises(ConfigError, match=r"--fail-above: must be METRIC=VALUE with a number"):
        parse_thresholds([], [text])


@pytest.mark.parametrize(
    ("below", "above", "failed"),
    [
        (["eval_loss=0.5"], ["eval_loss=0.5"], []),  # a threshold that is just met
        (["eval_loss=0.51"], [], ["eval_loss is 0.5, below 0.51"]),
        ([], ["drift.kl.exact.per_token.mean=0.2"],
         ["drift.kl.exact.per_token.mean is 0.25, above 0.2"]),
        (["pairs=4", "eval_loss=1"], ["drift.flags=0"],
         ["pairs is 3, below 4", "eval_loss is 0.5, below 1"]),
    ],
)  # fmt: skip
def test_every_missed_bar_is_named(below, above, failed, capsys):
    thresholds = parse_thresholds(below, above)
    if failed:
        with pytest.raises(SystemExit) as ended:
            check_thresholds(thresholds, RECORD)
        assert ended.value.code == 3
    else:
        check_thresholds(thresholds, RECORD)
    assert capsys.readouterr().err.splitlines() == [f"Failed: {line}" for line in failed]


def test_a_metric_that_is_no_number_misses_its_bar():
    with pytest.raises(SystemExit):
        check_thresholds(parse_thresholds([], ["x=1"]), {"x": math.nan})


def test_an_unknown_metric_lists_what_was_measured():
    with pytest.raises(ConfigError) as caught:
        check_thresholds(parse_thresholds(["eval_los=1"], []), RECORD)
    assert str(caught.value) == (
        "--fail-below or --fail-above: unknown metric 'eval_los'; did you mean `eval_loss`? "
        "measured were pairs, eval_loss, drift.flags, drift.kl.exact.per_token.mean"
    )


def run(*words):
    return CliRunner().invoke(cli, ["eval", "run", *words])


def test_results_are_printed_and_stored_before_a_bar_fails(workplace):
    done = run("--json", "--fail-below", "eval_rewards/accuracies=1.5")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["eval_rewards/accuracies"] <= 1
    assert done.stderr.splitlines()[-1].startswith("Failed: eval_rewards/accuracies is ")
    assert len(list((workplace / "run" / "evaluations").glob("pairs-*.json"))) == 1
    assert run("--json", "--fail-below", "eval_rewards/accuracies=0").exit_code == 0


def test_a_wrong_bar_is_refused_before_anything_is_loaded(workplace):
    done = run("--fail-below", "accuracy")
    assert (done.exit_code, done.stdout) == (1, "")
    assert not (workplace / "run" / "evaluations").exists()


@pytest.mark.parametrize("flag", [["--judge", "m"], ["--drift-prompts", "3"]])
def test_settings_of_the_drift_report_need_it(workplace, flag):
    done = run(*flag)
    assert done.exit_code == 1
    assert f"`{flag[0]}` has no effect without --drift" in done.stderr
