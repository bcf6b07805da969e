"""Which layers a name means, and the names under which mlx-lm finds exactly those."""

import mlx.nn as nn
import pytest
from mlx_lm.models import llama

from mlx_dpo.adapters.targets import (
    adaptable_modules,
    linear_names,
    mlx_lm_keys,
    select_modules,
    trainable_modules,
)
from mlx_dpo.errors import ConfigError
from tests.conftest import make_llama
from tests.scoring.small_models import make

Q = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def meant(model, *targets, num_layers=None):
    return select_modules(model, adaptable_modules(model), targets, num_layers)


@pytest.fixture
def untied():
    return llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=128,
            num_attention_heads=4, rms_norm_eps=1e-5, vocab_size=64, tie_word_embeddings=False,
        )
    )  # fmt: skip


class Reader(nn.Module):
    """Reads the weight of one of its layers, and calls both."""

    def __init__(self):
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)

    def __call__(self, x):
        return self.called(self.read(x) + self.read.weight.sum())


class ReaderModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [Reader()]


def test_a_layer_whose_weight_the_model_reads_is_selected_only_if_named():
    """With an adapter it would have no weight, and the model would fail."""
    assert meant(ReaderModel()) == ["layers.0.called"]
    assert meant(ReaderModel(), "read") == ["layers.0.read"]


@pytest.mark.parametrize("target", ["q_proj", "self_attn.q_proj"])
def test_a_name_is_a_path_in_the_blocks_or_its_last_parts(tiny_llama, target):
    assert meant(tiny_llama, target) == Q
    assert meant(tiny_llama, target, num_layers=1) == Q[1:]


def test_a_whole_path_means_one_layer(tiny_llama):
    assert meant(tiny_llama, Q[0]) == Q[:1]


def test_half_a_name_means_nothing(tiny_llama):
    with pytest.raises(ConfigError, match="`proj` matches no trainable module of this"):
        meant(tiny_llama, "proj")


def test_outside_of_the_blocks_only_what_is_named(untied):
    assert not any("layers" not in path for path in meant(untied))
    assert set(meant(untied, "embed_tokens", "lm_head")) == {"model.embed_tokens", "lm_head"}
    assert meant(untied, "model.embed_tokens") == ["model.embed_tokens"]


def test_experts_are_selected_only_if_named():
    model = make("mixtral")  # its linear layers are adapted: what is left are the experts
    names = {m.name for m in adaptable_modules(model) if not m.selected_by_default and m.in_block}
    experts = {f"block_sparse_moe.switch_mlp.{x}_proj" for x in ("up", "gate", "down")}
    assert experts <= names
    assert not any("switch_mlp" in name for name in linear_names(model))
    assert len(meant(model, "switch_mlp.up_proj")) == 3


@pytest.mark.parametrize(
    ("targets", "num_layers", "message"),
    [
        (
            ["q_proj", "nope"],
            None,
            r"`nope` matches no trainable module.* it has mlp.down_proj, .*q_proj",
        ),
        (["nope"], None, "outside the layers lm_head, model.embed_tokens"),
        ([Q[0]], 1, "matches no trainable module of the last 1 blocks"),
        (["lm_head"], 1, "`num_layers` has no effect: no target module is inside the layers"),
        ([], 3, "`num_layers` is 3, but the model has 2 layers"),
    ],
)
def test_the_error_of_an_unknown_target_lists_the_layers(untied, targets, num_layers, message):
    with pytest.raises(ConfigError, match=message):
        meant(untied, *targets, num_layers=num_layers)


def test_whole_blocks_are_trained_unless_parts_are_named(tiny_llama):
    modules = trainable_modules(tiny_llama)
    assert select_modules(tiny_llama, modules, [], None) == ["model.layers.0", "model.layers.1"]
    assert select_modules(tiny_llama, modules, [], 1) == ["model.layers.1"]
    assert select_modules(tiny_llama, modules, ["mlp"], 1) == ["model.layers.1.mlp"]
    norms = [f"model.layers.{i}.input_layernorm" for i in (0, 1)]
    assert select_modules(tiny_llama, modules, ["input_layernorm", "model.norm"], None) == [
        *norms, "model.norm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (Q, (2, ["self_attn.q_proj"])),
        (Q[1:], (1, ["self_attn.q_proj"])),
        (Q[:1], (2, Q[:1])),  # of no last blocks
        ([*Q, "model.embed_tokens"], (2, ["self_attn.q_proj", "model.embed_tokens"])),
        (["model.embed_tokens"], (2, ["model.embed_tokens"])),
        ([Q[0], "model.layers.1.mlp.up_proj"], (2, [Q[0], "model.layers.1.mlp.up_proj"])),
    ],
)
def test_keys_are_short_where_blocks_are_alike_and_whole_paths_elsewhere(paths, expected):
    assert mlx_lm_keys(make_llama(), paths) == expected
