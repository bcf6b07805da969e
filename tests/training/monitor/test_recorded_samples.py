"""Recorded samples: the user turn in the tokens of a prompt, and answers of base and policy."""

import mlx.core as mx
import pytest
from mlx_lm import load as load_checkpoint
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_dpo.adapters.attach import attach_adapters, disable_adapters, enable_full_fine_tuning
from mlx_dpo.generation.prompt import encode_prompt, encode_text
from mlx_dpo.reporting.samples import SamplesLog, read_samples
from mlx_dpo.training.monitor.recorded_samples import RecordedSampler, make_user_turn_finder
from mlx_dpo.training.monitor.samples import AnswerSampler
from tests.checkpoints import make_checkpoint, write_tokenizer

MISTRAL = """\
{%- for message in messages -%}
{%- if message.role == "system" -%}{{ message.content }}<|end|>
{%- elif message.role == "user" -%}<|user|>[INST] {{ message.content }} [/INST]
{%- else -%} {{ message.content }}<|end|>
{%- endif -%}
{%- endfor -%}"""
THINKING = """\
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{%- if not enable_thinking -%}<think></think>{%- endif -%}
{%- endif -%}"""
REFUSES = "{{ raise_exception('no') }}"
HIDES = "<|user|>{{ messages | length }}<|end|>"

USER = {"role": "user", "content": "Where is the house?"}
SYSTEM = {"role": "system", "content": "Be short."}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def tokenizer(tmp_path):
    def load(template=None):
        write_tokenizer(tmp_path)
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        return load_tokenizer(tmp_path)

    return load


@pytest.mark.parametrize("template", [None, MISTRAL, THINKING])
@pytest.mark.parametrize("thinking", [None, True])
def test_the_last_user_turn_is_found_in_its_tokens(tokenizer, template, thinking):
    loaded = tokenizer(template)
    find = make_user_turn_finder(loaded, thinking=thinking)

    def turn(messages):
        return find(encode_prompt(loaded, messages, thinking=thinking))

    assert turn([USER]) == ("Where is the house?", 1)
    assert turn([SYSTEM, USER]) == ("Where is the house?", 1)
    assert turn([SYSTEM, *EARLIER, USER]) == ("Where is the house?", 2)


@pytest.mark.parametrize("template", [None, REFUSES, HIDES])
def test_a_prompt_without_a_user_turn_is_shown_whole(tokenizer, template):
    loaded = tokenizer(template)
    find = make_user_turn_finder(loaded, thinking=None)
    assert find(encode_text(loaded, "Once upon a time")) == ("Once upon a time", 1)
    if template is None:
        cut = encode_prompt(loaded, [*EARLIER, USER])[-8:]  # by truncation, without its begin
        assert find(cut)[0].endswith("?")


@pytest.fixture
def checkpoint(tmp_path):
    return load_checkpoint(str(make_checkpoint(tmp_path / "model")))


def recorder(loaded, path, *, after=0):
    prompts = [encode_prompt(loaded, [USER]), encode_prompt(loaded, [SYSTEM, USER])]
    sampler = AnswerSampler(prompts, loaded.eos_token_ids, max_tokens=6, context=512)
    return RecordedSampler(sampler, loaded, SamplesLog(path, after=after))


def test_the_base_answers_beside_the_policy_and_stays_the_same(checkpoint, tmp_path):
    (model, loaded), path = checkpoint, tmp_path / "samples.jsonl"
    attach_adapters(model, rank=4, scale=8.0)
    model.eval()
    recorded = recorder(loaded, path)
    recorded.measure(model, 1)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(2)) * 0.5
    recorded.measure(model, 2)
    before, after = read_samples(path)
    assert [sample.is_unchanged for sample in before.samples] == [True, True]
    assert [sample.is_unchanged for sample in after.samples] == [False, False]
    assert [s.base for s in after.samples] == [s.base for s in before.samples]
    assert [s.prompt for s in after.samples] == ["Where is the house?"] * 2
    assert recorded.latest == after
    with disable_adapters(model):
        tokens = recorded.sampler.sample(model)
    assert [s.base.is_cut for s in after.samples] == [t.stop_token is None for t in tokens]


def test_full_fine_tuning_keeps_the_answers_of_the_untrained_model(checkpoint, tmp_path):
    (model, loaded), path = checkpoint, tmp_path / "samples.jsonl"
    enable_full_fine_tuning(model)
    model.eval()
    recorded = recorder(loaded, path)
    recorded.remember_untrained(model)
    embedding = model.model.embed_tokens
    embedding.weight = mx.random.normal(embedding.weight.shape, key=mx.random.key(2))
    recorded.measure(model, 1)
    resumed = recorder(loaded, path, after=1)
    resumed.measure(model, 2)
    first, second = read_samples(path)
    assert not any(sample.is_unchanged for sample in first.samples)
    assert second.samples == first.samples
    path.unlink()
    lost = recorder(loaded, path)
    lost.measure(model, 3)
    assert [sample.base for sample in read_samples(path)[0].samples] == [None, None]
