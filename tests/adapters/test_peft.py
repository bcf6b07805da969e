"""Adapters that PEFT saved, on this side: the logits are PEFT's, and nothing is left out."""

import hashlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama

from mlx_dpo import paths
from mlx_dpo.adapters.adapter_files import adapter_digest, load_adapter, read_adapter, save_adapter
from mlx_dpo.adapters.attach import adapted_layers, make_adapter_config
from mlx_dpo.errors import ModelError
from mlx_dpo.io.arrays import read_arrays, write_arrays
from mlx_dpo.models.load import load_model

FOLDER = Path(__file__).parents[1] / "goldens" / "peft"
GOLDEN = json.loads((FOLDER / "logits.json").read_text())
TOKENS = mx.array([GOLDEN["tokens"]])


def base(*, tied=True):
    model = load_model(str(paths.tiny_chat()), dtype="float32").model
    if tied:
        return model
    entries = json.loads((paths.tiny_chat() / "config.json").read_text())
    other = llama.Model(llama.ModelArgs.from_dict(entries | {"tie_word_embeddings": False}))
    other.model = model.model
    other.lm_head.weight = model.model.embed_tokens.weight
    return other


@pytest.fixture
def copy(tmp_path):
    def make(name="lora", **changes):
        folder = tmp_path / name
        shutil.copytree(FOLDER / name, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        return folder

    return make


def test_the_goldens_are_of_the_model_that_ships():
    found = hashlib.sha256((paths.tiny_chat() / "model.safetensors").read_bytes()).hexdigest()
    assert found == GOLDEN["model"], f"models/tiny-chat has changed; run {GOLDEN['made_by']} again"


@pytest.mark.parametrize("name", GOLDEN["logits"])
def test_logits_are_those_of_peft(name, tmp_path):
    tied = name != "embeddings"
    policy = base(tied=tied)
    load_adapter(policy, FOLDER / name)
    expected = np.array(GOLDEN["logits"][name])
    words = expected.shape[1]
    np.testing.assert_allclose(policy(TOKENS)[0, :, :words], expected, atol=1e-4)
    assert np.abs(np.array(base()(TOKENS)[0, :, :words]) - expected).max() > 0.05

    save_adapter(
        tmp_path, policy.unfreeze(keys=["lora_a", "lora_b", "m"]), make_adapter_config(policy)
    )
    again = base(tied=tied)
    load_adapter(again, tmp_path)
    assert mx.array_equal(again(TOKENS), policy(TOKENS))


def test_an_adapter_of_some_layers_is_on_those_alone():
    policy = base()
    load_adapter(policy, FOLDER / "some-layers")
    names = {f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 2) for x in "qk"}
    assert adapted_layers(policy).keys() == names
    # No `num_layers` of mlx-lm's means these, so that its keys are whole paths.
    assert set(make_adapter_config(policy)["lora_parameters"]["keys"]) == names


def test_embeddings_apart_from_their_tied_head_are_refused():
    with pytest.raises(ModelError, match=r"lora_embedding_A` leaves the head as it is"):
        load_adapter(base(), FOLDER / "embeddings")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "VERA"}, "peft_type `VERA` is not supported; use LORA"),
        ({"bias": "all"}, "`bias` is `all`; adapters here have no biases"),
        ({"modules_to_save": ["lm_head"]}, r"`modules_to_save` is set .*, but it saves whole"),
        ({"rank_pattern": {"q_proj": 4}}, "`rank_pattern` is set .*, but its ranks differ"),
        ({"alpha_pattern": {"q_proj": 4}}, "`alpha_pattern` is set .*, but its scales differ"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` is `pissa`, which changes the model"),
        ({"of_a_later_peft": 1}, "`of_a_later_peft` is set .*, but it is not supported here"),
        ({"lora_bias": True}, "`lora_bias` is set"),
        ({"init_lora_weights": "mica"}, "`init_lora_weights` is `mica`"),
        ({"r": 0}, "no adapter has `r` 0 and"),
        ({"lora_alpha": float("nan")}, "no adapter has `r` 2 and `lora_alpha` nan"),
        ({"r": None}, "`r`, `lora_alpha` and `lora_dropout` must be numbers"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(copy, changes, message):
    with pytest.raises(ModelError, match=message):
        read_adapter(copy(**changes))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", None, r"q_proj\.lora_a` is absent there"),
        (None, "model.layers.9.self_attn.q_proj.lora_A.weight", "no `model.layers.9.self_attn"),
        (None, "model.lm_head.weight", "`base_model.model.model.lm_head.weight` is not part of"),
    ],
)
def test_every_array_has_to_find_its_place(copy, old, new, message):
    folder = copy()
    arrays, _ = read_arrays(folder / "adapter_model.safetensors")
    if old:
        del arrays[f"base_model.model.{old}"]
    if new:
        arrays[f"base_model.model.{new}"] = mx.zeros((2, 192))
    mx.eval(arrays)
    write_arrays(folder / "adapter_model.safetensors", arrays)
    with pytest.raises(ModelError, match=message):
        load_adapter(base(), folder)


def test_a_table_under_dora_is_another_thing_in_peft(copy):
    with pytest.raises(ModelError, match="DoRA scales the columns of the embeddings in PEFT"):
        read_adapter(copy("embeddings", use_dora=True))


def test_pickles_are_not_read(copy):
    folder = copy()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"pickled \(`adapter_model.bin`\)"):
        read_adapter(folder)


def test_in_a_folder_of_both_layouts_mlx_lms_is_read(copy):
    folder = copy()
    before = adapter_digest(folder)
    own = base()
    load_adapter(own, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    save_adapter(folder, own.unfreeze(keys=["lora_a", "lora_b"]), config | make_adapter_config(own))
    assert read_adapter(folder).path.name == "adapters.safetensors"
    assert adapter_digest(folder) != before
