"""Interface of a model that answers prompts, on this machine or at an address."""

from collections.abc import Sequence
from typing import Any, Protocol

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.generation.batch import GeneratedText
from mlx_dpo.types import Message


class Responder(Protocol):
    """Anything that answers prompts: a run, a model on this machine or a model at an address."""

    @property
    def provenance(self) -> dict[str, Any]:
        """Names and digests of what answers, to be stored with an answer."""

    @property
    def system(self) -> str | None:
        """System message of the training run, which the prompts get; None without one."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes of loading, for the user."""

    def reply(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[GeneratedText]:
        """Generate one answer per prompt; each result says whether it was cut.

        Raises:
            ConfigError: a prompt leaves no room in the model's context.
        """

    def answer(
        self, conversations: Sequence[Sequence[Message]], sampling: Sampling, *, name: str
    ) -> list[str]:
        """Return the text of one answer per conversation, which errors call by `name` and number.

        Raises:
            ConfigError: a conversation leaves no room in the model's context.
        """

    def clip_note(self, prompts: Sequence[Prompt], max_tokens: int) -> str | None:
        """Return a note if answers of `max_tokens` tokens do not fit into the model's context."""

    def strip_thinking(self, conversation: Sequence[Message], reply: str) -> str:
        """Return a reply to `conversation` without its thinking."""
