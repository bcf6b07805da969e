import math

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models import gemma2, mamba

from mlx_dpo.chat.session import ChatSession
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError
from mlx_dpo.generation.batch import (
    _generate_batched,
    _generate_sequentially,
    generate_batch,
    generate_tokens,
    is_batching_exact,
)
from tests.checkpoints import END, VOCAB, make_checkpoint

QUESTIONS = ("Where is the cat?", "no", "Is the house on the hill better than the hat? " * 3, "why")
ROWS = [[1, 40, 41, 3, 2], [1, 7, 3, 2], [1, 90, 91, 92, 93, 94, 95, 3, 2], [1, 8, 9, 3, 2]]
STOPS = frozenset({END, *range(100, 190)})
GREEDY = Sampling(max_tokens=8)
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return mlx_lm.load(str(make_checkpoint(tmp_path_factory.mktemp("batch"))))


def spread(model):
    """Weights wide enough for uneven logits."""
    key = mx.random.key(3)
    model.apply(lambda w: w + mx.random.normal(w.shape, key=key) * 2 / math.sqrt(w.shape[-1]))
    return model


def five_dimensional_attention():
    return spread(
        gemma2.Model(
            gemma2.ModelArgs(
                model_type="gemma2",
                hidden_size=32,
                num_hidden_layers=2,
                intermediate_size=48,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                rms_norm_eps=1e-5,
                vocab_size=VOCAB,
            )
        )
    )


def state_space():
    return spread(
        mamba.Model(
            mamba.ModelArgs(
                model_type="mamba",
                vocab_size=VOCAB,
                hidden_size=32,
                intermediate_size=64,
                state_size=8,
                num_hidden_layers=2,
                conv_kernel=4,
                use_bias=False,
                use_conv_bias=True,
                time_step_rank=4,
            )
        )
    )


def alone(model, tokenizer, sampling):
    return [
        "".join(piece.text for piece in ChatSession(model, tokenizer, sampling).reply(question))
        for question in QUESTIONS
    ]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_each_answer_of_a_batch_is_the_one_given_alone(llama, penalty):
    sampling = Sampling(max_tokens=20, repetition_penalty=penalty)
    assert generate_batch(*llama, PROMPTS, sampling=sampling, context=None) == alone(
        *llama, sampling=sampling
    )


def test_an_empty_answer_keeps_its_place(llama):
    """The first token of the third answer is made one that ends answers."""
    model, tokenizer = llama
    stops = set(tokenizer.eos_token_ids)
    prompt = tokenizer.apply_chat_template(PROMPTS[2], add_generation_prompt=True)
    first = model(mx.array([prompt]))[0, -1].argmax().item()
    tokenizer.eos_token_ids = {*stops, first}
    try:
        sampling = Sampling(max_tokens=6)
        batch = generate_batch(model, tokenizer, PROMPTS, sampling=sampling, context=None)
        assert batch[2] == ""
        assert batch == alone(model, tokenizer, sampling)
    finally:
        tokenizer.eos_token_ids = stops


def test_llama_is_answered_in_batches(llama):
    assert is_batching_exact(llama[0], [[5, 6, 7], list(range(4, 40))], context=None)


@pytest.mark.parametrize("make", [five_dimensional_attention, state_space])
def test_where_batching_is_not_exact_answers_are_made_one_by_one(llama, make):
    mx.random.seed(0)
    model, tokenizer = make(), llama[1]
    sampling = Sampling(max_tokens=12)
    assert not is_batching_exact(model, [[5, 6, 7], list(range(4, 40))], context=None)
    assert generate_batch(model, tokenizer, PROMPTS, sampling=sampling, context=None) == alone(
        model, tokenizer, sampling
    )


def test_answers_of_equal_seeds_are_equal(llama):
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=1)
    first = generate_batch(*llama, PROMPTS, sampling=sampling, context=None)
    assert generate_batch(*llama, PROMPTS, sampling=sampling, context=None) == first
    assert len(set(first)) == len(first)


def test_no_prompts_have_no_answers(llama):
    assert generate_batch(*llama, [], sampling=Sampling(), context=None) == []


def test_thinking_is_refused_where_no_model_can(llama):
    with pytest.raises(ConfigError, match="`thinking` has no effect"):
        generate_batch(*llama, PROMPTS, sampling=Sampling(), context=None, thinking=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return mlx_lm.load(str(make_checkpoint(tmp_path_factory.mktemp("batched"))))[0]


def _generate_within_context(*arguments):
    return generate_tokens(*arguments[:-1], context=None)


@pytest.mark.parametrize(
    "way", [_generate_batched, _generate_sequentially, _generate_within_context]
)
def test_a_completion_is_the_likeliest_tokens_up_to_one_that_ends_it(model, way):
    """Each token from a forward pass over everything before it."""
    ends = []
    for row, said in zip(
        ROWS, way(model, STOPS, ROWS, GREEDY, [GREEDY.max_tokens] * len(ROWS)), strict=True
    ):
        so_far, likeliest = list(row), None
        while len(so_far) < len(row) + GREEDY.max_tokens and likeliest not in STOPS:
            likeliest = model(mx.array([so_far]))[0, -1].argmax().item()
            so_far.append(likeliest)
        ends.append(likeliest if likeliest in STOPS else None)
        assert said.stop_token == ends[-1]
        assert said.tokens == so_far[len(row) : len(so_far) - (said.stop_token is not None)]
    assert len(set(ends)) > 1


def test_no_prompts_have_no_completions(model):
    assert generate_tokens(model, STOPS, [], GREEDY, context=None) == []
