import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.config.dpo_config import get_settings
from tests.checkpoints import make_checkpoint
from tests.edited_files import edit

MATTER = ("--batch-size", "4", "--lora-r", "4", "--learning-rate", "1e-3")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    make_checkpoint(tmp_path / "base")
    write_pairs(tmp_path / "pairs.jsonl", 12)


def write_pairs(path, count):
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}, friend.", "rejected": f"{i * 7} no"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def train(*words):
    return run("train", "pairs.jsonl", "--model", "base", "--output", "run", *MATTER, *words)


def test_a_run_says_what_it_does_and_what_to_type_next():
    result = train("--valid-fraction", "0.25")
    assert result.exit_code == 0, result.output
    shown = result.output
    assert "model         base, 121 K parameters" in shown
    assert "pairs         9 to train on, 3 held out" in shown
    assert "adapters      LoRA, rank 4, alpha 32 on 14 linear layers: 8.7 K parameters" in shown
    assert "steps         3 of 4 pairs; AdamW, learning rate 0.001, cosine" in shown
    assert "step 1/3  loss 0.6931  margin" in shown
    assert "3 held-out pairs" in shown
    assert "result        the policy" in shown
    assert "time          3 steps in 0:0" in shown
    assert "output        adapters in run\n" in shown
    for command, line in zip(("compare", "chat", "report"), shown.splitlines()[-3:], strict=True):
        assert line.removeprefix("next").strip().startswith(f"mlx-dpo {command} run ")


def labels(result):
    lines = result.stdout.partition("step 1/3")[0].splitlines()
    return [label for line in lines if (label := line[:14].strip())]


def test_the_header_has_the_five_lines_that_matter_and_verbose_adds_the_rest():
    assert labels(train()) == ["model", "pairs", "adapters", "steps", "output"]
    result = run("train", "pairs.jsonl", "--model", "base", "--output", "more", *MATTER, "-v")
    assert labels(result) == [
        "model", "pairs", "reference", "adapters", "scorer", "loss", "steps", "micro-batches",
        "samples", "memory", "output",
    ]  # fmt: skip


def test_the_header_warns_of_pairs_that_are_cut_and_left_out():
    with Path("pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Why?", "chosen": "same", "rejected": "same"}) + "\n")
    result = train("--bad-pairs", "drop", "--max-length", "20")
    assert result.exit_code == 0, result.output
    assert "left out 1 pair: " in result.stdout and " cut to 20 tokens: " in result.stdout


def test_the_header_says_that_no_answer_is_sampled_although_it_was_asked_for():
    result = train("--valid-fraction", "0", "--samples", "2")
    assert result.exit_code == 0, result.output
    assert "samples       none: no pairs are held out" in result.stdout


def test_flags_beat_the_file_and_the_file_beats_defaults(tmp_path):
    (tmp_path / "settings.yaml").write_text("beta: 0.3\nepochs: 3\nlearning_rate: 2e-3\n")
    result = run(
        "train", "pairs.jsonl", "--model", "base", "--output", "run", "--config", "settings.yaml",
        "--epochs", "2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    settings = json.loads(Path("run/run.json").read_text())["settings"]
    assert (settings["beta"], settings["epochs"], settings["learning_rate"]) == (0.3, 2, 2e-3)
    assert settings["batch_size"] == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learing_rate: 1", "unknown setting `learing_rate`; did you mean `learning_rate`?"),
        ("beta: [", "settings.yaml:1: not valid YAML"),
        ("- beta", "settings.yaml: expected `setting: value` on each line, found list"),
        ("beta: 0", "settings.yaml:1: `beta` must be above 0, got 0.0"),
        ("lora_target_modules: 5", "`lora_target_modules` must be str, got 5"),
        (b"beta: \xff", "settings.yaml: not UTF-8 (byte 0xff at 6)"),
        (None, "settings.yaml: no such file"),
    ],
)
def test_a_faulty_settings_file_gives_a_one_line_error(tmp_path, text, message):
    if text is not None:
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "settings.yaml").write_bytes(content)
    result = train("--config", "settings.yaml")
    assert_one_line_error(result, message)


def assert_one_line_error(result, message):
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


GOOD = {"prompt": "Hi", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "pairs.jsonl:2: not JSON"),
        ("[]", "pairs.jsonl:2: "),
        (GOOD | {"rejected": None}, "pairs.jsonl:2: "),
        ({"prompt": "Hi", "chosen": "a"}, "pairs.jsonl:2: missing `rejected`"),
        (GOOD | {"chosen": 3}, "pairs.jsonl:2: "),
        (GOOD | {"chosen": ""}, "pairs.jsonl:2: "),
        (GOOD | {"chosen": "b"}, "pairs.jsonl:2: "),
        (GOOD | {"prompt": "word " * 3000}, "pairs.jsonl:2: "),
    ],
)
def test_a_bad_row_gives_a_one_line_error_with_its_location_and_writes_nothing(
    tmp_path, line, message
):
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(GOOD)}\n{text}\n")
    assert_one_line_error(train(), message)
    assert not (tmp_path / "run").exists()


def test_no_pair_left_gives_a_one_line_error(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(GOOD | {"chosen": ""}) + "\n")
    assert_one_line_error(train("--bad-pairs", "drop"), "no usable pair")
    assert not (tmp_path / "run").exists()


def test_missing_files_and_folders_give_a_one_line_error(tmp_path):
    assert_one_line_error(
        run("train", "none.jsonl", "--model", "base", "--output", "run"), "none.jsonl"
    )
    assert_one_line_error(
        run("train", "pairs.jsonl", "--model", "./none", "--output", "run"), "none"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), "PAIRS and --model"),
        (("pairs.jsonl", "--output", "run"), "--model"),
        (("--model", "base"), "PAIRS"),
        (("--config", "s.yaml"), "--model"),
    ],
)
def test_all_that_is_missing_is_named_at_once(tmp_path, words, names):
    (tmp_path / "s.yaml").write_text("pairs: pairs.jsonl\n")
    done = run("train", *words)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == f"Error: missing {names}"


def test_a_misspelt_setting_is_named_before_what_is_missing(tmp_path):
    (tmp_path / "s.yaml").write_text("learning_rates: 1e-4\n")
    assert_one_line_error(run("train", "--config", "s.yaml"), "unknown setting `learning_rates`")


def test_a_model_without_weights_or_with_pickles_gives_a_one_line_error(tmp_path):
    (tmp_path / "base" / "model.safetensors").unlink()
    assert_one_line_error(train(), "no weights")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"x")
    assert_one_line_error(train(), "pickle")
    assert not (tmp_path / "run").exists()


def test_ids_outside_the_vocabulary_give_a_one_line_error(tmp_path):
    """A tokenizer of another model: MLX itself would read beyond the embedding."""
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    arrays = mx.load(str(tmp_path / "base" / "model.safetensors"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        arrays[name] = arrays[name][:50]
    mx.save_safetensors(str(tmp_path / "base" / "model.safetensors"), arrays)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    assert_one_line_error(train(), "pairs.jsonl:1: ")


def test_a_template_that_changes_the_prompt_gives_a_one_line_error(tmp_path):
    (tmp_path / "base" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ loop.length }}{{ m.content }}<|end|>{% endfor %}"
    )
    assert_one_line_error(train(), "pairs.jsonl:1: the chat template changes the prompt")


def test_an_output_that_is_a_file_or_lies_in_a_file_gives_a_one_line_error(tmp_path):
    (tmp_path / "run").write_text("mine")
    assert_one_line_error(train(), "run: cannot be written")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_finished_and_a_foreign_folder_are_refused(tmp_path):
    assert train().exit_code == 0
    assert_one_line_error(train(), "this run is finished")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    result = run("train", "pairs.jsonl", "--model", "base", "--output", "other")
    assert_one_line_error(result, "not a run folder")


def command(*words):
    return [sys.executable, "-c", "from mlx_dpo.cli import main; main()", *words]


def test_control_c_saves_and_resume_needs_no_more_than_the_folder(tmp_path):
    straight = train("--epochs", "30", "--save-steps", "1000")
    assert straight.exit_code == 0, straight.output
    expected = mx.load("run/adapters.safetensors")

    process = subprocess.Popen(
        command("train", "pairs.jsonl", "--model", "base", "--output", "again", *MATTER,
                "--epochs", "30", "--save-steps", "1000"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "loss 0" in line:
            break
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Saving after this step" in errors
    assert rest.endswith("Stopped and saved; resume with: mlx-dpo train --resume --output again\n")
    assert not Path("again/adapters.safetensors").exists()

    resumed = run("train", "--resume", "--output", "again")
    assert resumed.exit_code == 0, resumed.output
    assert "resuming after step" in resumed.output
    for name, value in mx.load("again/adapters.safetensors").items():
        assert mx.array_equal(value, expected[name]), name


def test_a_run_that_was_killed_before_its_first_checkpoint_says_that_it_begins_again():
    assert train().exit_code == 0
    shutil.rmtree("run/checkpoints")
    edit("run/run.json", state="unfinished")
    done = run("train", "--resume", "--output", "run")
    assert "output        run, from the beginning: there is no checkpoint" in done.output


def test_resuming_with_a_changed_flag_gives_a_one_line_error():
    process = subprocess.Popen(
        command("train", "pairs.jsonl", "--model", "base", "--output", "run", *MATTER,
                "--epochs", "100", "--save-steps", "1"),
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not list(Path("run/checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    assert_one_line_error(train("--epochs", "100"), "another run is writing here")
    process.kill()
    process.wait()
    assert_one_line_error(train("--epochs", "100"), "holds an unfinished run; add --resume")
    result = run("train", "--resume", "--output", "run", "--beta", "0.3")
    assert_one_line_error(result, "the run began with beta = its default, not 0.3")


def test_a_loss_of_nan_gives_a_one_line_error_and_leaves_the_last_checkpoint():
    result = run("train", "pairs.jsonl", "--model", "base", "--output", "run",
                 "--learning-rate", "1e30", "--max-grad-norm", "0", "--epochs", "4",
                 "--batch-size", "4", "--lr-scheduler-type", "constant")  # fmt: skip
    assert result.exit_code == 1
    assert "not a finite number at pairs.jsonl:" in result.output.splitlines()[-1]
    assert list(Path("run/checkpoints").glob("step-*"))


def test_eval_measures_again_in_a_table_and_as_json():
    train("--valid-fraction", "0.25")
    table = run("eval", "run")
    assert table.exit_code == 0, table.output
    assert "3 held-out pairs" in table.output
    write_pairs(Path("others.jsonl"), 5)
    printed = json.loads(run("eval", "run", "others.jsonl", "--json").output)
    assert (printed["pairs"], printed["of"]) == (5, "pairs of others.jsonl")
    assert printed["finished"] is True
    assert set(printed) >= {"eval_loss", "eval_rewards/accuracies", "eval_logps/chosen"}
    assert_one_line_error(run("eval", "nowhere"), "nowhere: not a run folder")


def test_eval_says_what_it_measured_on():
    train("--valid-fraction", "0")
    (Path("folder")).mkdir()
    write_pairs(Path("folder/train.jsonl"), 12)
    write_pairs(Path("folder/valid.jsonl"), 3)
    shown = run("eval", "run", "folder").output
    assert "3 pairs of folder/valid.jsonl" in shown
    assert "3 pairs (" in shown  # what became of the file's rows
    shown = run("eval", "run", "folder/train.jsonl").output
    assert "12 pairs of folder/train.jsonl" in shown
    assert "the run was trained on these pairs" in shown


def test_eval_refuses_rows_beyond_the_models_context(tmp_path):
    train("--max-length", "2048")
    row = GOOD | {"prompt": "word " * 200}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    assert_one_line_error(run("eval", "run", "long.jsonl"), "the model's context length is 512")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--eval-steps", "1", "--valid-fraction", "0"), "`eval_steps` has no effect"),
        (("--seed", "-1"), "`seed` must be at least 0"),
    ],
)
def test_settings_without_effect_give_a_one_line_error(words, message):
    assert_one_line_error(train(*words), message)


def test_valid_fraction_with_a_folders_own_held_out_pairs_gives_a_one_line_error():
    Path("folder").mkdir()
    write_pairs(Path("folder/train.jsonl"), 12)
    write_pairs(Path("folder/valid.jsonl"), 3)
    result = run("train", "folder", "--model", "base", "--output", "run", *MATTER,
                 "--valid-fraction", "0.5")  # fmt: skip
    assert_one_line_error(result, "`valid_fraction` has no effect together with folder/valid.jsonl")


def test_a_home_folder_in_a_settings_file_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "settings.yaml").write_text("output: ~/run\n")
    result = run("train", "pairs.jsonl", "--model", "base", *MATTER, "--config", "settings.yaml")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "home" / "run" / "run.json").is_file()


def test_a_policy_is_not_put_on_a_base_that_changed(tmp_path):
    train()
    tokenizer = tmp_path / "base" / "chat_template.jinja"
    tokenizer.write_text(tokenizer.read_text() + "{# changed #}")
    assert_one_line_error(run("generate", "run", "Hi"), "the tokenizer changed since the run began")
    make_checkpoint(tmp_path / "base", seed=9)
    assert_one_line_error(run("generate", "run", "Hi"), "the model changed since the run began")


def test_eval_rejects_a_model_other_than_the_trained_model(tmp_path):
    train()
    make_checkpoint(tmp_path / "base", seed=9)
    assert_one_line_error(run("eval", "run"), "the model changed since the run began")


def test_a_setting_that_fails_late_leaves_nothing_behind(tmp_path):
    """A first mistake must not lock the folder for the second try."""
    result = train("--lora-target-modules", "q_prj")
    assert result.exit_code == 1
    assert "`q_prj` matches no trainable module" in result.output.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    assert train().exit_code == 0


def test_a_misspelt_column_and_a_missing_file_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    row = {"promt": "x", "chosen": "y", "rejected": "z"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert_one_line_error(train(), "pairs.jsonl:1: missing `prompt` (found `promt`)")
    result = run("train", "org/data", "--model", "base", "--output", "run")
    assert_one_line_error(result, "org/data: no such file or folder, the dataset is not in")


def test_held_out_pairs_that_are_trained_on_are_reported():
    shown = train("--valid", "pairs.jsonl").output
    assert "12 of the held-out pairs are also trained on" in shown


def test_eval_drops_bad_pairs_with_the_flag():
    train()
    write_pairs(Path("others.jsonl"), 3)
    with Path("others.jsonl").open("a") as file:
        file.write(json.dumps(GOOD | {"chosen": ""}) + "\n")
    assert_one_line_error(
        run("eval", "run", "others.jsonl"), "others.jsonl:4: a completion is empty"
    )
    printed = json.loads(run("eval", "run", "others.jsonl", "--bad-pairs", "drop", "--json").output)
    assert printed["pairs"] == 3
    assert_one_line_error(run("eval", "run", "--bad-pairs", "drop"), "`bad_pairs` has no effect")


def test_help_shows_every_setting_once_under_its_section():
    shown = run("train", "--help-all").output
    titles = ("Options:", "Model:", "Pairs:", "Loss:", "LoRA:", "Training:", "Run:")
    starts = [shown.index(f"\n{title}\n") for title in titles]
    assert starts == sorted(starts)
    loss = shown[starts[3] : starts[4]]
    assert "--beta" in loss
    assert "--help" in shown[starts[0] : starts[1]]
    for name in get_settings():
        flag = "--" + name.replace("_", "-")
        lines = [s for s in shown.splitlines() if re.match(rf"  (-\w, )?{flag}(,| |$)", s)]
        assert len(lines) == (name != "pairs"), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "x", "--num-train-epochs", "3"), "'--num-train-epochs'; use --epochs"),
        (("train", "x", "--use_dora"), "'--use_dora'; use --fine-tune-type dora"),
        (
            ("train", "x", "--lerning-rate", "1"),
            "'--lerning-rate'; did you mean '--learning-rate'?",
        ),
        (("train", "x", "--dataset_name", "y"), "'--dataset_name'; use the argument PAIRS"),
        (("train", "x", "--max-tokens", "9"), "'--max-tokens'; use --micro-batch-tokens"),
        (("convert", "x", "--quantization-bit", "4"), "'--quantization-bit'; use --bits"),
        (("chat", "run", "--reference"), "'--reference'; use --base"),
        # What is not here either is no help.
        (("data", "check", "x", "--num-train-epochs", "3"), "'--num-train-epochs'"),
    ],
)
def test_the_error_of_a_flag_of_another_trainer_names_our_flag(words, message):
    done = run(*words)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == f"Error: No such option {message}"


def test_all_unknown_flags_are_answered_at_once():
    done = run(
        "train", "x", "--num_train_epochs", "3", "--beta", "--zzz", "--zzz=3", "-z", "--", "-y"
    )
    assert done.stderr.splitlines()[-1] == (
        "Error: No such options: '--num_train_epochs' (use --epochs), '--zzz', '-z'"
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--learning_rate", "0.5"),
        ("--lr=0.5",),
        ("--lr", "0.5", "--lora_rank", "3", "--num_epochs", "7"),
    ],
)
def test_flags_of_other_spellings_are_taken(words):
    command = cli.get_command(click.Context(cli), "train")
    context = command.make_context("train", ["x", "-m", "base", "-o=run", *words])
    assert (context.params["model"], context.params["output"]) == ("base", "=run")
    assert context.params["learning_rate"] == 0.5
    if len(words) > 2:
        assert (context.params["lora_r"], context.params["epochs"]) == (3, 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output", "none"), "none: not a run folder (no such folder)"),
        (("--output", "."), ".: not a run folder (no `run.json`)"),
        (
            ("--output", "base"),
            "base: a model, not a run folder; train it with",
        ),
    ],
)
def test_going_on_with_nothing_says_what_is_missing(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(run("train", "--resume", *words), message)


@pytest.mark.parametrize("flag", ["--output", "--valid", "--start-adapter", "pairs"])
def test_a_name_that_is_too_long_for_a_file_gives_a_one_line_error(flag):
    name = "n" * 300
    pairs = name if flag == "pairs" else "pairs.jsonl"
    given = () if flag == "pairs" else (flag, name)
    result = run("train", pairs, "--model", "base", *((flag, name) if given else ()), *(
        () if flag == "--output" else ("--output", "run")))  # fmt: skip
    assert_one_line_error(result, "too long for a file")
