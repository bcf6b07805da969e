"""What a quantized GGUF file keeps is measured by the values of its rows."""

import json

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.export.gguf import find_quantizer, write_rounded_checkpoint

HALF = np.float16


@pytest.fixture
def files(tmp_path):
    """A checkpoint of three matrices and a vector, and a place for GGUF files."""
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("q", (6, 32)), ("k", (2, 32)), ("e", (3, 32)), ("norm", (32,)))
    }
    tensors["e"][2] = tensors["e"][0]  # a row that stands twice
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    mx.save_safetensors(
        str(folder / "model.safetensors"), {n: mx.array(v) for n, v in tensors.items()}
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "rounded").mkdir()
    return tmp_path, tensors


def write(path, arrays):
    mx.save_gguf(str(path), {name: mx.array(value) for name, value in arrays.items()}, {})


def rounded_tensors(folder, plain, quantized):
    write(folder / "plain.gguf", plain)
    write(folder / "quantized.gguf", quantized)
    write_rounded_checkpoint(
        folder / "rounded", folder / "checkpoint", folder / "plain.gguf", folder / "quantized.gguf"
    )
    return mx.load(str(folder / "rounded" / "model.safetensors"))


def test_rows_are_found_where_the_converter_put_them(files):
    """Permuted rows, joined matrices and a row that stands twice, by hand."""
    folder, tensors = files
    half = {name: value.astype(HALF) for name, value in tensors.items()}
    order = [4, 0, 2, 5, 1, 3]
    joined = np.concatenate([half["q"][order], half["k"]])
    coarse = {"qk": np.round(joined * 4) / 4, "embd": np.round(half["e"] * 2) / 2}
    norm = tensors["norm"]
    found = rounded_tensors(
        folder, {"qk": joined, "embd": half["e"], "n": norm}, coarse | {"n": norm + 1}
    )
    np.testing.assert_array_equal(found["q"], np.round(half["q"] * 4) / 4)
    np.testing.assert_array_equal(found["k"], np.round(half["k"] * 4) / 4)
    np.testing.assert_array_equal(found["e"], np.round(half["e"] * 2) / 2)
    np.testing.assert_array_equal(found["norm"], tensors["norm"])  # vectors are not quantized
    assert found["q"].dtype == mx.float16 and found["norm"].dtype == mx.float32
    assert (folder / "rounded" / "config.json").is_file()


@pytest.mark.parametrize("order", [1, -1])
def test_equal_rows_of_head_and_embeddings_are_told_apart(tmp_path, order):
    """llama.cpp quantizes the head to more bits than the embeddings."""
    rows = np.random.default_rng(0).standard_normal((4, 32)).astype(HALF)
    checkpoint = {"model.embed_tokens.weight": rows, "lm_head.weight": rows}
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "rounded").mkdir()
    mx.save_safetensors(
        str(tmp_path / "checkpoint" / "model.safetensors"),
        {name: mx.array(value) for name, value in checkpoint.items()},
    )
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    coarse = {"token_embd.weight": np.round(rows), "output.weight": np.round(rows * 8) / 8}
    coarse = dict(list(coarse.items())[::order])
    found = rounded_tensors(tmp_path, dict.fromkeys(coarse, rows), coarse)
    np.testing.assert_array_equal(found["lm_head.weight"], coarse["output.weight"])
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], coarse["token_embd.weight"])


def test_what_was_not_rounded_keeps_its_values(files):
    folder, tensors = files
    half = {name: value.astype(HALF) for name, value in tensors.items()}
    found = rounded_tensors(folder, half, half | {"k": half["k"] * 2})
    np.testing.assert_array_equal(found["k"], half["k"] * 2)
    for name in ("q", "e"):
        np.testing.assert_array_equal(found[name], tensors[name])  # not even cast to float16


def test_rows_that_the_checkpoint_has_not_are_refused(files):
    folder, tensors = files
    half = {name: value.astype(HALF) for name, value in tensors.items()}
    scaled = half | {"q": half["q"] * HALF(1.5)}
    with pytest.raises(ModelError, match="the converter wrote other values for `q`"):
        rounded_tensors(folder, scaled, scaled | {"q": np.round(scaled["q"])})
    assert not list((folder / "rounded").iterdir())


def test_a_quantized_type_is_read_as_llama_cpp_reads_it(files):
    """Q8_0 by its formula: a float16 scale for each 32 values, max |value| / 127, and integers."""
    folder, tensors = files
    half = {name: value.astype(HALF) for name, value in tensors.items()}
    write(folder / "plain.gguf", half)
    scales = (np.abs(half["k"].astype(np.float32)).max(axis=1, keepdims=True) / 127).astype(HALF)
    integers = np.round(half["k"] / scales.astype(np.float32)).astype(np.int8)
    packed = np.concatenate([scales.view(np.uint8), integers.view(np.uint8)], axis=1)
    writer = GGUFWriter(folder / "quantized.gguf", "llama")
    for name, value in half.items():
        raw = {"raw_dtype": GGMLQuantizationType.Q8_0} if name == "k" else {}
        writer.add_tensor(name, packed if name == "k" else value, **raw)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    write_rounded_checkpoint(
        folder / "rounded", folder / "checkpoint", folder / "plain.gguf", folder / "quantized.gguf"
    )
    found = mx.load(str(folder / "rounded" / "model.safetensors"))
    expected = (integers * scales.astype(np.float32)).astype(HALF)
    np.testing.assert_array_equal(found["k"], expected)
    assert not np.array_equal(expected, half["k"])


def test_a_missing_quantizer_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"`llama-quantize` \(none found\).*`--quantizer`"):
        find_quantizer(None)
