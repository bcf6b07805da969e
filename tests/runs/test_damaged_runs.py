"""Runs whose files were damaged: named, or resumed from before the damage with the same result."""

import json
import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.errors import DamagedFileError, RunError
from mlx_dpo.io.checksums import DIGEST
from mlx_dpo.io.notices import notify_once
from mlx_dpo.reporting.metrics_log import read_metrics
from mlx_dpo.runs.folder import RunPaths, read_record
from mlx_dpo.runs.stages.find import find_run
from tests.damaged_files import damage
from tests.edited_files import edit, read_entries
from tests.runs.train_helper import train, weights


def numbers(config):
    """Return the metrics of a run, without those that measure time and memory."""
    rows = read_metrics(Path(config.output) / "metrics.jsonl")
    timed = ("tokens_per_second", "peak_memory_gb")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def assert_same_result(config, expected):
    assert numbers(config) == numbers(expected)
    for name, value in weights(config).items():
        assert mx.array_equal(value, weights(expected)[name]), name


def flip_line(path, number):
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = lines[number - 1].replace(b'"loss": 0', b'"loss": 1')
    path.write_bytes(b"\n".join(lines))


def test_damage_of_an_unfinished_run_is_named_and_the_result_is_the_same(config, tmp_path, caplog):
    """Checkpoints at steps 2 and 4 and where it stopped; each damage sends the run further back."""
    config = replace(config, save_total_limit=5, epochs=3)
    straight = replace(config, output=str(tmp_path / "straight"))
    train(straight)
    train(config, stop_after=5)
    folder = Path(config.output)
    damage(folder / "checkpoints/step-000005/optimizer.safetensors", "flipped")
    flip_line(folder / "metrics.jsonl", 3)
    damage(folder / "reference/train.safetensors", "flipped", -1)
    train(config, resume=True)
    assert "step-000005/optimizer.safetensors: damaged (its content does not match" in caplog.text
    assert "metrics.jsonl:3: damaged (not a metrics row" in caplog.text
    assert caplog.text.count("resuming from step-000002") == 2
    assert "reference/train.safetensors: damaged; its 9 pairs are scored again" in caplog.text
    assert_same_result(config, straight)


def test_missing_metrics_send_a_run_back(config, tmp_path, caplog):
    straight = replace(config, output=str(tmp_path / "straight"))
    train(straight)
    train(config, stop_after=5)
    path = Path(config.output) / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    train(config, resume=True)
    assert "metrics.jsonl: damaged (3 of 5 rows are left); resuming from the beg" in caplog.text
    assert_same_result(config, straight)


FINISHED_FILES = ("run.json", "metrics.jsonl", "adapter_config.json", "adapters.safetensors",
                  "adapter_model.safetensors")  # fmt: skip


@pytest.mark.parametrize("name", FINISHED_FILES)
@pytest.mark.parametrize("change", ["flipped", "cut", "zeroed"])
def test_a_damaged_finished_run_is_refused_by_name(workplace, name, change):
    damage(Path("run") / name, change)
    with pytest.raises(RunError, match=rf"^run/{name}") as error:
        find_run("run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapters.safetensors", "metrics.jsonl"])
def test_a_finished_run_without_a_file_is_refused_by_name(workplace, name):
    damage(Path("run") / name, "removed")
    with pytest.raises(DamagedFileError, match=rf"^run/{name}: damaged"):
        find_run("run")


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "run", "Hi"],
        ["eval", "run"],
        ["report", "run"],
        ["export", "run"],
        ["fuse", "run", "--output", "fused"],
        ["compare", "run", "Hi"],
        ["push", "run", "org/name", "--dry-run"],
        ["chat", "run"],
        ["serve", "run", "--port", "0"],
    ],
    ids=lambda words: words[0],
)
def test_no_command_uses_damaged_adapters(workplace, words):
    damage(Path("run/adapters.safetensors"), "flipped", -1)
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 1
    assert done.output.splitlines() == [
        "Error: run/adapters.safetensors: damaged (its content does not match its checksum); "
        "restore it from a copy"
    ]
    assert not Path("fused").exists()


def test_adapters_of_another_run_are_not_taken_for_this_runs_own(workplace):
    checkpoint = next(Path("run/checkpoints").iterdir())
    arrays = mx.load(str(checkpoint / "adapters.safetensors"))
    mx.save_safetensors("run/adapters.safetensors", arrays)
    with pytest.raises(DamagedFileError, match="its checksum is not the one that the run recorded"):
        find_run("run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"automatic_settings": []}, "`automatic_settings` is list, not dict"),
        ({"steps": [3]}, "`steps` is list, not int"),
        ({"counts": {"train": [1]}}, "an entry of `counts` is list, not int"),
        ({"warnings": "none"}, "`warnings` is str, not list"),
        ({"pairs": [3]}, "an entry of `pairs` is int, not dict"),
        ({"settings": {"beta": [1]}}, "`beta`"),
        ({"provenance": 3}, "`provenance` is int, not dict"),
    ],
)
def test_wrong_types_in_a_record_are_one_line(workplace, changes, message):
    edit("run/run.json", **changes)
    done = CliRunner().invoke(cli, ["generate", "run", "Hi"])
    assert done.exit_code == 1 and done.output.count("\n") == 1
    assert done.output.startswith("Error: run/run.json: not a valid record of a run (")
    assert message in done.output


def test_a_record_that_is_no_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, make in enumerate(
        (
            lambda path: path.mkdir(),
            lambda path: path.symlink_to("run.json"),
            lambda path: path.write_text("[" * 100_000),
            lambda path: path.write_bytes(b"\xe4"),
            lambda path: os.mkfifo(path),
        )
    ):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        make(folder / "run.json")
        for words in (
            ["generate", folder.name, "Hi"],
            ["report", folder.name],
            ["train", "--resume", "--output", folder.name],
        ):
            done = CliRunner().invoke(cli, words)
            assert done.exit_code == 1 and done.output.count("\n") == 1, done.output
            assert done.output.startswith(f"Error: {folder.name}/run.json: ")


def test_a_record_tells_its_reader_how_it_may_be_edited(workplace):
    entries = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps(entries | {"warnings": ["mine"]}))
    with pytest.raises(DamagedFileError, match=f'if you edited it, set its "{DIGEST}" to "edited"'):
        find_run("run")
    edit("run/run.json", warnings=["mine"])
    assert read_record(RunPaths(Path("run")))["warnings"] == ["mine"]
    assert read_entries("run/run.json")["warnings"] == ["mine"]


@pytest.mark.parametrize("obstacle", ["file", "no space", "read-only", "no home"])
def test_training_goes_on_without_a_cache_and_says_so_once(
    config, tmp_path, monkeypatch, caplog, obstacle
):
    notify_once.cache_clear()
    cache = tmp_path / "blocked"
    monkeypatch.setenv("MLX_DPO_CACHE", str(cache))
    if obstacle == "file":
        cache.write_text("")
    elif obstacle == "no home":
        monkeypatch.delenv("MLX_DPO_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "")
    else:
        error = OSError(28, "No space left on device") if obstacle == "no space" else OSError(
            30, "Read-only file system")  # fmt: skip

        def refuse(path, *args):
            raise error

        monkeypatch.setattr("mlx_dpo.training.reference_logps.write_logps", refuse)
    train(config)
    expected = "nothing is cached" if obstacle == "no home" else "log-probs are not cached"
    assert len([r for r in caplog.records if expected in r.message]) == 1
    assert read_record(RunPaths(Path(config.output)))["state"] == "finished"
