"""Models without weights have the layers of loaded ones. (tests/cli/test_plan_cli.py has more.)"""

import json

import mlx.core as mx
import pytest
from mlx_lm.models import gemma3_text

from mlx_dpo.models.empty_weights import load_empty_model
from mlx_dpo.models.load import load_model
from mlx_dpo.profiling.memory import parameter_bytes
from tests.checkpoints import make_checkpoint, random_weights

GEMMA = {
    "model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 2,
    "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "vocab_size": 300, "sliding_window": 8, "sliding_window_pattern": 2, "torch_dtype": "float32",
    "query_pre_attn_scalar": 32, "max_position_embeddings": 64, "eos_token_id": 3,
}  # fmt: skip


@pytest.mark.parametrize("tied", [None, True, False])
def test_a_tied_head_of_gemma_is_counted_once(tmp_path, tied):
    """Its configuration does not say that it is tied: that is the default of its family."""
    folder = make_checkpoint(tmp_path / "gemma")
    entries = GEMMA | ({} if tied is None else {"tie_word_embeddings": tied})
    (folder / "config.json").write_text(json.dumps(entries))
    model = gemma3_text.Model(gemma3_text.ModelArgs.from_dict(entries))
    if tied is not False:
        model.sanitize({})
    weights = random_weights(model, seed=0, dtype=mx.float32)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    empty, loaded = load_empty_model(str(folder)).model, load_model(str(folder)).model
    assert parameter_bytes(empty) == parameter_bytes(loaded)
    assert ("lm_head" in empty) == (tied is False)
