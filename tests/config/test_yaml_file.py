"""Settings in YAML: what is refused, with its line, and what is read."""

import pytest

from mlx_dpo.cli.setting_flags import read_settings
from mlx_dpo.config.yaml_file import read_yaml
from mlx_dpo.errors import ConfigError


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{x}: &{x} [{','.join(['*' + y] * 9)}]\n" for x, y in zip("bcdefgh", "abcdefg", strict=True)
)


def write(text):
    with open("s.yaml", "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def refusal(text, read=read_settings):
    write(text)
    with pytest.raises(ConfigError) as error:
        read("s.yaml")
    message = str(error.value)
    assert message.startswith("s.yaml")
    assert "\n" not in message
    assert len(message) < 2000
    return message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\nseed: 1\nbeta: 0.2", "3 (`beta` is set twice, first in line 1)"),
        ("seed: 010", "1 (`010` is octal in YAML (8); write 8, or quote"),
        ("beta: 0.1\nseed: -0_17", "2 (`-0_17` is octal in YAML (-15)"),
        ("seed: 1:30", "1 (`1:30` is sexagesimal in YAML (90); write 90"),
        ("beta: 1:30.5", "1 (`1:30.5` is sexagesimal in YAML (90.5)"),
        ("model: no", "s.yaml:1: `model` must be str, got False; quote it if it is text"),
        ("seed: 1\nrun_name: on", "s.yaml:2: `run_name` must be str, got True; quote it"),
        ("max_steps: 1e3", "s.yaml:1: `max_steps` must be int, got '1e3'"),
        ("seed: 1\nbeta: [", "2 ("),
        ("seed: 1\nbeta: 0", "s.yaml:2: `beta` must be above 0, got 0.0"),
        ("seed: " + "9" * 400, "1 (a number of 400 digits)"),
        ("seed: " + "9" * 5000, "1 (a number of 5000 digits)"),
        ("beta: " + "9" * 300 + ".0e99", "s.yaml:1: `beta` must be above 0, got inf"),
        ("column: " + "[" * 2000 + "]" * 2000, "1 (nested more than 128 times"),
        (LAUGHS, "1 (more than 10,000 values)"),
        ("column: &a [*a]", "1 (a value that contains itself)"),
        ("run_name: !!int abc", "1 (not a value of the type `int`)"),
        ("seed: 1\nrun_name: !!timestamp x", "2 (not a value of the type"),
        ("seed: 1\nrun_name: !!bool maybe", "2 (not a value of the type `bool`)"),
        ("run_name: !!python/object/apply:os.getcwd []", "1 (could not dete"),
        ("seed: 1\nmodel: a\x00b", "2 (the character '\\x00' is not allowed)"),
        ('seed: 1\nmodel: "a\\0b"', "s.yaml:2: `model` must not contain a NUL character"),
        ('system: "a\\ud83d"', "s.yaml:1: `system` contains an unpaired surrogate"),
        ("", "s.yaml: expected `setting: value` on each line, found nothing"),
        ("? [a]\n: 1", "1 (found unhashable key)"),
        ("a: 1\n---\nb: 2", "2 ("),
    ],
)  # fmt: skip
def test_what_reads_otherwise_than_it_looks_is_refused_with_its_line(text, message):
    if message[0].isdigit():  # line and problem of YAML itself
        message = f"s.yaml:{message[0]}: not valid YAML {message[2:]}"
    assert refusal(text).startswith(message)


def test_a_value_of_no_end_is_not_printed_in_full():
    assert len(refusal("run_name: [" + "x, " * 5000 + "]")) < 300
    assert len(refusal("chat_template: " + "x" * 5000)) < 300


def test_names_that_look_like_booleans_are_names():
    assert refusal("on: 1").startswith("s.yaml: unknown setting `on`")


def test_plain_values_merges_and_dates_are_read():
    write("seed: 1_000\nbeta: 5e-1\nlearning_rate: 1e-4\nuse_rslora: yes\nrun_name: 2024-13-45\n")
    assert read_settings("s.yaml") == {
        "seed": 1000, "beta": "5e-1", "learning_rate": "1e-4", "use_rslora": True,
        "run_name": "2024-13-45",
    }  # fmt: skip
    write("x: &x {seed: 0, beta: 1}\ny:\n  <<: *x\n  seed: 2\n")
    assert read_yaml("s.yaml")["y"] == {"seed": 2, "beta": 1}
    write('\ufeffseed: "0x1F"\nsystem: "\\ud83d\\ude00"')
    assert read_yaml("s.yaml")["seed"] == "0x1F"


FOREIGN = {
    "TRL": ({"model_name_or_path": "`model`", "dataset_name": "PAIRS", "bf16": "`dtype` bfloat16",
             "per_device_train_batch_size": "`batch_size`", "output_dir": "`output`"}),
    "LLaMA-Factory": ({"stage": "`loss_type`", "cutoff_len": "`max_length`", "pref_beta": "`beta`",
                       "pref_loss": "`loss_type`", "template": "not needed", "dataset": "PAIRS",
                       "lora_rank": "`lora_r`", "max_samples": "not supported"}),
    "axolotl": ({"base_model": "`model`", "sequence_len": "`max_length`", "rl": "`loss_type`",
                 "val_set_size": "`valid_fraction`", "num_epochs": "`epochs`"}),
    "Unsloth": ({"model_name": "`model`", "max_seq_length": "`max_length`", "r": "`lora_r`",
                 "random_state": "`seed`", "full_finetuning": "`fine_tune_type` full"}),
}  # fmt: skip


@pytest.mark.parametrize("trainer", FOREIGN)
def test_all_names_of_another_trainer_are_answered_at_once(trainer):
    names = FOREIGN[trainer]
    message = refusal(
        "".join(f"{name}: 1\n" for name in names) + "lerning_rate: 1\nxyz: 2\nbeta: 1"
    )
    assert message.startswith(
        "s.yaml: translate it with `mlx-dpo config from s.yaml`; unknown settings: "
    )
    for name, here in names.items():
        advice = message.partition(f"`{name}` (")[2].partition(")")[0]
        assert here in advice, name
    assert "`lerning_rate` (did you mean `learning_rate`?), `xyz`" in message
