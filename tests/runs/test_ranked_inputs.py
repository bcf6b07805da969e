"""Data that a loss of ranked data cannot take is refused when it is loaded."""

import json

import mlx.core as mx
import pytest

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.runs.build import make_order, make_plan
from mlx_dpo.runs.inputs import load_inputs, row_rules
from mlx_dpo.scoring.scorers import plain_scorer
from mlx_dpo.scoring.select_scorer import ScorerChoice
from mlx_dpo.types import PairLogps
from tests.checkpoints import make_checkpoint

RANKED = [
    {
        "prompt": f"{n}?",
        "completions": ["no", f"it is {n}", f"{n}"],
        "scores": [0.0, 1.0, 0.5],
    }
    for n in range(4)
]
PLAIN = [{"prompt": "a?", "chosen": "b", "rejected": "c"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ranked") / "base")


def load(base, tmp_path, rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DPOConfig(
        model=str(base), pairs=[str(path)], output=str(tmp_path / "run"), max_length=64,
        **{"valid_fraction": 0.25} | settings,
    )  # fmt: skip
    return config, load_inputs(config)


@pytest.mark.parametrize("loss", ["plackett_luce", "lipo_lambda"])
def test_a_loss_of_lists_has_all_pairs_and_whole_lists_in_each_split(base, tmp_path, loss):
    config, inputs = load(base, tmp_path, RANKED, loss_type=[loss])
    assert row_rules(config).ranked == "all"
    assert (len(inputs.train), len(inputs.valid)) == (9, 3)
    for pairs in inputs.splits.values():
        ids = [pair.ranking.list_id for pair in pairs]
        assert {ids.count(number) for number in ids} == {3}


def test_every_step_has_whole_lists(base, tmp_path):
    """9 pairs of 3 lists: steps of up to 4 pairs have one list each, and cut none."""
    steps = {"batch_size": 4, "learning_rate": 1e-3}
    config, inputs = load(base, tmp_path, RANKED, loss_type=["plackett_luce"], **steps)
    zeros, count = mx.zeros((9,)), 3
    choice = ScorerChoice(plain_scorer, plain_scorer, "plain", "as requested")
    plan = make_plan(
        config, inputs.train, PairLogps(zeros, zeros), choice=choice, total_steps=count
    )
    orders = make_order(config, inputs.train).epoch_steps(0), [plan.indices(i) for i in (1, 2, 3)]
    for steps in orders:
        ids = [[inputs.train[i].ranking.list_id for i in step] for step in steps]
        assert [len(step) for step in ids] == [3] * count
        assert [len(set(step)) for step in ids] == [1] * count
        assert len({step[0] for step in ids}) == count


@pytest.mark.parametrize("rows", [PLAIN, [*RANKED, *PLAIN]])
def test_plain_pairs_are_refused_in_one_line(base, tmp_path, rows):
    with pytest.raises(DataError) as error:
        load(base, tmp_path, rows, loss_type=["plackett_luce"], valid_fraction=0.0)
    assert str(error.value) == (
        "loss_type `plackett_luce` needs ranked lists, rows with `completions` and their scores "
        "(found 1 plain pairs); use --loss-type sigmoid, or other rows"
    )


def test_scores_whose_powers_of_two_are_no_weights_are_refused(base, tmp_path):
    percent = [row | {"scores": [0, 90, 50]} for row in RANKED]
    load(base, tmp_path, percent, loss_type=["plackett_luce"])
    with pytest.raises(DataError, match=r"must be within ±20 \(found 90\); divide the scores"):
        load(base, tmp_path, percent, loss_type=["lipo_lambda"])


def test_a_loss_of_score_gaps_needs_the_scores(base, tmp_path):
    with pytest.raises(ConfigError, match="needs the gap of the scores; name the column"):
        load(base, tmp_path, RANKED, loss_type=["rpo_bwd_kl"])
    _, inputs = load(
        base, tmp_path, RANKED, loss_type=["rpo_bwd_kl"], margin_column="score", ranked="all",
    )  # fmt: skip
    assert sorted({pair.margin for pair in inputs.train}) == [0.5, 1.0]


def test_scores_are_part_of_what_a_run_of_lists_depends_on(base, tmp_path):
    """Other scores in the same order are other weights; a run of pairs does not read them."""
    other = [row | {"scores": [0.0, 1.0, 0.75]} for row in RANKED]
    for loss, differs in (("lipo_lambda", True), ("sigmoid", False)):
        settings = {"loss_type": [loss], "ranked": "all"}
        loaded = [load(base, tmp_path, rows, **settings) for rows in (RANKED, other)]
        digests = [inputs.provenance(config)["train"] for config, inputs in loaded]
        assert (digests[0] != digests[1]) == differs
