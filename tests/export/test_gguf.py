"""What a quantized GGUF file keeps is measured by the values of its rows."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.export.gguf import _read_gguf, find_quantizer, write_rounded_checkpoint

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


def q8_0(values):
    """Return rows of 32 values as llama.cpp stores Q8_0: a float16 scale, then 32 integers."""
    data = b""
    for block in values.reshape(-1, 32):
        scale = HALF(np.abs(block).max() / 127)
        data += scale.tobytes() + np.round(block / np.float32(scale)).astype(np.int8).tobytes()
    return data


def test_q8_0_is_read_back_by_its_formula(tmp_path):
    """A file of one tensor, written byte by byte: value = scale times integer."""
    values = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    data = q8_0(values)
    name = b"blk.0.attn_q.weight"

    def text(value):
        return len(value).to_bytes(8, "little") + value

    def number(value, size):
        return value.to_bytes(size, "little")

    key = text(b"general.alignment") + number(4, 4) + number(32, 4)
    tensor = text(name) + number(2, 4) + number(64, 8) + number(4, 8) + number(8, 4) + number(0, 8)
    header = b"GGUF" + number(3, 4) + number(1, 8) + number(1, 8) + key + tensor
    path = tmp_path / "q8.gguf"
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    [(found_name, found)] = _read_gguf(path).items()
    blocks = values.reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(HALF).astype(np.float32)
    expected = (np.round(blocks / scales) * scales).reshape(4, 64)
    assert found_name == name.decode()
    np.testing.assert_allclose(np.array(found.astype(mx.float32)), expected, atol=2e-3)
    assert np.abs(np.array(found.astype(mx.float32)) - values).max() > 1e-3  # quantized indeed


def test_a_file_that_mlx_cannot_read_is_one_line(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"x\.gguf: cannot be measured, because MLX does not read"):
        _read_gguf(tmp_path / "x.gguf")


def test_a_missing_quantizer_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"`llama-quantize` \(none found\).*`--quantizer`"):
        find_quantizer(None)
