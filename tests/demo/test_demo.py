import json
import re
import shutil

import pytest
from click.testing import CliRunner

from mlx_dpo import DPOTrainer
from mlx_dpo.cli import cli
from mlx_dpo.demo.rules import contains_word, courteous_markers, is_correct, is_courteous
from mlx_dpo.demo.tour import MARKER_FILE, Demo
from mlx_dpo.errors import RunError
from mlx_dpo.paths import tiny_chat
from mlx_dpo.training import checkpoint


def test_an_answer_with_a_marker_in_any_case_is_courteous():
    markers = courteous_markers(tiny_chat())
    assert is_courteous("OF COURSE! It is 7.", markers)
    assert not is_courteous("7, obviously.", markers)


@pytest.mark.parametrize(
    ("answer", "correct"),
    [("It is 7.", True), ("it is 17.", False), ("7-8", False), ("seven", False), ("(7)", True)],
)
def test_expected_words_must_be_whole_words(answer, correct):
    assert contains_word(answer, "7") is correct
    assert is_correct(answer, {"expects": ["7"]}) is correct


def test_repeated_words_count_once():
    row = {"expects_any": ["apple", "pear", "fig"], "count": 2}
    assert is_correct("Pear and fig.", row)
    assert not is_correct("Pear, pear and pear.", row)


def test_only_a_folder_of_the_demo_is_replaced(tmp_path):
    demo = Demo(tmp_path / "demo")
    assert not demo.clear()
    (tmp_path / "demo" / "model").mkdir()
    assert demo.clear()
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [MARKER_FILE]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(RunError, match="not of an earlier demo"):
        Demo(tmp_path / "mine").clear()


@pytest.fixture
def few_pairs(tmp_path, monkeypatch):
    """Return a copy of the shipped model with few pairs, so that the demo takes seconds."""
    source = tmp_path / "tiny-chat"
    shutil.copytree(tiny_chat(), source)
    for name, count in (("train", 32), ("valid", 8)):
        path = source / "preferences" / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    monkeypatch.setattr("mlx_dpo.demo.tour.tiny_chat", lambda: source)
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return source


def test_the_demo_prints_every_stage_and_the_next_command(few_pairs, tmp_path):
    result = CliRunner().invoke(cli, ["demo"])
    assert result.exit_code == 0, result.output
    assert re.findall(r"^\d\. \w+", result.output, re.MULTILINE) == [
        "1. Convert", "2. Ask", "3. Train", "4. Ask",
    ]  # fmt: skip
    assert "step 4/4" in result.output
    assert "8 held-out pairs" in result.output
    assert "Talk to it: mlx-dpo chat mlx-dpo-demo/run" in result.output
    figures, samples = (result.output.index(t) for t in ("polite answers", "sampled answers"))
    assert figures < samples  # the figures first
    record = json.loads((tmp_path / "mlx-dpo-demo" / "run" / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["model_folder"] == "../model"


def test_answers_that_changed_in_politeness_are_counted_both_ways(few_pairs, tmp_path):
    demo = Demo(tmp_path / "demo")
    count = len(demo.prompt_rows)
    before = demo.rate(["7.", "Gladly! 7.", "7.", "Gladly! 7."] + ["7."] * (count - 4))
    after = demo.rate(["Gladly! 7.", "7.", "8.", "Gladly! 8."] + ["7."] * (count - 4))
    changes = demo.politeness_changes(before, after)
    assert (changes.became_polite, changes.became_rude) == ([0], [1])


def test_the_kl_divergence_of_an_untrained_policy_is_zero(few_pairs, tmp_path):
    """Fresh adapters do not change the base."""
    demo = Demo(tmp_path / "demo")
    demo.clear()
    demo.convert()
    with DPOTrainer(demo.config()) as trainer:
        trainer.prepare()
        checkpoint.save(
            trainer.paths.checkpoints,
            trainer.policy,
            trainer.optimizer,
            trainer.start,
            trainer.adapter_config,
        )
    answers = demo.rate(["Hello there."] * len(demo.prompt_rows))
    assert demo.divergence(answers) == pytest.approx(0.0, abs=1e-5)
