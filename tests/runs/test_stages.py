import json
import shutil

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dpo import ConfigError, DataError, DPOConfig, DPOTrainer, RunError, evaluate_run
from mlx_dpo.cli import cli
from mlx_dpo.io.checksums import read_checked_json
from mlx_dpo.runs.folder import RunPaths, read_record
from mlx_dpo.runs.stages.find import find_run, has_run
from mlx_dpo.runs.stages.settings import StageSettings
from mlx_dpo.runs.stages.training import StagedTraining, read_stages
from mlx_dpo.saved_runs.respond import open_any_responder


@pytest.fixture
def values(trained, tmp_path):
    return {
        "model": str(trained / "base"),
        "pairs": [str(trained / "pairs.jsonl")],
        "output": str(tmp_path / "staged"),
        "valid_fraction": 0.25,
        "batch_size": 3,
        "lora_r": 4,
        "epochs": 1,
        "learning_rate": 1e-3,
        "beta": 0.3,
        "samples": 0,
        "save_steps": 1,
    }


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "answers.jsonl"
    lines = [{"prompt": f"Where is {n}?", "completion": f"On the hat, {n}."} for n in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make(values, names=("sft", "dpo"), **first):
    return StageSettings(names, values, {"epochs": 1, "learning_rate": 2e-3} | first)


def train(settings, *, steps=None, resume=False):
    """Train the stages; with `steps`, stop the process after so many steps of all stages."""
    left = steps
    with StagedTraining(settings, resume=resume) as training:
        for _, stage in training.stages():
            with DPOTrainer(stage.config, resume=True) as trainer:
                trainer.prepare()
                for row in trainer.steps():
                    if left is not None and "loss" in row and (left := left - 1) == 0:
                        trainer.request_stop()
            if left == 0:
                return


def weights(folder):
    return mx.load(str(folder / "adapters.safetensors"))


def same(first, second):
    return all(mx.array_equal(value, second[name]).item() for name, value in first.items())


def test_stages_are_runs_of_which_the_second_starts_from_the_first(values, rows, trained, tmp_path):
    train(make(values, pairs=[str(rows)]))
    sft, dpo = (tmp_path / "staged" / name for name in ("sft", "dpo"))
    by_hand = {"output": str(tmp_path / "sft"), "pairs": [str(rows)], "loss_type": "sft"}
    given = {name: value for name, value in values.items() if name != "beta"}
    for changes in (
        given | by_hand | {"learning_rate": 2e-3},
        values | {"output": str(tmp_path / "dpo"), "start_adapter": str(sft), "lora_r": None},
    ):
        with DPOTrainer(DPOConfig.from_dict(changes)) as trainer:
            trainer.prepare()
            list(trainer.steps())
    assert same(weights(sft), weights(tmp_path / "sft"))
    assert same(weights(dpo), weights(tmp_path / "dpo"))
    assert not same(weights(sft), weights(dpo))
    metrics = evaluate_run(str(dpo)).metrics
    assert metrics.margins == pytest.approx(evaluate_run(str(tmp_path / "dpo")).metrics.margins)
    assert read_record(RunPaths(dpo))["provenance"]["start_adapter"]


def test_without_rows_of_its_own_the_first_stage_takes_the_chosen_answers(values, tmp_path):
    first, second = make(values).stages()
    assert first.config.pairs == second.config.pairs
    train(make(values))
    record = read_record(RunPaths(tmp_path / "staged" / "sft"))
    assert record["counts"] == {"train": 9, "valid": 3}


@pytest.mark.parametrize("steps", [1, 3, 4])  # in the first stage, at its end, in the second
def test_stages_stopped_anywhere_resume_to_the_same_weights(values, tmp_path, steps):
    train(make(values))
    other = values | {"output": str(tmp_path / "stopped")}
    train(make(other), steps=steps)
    finished = read_record(RunPaths(tmp_path / "stopped" / "sft"))["state"] == "finished"
    assert finished == (steps >= 3)
    assert not (tmp_path / "stopped" / "dpo" / "adapters.safetensors").exists()
    train(make(other), resume=True)
    for name in ("sft", "dpo"):
        straight, stopped = tmp_path / "staged" / name, tmp_path / "stopped" / name
        assert same(weights(straight), weights(stopped))


def test_a_process_killed_before_a_stage_began_loses_nothing(values, tmp_path):
    with StagedTraining(make(values)):
        pass  # killed after the record was written
    assert read_stages(tmp_path / "staged") is not None
    with pytest.raises(RunError, match="no stage has begun; continue with `mlx-dpo train --resume"):
        find_run(str(tmp_path / "staged"))
    train(make(values), steps=3, resume=True)
    (tmp_path / "staged" / "dpo").mkdir(exist_ok=True)  # killed when its folder was made
    train(make(values), resume=True)
    assert find_run(str(tmp_path / "staged"))[1]["state"] == "finished"


def test_a_folder_of_stages_opens_the_last_finished_stage(values, tmp_path, caplog):
    folder = tmp_path / "staged"
    train(make(values), steps=4)
    assert has_run(str(folder))
    assert find_run(str(folder))[0].folder == folder / "sft"
    assert f"{folder}: using the stage `sft` (1 of 2, 1 finished)" in caplog.text
    caplog.clear()
    train(make(values), resume=True)
    assert find_run(str(folder))[0].folder == folder / "dpo"
    assert "using the stage" not in caplog.text
    assert open_any_responder(str(folder)).provenance["run"] == str(folder)
    shutil.rmtree(folder / "dpo")
    (folder / "sft" / "run.json").write_text("{}")
    with pytest.raises(RunError, match=r"run\.json"):
        find_run(str(folder))


def test_a_card_is_written_and_uploaded_with_the_last_stage(values, tmp_path):
    folder = tmp_path / "staged"
    train(make(values))
    result = CliRunner().invoke(cli, ["push", str(folder), "me/aligned", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert f"Written to {folder}/dpo/README.md" in result.stderr
    assert not (folder / "README.md").exists()


def test_settings_are_for_both_stages_or_for_the_one_they_act_on(values, rows):
    values |= {"margin_column": "m", "column": ["prompt=q"], "start_adapter": None, "seed": 4}
    first, second = (stage.config for stage in make(values, pairs=[str(rows)]).stages())
    assert (first.seed, second.seed, first.batch_size, second.batch_size) == (4, 4, 3, 3)
    assert (first.learning_rate, second.learning_rate) == (2e-3, 1e-3)
    assert (first.lora_r, second.lora_r) == (4, None)
    assert (first.beta, second.beta) == (None, 0.3)
    assert (first.column, second.column) == ((), ("prompt=q",))
    assert (first.margin_column, second.margin_column) == (None, "m")
    assert first.loss_type == ("sft",)
    assert second.start_adapter == first.output
    assert make(values).stages()[0].config.column == ("prompt=q",)  # the rows are the pairs


def test_the_second_stage_may_be_any_loss_of_preferences(values):
    stages = make(values | {"beta": None}, ("sft", "simpo")).stages()
    assert [stage.name for stage in stages] == ["sft", "simpo"]
    assert stages[1].config.loss_type == ("simpo",)
    both = make(values | {"loss_type": ["sigmoid", "sft"]}).stages()[1].config
    assert both.loss_type == ("sigmoid", "sft")


@pytest.mark.parametrize(
    ("names", "changes", "first", "message"),
    [
        (("dpo", "sft"), {}, {}, "`stages` must be sft,dpo or sft and another loss"),
        (("sft",), {}, {}, "got sft"),
        (("sft", "sft"), {"beta": None}, {}, "with a loss of preferences"),
        (("sft", "simp"), {}, {}, "unknown loss `simp`"),
        (("sft", "ipo"), {"loss_type": ["ipo"]}, {}, "no effect with the stage `ipo`"),
        (
            ("sft", "dpo"),
            {},
            {"beta": 1.0},
            "stage `sft`: `beta` has no effect with loss_type `sft`",
        ),
        (("sft", "dpo"), {}, {"output": "x"}, "`output` cannot be set for the stage `sft`"),
        (("sft", "dpo"), {}, {"lr": 1}, "stage `sft`: unknown setting `lr`"),
    ],
)
def test_stages_that_cannot_be_trained_are_refused_before_anything_is_written(
    values, tmp_path, names, changes, first, message
):
    with pytest.raises(ConfigError, match=message):
        StagedTraining(make(values | changes, names, **first))
    assert not (tmp_path / "staged").exists()


def test_other_settings_are_refused_on_resume_and_finished_stages_stay(values, tmp_path):
    train(make(values), steps=1)
    for changed in (
        make(values | {"seed": 9}),
        make(values | {"beta": 0.9}),
        make(values, learning_rate=1e-4),
        make(values | {"beta": None}, ("sft", "simpo")),
    ):
        with (
            pytest.raises(RunError, match="began with another"),
            StagedTraining(changed, resume=True),
        ):
            pass
    with pytest.raises(RunError, match="add --resume"), StagedTraining(make(values)):
        pass
    train(make(values), resume=True)
    with pytest.raises(RunError, match="all stages are finished"):
        train(make(values), resume=True)


def test_rows_that_do_not_exist_are_an_error_before_the_first_stage(values, rows, tmp_path):
    missing = str(tmp_path / "missing.jsonl")
    for settings in (
        make(values | {"pairs": [missing]}, pairs=[str(rows)]),
        make(values, pairs=[missing]),
        make(values | {"valid": missing, "valid_fraction": None}),
    ):
        with pytest.raises(DataError, match=r"missing\.jsonl: no such file"):
            train(settings)
    with pytest.raises(ConfigError, match="only one of the stages"):
        train(make(values | {"pairs": ["-"]}))
    assert not (tmp_path / "staged").exists()


def test_after_an_error_at_its_start_the_first_stage_begins_with_other_settings(
    values, rows, tmp_path
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Who?", "completion": "He.", "label": true}\n')
    with pytest.raises(DataError, match="would train on bad answers too"):
        train(make(values, pairs=[str(bad)]))
    assert not (tmp_path / "staged").exists()
    with StagedTraining(make(values, pairs=[str(bad)])):
        pass  # killed after the record was written
    train(make(values, pairs=[str(rows)]), steps=1)
    assert read_stages(tmp_path / "staged").first["pairs"] == [str(rows)]


def test_a_folder_with_other_files_is_left_alone(values, tmp_path):
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty and without stages"):
        train(make(values))
    assert [path.name for path in (tmp_path / "staged").iterdir()] == ["notes.txt"]


def test_a_damaged_record_is_an_error(values, tmp_path):
    with StagedTraining(make(values)):
        pass
    path = tmp_path / "staged" / "stages.json"
    record = read_checked_json(path)[0]
    assert record["stages"] == ["sft", "dpo"]
    path.write_text(path.read_text().replace('"seed"', '"sed"').replace("0.3", "0.4"))
    with pytest.raises(RunError, match=r"stages\.json"):
        read_stages(tmp_path / "staged")
