import re
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from mlx_dpo.errors import ModelError
from mlx_dpo.generation.prompt import encode_prompt, encode_text
from tests.data.template_families import byte_level


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_plain_text_begins_once_and_has_no_end(sentencepiece, template):
    """A tokenizer that ends every text would end the one that is to go on."""
    inner = Tokenizer.from_str(sentencepiece.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    assert encode_text(tokenizer, "s.") == [0, 5, 6]
    assert encode_text(tokenizer, "<s>s.") == [0, 5, 6]


def test_plain_text_has_no_begin_token_where_the_tokenizer_writes_none():
    class Bare(SimpleNamespace):
        def encode(self, text, add_special_tokens=True):
            return [7, 8]

    assert encode_text(Bare(bos_token_id=1), "x") == [7, 8]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("", "drops the whole conversation"),
        ("{% if false %}x{% endif %}", "drops the whole conversation"),
        ("{{ 'a' * 10 ** 10 }}", "refuses the conversation (the chat template builds a text"),
        ("{% for x in %}", "refuses the conversation (the chat template cannot be compiled"),
    ],
)
def test_a_template_without_a_prompt_is_refused_in_one_line(template, problem):
    """mlx-lm fails on an empty prompt."""
    tokenizer = byte_level.__wrapped__("chatml")
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=re.escape(problem) + ".*; use a model with another"):
        encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
