"""Records of runs on disk, also those of earlier versions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_dpo import DPOTrainer, evaluate_run
from mlx_dpo.errors import ConfigError, ModelError, RunError
from mlx_dpo.io.checksums import check_line
from mlx_dpo.runs.build import inference_limit, make_dataset_scorer
from mlx_dpo.runs.folder import (
    OLD_KEYS,
    OLD_PROVENANCE_KEYS,
    RunPaths,
    read_record,
    reference_provenance,
)
from tests.edited_files import read_entries
from tests.runs.train_helper import train, weights


def write_with_old_keys(folder):
    """Rewrite `run.json` with the key names of earlier versions."""
    path = Path(folder) / "run.json"
    record = read_entries(path)
    old = {new: key for key, new in OLD_KEYS.items()}
    old_provenance = {new: key for key, new in OLD_PROVENANCE_KEYS.items()}
    assert old.keys() <= record.keys()
    record = {old.get(key, key): value for key, value in record.items()}
    provenance = record["provenance"].items()
    record["provenance"] = {old_provenance.get(key, key): value for key, value in provenance}
    assert OLD_KEYS.keys() <= record.keys()
    assert "held" in record["provenance"]
    path.write_text(json.dumps(record))


def edit_record(folder, edit):
    """Change the content of `run.json` by calling `edit` with it."""
    path = Path(folder) / "run.json"
    record = read_entries(path)
    edit(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("name", ["shared", "plain"])
def test_a_run_resumes_with_the_scorer_that_it_chose(config, name):
    trainer, _ = train(config, stop_after=1)
    assert trainer.record["automatic_settings"]["scorer"] == trainer.choice.name == "trie"
    edit_record(config.output, lambda record: record["automatic_settings"].update(scorer=name))
    trainer, _ = train(config, resume=True, stop_after=1)
    assert trainer.record["automatic_settings"]["scorer"] == trainer.choice.name == name
    assert trainer.config.scorer == "auto"


def test_a_requested_scorer_is_a_setting_and_not_a_choice(config):
    trainer, _ = train(replace(config, scorer="shared"), stop_after=1)
    assert trainer.choice.name == "shared"
    assert "scorer" not in trainer.record["automatic_settings"]


def test_reference_log_probs_of_the_trie_have_their_own_place_in_the_cache(config):
    """Their last bits differ."""

    def key(settings, **automatic):
        record = {
            "settings": replace(config, **settings).to_dict(),
            "provenance": {"model": "digest"},
            "automatic_settings": automatic or None,
        }
        return reference_provenance(record, "cpu float32")

    assert key({"scorer": "shared"}) == key({"scorer": "plain"})
    # A run that began before there was a trie scorer keeps its passes, and finds what it cached.
    assert key({}, micro_batch_size=2) == key({"scorer": "shared"})
    # So does a setting, also for a reference model, whose record names the scorer as well.
    assert key({"scorer": "shared"}, scorer="shared") == key({"scorer": "shared"})
    assert key({}, scorer="trie") == key({"scorer": "trie"})
    assert (
        len({key({}, scorer=name) for name in ("trie", "shared")} | {key({"scorer": "plain"})}) == 3
    )


def test_a_run_of_an_earlier_version_opens(config):
    trainer, _ = train(config)
    write_with_old_keys(config.output)
    record = read_record(RunPaths(Path(config.output)))
    assert record == trainer.record
    metrics = evaluate_run(config.output).metrics
    assert metrics.loss == pytest.approx(trainer.evaluation["eval_loss"], abs=1e-6)


def test_a_run_from_before_the_trie_is_evaluated_as_it_was_trained(config, monkeypatch):
    """With passes of as many pairs: its log-probs would differ in their last bits."""
    train(config)
    edit_record(config.output, lambda record: record["automatic_settings"].pop("scorer"))
    seen = []

    def record_scorer(config, *more):
        seen.append(config.scorer)
        return make_dataset_scorer(config, *more)

    monkeypatch.setattr("mlx_dpo.saved_runs.evaluate.make_dataset_scorer", record_scorer)
    evaluate_run(config.output)
    assert seen == ["shared"]


def test_a_run_of_an_earlier_version_resumes_bit_for_bit(config, tmp_path):
    whole = replace(config, output=str(tmp_path / "whole"), scorer="shared")
    train(whole)
    train(replace(config, scorer="shared"), stop_after=3)
    edit_record(config.output, lambda record: record["settings"].update(scorer="auto"))
    write_with_old_keys(config.output)
    trainer, _ = train(config, resume=True)
    assert trainer.choice.name == "shared"  # those versions had no other that shares
    assert trainer.record["automatic_settings"] == {"micro_batch_size": 2, "recompute": False}
    # With the passes of those versions, by numbers of pairs.
    assert inference_limit(trainer.config, trainer.choice, trainer.inputs.train).tokens is None
    expected = weights(whole)
    for name, value in weights(config).items():
        assert value.tolist() == expected[name].tolist(), name


def test_files_of_another_program_are_not_overwritten(config):
    folder = Path(config.output)
    names = ("checkpoints/a", "reference/b", "metrics.jsonl", "run.json")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"name": "an experiment"}')
    with pytest.raises(RunError, match=r"run\.json: not a record of mlx-dpo"):
        DPOTrainer(config, overwrite=True).__enter__()
    assert all((folder / name).is_file() for name in names)


def test_a_damaged_run_is_overwritten_on_request(config):
    train(config, stop_after=1)
    record = Path(config.output) / "run.json"
    record.write_text(record.read_text().replace("unfinished", "finished"))
    with DPOTrainer(config, overwrite=True) as trainer:
        assert trainer.earlier is None


def test_a_run_stays_if_what_should_replace_it_cannot_begin(config):
    trained, _ = train(config)
    files = {path: path.read_bytes() for path in trained.paths.folder.rglob("*") if path.is_file()}
    for wrong in ({"model": "none/"}, {"lora_target_modules": ("none",)}):
        with (
            pytest.raises((ConfigError, ModelError)),
            DPOTrainer(replace(config, **wrong), overwrite=True) as trainer,
        ):
            trainer.prepare()
        assert all(path.read_bytes() == content for path, content in files.items())


def test_a_finished_run_is_overwritten_on_request(config):
    train(config)
    first = read_record(RunPaths(Path(config.output)))
    with DPOTrainer(replace(config, seed=7), overwrite=True) as trainer:
        trainer.prepare()
        rows = list(trainer.steps())
    second = read_record(RunPaths(Path(config.output)))
    assert (second["state"], second["settings"]["seed"]) == ("finished", 7)
    assert second["id"] != first["id"]
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(check_line(line)) for line in lines] == rows
