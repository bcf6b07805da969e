"""A chat session with a model, independent of the terminal and of files."""

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, Literal, NamedTuple

from mlx_dpo.adapters.switch import AdapterState, AdapterSwitch
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.chat_templates.template_date import set_day
from mlx_dpo.errors import ConfigError
from mlx_dpo.generation.context import max_answer_tokens
from mlx_dpo.generation.decode import strip_thinking
from mlx_dpo.generation.prompt import check_thinking, encode_prompt, encode_text
from mlx_dpo.generation.sampling import make_sampler
from mlx_dpo.generation.stream import AnswerChunk, PromptCache, stream_answer
from mlx_dpo.types import Message, Text

Author = AdapterState | Literal["person"]  # of an answer


class _History(NamedTuple):
    """The turns of a chat, and for each answer its author and its system message."""

    turns: list[Message]
    authors: list[Author]
    systems: list[str | None]


class ChatSession:
    """A conversation with a model whose adapters can be on (aligned) or off (base).

    Args:
        raw: continue plain text without a chat template; always so if the tokenizer has none.
        context: maximum number of tokens of the conversation; None for no limit.
        switch: the adapter switch of `model`; without a switch the session has only the base model.

    Raises:
        ConfigError: `system` or `thinking` has no effect, or `top_k` is not below the vocabulary
            size.
    """

    def __init__(  # noqa: PLR0913 (one argument per setting of a session)
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        context: int | None = None,
        raw: bool = False,
        switch: AdapterSwitch | None = None,
    ) -> None:
        self.raw = raw or not tokenizer.has_chat_template
        self.sampling = sampling.with_seed()
        self.thinking, self.context = thinking, context
        self.system: str | None = None
        self.turns: list[Message] = []
        # Of the answers in `turns`, from which turns beyond the context are dropped.
        self.authors: list[Author] = []
        self._systems: list[str | None] = []  # system message in effect for each answer
        self.switch = switch or AdapterSwitch(model)
        self._model, self._tokenizer = model, tokenizer
        set_day(tokenizer, None)  # a conversation takes place today, whenever the run began
        self._caches: dict[AdapterState, PromptCache] = {}
        self._check_settings()
        self.set_system(system)
        self.reset()

    def _check_settings(self) -> None:
        if self.sampling.top_k >= len(self._tokenizer):
            raise ConfigError(
                f"`top_k` must be below the vocabulary size of {len(self._tokenizer)}, "
                f"got {self.sampling.top_k}; 0 disables it"
            )
        if self.raw and self.thinking is not None:
            raise ConfigError("`thinking` has no effect: no chat template is used")
        if self.thinking is not None:
            check_thinking(self._tokenizer)

    def set_system(self, system: str | None) -> None:
        """Set the system message for the following answers; None removes it.

        Raises:
            ConfigError: the system message would have no effect.
        """
        if system is not None and self.raw:
            raise ConfigError("`system` has no effect: no chat template is used")
        probe = [_message("user", "?")]
        if system and self._tokens([_message("system", system), *probe]) == self._tokens(probe):
            raise ConfigError("`system` has no effect; the model's chat template ignores it")
        self.system = system

    def reset(self) -> None:
        """Clear the conversation and restart the sampler from its seed."""
        self.turns, self.authors, self._systems = [], [], []
        self._sampler = make_sampler(self.sampling)

    def reply(self, text: str) -> Generator[AnswerChunk]:
        """Stream the answer to `text` and add both to the conversation.

        If the generator is closed early, the partial answer is added.

        Raises:
            ConfigError: the question leaves no room in the model's context.
            ModelError: the chat template rejects the conversation.
        """
        question = _message("user", text)
        earlier, prompt = self._fit_context(question)
        dropped_turns = len(self.turns) - len(earlier)
        answer: str | None = None
        try:
            with closing(self._stream(prompt, dropped_turns)) as pieces:
                for piece in pieces:
                    answer = (answer or "") + piece.text
                    yield piece
        finally:
            if answer is not None:
                self.turns = [*earlier, question, _message("assistant", answer)]
                self.authors = [*self.authors, self.switch.active]
                self._systems = [*self._systems, self.system]

    def retry(self) -> Generator[AnswerChunk]:
        """Stream another answer to the last question and replace the earlier answer.

        Raises:
            ConfigError: there is no answer yet, or the new answer would be identical.
        """
        if self.sampling.temperature == 0:
            raise ConfigError("with `temperature` 0 the answer is always the same; set one above 0")
        before = self._history
        question, undone = self.undo(), self.turns
        try:
            yield from self.reply(question)
        finally:
            if self.turns is undone:  # stopped before the first token
                self._history = before

    def undo(self) -> str:
        """Remove the last question and its answer; return the question.

        Raises:
            ConfigError: there is no answer yet.
        """
        self.last_answer()
        *self.turns, question, _ = self.turns
        self.authors, self._systems = self.authors[:-1], self._systems[:-1]
        return str(question["content"])

    def answer_with(self, adapter_state: AdapterState) -> Generator[AnswerChunk]:
        """Stream the base or the aligned model's answer to the last question.

        The conversation is not changed. The system message is that of the last answer.
        """
        self.last_answer()
        before, system = self._history, self.system
        with self.switch.activated(adapter_state):
            try:
                self.system = self._systems[-1]
                yield from self.reply(self.undo())
            finally:
                self._history, self.system = before, system

    @property
    def _history(self) -> _History:
        return _History(self.turns, self.authors, self._systems)

    @_history.setter
    def _history(self, history: _History) -> None:
        self.turns, self.authors, self._systems = history

    def replace_answer(self, answer: str, author: Author) -> None:
        """Replace the last answer in the conversation by `answer`, written by `author`."""
        self.last_answer()
        self.turns = [*self.turns[:-1], _message("assistant", answer)]
        self.authors = [*self.authors[:-1], author]

    def last_answer(self) -> str:
        """Return the last answer without the model's thinking.

        Raises:
            ConfigError: there is no answer yet.
        """
        if not self.turns:
            raise ConfigError("there is no answer yet; ask something first")
        text = str(self.turns[-1]["content"])
        return text if self.authors[-1] == "person" else self.strip_thinking(text)

    def strip_thinking(self, text: str) -> str:
        """Return `text`, a reply to the last question, without the model's thinking in it."""
        prompt = self._tokens(_with_system(self.system, self.turns[:-1]))
        return strip_thinking(self._tokenizer, prompt, text)

    def last_prompt(self) -> Text:
        """Return the prompt of the last answer: messages, or plain text if the session is `raw`."""
        self.last_answer()
        if self.raw:
            return "\n".join(turn["content"] for turn in self.turns[:-1])
        return tuple(_with_system(self._systems[-1], self.turns[:-1]))

    def conversation(self) -> list[Message]:
        """Return the system message and the turns that are still in the model's context."""
        return _with_system(self.system, self.turns)

    def _tokens(self, turns: Sequence[Message]) -> list[int]:
        if self.raw:
            return encode_text(self._tokenizer, "\n".join(turn["content"] for turn in turns))
        return encode_prompt(self._tokenizer, turns, thinking=self.thinking)

    def _fit_context(self, question: Message) -> tuple[list[Message], list[int]]:
        """Return the earlier turns that fit into the context, and the token ids of the prompt.

        The prompt consists of the earlier turns and the question. The oldest questions are dropped
        first, each with its answer. Up to a quarter of the context is reserved for the new answer.
        """
        earlier = list(self.turns)
        prompt = self._tokens(_with_system(self.system, [*earlier, question]))
        if self.context is None:
            return earlier, prompt
        reserved = min(self.sampling.max_tokens, self.context // 4)
        while earlier and len(prompt) + reserved > self.context:
            del earlier[:2]
            prompt = self._tokens(_with_system(self.system, [*earlier, question]))
        return earlier, prompt

    def _stream(self, prompt: list[int], dropped_turns: int) -> Generator[AnswerChunk]:
        state = self.switch.active
        cache = self._caches[state] = self._caches.get(state) or PromptCache(self._model)
        return stream_answer(
            self._model,
            self._tokenizer,
            prompt,
            cache=cache,
            sampling=self.sampling,
            sampler=self._sampler,
            max_tokens=max_answer_tokens(
                "the question", len(prompt), self.sampling.max_tokens, self.context
            ),
            dropped_turns=dropped_turns,
        )


def _with_system(system: str | None, turns: Sequence[Message]) -> list[Message]:
    return [*([] if system is None else [_message("system", system)]), *turns]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
