import json
import re
import shutil

import pytest
from click.testing import CliRunner

from mlx_dpo import DPOTrainer
from mlx_dpo.cli import cli
from mlx_dpo.demo.rules import contains_word, courteous_markers, is_courteous, is_right
from mlx_dpo.demo.tour import MARK, Tour
from mlx_dpo.errors import RunError
from mlx_dpo.paths import tiny_chat
from mlx_dpo.training import checkpoint


def test_courtesy_is_one_of_the_markers_in_any_case():
    markers = courteous_markers(tiny_chat())
    assert is_courteous("OF COURSE! It is 7.", markers)
    assert not is_courteous("7, obviously.", markers)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("It is 7.", True), ("it is 17.", False), ("7-8", False), ("seven", False), ("(7)", True)],
)
def test_content_is_a_whole_word(answer, right):
    assert contains_word(answer, "7") is right
    assert is_right(answer, {"expects": ["7"]}) is right


def test_lists_count_different_members():
    row = {"expects_any": ["apple", "pear", "fig"], "count": 2}
    assert is_right("Pear and fig.", row)
    assert not is_right("Pear, pear and pear.", row)


def test_the_demos_folder_is_replaced_and_no_other(tmp_path):
    tour = Tour(tmp_path / "demo")
    assert not tour.clear()
    (tmp_path / "demo" / "model").mkdir()
    assert tour.clear()
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [MARK]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(RunError, match="not of an earlier demo"):
        Tour(tmp_path / "mine").clear()


@pytest.fixture
def few_pairs(tmp_path, monkeypatch):
    """The shipped model with few pairs: every stage of the demo in seconds."""
    source = tmp_path / "tiny-chat"
    shutil.copytree(tiny_chat(), source)
    for name, count in (("train", 32), ("valid", 8)):
        path = source / "preferences" / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    monkeypatch.setattr("mlx_dpo.demo.tour.tiny_chat", lambda: source)
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return source


def test_the_demo_shows_every_stage_and_what_to_type_next(few_pairs, tmp_path):
    result = CliRunner().invoke(cli, ["demo"])
    assert result.exit_code == 0, result.output
    assert re.findall(r"^\d\. \w+", result.output, re.MULTILINE) == [
        "1. Convert", "2. Ask", "3. Train", "4. Ask",
    ]  # fmt: skip
    assert "step 4/4" in result.output
    assert "8 held-out pairs" in result.output
    assert "Talk to it: mlx-dpo chat mlx-dpo-demo/run" in result.output
    record = json.loads((tmp_path / "mlx-dpo-demo" / "run" / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["model_folder"] == "../model"


def test_the_divergence_of_a_policy_from_itself_is_zero(few_pairs, tmp_path):
    """Adapters that were never trained leave the base as it is."""
    tour = Tour(tmp_path / "demo")
    tour.clear()
    tour.convert()
    with DPOTrainer(tour.config()) as run:
        run.prepare()
        checkpoint.save(
            run.paths.checkpoints, run.policy, run.optimizer, run.start, run.adapter_config
        )
    answers = tour.judged(["Hello there."] * len(tour.asked))
    assert tour.divergence(answers) == pytest.approx(0.0, abs=1e-5)
