"""A prompt cache that follows a conversation: only tokens it does not hold go through the model."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache


class PromptCache:
    """`layers` is mlx-lm's cache; `tokens` are the tokens it holds."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.drop()

    def drop(self) -> None:
        """Hold nothing."""
        self.layers: list[Any] = make_prompt_cache(self._model)
        self.tokens: list[int] = []

    def rewind(self, prompt: Sequence[int]) -> list[int]:
        """Keep what `prompt` begins with; returns its other tokens, at least one.

        The caller puts them through the model next: from here on they count as held.
        """
        pairs = zip(self.tokens, prompt[:-1], strict=False)
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if not self._trim(len(self.tokens) - kept):
            kept = 0
        if kept == 0:
            self.drop()
        self.tokens = list(prompt)
        return list(prompt[kept:])

    def _trim(self, surplus: int) -> bool:
        """Forget the last tokens; False if an architecture's cache cannot."""
        if surplus == 0:
            return True
        if surplus == len(self.tokens) or not can_trim_prompt_cache(self.layers):
            return False
        # A chunked cache may have let go of what a longer trim would need.
        return all(layer.trim(surplus) == surplus for layer in self.layers)
