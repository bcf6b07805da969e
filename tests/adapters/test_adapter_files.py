"""What is written loads here and in mlx-lm, and what does not fit is refused by name."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import load_adapters

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.adapters.adapter_files import (
    adapter_digest,
    attach_loaded_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
)
from mlx_dpo.errors import ModelError
from tests.conftest import make_llama
from tests.edited_files import edit, read_entries, write_edited
from tests.scoring.small_models import MODELS, SIZES

TOKENS = mx.array([[1, 2, 3, 4, 5, 6]])
PACKINGS = [
    None,
    *[("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)],
    ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32),
]  # fmt: skip


def base(packing=None):
    model = make_llama()
    if packing is not None:
        mode, bits, group_size = packing
        nn.quantize(model, group_size=group_size, bits=bits, mode=mode)
    return model


def trained(model, **settings):
    """Adapters with values as training would give them."""
    adapters.attach_adapters(model, **({"rank": 4, "scale": 2.0, "seed": 1} | settings))
    mx.random.seed(7)
    for module in adapters.adapted_layers(model).values():
        module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
        if "m" in module:
            module.m = module.m * (1 + 0.1 * mx.random.normal(module.m.shape))
    return model


def save(folder, policy):
    save_adapter(folder, policy, adapters.make_adapter_config(policy))
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapters.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_saved_adapters_load_here_and_in_mlx_lm(tmp_path, packing, kind):
    policy = trained(base(packing), kind=kind, target_modules=["q_proj", "down_proj"], num_layers=1)
    save(tmp_path, policy)
    expected = policy(TOKENS)
    ours = base(packing)
    load_adapter(ours, tmp_path)
    assert mx.array_equal(ours(TOKENS), expected)
    assert not tree_flatten(ours.trainable_parameters())

    def in_mlx_lm():
        return load_adapters(base(packing), str(tmp_path))(TOKENS)

    if kind == "dora" and packing and packing[1] in (3, 5, 6):
        with pytest.raises(ValueError, match="incompatible tensors"):
            in_mlx_lm()  # it takes such layers for narrower than they are
    else:
        assert mx.allclose(in_mlx_lm(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_embeddings_and_a_head_of_its_own_load_in_mlx_lm(tmp_path, kind):
    def untied():
        args = llama.ModelArgs(
            model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=128,
            num_attention_heads=4, rms_norm_eps=1e-5, vocab_size=64, tie_word_embeddings=False,
        )  # fmt: skip
        mx.random.seed(0)
        return llama.Model(args)

    policy = trained(untied(), kind=kind, target_modules=["embed_tokens", "lm_head", "v_proj"])
    save(tmp_path, policy)
    theirs = load_adapters(untied(), str(tmp_path))
    assert mx.allclose(theirs(TOKENS), policy(TOKENS), atol=1e-5)
    assert not mx.allclose(untied()(TOKENS), policy(TOKENS), atol=1e-2)


@pytest.mark.parametrize("packed", [False, True])
def test_experts_load_in_mlx_lm(tmp_path, packed):
    from mlx_lm.models import mixtral

    def experts():
        mx.random.seed(0)
        entries = {"model_type": "mixtral", **SIZES, **MODELS["mixtral"], "intermediate_size": 64}
        model = mixtral.Model(mixtral.ModelArgs.from_dict(entries))
        if packed:
            nn.quantize(model, group_size=32, bits=4)
        return model

    policy = trained(experts(), target_modules=["switch_mlp.up_proj", "down_proj", "q_proj"])
    save(tmp_path, policy)
    theirs = load_adapters(experts(), str(tmp_path))
    assert mx.allclose(theirs(TOKENS), policy(TOKENS), atol=1e-5)
    assert not mx.allclose(experts()(TOKENS), policy(TOKENS), atol=1e-3)


def test_no_block_counts_as_trained_if_only_the_embedding_is(tmp_path):
    policy = base()
    adapters.enable_full_fine_tuning(policy, target_modules=["embed_tokens"])
    assert adapters.make_adapter_config(policy) == {"fine_tune_type": "full", "num_layers": 0}
    policy.load_weights([("model.embed_tokens.weight", policy.model.embed_tokens.weight * 1.1)],
                        strict=False)  # fmt: skip
    save(tmp_path, policy)
    assert mx.array_equal(load_adapters(base(), str(tmp_path))(TOKENS), policy(TOKENS))


def test_trained_weights_load_here_and_in_mlx_lm(tmp_path):
    policy = base()
    adapters.enable_full_fine_tuning(policy, num_layers=1)
    for name, value in adapters.adapter_weights(policy).items():
        policy.load_weights([(name, value * 1.1)], strict=False)
    save(tmp_path, policy)
    config = read_entries(tmp_path / "adapter_config.json")
    assert config == {"fine_tune_type": "full", "num_layers": 1}
    ours = base()
    load_adapter(ours, tmp_path)
    assert mx.array_equal(ours(TOKENS), policy(TOKENS))
    assert not tree_flatten(ours.trainable_parameters())
    assert mx.array_equal(load_adapters(base(), str(tmp_path))(TOKENS), policy(TOKENS))


def test_trained_weights_are_used_in_the_type_that_the_base_has(tmp_path):
    policy = base()
    policy.set_dtype(mx.bfloat16)
    adapters.enable_full_fine_tuning(policy, target_modules=["q_proj"])
    save(tmp_path, policy)
    ours = base()
    ours.set_dtype(mx.bfloat16)
    expected = ours(TOKENS)
    load_adapter(ours, tmp_path)
    assert mx.array_equal(ours(TOKENS), expected)
    assert ours(TOKENS).dtype == mx.bfloat16


@pytest.mark.parametrize("fine_tune_type", ["lora", "dora", "full"])
def test_a_start_goes_on_from_what_was_saved_and_can_be_trained(tmp_path, fine_tune_type):
    policy = base()
    if fine_tune_type == "full":
        adapters.enable_full_fine_tuning(policy, target_modules=["v_proj"])
    else:
        policy = trained(policy, kind=fine_tune_type, target_modules=["v_proj"])
    save(tmp_path, policy)
    again = base()
    attach_loaded_adapter(again, read_adapter(tmp_path), dropout=0.25)
    assert mx.array_equal(again.eval()(TOKENS), policy.eval()(TOKENS))
    weights = adapters.adapter_weights(policy)
    assert adapters.adapter_weights(again).keys() == weights.keys()
    before, after = adapters.make_adapter_config(policy), adapters.make_adapter_config(again)
    if fine_tune_type != "full":
        after["lora_parameters"]["dropout"] = before["lora_parameters"]["dropout"]
    assert before == after


def test_adapters_of_sixteen_bits_are_trained_in_float32(tmp_path):
    policy = trained(base(), target_modules=["q_proj"])
    narrow = {k: v.astype(mx.bfloat16) for k, v in adapters.adapter_weights(policy).items()}
    save(tmp_path, policy)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), narrow)
    again = base()
    attach_loaded_adapter(again, read_adapter(tmp_path), dropout=0.0)
    assert {v.dtype for v in adapters.adapter_weights(again).values()} == {mx.float32}


def test_adapters_without_keys_are_where_their_arrays_say(tmp_path):
    """mlx-lm leaves keys out for all layers of the blocks, experts and embeddings among them."""
    policy = trained(base())
    config = adapters.make_adapter_config(policy)
    del config["lora_parameters"]["keys"]
    save_adapter(tmp_path, policy, config)
    ours = base()
    load_adapter(ours, tmp_path)
    assert mx.array_equal(ours(TOKENS), policy(TOKENS))


def test_the_digest_is_of_what_is_read(tmp_path):
    save(tmp_path, trained(base()))
    before = adapter_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert adapter_digest(tmp_path) == before
    (tmp_path / "notes.txt").unlink()
    save(tmp_path, trained(base(), seed=2))
    changed = adapter_digest(tmp_path)
    edit(tmp_path / "adapter_config.json", num_layers=1)
    assert len({before, changed, adapter_digest(tmp_path)}) == 3


def test_adapters_of_another_model_are_refused_by_name(tmp_path):
    save(tmp_path, trained(base(), target_modules=["q_proj"]))
    wrong = read_entries(tmp_path / "adapter_config.json")
    wrong["lora_parameters"]["rank"] = 5
    write_edited(tmp_path / "adapter_config.json", wrong)
    with pytest.raises(ModelError, match=r"another model.*layers\.0\.self_attn\.q_proj\.lora_a"):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no `adapter_config.json`"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"num_layers": 2}', "not an adapter description in mlx-lm's layout"),
        ('{"num_layers": 2, "lora_parameters": {"rank": 4, "dropout": 0}}', "missing `scale`"),
        ('{"fine_tune_type": "ia3"}', "fine_tune_type `ia3` is unknown; it is lora, dora or full"),
        (
            '{"lora_parameters": {"rank": 4, "scale": 1, "dropout": 0}}',
            "adapters.safetensors: adapters cannot be read",
        ),
    ],
)
def test_a_folder_without_adapters_says_what_is_wrong(tmp_path, content, message):
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=message) as error:
        load_adapter(base(), tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_weights_give_a_one_line_error(tmp_path):
    save(tmp_path, trained(base()))
    (tmp_path / "adapters.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot be read") as error:
        load_adapter(base(), tmp_path)
    assert "\n" not in str(error.value)
