import json
import math
import re
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import pytest

from mlx_dpo import DPOConfig, DPOTrainer, evaluate_run, load_policy
from mlx_dpo.adapters import attach as adapters
from mlx_dpo.errors import ConfigError, RunError, TrainingError
from mlx_dpo.reporting.metrics_log import read_metrics
from mlx_dpo.reporting.samples import read_samples
from mlx_dpo.runs.folder import (
    RunPaths,
    lock_folder,
    read_record,
    reference_provenance,
    write_record,
)
from mlx_dpo.runs.summary import summarize_training
from tests.edited_files import edit, read_entries
from tests.runs.train_helper import train, weights

TOKENS = mx.array([[1, 40, 41, 42, 3, 2]])


def comparable(rows):
    """Rows without what a clock says."""
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", "peak_memory_gb")}
        for row in rows
    ]


def test_a_run_writes_exactly_these_files_and_its_rows(config, tmp_path):
    trainer, rows = train(config)
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock", "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors",
        "checkpoints", "metrics.jsonl", "reference", "run.json", "samples.jsonl",
    ]  # fmt: skip
    assert read_metrics(folder / "metrics.jsonl") == rows
    # 9 pairs to train on, 4 a step, 2 epochs: 3 + 3 steps, and one evaluation at the end
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]
    assert [row["epoch"] for row in rows[:6]] == pytest.approx([4 / 9, 8 / 9, 1, 13 / 9, 17 / 9, 2])
    assert trainer.evaluation == rows[-1]
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["counts"] == {"train": 9, "valid": 3}
    assert record["before"]["eval_loss"] == pytest.approx(math.log(2))
    assert record["before"]["eval_rewards/margins"] == 0
    assert DPOConfig.from_dict(record["settings"]) == replace(config, max_length=512)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_the_first_loss_is_log_two_but_not_after_a_resume(config, bits):
    config = replace(config, bits=bits, warmup_ratio=0.0, lora_dropout=0.0)
    _, rows = train(config, stop_after=1)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    fresh = replace(config, output=config.output + "-2")
    with DPOTrainer(fresh) as trainer:
        trainer.prepare()  # killed here: the reference is on disk, no checkpoint is
    _, rows = train(fresh, resume=True, stop_after=1)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(config, tmp_path, stop_after):
    config = replace(config, eval_steps=2)
    straight = replace(config, output=str(tmp_path / "straight"))
    _, expected = train(straight)
    trainer, _ = train(config, stop_after=stop_after)
    assert trainer.stopped
    assert not (tmp_path / "run" / "adapters.safetensors").exists()
    mx.random.seed(123)
    _, rows = train(config, resume=True)
    assert rows[0]["step"] == stop_after + 1
    for name, value in weights(straight).items():
        assert mx.array_equal(value, weights(config)[name]), name
    written = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert comparable(written) == comparable(expected)
    ours, theirs = (tmp_path / name / "samples.jsonl" for name in ("run", "straight"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_rows_after_the_last_checkpoint_are_not_written_twice(config, tmp_path):
    """As after `kill -9` at step 3, when the last checkpoint is that of step 2."""
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        for row in trainer.steps():
            if row["step"] == 3:
                break
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train(config, resume=True)
    written = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in written] == [1, 2, 3, 4, 5, 6, 6]


def test_a_run_killed_after_its_last_evaluation_does_not_write_it_twice(config, tmp_path):
    train(config)
    expected = weights(config)
    record = tmp_path / "run" / "run.json"
    edit(record, state="unfinished")
    (tmp_path / "run" / "adapters.safetensors").unlink()
    _, rows = train(config, resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")][-2:] == [6, 6]
    assert len(rows) == 1
    for name, value in weights(config).items():
        assert mx.array_equal(value, expected[name]), name


def test_a_run_keeps_its_own_reference(config, tmp_path):
    """The cache may be cleared between two starts; the reference must not be scored anew."""
    train(config, stop_after=1)
    shutil.rmtree(tmp_path / "cache")
    train(config, resume=True)
    assert not (tmp_path / "cache").exists()


def test_runs_share_reference_logps(config, tmp_path):
    train(config)
    files = {path: path.stat().st_ino for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(files) == 2
    train(replace(config, output=str(tmp_path / "again"), beta=0.5, lora_r=2))
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        assert files.get(path) == path.stat().st_ino  # not written again


def test_reference_logps_of_another_device_are_not_used(config):
    """In bfloat16 on a GPU it says other numbers than in float32 on the CPU."""
    trainer, _ = train(config)
    provenance = reference_provenance(trainer.record, "cpu float32")
    assert trainer.record["provenance"]["device_and_dtype"] == "cpu float32"
    assert len({provenance, reference_provenance(trainer.record, "metal bfloat16")}) == 2
    for name in ("bits", "group_size", "dtype"):
        other = trainer.record | {"settings": trainer.record["settings"] | {name: "x"}}
        assert reference_provenance(other, "cpu float32") != provenance


def test_a_run_is_not_resumed_in_another_number_type(config, tmp_path):
    train(config, stop_after=1)
    path = tmp_path / "run" / "run.json"
    provenance = read_entries(path)["provenance"] | {"device_and_dtype": "metal bfloat16"}
    edit(path, provenance=provenance)
    with (
        DPOTrainer(config, resume=True) as trainer,
        pytest.raises(RunError, match="the device or its dtype changed"),
    ):
        trainer.load()


def test_a_run_may_hold_nothing_out(config):
    trainer, rows = train(replace(config, valid_fraction=0.0))
    assert trainer.evaluation is None
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match="has no held-out pairs; name a file of pairs"):
        evaluate_run(config.output)


def test_the_same_run_twice_gives_the_same_weights(config, tmp_path):
    other = replace(config, output=str(tmp_path / "again"))
    train(config)
    train(other)
    for name, value in weights(config).items():
        assert mx.array_equal(value, weights(other)[name]), name


def test_evaluating_in_between_changes_nothing(config, tmp_path):
    other = replace(config, output=str(tmp_path / "again"), eval_steps=1)
    train(config)
    _, rows = train(other)
    assert [row["step"] for row in rows if "eval_loss" in row] == [1, 2, 3, 4, 5, 6]
    for name, value in weights(config).items():
        assert mx.array_equal(value, weights(other)[name]), name


def test_evaluate_run_gives_the_metrics_of_the_run(config):
    trainer, _ = train(config)
    metrics = evaluate_run(config.output).metrics
    assert metrics.loss == pytest.approx(trainer.evaluation["eval_loss"], abs=1e-6)
    assert metrics.margins == pytest.approx(trainer.evaluation["eval_rewards/margins"], abs=1e-6)
    assert metrics.chosen_logps == pytest.approx(trainer.evaluation["eval_logps/chosen"], abs=1e-4)


def test_the_policy_loads_here_and_in_mlx_lm(config, monkeypatch, tmp_path):
    train(config)
    monkeypatch.chdir("/")
    policy = load_policy(config.output).model
    theirs, _ = mlx_lm.load(config.model, adapter_path=config.output)
    assert mx.allclose(policy(TOKENS), theirs(TOKENS), atol=1e-5)
    base = load_policy(config.output, reference=True).model
    plain = load_policy(None, model=config.model).model
    assert mx.array_equal(base(TOKENS), plain(TOKENS))
    assert not mx.allclose(base(TOKENS), policy(TOKENS), atol=1e-4)


def test_an_unfinished_run_opens_at_its_last_checkpoint(config):
    train(config, stop_after=3)
    policy = load_policy(config.output).model
    assert "step-000003" in load_policy(config.output).notes[-1]
    theirs, _ = mlx_lm.load(config.model, adapter_path=f"{config.output}/checkpoints/step-000003")
    assert mx.allclose(policy(TOKENS), theirs(TOKENS), atol=1e-5)


def test_a_run_moved_with_its_model_still_opens(config, tmp_path):
    (tmp_path / "here").mkdir()
    moved = replace(config, output=str(tmp_path / "here" / "run"))
    train(moved)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "base").rename(tmp_path / "elsewhere" / "base")
    (tmp_path / "here").rename(tmp_path / "elsewhere" / "here")
    assert load_policy(str(tmp_path / "elsewhere" / "here" / "run")).model(TOKENS).shape[1] == 6


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", 2e-3), ("bits", 8), ("seed", 1), ("max_length", 99)]
)
def test_resuming_with_another_setting_names_it(config, name, value):
    train(config, stop_after=1)
    with pytest.raises(RunError, match=f"began with {name} = .*, not {value}"):
        DPOTrainer(replace(config, **{name: value}), resume=True).__enter__()


def test_resuming_may_change_what_does_not_change_the_result(config):
    train(config, stop_after=1)
    train(replace(config, save_steps=1, logging_steps=3), resume=True)


@pytest.mark.parametrize(
    ("what", "name"), [("pairs", "the training pairs"), ("model", "the model")]
)
def test_resuming_on_other_contents_names_them(config, pairs_file, checkpoint_folder, what, name):
    train(config, stop_after=1)
    if what == "pairs":
        pairs_file.write_text(pairs_file.read_text().replace("friend", "my friend"))
    else:
        path = checkpoint_folder / "model.safetensors"
        arrays = mx.load(str(path))
        arrays["model.norm.weight"] = arrays["model.norm.weight"] * 1.5
        mx.save_safetensors(str(path), arrays, {"format": "pt"})
    with (
        DPOTrainer(config, resume=True) as trainer,
        pytest.raises(RunError, match=f"{name} changed"),
    ):
        trainer.load()


def test_a_folder_with_a_run_is_not_overwritten(config):
    train(config, stop_after=1)
    with pytest.raises(RunError, match="unfinished run; add --resume"):
        DPOTrainer(config).__enter__()
    train(config, resume=True)
    for resume in (False, True):
        with pytest.raises(RunError, match="finished after 6 steps") as error:
            DPOTrainer(config, resume=resume).__enter__()
        further = f"--model {config.model} --start-adapter {config.output} --output"
        assert f"mlx-dpo train {config.pairs[0]} {further} {config.output}-2; " in str(error.value)


def test_a_folder_with_other_files_is_left_alone(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("x")
    with pytest.raises(RunError, match=r"not a run folder \(found `thesis.txt`\)"):
        DPOTrainer(config).__enter__()


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_lives(config):
    with DPOTrainer(config), pytest.raises(RunError, match="another run is writing here"):
        DPOTrainer(config).__enter__()


def test_a_folder_in_which_nothing_was_written_disappears(tmp_path):
    with lock_folder(RunPaths(tmp_path / "a" / "run")):
        assert (tmp_path / "a" / "run").is_dir()
    assert not (tmp_path / "a" / "run").exists()


def test_bad_pairs_leave_nothing_behind(config, pairs_file, tmp_path):
    pairs_file.write_text("{")
    with DPOTrainer(config) as trainer, pytest.raises(Exception, match=r"pairs\.jsonl:1: "):
        trainer.load()
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_keeps_the_last_good_state(config, tmp_path):
    config = replace(config, learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=0.0)
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        with pytest.raises(
            TrainingError, match=r"step \d: .*not a finite number at .*pairs\.jsonl:\d+"
        ):
            list(trainer.steps())
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    last = tmp_path / "run" / "checkpoints" / f"step-{steps[-1]:06d}"
    saved = mx.load(str(last / "adapters.safetensors"))
    for name, value in adapters.adapter_weights(trainer.policy).items():
        assert mx.array_equal(saved[name], value), name


def test_rows_longer_than_the_models_context_are_refused(config, pairs_file):
    row = {"prompt": "word " * 200, "chosen": "yes", "rejected": "no"}
    pairs_file.write_text(pairs_file.read_text() + json.dumps(row) + "\n")
    with (
        DPOTrainer(replace(config, max_length=2048)) as trainer,
        pytest.raises(ConfigError, match=r"`max_length` is 2048, .* 512 tokens.*--max-length 512"),
    ):
        trainer.load()


@pytest.mark.parametrize("name", ["model", "pairs", "output"])
def test_missing_required_settings_are_an_error(settings, name):
    del settings[name]
    with pytest.raises(ConfigError, match=f"`{name}` is not set"):
        DPOTrainer(DPOConfig.from_dict(settings))


def test_max_steps_takes_the_place_of_epochs(settings, tmp_path):
    del settings["epochs"]
    _, rows = train(DPOConfig.from_dict(settings | {"max_steps": 7}))
    assert [row["step"] for row in rows[:-1]] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[6]["epoch"] == pytest.approx(2 + 4 / 9)


@pytest.mark.parametrize("steps", [1, 2])
def test_every_step_of_a_short_run_moves_the_weights(settings, steps):
    """The warm-up of Transformers begins at a learning rate of 0; so short a run has none."""
    del settings["epochs"]
    trainer, rows = train(DPOConfig.from_dict(settings | {"max_steps": steps}))
    assert rows[0]["learning_rate"] == settings["learning_rate"]
    assert "no warm-up" in dict(summarize_training(trainer))["steps"]


def test_a_run_chooses_and_records_the_settings_that_are_not_given(settings, tmp_path):
    del settings["learning_rate"]
    with DPOTrainer(DPOConfig.from_dict(settings)) as trainer:
        trainer.prepare()
        shown = dict(summarize_training(trainer))["steps"]
    chosen = r"learning rate (\S+) \(chosen: (LoRA, width \d+, 6 steps, \d+ tokens per .*?)\)"
    rate, reason = re.search(chosen, shown).groups()
    assert trainer.config.learning_rate == float(rate) > 1e-4
    assert trainer.config.max_length == 512  # the context length
    record = read_record(RunPaths(tmp_path / "run"))
    assert record["settings"]["learning_rate"] == float(rate)
    assert record["settings"]["max_length"] == 512
    assert record["chosen_settings"] == {"learning_rate": reason}


def test_a_resumed_run_keeps_the_settings_that_it_chose(settings, tmp_path):
    del settings["learning_rate"]
    config = DPOConfig.from_dict(settings)
    with DPOTrainer(config) as trainer:
        trainer.prepare()
    paths = RunPaths(tmp_path / "run")
    record = read_record(paths)
    record["settings"] |= {"learning_rate": 0.5, "max_length": 300}  # by another rule
    write_record(paths, record)
    with DPOTrainer(config, resume=True) as trainer:
        trainer.load()
    assert (trainer.config.learning_rate, trainer.config.max_length) == (0.5, 300)


def test_a_warm_up_that_does_not_end_is_refused(config):
    with (
        DPOTrainer(replace(config, warmup_steps=6)) as trainer,
        pytest.raises(ConfigError, match="`warmup_steps` 6 leaves none of the run's 6 steps"),
    ):
        trainer.load()
    with DPOTrainer(replace(config, warmup_steps=5)) as trainer:
        trainer.load()


def test_exactly_one_of_run_and_model_is_required(config):
    for choice, message in (((None, None), "missing RUN"), (("run", "model"), "not both")):
        with pytest.raises(ConfigError, match=message):
            load_policy(choice[0], model=choice[1])
    with pytest.raises(ConfigError, match="no effect"):
        load_policy(None, model=config.model, reference=True)


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    for name, why in ((".", "no `run.json`"), ("nowhere", "no such folder")):
        with pytest.raises(RunError, match=why):
            evaluate_run(str(tmp_path / name))


def test_memory_is_that_of_the_run_and_not_of_what_was_done_before(config):
    held = mx.zeros((200_000_000,))
    mx.eval(held)
    del held
    _, rows = train(config)
    assert 0 < rows[0]["peak_memory_gb"] < 0.4


def test_train_alone_enters_prepares_and_trains_to_the_end(config):
    stepwise = replace(config, output=config.output + "-stepwise")
    with DPOTrainer(stepwise) as trainer:
        trainer.prepare()
        expected = list(trainer.steps())
    assert comparable(DPOTrainer(config).train()) == comparable(expected)
    found, wanted = weights(config), weights(stepwise)
    assert found.keys() == wanted.keys()
    assert all(mx.array_equal(found[name], wanted[name]).item() for name in wanted)


def test_steps_outside_of_a_with_block_are_refused(config):
    with pytest.raises(RuntimeError, match="use the trainer in a `with` block"):
        next(DPOTrainer(config).steps())


def test_sampled_answers_do_not_change_the_run(config, tmp_path):
    """With dropout, which draws from MLX's random state after each evaluation."""
    config = replace(config, eval_steps=1)
    _, rows = train(config)
    silent = replace(config, output=str(tmp_path / "silent"), samples=0)
    _, without = train(silent)
    assert all(mx.array_equal(value, weights(silent)[n]) for n, value in weights(config).items())
    sampled = [row for row in rows if "eval_completions/kl" in row]
    assert len(sampled) == len([row for row in rows if "eval_loss" in row]) == 6
    assert not any("eval_completions/kl" in row for row in without)
    assert [row["eval_loss"] for row in sampled] == [
        row["eval_loss"] for row in without if "eval_loss" in row
    ]


def test_a_run_answers_the_same_held_out_prompts_at_each_evaluation(config, tmp_path):
    few = replace(config, eval_steps=3, samples=1)
    trainer, _ = train(few)
    recorded = read_samples(trainer.paths.samples)
    assert [item.step for item in recorded] == [3, 6]
    [[first], [second]] = [item.samples for item in recorded]
    assert (first.prompt, first.base) == (second.prompt, second.base)
    assert first.base is not None
    assert trainer.answer_sampler.latest == recorded[-1]
    with DPOTrainer(replace(few, output=str(tmp_path / "none"), samples=0)) as silent:
        silent.prepare()
        assert silent.answer_sampler is None
        assert not silent.paths.samples.exists()


def test_the_setting_of_earlier_versions_is_read_from_their_records(config):
    trainer, _ = train(config, stop_after=1)
    settings = json.loads(trainer.paths.record.read_text())["settings"]
    del settings["samples"]
    edit(trainer.paths.record, settings=settings | {"eval_samples": 2})
    assert DPOConfig.from_dict(read_record(trainer.paths)["settings"]).sample_count == 2
    with pytest.raises(ConfigError, match="unknown setting `eval_samples`; use `samples`"):
        DPOConfig.from_dict({"eval_samples": 2})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"valid_fraction": 0.0, "samples": 2}, ("samples", "none: no pairs are held out")),
        ({"valid_fraction": 0.0}, None),
        ({"samples": 1}, ("samples", "1 held-out prompt, answered in up to ")),
    ],
)
def test_the_header_names_the_samples_or_why_there_are_none(config, changes, line):
    with DPOTrainer(replace(config, **changes)) as trainer:
        trainer.prepare()
        found = [text for label, text in summarize_training(trainer) if label == "samples"]
    assert (found != []) is (line is not None)
    assert line is None or found[0].startswith(line[1])
