import pytest
from mlx_lm.server import CompletionRequest

from mlx_dpo.chat.server import SynchronizedResponseGenerator


def test_an_empty_tokenized_prompt_never_reaches_the_model():
    class EmptyTokenizer:
        def encode(self, text):
            return []

    # Without `__init__`, so that its thread does not start.
    generator = SynchronizedResponseGenerator.__new__(SynchronizedResponseGenerator)
    request = CompletionRequest("text", "\u200b", [], None, None)
    with pytest.raises(ValueError, match="the prompt is empty"):
        generator._tokenize(EmptyTokenizer(), request, None)
