"""`rope_parameters` mean what they mean in transformers, or the model is refused."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.errors import ModelError
from mlx_dpo.export.convert import convert
from mlx_dpo.models.load import load_model
from mlx_dpo.models.rope import rope_notes, rope_overrides
from tests.checkpoints import make_checkpoint

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
TOKENS = mx.array([[5, 17, 200, 41, 8, 99, 7, 23, 150, 64]])


def written(folder, without=("rope_theta", "rope_scaling"), **entries):
    make_checkpoint(folder)
    path = folder / "config.json"
    found = {k: v for k, v in json.loads(path.read_text()).items() if k not in without}
    path.write_text(json.dumps(found | entries))
    return load_model(str(folder))


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"rope_theta": 50.0}, {"rope_type": "default", "rope_theta": 50.0}),
        ({"rope_theta": 50.0, "rope_scaling": LLAMA3}, LLAMA3 | {"rope_theta": 50.0}),
    ],
)
def test_both_ways_to_write_it_are_the_same_model(tmp_path, older, newer):
    expected = written(tmp_path / "older", **older)
    found = written(tmp_path / "newer", rope_parameters=newer)
    plain = written(tmp_path / "plain")
    np.testing.assert_array_equal(found.model(TOKENS), expected.model(TOKENS))
    assert np.abs(np.array(plain.model(TOKENS) - found.model(TOKENS))).max() > 0.01
    assert [note for note in expected.notes + plain.notes if "rope" in note] == []
    [note] = [note for note in found.notes if "rope" in note]
    assert note.startswith("`rope_theta` 50.0") and "mlx-lm alone would ignore" in note


def test_the_newer_way_counts_where_both_are_there(tmp_path):
    """As in transformers."""
    rope = {"rope_type": "default", "rope_theta": 50.0}
    found = written(tmp_path / "both", without=(), rope_theta=7.0, rope_parameters=rope)
    expected = written(tmp_path / "older", rope_theta=50.0)
    np.testing.assert_array_equal(found.model(TOKENS), expected.model(TOKENS))


def test_a_converted_model_has_it_where_mlx_lm_reads_it(tmp_path):
    from mlx_lm.utils import load_model as mlx_load_model

    rope = LLAMA3 | {"rope_theta": 50.0}
    found = written(tmp_path / "newer", rope_parameters=rope)
    convert(str(tmp_path / "newer"), tmp_path / "converted", dtype="float32")
    model, _ = mlx_load_model(tmp_path / "converted")
    np.testing.assert_array_equal(model(TOKENS), found.model(TOKENS))
    assert [note for note in load_model(str(tmp_path / "converted")).notes if "rope" in note] == []


FULL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
SLIDING = {"rope_type": "default", "rope_theta": 1e4}
BY_LAYER = {"full_attention": FULL, "sliding_attention": SLIDING}


def test_layers_of_two_kinds_have_the_bases_that_mlx_lm_has_names_for():
    gemma = {"model_type": "gemma3_text", "rope_parameters": BY_LAYER}
    expected = {
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 1e4,
    }
    assert rope_overrides(gemma, "x") == expected
    inside = {"model_type": "gemma3", "text_config": gemma | {"vocab_size": 9}}
    part = rope_overrides(inside, "x")["text_config"]
    assert part == inside["text_config"] | expected
    assert "`rope_local_base_freq` 10000.0" in rope_notes(inside, "x")[0]


def test_dbrx_has_it_in_a_place_of_its_own():
    entries = {"model_type": "dbrx", "attn_config": {"rope_theta": 5.0}}
    assert rope_overrides(entries | {"rope_parameters": {"rope_theta": 5.0}}, "x") == {}
    with pytest.raises(ModelError, match="`dbrx` knows no `rope_theta`"):
        rope_overrides(entries | {"rope_parameters": {"rope_theta": 6.0}}, "x")


@pytest.mark.parametrize(
    ("kind", "rope", "found"),
    [
        ("gpt_neox", {"rope_theta": 5.0, "partial_rotary_factor": 0.3},
         {"rotary_emb_base": 5.0, "rotary_pct": 0.3}),
        ("phi", {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
         {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("llama", {"rope_theta": 1e4, "partial_rotary_factor": 1.0}, {"rope_theta": 1e4}),
        ("qwen3", {"rope_theta": 5.0}, {}),  # reads them itself
        ("gemma4_text", BY_LAYER, {}),
        ("gpt2", {}, {}),
        ("olmo3", {"full_attention": FULL, "sliding_attention": SLIDING | {"rope_theta": 1e6}},
         {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ],
)  # fmt: skip
def test_each_architecture_has_its_own_names(kind, rope, found):
    assert rope_overrides({"model_type": kind, "rope_parameters": rope}, "x") == found


@pytest.mark.parametrize(
    ("kind", "rope", "message"),
    [
        ("gemma", LLAMA3 | {"rope_theta": 5.0}, "`gemma` knows no `rope_scaling`"),
        ("llama", {"rope_theta": 5.0, "partial_rotary_factor": 0.5}, "no `partial_rotary_factor`"),
        ("olmo3", BY_LAYER, "differ from layer to layer"),
        ("gemma3_text", BY_LAYER | {"sliding_attention": FULL}, "differ from layer to layer"),
        ("olmo3", {"full_attention": {}, "sliding_attention": SLIDING}, "differ from layer"),
        ("llama", {"others": SLIDING, "full_attention": SLIDING}, "differ from layer to layer"),
    ],
)
def test_rope_settings_that_mlx_lm_does_not_support_are_an_error(kind, rope, message):
    with pytest.raises(ModelError, match=rf"^x/config\.json: .*{message}.*use another model$"):
        rope_overrides({"model_type": kind, "rope_parameters": rope}, "x")
