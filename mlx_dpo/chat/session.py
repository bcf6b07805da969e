"""A conversation with a model: text in, pieces of text out. Knows no terminal and no files."""

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, Literal

from mlx_dpo.adapters.switch import Side, Sides
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError
from mlx_dpo.generation.generate import check_thinking, make_sampler, prompt_tokens, text_tokens
from mlx_dpo.generation.stream import Piece, PromptCache, answer_in, stream_answer
from mlx_dpo.types import Message, Text

Author = Side | Literal["person"]  # of an answer


class ChatSession:
    """One session: turns, a prompt cache for each side, and the state of the sampler.

    `raw` continues plain text; it is the only way for a tokenizer without a chat template.
    `context` is the number of positions to be used, None for no limit. `sides` are those of
    `model`, where it has any.

    Raises:
        ConfigError: `system` or `thinking` has no effect, or `top_k` is not below the vocabulary.
    """

    def __init__(  # noqa: PLR0913 (one argument for each thing that makes up a session)
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        context: int | None = None,
        raw: bool = False,
        sides: Sides | None = None,
    ) -> None:
        self.raw = raw or not tokenizer.has_chat_template
        self.sampling = sampling.seeded()
        self.thinking, self.context = thinking, context
        self.system: str | None = None
        self.turns: list[Message] = []
        self.authors: list[Author] = []  # of the answers in them, the last ones
        self._systems: list[str | None] = []  # messages that these were answers after
        self.sides = sides or Sides(model)
        self._model, self._tokenizer = model, tokenizer
        self._caches: dict[Side, PromptCache] = {}
        self._refuse_settings_without_effect()
        self.instruct(system)
        self.reset()

    def _refuse_settings_without_effect(self) -> None:
        if self.sampling.top_k >= len(self._tokenizer):
            raise ConfigError(
                f"`top_k` must be below the vocabulary of {len(self._tokenizer)} tokens, "
                f"got {self.sampling.top_k}; 0 chooses among all"
            )
        if self.raw and self.thinking is not None:
            raise ConfigError("`thinking` has no effect: no chat template is used")
        if self.thinking is not None:
            check_thinking(self._tokenizer)

    def instruct(self, system: str | None) -> None:
        """Have this system message before everything from now on, or none.

        Raises:
            ConfigError: it would have no effect.
        """
        if system is not None and self.raw:
            raise ConfigError("`system` has no effect: no chat template is used")
        asked = [_message("user", "?")]
        if system and self._ids([_message("system", system), *asked]) == self._ids(asked):
            raise ConfigError("`system` has no effect; the model's chat template leaves it out")
        self.system = system

    def reset(self) -> None:
        """Start over, as if nothing had been said: the draws start over, too."""
        self.turns, self.authors, self._systems = [], [], []
        self._sampler = make_sampler(self.sampling)

    def reply(self, text: str) -> Generator[Piece]:
        """Stream the answer to `text`. Closed early, what was said so far stays in the turns.

        Raises:
            ConfigError: the question leaves no room in the model's context.
            ModelError: the chat template refuses the conversation.
        """
        asked = _message("user", text)
        kept, prompt = self._fitting(asked)
        left_out = len(self.turns) - len(kept)
        answer: str | None = None
        try:
            with closing(self._pieces(prompt, left_out)) as pieces:
                for piece in pieces:
                    answer = (answer or "") + piece.text
                    yield piece
        finally:
            if answer is not None:
                self.turns = [*kept, asked, _message("assistant", answer)]
                self.authors = [*self.authors, self.sides.now]
                self._systems = [*self._systems, self.system]

    def retry(self) -> Generator[Piece]:
        """Stream another answer to the last question; it takes the place of the one there is.

        Raises:
            ConfigError: nothing has been said, or the answer would be the same again.
        """
        if self.sampling.temperature == 0:
            raise ConfigError("with `temperature` 0 the answer is always the same; set one above 0")
        before = self._said
        question, undone = self.undo(), self.turns
        try:
            yield from self.reply(question)
        finally:
            if self.turns is undone:  # stopped before it began
                self._said = before

    def undo(self) -> str:
        """Take the last question and its answer back; returns the question.

        Raises:
            ConfigError: nothing has been said.
        """
        self.last_answer()
        *self.turns, asked, _ = self.turns
        self.authors, self._systems = self.authors[:-1], self._systems[:-1]
        return str(asked["content"])

    def other_answer(self, side: Side) -> Generator[Piece]:
        """Stream what `side` says to the last question; the turns stay as they are.

        It is asked after the system message that the last answer was given after.
        """
        self.last_answer()
        before, system = self._said, self.system
        with self.sides.on(side):
            try:
                self.system = self._systems[-1]
                yield from self.reply(self.undo())
            finally:
                self._said, self.system = before, system

    @property
    def _said(self) -> tuple[list[Message], list[Author], list[str | None]]:
        """Everything that was said, and what is known of it."""
        return self.turns, self.authors, self._systems

    @_said.setter
    def _said(self, said: tuple[list[Message], list[Author], list[str | None]]) -> None:
        self.turns, self.authors, self._systems = said

    def replace(self, answer: str, author: Author) -> None:
        """Go on as if this had been the answer to the last question."""
        self.last_answer()
        self.turns = [*self.turns[:-1], _message("assistant", answer)]
        self.authors = [*self.authors[:-1], author]

    def last_answer(self) -> str:
        """The answer to the last question, without thinking.

        Raises:
            ConfigError: nothing has been said.
        """
        if not self.turns:
            raise ConfigError("nothing has been said yet; ask something first")
        said = str(self.turns[-1]["content"])
        return said if self.authors[-1] == "person" else self.answer_in(said)

    def answer_in(self, said: str) -> str:
        """What was said to the last question, without what was thought."""
        return answer_in(self._tokenizer, self._ids(self._with_system(self.turns[:-1])), said)

    def asked(self) -> Text:
        """What the last answer is an answer to: messages, or text without a chat template."""
        self.last_answer()
        if self.raw:
            return "\n".join(turn["content"] for turn in self.turns[:-1])
        return tuple(_with_system(self._systems[-1], self.turns[:-1]))

    def conversation(self) -> list[Message]:
        """Everything that the model sees, with the last answer."""
        return self._with_system(self.turns)

    def _with_system(self, turns: Sequence[Message]) -> list[Message]:
        return _with_system(self.system, turns)

    def _ids(self, turns: Sequence[Message]) -> list[int]:
        if self.raw:
            return text_tokens(self._tokenizer, "\n".join(turn["content"] for turn in turns))
        return prompt_tokens(self._tokenizer, turns, thinking=self.thinking)

    def _fitting(self, asked: Message) -> tuple[list[Message], list[int]]:
        """The turns before `asked` that there is room for, and the prompt that they make.

        The oldest questions go first, each with its answer; a quarter of the context is kept for
        the answer.
        """
        kept = list(self.turns)
        prompt = self._ids(self._with_system([*kept, asked]))
        if self.context is None:
            return kept, prompt
        room = min(self.sampling.max_tokens, self.context // 4)
        while kept and len(prompt) + room > self.context:
            del kept[:2]
            prompt = self._ids(self._with_system([*kept, asked]))
        if len(prompt) >= self.context:
            raise ConfigError(
                f"the question: {len(prompt)} tokens leave no room for an answer (the context is "
                f"{self.context}); shorten it"
            )
        return kept, prompt

    def _pieces(self, prompt: list[int], left_out: int) -> Generator[Piece]:
        side = self.sides.now
        cache = self._caches[side] = self._caches.get(side) or PromptCache(self._model)
        room = self.sampling.max_tokens if self.context is None else self.context - len(prompt)
        return stream_answer(
            self._model,
            self._tokenizer,
            prompt,
            cache=cache,
            sampling=self.sampling,
            sampler=self._sampler,
            limit=min(self.sampling.max_tokens, room),
            left_out=left_out,
        )


def _with_system(system: str | None, turns: Sequence[Message]) -> list[Message]:
    return [*([] if system is None else [_message("system", system)]), *turns]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
