"""One adapter in two layouts: what PEFT saved is read, and written again as PEFT had it."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.adapters.adapter_files import (
    adapter_digest,
    add_peft_files,
    attach_loaded_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
)
from mlx_dpo.adapters.hf_checkpoint import local_checkpoint
from mlx_dpo.adapters.hf_names import make_peft_adapter
from mlx_dpo.errors import ModelError
from mlx_dpo.io.arrays import read_arrays
from mlx_dpo.io.checksums import read_checked_arrays
from tests.trained_run import GOLDENS

GOLDEN = json.loads((GOLDENS / "logits.json").read_text())
TOKENS = mx.array([GOLDEN["tokens"]])
KINDS = [k for k in GOLDEN["logits"] if k != "mixtral"]
EVERY = [(kind, name) for kind, found in GOLDEN["logits"].items() for name in found]


def opened(kind):
    model, entries = load_model(GOLDENS / kind)
    return model, entries, local_checkpoint(GOLDENS / kind, kind)


def policy(kind, name):
    """The golden's model with its adapter, as if it had just been trained."""
    model, entries, checkpoint = opened(kind)
    attach_loaded_adapter(model, read_adapter(GOLDENS / kind / name), dropout=0.0)
    return model.eval(), entries, checkpoint


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_logits_of_what_peft_saved_are_pefts(kind, name):
    model, _, _ = opened(kind)
    before = np.array(model(TOKENS)[0])
    load_adapter(model, GOLDENS / kind / name)
    expected = np.array(GOLDEN["logits"][kind][name])
    np.testing.assert_allclose(model(TOKENS)[0], expected, atol=1e-4)
    assert np.abs(before - expected).max() > 0.05


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_what_is_written_for_peft_is_what_peft_wrote(kind, name, tmp_path):
    model, entries, checkpoint = policy(kind, name)
    save_adapter(tmp_path, model, adapters.make_adapter_config(model))
    side = make_peft_adapter(model, entries, checkpoint, rslora=name == "rslora")
    add_peft_files(tmp_path, *side)
    theirs, _ = read_arrays(GOLDENS / kind / name / "adapter_model.safetensors")
    ours, metadata = read_checked_arrays(tmp_path / "adapter_model.safetensors")
    assert metadata == {"format": "pt"}  # beside the entries of the checksum
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)

    def settings(folder):
        found = json.loads((folder / "adapter_config.json").read_text())
        names = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "bias")
        return {name: found[name] for name in names}

    assert settings(tmp_path) == settings(GOLDENS / kind / name)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_the_folder_of_both_layouts_loads_in_mlx_lm(kind, name, tmp_path):
    from mlx_lm.tuner.utils import load_adapters

    model, entries, checkpoint = policy(kind, name)
    save_adapter(tmp_path, model, adapters.make_adapter_config(model))
    before = adapter_digest(tmp_path)
    add_peft_files(tmp_path, *make_peft_adapter(model, entries, checkpoint))
    assert adapter_digest(tmp_path) == before
    theirs = load_adapters(opened(kind)[0], str(tmp_path))
    np.testing.assert_allclose(theirs(TOKENS), model(TOKENS), atol=1e-4)


def test_targets_are_last_names_only_where_they_mean_the_same_layers():
    targets = make_peft_adapter(*policy("llama", "lora"))[0]["target_modules"]
    assert targets == [f"{x}_proj" for x in ("down", "gate", "k", "o", "q", "up", "v")]
    targets = make_peft_adapter(*policy("llama", "last-layers"))[0]["target_modules"]
    assert len(targets) == 14
    assert {path.split(".")[2] for path in targets} == {"1", "2"}
    targets = make_peft_adapter(*policy("gpt2", "last-layers"))[0]["target_modules"]
    assert {path.split(".")[0] for path in targets} == {"transformer"}


def test_a_head_of_its_own_goes_along():
    model, entries, checkpoint = opened("llama")
    adapters.attach_adapters(model, rank=2, scale=2.0, target_modules=["lm_head", "embed_tokens"])
    settings, arrays = make_peft_adapter(model, entries, checkpoint)
    assert settings["target_modules"] == ["embed_tokens", "lm_head"]
    table = arrays["base_model.model.model.embed_tokens.lora_embedding_A"]
    head = arrays["base_model.model.lm_head.lora_B.weight"]
    assert (table.shape, head.shape) == ((2, 48), (48, 2))


def attach(architecture, **settings):
    model, entries, checkpoint = opened(architecture)
    adapters.attach_adapters(model, **({"rank": 2, "scale": 2.0} | settings))
    return model, entries, checkpoint


def test_experts_and_what_chooses_among_them_have_no_counterpart():
    with pytest.raises(
        ModelError, match=r"block_sparse_moe.gate` is the router of a layer of experts"
    ):
        make_peft_adapter(*attach("mixtral"))
    with pytest.raises(ModelError, match=r"switch_mlp.up_proj` stacks the experts"):
        make_peft_adapter(*attach("mixtral", target_modules=["switch_mlp.up_proj"]))


def test_a_table_that_is_the_head_too_has_none():
    with pytest.raises(ModelError, match="is tied to the LM head"):
        make_peft_adapter(*attach("qwen2", target_modules=["embed_tokens"]))


def test_a_table_under_dora_has_none():
    with pytest.raises(ModelError, match="DoRA scales the rows of the embeddings here"):
        make_peft_adapter(*attach("llama", kind="dora", target_modules=["embed_tokens"]))


def test_architectures_that_were_not_tried_are_refused_by_name():
    model, entries, checkpoint = attach("llama")
    with pytest.raises(ModelError, match="layers of `exaone` have not been verified against"):
        make_peft_adapter(model, entries | {"model_type": "exaone"}, checkpoint)


def test_a_layer_that_the_checkpoint_has_otherwise_is_named(tmp_path):
    model, entries, checkpoint = attach("llama", target_modules=["q_proj"])
    q, k = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")
    without = {n: s for n, s in checkpoint.shapes.items() if n != q}
    for shapes, message in (
        (without, "no tensor has this name"),
        (checkpoint.shapes | {q: checkpoint.shapes[k]}, r"its shape is \(8, 16\)"),
    ):
        other = type(checkpoint)("other", shapes)
        with pytest.raises(ModelError, match=rf"`model\.layers\.0.*q_proj`: other has.*{message}"):
            make_peft_adapter(model, entries, other)


def test_a_checkpoint_of_other_weights_is_an_error(tmp_path):
    """Names and shapes alone would take any model of the same size."""
    shutil.copytree(GOLDENS / "mistral", tmp_path / "other")
    model, entries, _ = attach("llama", target_modules=["q_proj"])
    checkpoint = local_checkpoint(tmp_path / "other", "other")
    with pytest.raises(
        ModelError,
        match=r"`model.layers.*` does not match the weights of the trained model.*\(cosine -?0\.\d",
    ):
        make_peft_adapter(model, entries, checkpoint)


def test_a_quantised_base_is_proved_on_the_checkpoint_that_it_was_made_from(tmp_path):
    import mlx.nn as nn
    from mlx_lm.utils import save_model

    def wide(folder):
        from tests.checkpoints import make_checkpoint

        return make_checkpoint(folder)

    original = wide(tmp_path / "original")
    model, entries = load_model(original)
    nn.quantize(model, group_size=32, bits=4)
    save_model(tmp_path / "packed", model)
    adapters.attach_adapters(model, rank=2, scale=2.0)
    with pytest.raises(ModelError, match="was quantized by MLX"):
        make_peft_adapter(model, entries, local_checkpoint(tmp_path / "packed", "packed"))
    settings, _ = make_peft_adapter(model, entries, local_checkpoint(original, "original"))
    assert "q_proj" in settings["target_modules"]


def test_trained_weights_of_the_model_are_no_adapter():
    model, entries, checkpoint = opened("llama")
    adapters.enable_full_fine_tuning(model, num_layers=1)
    with pytest.raises(ModelError, match="there is no adapter; write the whole model"):
        make_peft_adapter(model, entries, checkpoint)
