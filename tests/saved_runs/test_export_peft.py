"""A finished run ships by itself what can be proved; the rest is told, and `export` mends it."""

import json
from pathlib import Path

import pytest

from mlx_dpo import load_policy
from mlx_dpo.errors import ConfigError, ModelError, RunError
from mlx_dpo.runs.save_peft import LOADS_IN_PEFT
from mlx_dpo.runs.summary import summarize_end
from mlx_dpo.saved_runs.export_peft import export_run
from tests.edited_files import edit, read_entries, write_edited
from tests.trained_run import train


def config(folder):
    return json.loads(Path(folder, "adapter_config.json").read_text())


def test_a_run_on_a_hugging_face_checkpoint_loads_in_both(workplace):
    trainer = train(workplace, output="next", pairs=["pairs.jsonl"], use_rslora=True)
    assert summarize_end(trainer)[0] == ("adapter", LOADS_IN_PEFT)
    found = config("next")
    assert (found["fine_tune_type"], found["peft_type"]) == ("lora", "LORA")
    assert found["use_rslora"] and found["lora_alpha"] == 32
    assert found["lora_parameters"]["scale"] == pytest.approx(16)
    assert found["base_model_name_or_path"] is None  # a folder here means nothing elsewhere
    assert json.loads(Path("next/run.json").read_text())["adapter"] == LOADS_IN_PEFT


def test_a_run_on_a_packed_model_says_why_not_and_export_mends_it(workplace):
    from mlx_dpo.export.convert import convert

    convert("base", Path("packed"), bits=8, group_size=32)
    trainer = train(workplace, model=str(Path("packed").resolve()), output="next")
    [(_, message)] = summarize_end(trainer)
    assert message.startswith("loads in mlx-lm; not in PEFT: its base was quantized by MLX")
    assert not Path("next/adapter_model.safetensors").exists()
    before = load_policy("next").model.parameters()
    with pytest.raises(ModelError, match="packed was quantized by MLX"):
        export_run("next")
    assert export_run("next", "base") == LOADS_IN_PEFT
    assert config("next")["peft_type"] == "LORA"
    after = load_policy("next").model.parameters()
    from mlx_dpo.io.arrays import named_arrays

    assert named_arrays(before).keys() == named_arrays(after).keys()


def test_a_run_goes_on_from_an_adapter_that_was_exported_meanwhile(workplace):
    """Its content is what it was, although the file of settings has more in it."""
    train(workplace, output="next", pairs=["pairs.jsonl"], start_adapter="run", lora_r=None)
    entries = {k: v for k, v in config("run").items() if k[:4] in ("fine", "num_", "lora")}
    entries.pop("lora_alpha"), entries.pop("lora_dropout")
    Path("run/adapter_config.json").write_text(json.dumps(entries))
    load_policy("next", reference=True)
    export_run("run")
    load_policy("next", reference=True)


def test_what_cannot_be_exported_is_reported(workplace):
    with pytest.raises(ConfigError, match="`revision` has no effect without a Hub id"):
        export_run("run", "base", "main")
    with pytest.raises(ModelError, match="no such folder, and not a Hub id"):
        export_run("run", "../no-such")
    edit("run/run.json", state="unfinished")
    with pytest.raises(RunError, match="unfinished"):
        export_run("run")


def test_a_base_of_the_hub_is_named_and_a_folder_of_that_look_is_not(workplace, fake_hub):
    from huggingface_hub import HfApi

    HfApi().create_repo("org/base", private=True)
    data = Path("base/model.safetensors").read_bytes()
    fake_hub.repos["org/base"]["commits"].append(("m", {"model.safetensors": data}))
    export_run("run", "org/base")
    assert config("run")["base_model_name_or_path"] == "org/base"
    Path("org").mkdir()
    Path("base").rename("org/base")
    record = read_entries("run/run.json")
    record["settings"]["model"], record["model_folder"] = "org/base", "../org/base"
    write_edited("run/run.json", record)
    export_run("run")
    assert config("run")["base_model_name_or_path"] is None
