import re
from importlib.resources import files

import pytest

from mlx_dpo.errors import ConfigError
from mlx_dpo.generation.context import (
    LEARNED_POSITIONS,
    check_max_length,
    clip_note,
    context_length,
    max_answer_tokens,
)


def test_the_context_length_is_read_under_the_names_of_all_families():
    assert context_length({"max_position_embeddings": 512}) == 512
    assert context_length({"text_config": {"max_position_embeddings": 64}}) == 64
    assert context_length({"n_positions": 1024}) == 1024
    assert context_length({"model_type": "mamba"}) is None


def test_the_table_of_learned_positions_is_what_counts():
    """mlx-lm makes the table of `n_positions` rows, whatever the other settings say."""
    config = {"model_type": "gpt2", "n_positions": 256, "n_ctx": 1024}
    assert context_length(config | {"max_position_embeddings": 2048}) == 256
    check_max_length(256, config)
    with pytest.raises(ConfigError, match="257, but the model has learned 256 positions"):
        check_max_length(257, config)
    check_max_length(4096, {"model_type": "llama", "max_position_embeddings": 2048})


def test_the_list_of_models_with_learned_positions_is_that_of_mlx_lm():
    table = re.compile(r"self\.(wpe|\w*pos\w*)\s*=\s*nn\.Embedding\(")
    names = {
        path.name.removesuffix(".py")
        for path in files("mlx_lm.models").iterdir()
        if path.name.endswith(".py") and table.search(path.read_text("utf-8"))
    }
    assert names - {"muse_spark"} == set(LEARNED_POSITIONS)  # muse_spark's is of an image


def test_an_answer_gets_what_the_prompt_leaves_of_the_context():
    assert max_answer_tokens("p", 10, 20, None) == 20
    assert max_answer_tokens("p", 10, 20, 30) == 20
    assert max_answer_tokens("p", 10, 20, 29) == 19
    assert max_answer_tokens("p", 28, 20, 29) == 1
    with pytest.raises(ConfigError, match=r"a\.txt:3: 29 tokens leave no room for an answer"):
        max_answer_tokens("a.txt:3", 29, 20, 29)


def test_a_note_says_where_answers_end():
    assert clip_note([10, 3], 20, 30) is clip_note([], 20, 30) is clip_note([10], 20, None) is None
    assert clip_note([10, 3], 20, 29) == (
        "The model's context is 29 tokens, so some answers are limited to fewer than 20 tokens: "
        "the longest prompt (10 tokens) leaves room for 19"
    )
