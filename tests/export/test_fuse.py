"""A fused model gives the logits of base and adapter, under the names that its source has."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard
from mlx_lm.utils import load_model

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.adapters.adapter_files import load_adapter
from mlx_dpo.adapters.merge import AffineQuantization, merge_adapters, merged_weight
from mlx_dpo.cli import cli
from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.export.fuse import fuse_run
from mlx_dpo.export.model_folder import merged_tensors, set_config_dtype, write_hf
from mlx_dpo.export.options import FuseOptions
from mlx_dpo.io.arrays import named_arrays, read_arrays
from mlx_dpo.models.device import float32_weight
from tests.adapters.test_hf_names import EVERY, GOLDEN, TOKENS, opened
from tests.trained_run import GOLDENS, train

SIZES = {"rank": 2, "scale": 2.0}


def moved(model, **settings):
    """Adapters in which every array does something."""
    adapters.attach_adapters(model, **(SIZES | settings))
    mx.random.seed(3)
    for module in adapters.adapted_layers(model).values():
        module.lora_b = 0.3 * mx.random.normal(module.lora_b.shape)
        if "m" in module:
            module.m = module.m * (1 + 0.2 * mx.random.normal(module.m.shape))
    return model.eval()


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_the_written_checkpoint_gives_the_logits_of_peft(kind, name, tmp_path):
    model, entries, checkpoint = opened(kind)
    load_adapter(model, GOLDENS / kind / name)
    (tmp_path / "fused").mkdir()
    write_hf(tmp_path / "fused", merged_tensors(model, entries, checkpoint), checkpoint)
    fused, _ = load_model(tmp_path / "fused")
    expected = np.array(GOLDEN["logits"][kind][name])
    np.testing.assert_allclose(fused(TOKENS)[0], expected, atol=1e-4)

    before, metadata = read_arrays(GOLDENS / kind / "model.safetensors")
    after, saved_metadata = read_arrays(tmp_path / "fused" / "model.safetensors")
    assert saved_metadata == metadata
    shapes = {name: (value.shape, value.dtype) for name, value in before.items()}
    assert {name: (value.shape, value.dtype) for name, value in after.items()} == shapes
    touched = {n for n in before if not mx.array_equal(before[n], after[n])}
    saved, _ = read_arrays(GOLDENS / kind / name / "adapter_model.safetensors")
    assert len(touched) == sum("lora_A" in name for name in saved)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_fused_model_computes_as_base_and_adapter(tiny_llama, kind, bits):
    if bits:
        nn.quantize(tiny_llama, group_size=32, bits=bits)
    model = moved(tiny_llama, kind=kind, target_modules=["q_proj", "down_proj", "embed_tokens"])
    expected = model(TOKENS)
    rounding = merge_adapters(model, mx.float32)
    assert not adapters.adapted_layers(model)
    assert not any("scales" in module for module in model.modules())
    np.testing.assert_allclose(model(TOKENS), expected, atol=2e-5)
    assert rounding.retained == pytest.approx(1, abs=1e-6)
    assert rounding.cosine == pytest.approx(1, abs=1e-6)


def test_experts_are_fused_one_by_one():
    model, _, _ = opened("mixtral")
    model = moved(model, target_modules=["switch_mlp.up_proj", "down_proj", "gate"])
    expected = model(TOKENS)
    merge_adapters(model, mx.float32)
    np.testing.assert_allclose(model(TOKENS), expected, atol=2e-5)


def test_a_row_without_length_is_not_stretched():
    base = nn.Linear(2, 2, bias=False)
    base.weight = mx.array([[0.0, 0.0], [3.0, 4.0]])
    from mlx_dpo.adapters.layers import add_adapter

    adapted = add_adapter(base, "x", kind="dora", rank=1, scale=1.0, dropout=0.0)
    adapted.m = mx.array([7.0, 10.0])
    assert merged_weight(adapted, base.weight).tolist() == [[0, 0], [6, 8]]


def test_bits_that_are_too_few_leave_noise_of_a_small_change(tiny_llama):
    """As measured of mlx-lm's re-quantised fuse: 1 % of the weights, 4 bits."""
    model = moved(tiny_llama, target_modules=["q_proj"])
    for adapted in adapters.adapted_layers(model).values():
        added = merged_weight(adapted, mx.zeros(adapted.linear.weight.shape))
        size = mx.linalg.norm(added) / mx.linalg.norm(adapted.linear.weight)
        adapted.lora_b = adapted.lora_b * (0.01 / size)
    fine = AffineQuantization(8, 32).round_trip(mx.ones((4, 33)))
    assert mx.array_equal(fine, mx.ones((4, 33)))  # whose groups do not fit: left alone
    found = merge_adapters(model, mx.float32, AffineQuantization(4, 32))
    assert found.cosine < 0.3


def test_what_is_left_is_counted_on_the_rounded_weight():
    """W = 0, the change (4, 1); to steps of 4 it becomes (4, 0): 16 / 17 of it."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight = mx.zeros((1, 2))
    model = nn.Module()
    model.layers = [nn.Module()]
    model.layers[0].q_proj = layer

    class Coarse(AffineQuantization):
        def round_trip(self, weight):
            return mx.round(weight / 4) * 4

    adapters.attach_adapters_at(
        model, ["layers.0.q_proj"], kind="lora", rank=1, scale=1.0, dropout=0.0
    )
    adapted = model.layers[0].q_proj
    adapted.lora_a, adapted.lora_b = mx.array([[4.0], [1.0]]), mx.array([[1.0]])
    found = merge_adapters(model, mx.float32, Coarse(4, 32))
    assert found.retained == pytest.approx(16 / 17)
    assert found.cosine == pytest.approx(16 / (17 * 16) ** 0.5)


def test_weights_that_were_trained_themselves_are_written(tmp_path):
    model, entries, checkpoint = opened("llama")
    adapters.enable_full_fine_tuning(model, num_layers=1)
    for name, value in adapters.adapter_weights(model).items():
        model.load_weights([(name, value * 1.5)], strict=False)
    expected = model(TOKENS)
    (tmp_path / "fused").mkdir()
    write_hf(tmp_path / "fused", merged_tensors(model, entries, checkpoint), checkpoint)
    fused, _ = load_model(tmp_path / "fused")
    np.testing.assert_allclose(fused(TOKENS), expected, atol=1e-5)
    assert merge_adapters(model, mx.float32) is None
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-6)


def test_a_tensor_that_the_checkpoint_has_twice_is_not_forgotten():
    """A head that is written out although it is the table of embeddings."""
    model, entries, checkpoint = opened("qwen2")
    adapters.attach_adapters(model, **SIZES, target_modules=["embed_tokens"])
    assert merged_tensors(model, entries, checkpoint).keys() == {"model.embed_tokens.weight"}
    shapes = checkpoint.shapes | {"lm_head.weight": (48, 16)}
    twice = type(checkpoint)("twice", shapes, checkpoint.folder)
    changed = merged_tensors(model, entries, twice)
    assert mx.array_equal(changed["lm_head.weight"], changed["model.embed_tokens.weight"])
    model, entries, checkpoint = opened("llama")  # whose head is its own
    adapters.attach_adapters(model, **SIZES, target_modules=["embed_tokens"])
    assert merged_tensors(model, entries, checkpoint).keys() == {"model.embed_tokens.weight"}


def test_the_configuration_says_the_type_and_no_packing():
    entries = {
        "quantization": {"bits": 4}, "quantization_config": {}, "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16"},
    }  # fmt: skip
    named = {"torch_dtype": "float16", "text_config": {"dtype": "float16"}}
    assert set_config_dtype(entries, "float16") == named
    assert "quantization" in entries


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"to": "hf", "bits": 4}, "`--bits` has no effect with `--to hf`"),
        ({"to": "hf", "dtype": "float16"}, "`--dtype` has no effect with `--to hf`"),
        ({"group_size": 32}, "`--group-size` has no effect without `--bits`"),
        ({"base": "x"}, "`--base-model` has no effect without `--to hf`"),
        ({"gguf": Path("x")}, "`--gguf` has no effect without `--to hf`"),
        ({"to": "hf", "converter": "x"}, "`--converter` has no effect without `--gguf`"),
    ],
)
def test_wishes_without_effect_are_refused(wish, message):
    with pytest.raises(ConfigError, match=message):
        FuseOptions(**wish)


def test_a_run_becomes_a_model_that_is_measured_after_it_was_written(workplace):
    Path("base/LICENSE").write_text("You may.")
    Path("base/README.md").write_text("---\nlicense: mit\n---\n")
    fused = fuse_run("run", Path("fused"), FuseOptions())
    assert fused.retention.margin == pytest.approx(1, abs=1e-4)
    assert fused.retention.change == pytest.approx(1, abs=1e-4)
    assert fused.measured_on == "3 held-out pairs"
    assert sorted(path.name for path in Path("fused").iterdir()) == [
        "LICENSE", "README.md", "chat_template.jinja", "config.json", "model.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert ModelCard.load("fused/README.md").data.license == "mit"
    model, _ = load_model(Path("fused"))
    base, _ = load_model(Path("base"))
    load_adapter(base, Path("run"))
    np.testing.assert_allclose(model(TOKENS), base(TOKENS), atol=1e-4)


def test_a_fuse_that_loses_the_training_is_refused_and_leaves_nothing(workplace):
    with pytest.raises(
        ModelError, match=r"keeps -?\d+\.\d% of the margin and .*or --force"
    ) as error:
        fuse_run("run", Path("fused"), FuseOptions(bits=2))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in workplace.iterdir()) == ["base", "pairs.jsonl", "run"]
    forced = fuse_run("run", Path("fused"), FuseOptions(bits=2, force=True))
    assert forced.retention.minimum < 0.9
    assert "quantization" in json.loads(Path("fused/config.json").read_text())


def test_fusing_measures_on_other_pairs_if_asked(workplace):
    fused = fuse_run("run", Path("fused"), FuseOptions(to="hf", pairs="pairs.jsonl"))
    assert fused.measured_on.startswith("12 pairs of pairs.jsonl")
    assert read_arrays(Path("fused/model.safetensors"))[1] == {"format": "pt"}


def test_a_run_on_a_packed_base_is_fused_unpacked_in_its_own_type(workplace):
    from mlx_dpo.export.convert import convert

    convert("base", Path("packed"), bits=4, group_size=32, dtype="bfloat16")
    train(workplace, model="packed", pairs=["pairs.jsonl"], output="other")
    fused = fuse_run("other", Path("fused"), FuseOptions(min_retained=0.5))
    assert fused.kind == "bfloat16"
    weights = named_arrays(load_model(Path("fused"))[0].parameters())
    assert {value.dtype for value in weights.values()} == {mx.bfloat16}
    packed, _ = load_model(Path("packed"))
    load_adapter(packed, Path("other"))
    layer = packed.model.layers[0].self_attn.q_proj
    whole = merged_weight(layer, float32_weight(layer.linear))
    own = weights["model.layers.0.self_attn.q_proj.weight"].astype(mx.float32)
    np.testing.assert_allclose(own, whole, rtol=2**-8)
    with pytest.raises(ModelError, match="was quantized by MLX"):
        fuse_run("other", Path("hf"), FuseOptions(to="hf"))
    fuse_run("other", Path("hf"), FuseOptions(to="hf", base="base", min_retained=0.0))


def test_noise_that_happens_to_lie_along_a_small_change_is_not_kept_training(workplace):
    """What 4 bits make of a model is many times such a change, and a share of it points there."""
    train(workplace, pairs=["pairs.jsonl"], output="slight", learning_rate=1e-5, epochs=1)
    retention = fuse_run("slight", Path("plain"), FuseOptions()).retention
    assert retention.change == pytest.approx(1, abs=1e-2)
    found = fuse_run("slight", Path("forced"), FuseOptions(bits=4, force=True))
    assert found.retention.minimum > 2 and found.merge_retention.cosine < 0.01
    with pytest.raises(ModelError, match=r"which is beyond 110%, so it was not written; leave"):
        fuse_run("slight", Path("packed"), FuseOptions(bits=4))
    train(workplace, pairs=["pairs.jsonl"], output="slighter", learning_rate=1e-7, epochs=1)
    with pytest.raises(ModelError, match=r"training hardly moved it \(a margin of .* nats\)"):
        fuse_run("slighter", Path("packed"), FuseOptions(bits=4))


def test_an_adapter_that_goes_in_twice_is_refused(workplace):
    """Names and shapes of a fused model are those of its base, and its weights nearly so."""
    train(workplace, pairs=["pairs.jsonl"], output="slight", learning_rate=1e-4, epochs=1)
    fuse_run("slight", Path("once"), FuseOptions(to="hf"))
    with pytest.raises(
        ModelError, match=r"keeps 20\d.* of the adapters' .*beyond 110%.*that was trained"
    ):
        fuse_run("slight", Path("twice"), FuseOptions(to="hf", base="once"))
    assert not Path("twice").exists()


def test_a_run_that_computed_in_another_type_is_written_in_that(workplace):
    train(workplace, dtype="bfloat16", pairs=["pairs.jsonl"], output="other")
    assert fuse_run("other", Path("fused"), FuseOptions(min_retained=0.0)).kind == "bfloat16"
    assert (
        fuse_run("other", Path("wide"), FuseOptions(dtype="float32", min_retained=0)).kind
        == "float32"
    )


def converter(folder, does):
    path = folder / "convert_hf_to_gguf.py"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return path


def fused_with(own, to="model.gguf", output="fused"):
    words = ["fuse", "run", "--output", output, "--to", "hf", "--gguf", to, "--converter", str(own)]
    return CliRunner().invoke(cli, words)


def test_gguf_is_made_by_llama_cpps_converter(workplace):
    own = converter(workplace, 'test -f "$1/config.json" && cat "$1/model.safetensors" > "$3"')
    done = fused_with(own)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1].split()[:2] == ["gguf", "model.gguf,"]
    assert Path("model.gguf").read_bytes() == Path("fused/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("echo noise; echo 'Model X is not supported' >&2; exit 1", "Model X is not supported"),
        ('echo half > "$3"; exit 1', "it wrote nothing"),
        ("exit 0", "it wrote nothing"),
    ],
)
def test_the_message_of_the_converter_is_shown_and_the_checkpoint_stays(workplace, does, message):
    done = fused_with(converter(workplace, does))
    assert done.exit_code == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["model", "margin", "change"]
    [line] = done.stderr.splitlines()
    assert f"model.gguf: convert_hf_to_gguf.py cannot convert the model ({message})" in line
    assert (
        "the checkpoint itself is complete in fused" in line and Path("fused/config.json").is_file()
    )
    assert not list(workplace.glob("*.gguf*")) and not list(workplace.glob(".*gguf*"))


def test_a_converter_that_is_no_program_is_one_line(workplace):
    own = converter(workplace, "exit 0")
    own.write_text("no first line")
    done = fused_with(own)
    assert done.exit_code == 1 and "(Exec format error)" in done.stderr
    own.chmod(0o644)
    done = fused_with(own, output="other")
    assert "not executable; make it so with `chmod +x`" in done.stderr


def test_where_gguf_cannot_go_is_said_before_anything_is_loaded(workplace):
    own = converter(workplace, "exit 0")
    Path("model.gguf").touch()
    assert "model.gguf: already exists" in fused_with(own).stderr
    assert "the folder no" in fused_with(own, "no/model.gguf").stderr
    assert not Path("fused").exists()


def test_gguf_without_a_converter_is_refused_before_anything_is_loaded(workplace, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"needs llama.cpp's `convert_hf_to_gguf.py`"):
        fuse_run("no-such-run", Path("fused"), FuseOptions(to="hf", gguf=Path("model.gguf")))
