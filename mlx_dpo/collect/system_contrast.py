"""Answers under two system prompts, to train on without them.

With two prompts this is RLCD (Yang et al. 2023, arXiv:2307.12950); with a good one alone, it is
context distillation (Askell et al. 2021, arXiv:2112.00861) by preferences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_dpo.collect.contrastive_pairs import PairRule
from mlx_dpo.collect.sample import make_answer
from mlx_dpo.collect.session import Answer
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import Prompt, prepend_system_prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.generation.responder import Responder
from mlx_dpo.saved_runs.respond import reply_without_thinking, response_provenance, with_chunk_seed


@dataclass(frozen=True)
class SystemPrompts:
    """The system prompts of the chosen and of the rejected answers.

    Args:
        chosen: system prompt of the better answers.
        rejected: system prompt of the worse answers; None for the prompt as it is.

    Raises:
        ConfigError: a system prompt is empty, or both are the same.
    """

    chosen: str
    rejected: str | None = None

    def __post_init__(self) -> None:
        for name in ("chosen", "rejected"):
            text = getattr(self, name)
            if text is not None and not text.strip():
                raise ConfigError(f"`system_{name}` is empty; write a system prompt")
        if self.rejected is not None and self.chosen.strip() == self.rejected.strip():
            raise ConfigError("`system_chosen` and `system_rejected` are the same; change one")

    @property
    def rule(self) -> PairRule:
        """Rule that makes pairs of the answers."""
        worse = "without a system prompt" if self.rejected is None else "with --system-rejected"
        return PairRule("the answer with --system-chosen", f"the answer {worse}", "system prompts")

    def apply(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts as the model gets them: all for `chosen`, then all for `rejected`."""
        return [
            put_before(prompt, system)
            for system in (self.chosen, self.rejected)
            for prompt in prompts
        ]


@dataclass(frozen=True)
class SystemContrast:
    """Sampler of two answers to each prompt, with the one and with the other system prompt.

    A prompt that has a system message keeps it, after the system prompt.
    """

    responder: Responder
    sampling: Sampling
    systems: SystemPrompts

    def __call__(self, prompts: Sequence[Prompt], chunk: int) -> list[list[Answer]]:
        """Return two answers to each prompt; the first one is that of the chosen system prompt."""
        columns = []
        for position, system in enumerate((self.systems.chosen, self.systems.rejected)):
            sampling = with_chunk_seed(self.sampling, chunk, position)
            source = response_provenance(self.responder, sampling)
            if system is not None:
                source |= {"system": system}
            conversations = [put_before(prompt, system) for prompt in prompts]
            replies = reply_without_thinking(self.responder, conversations, sampling)
            columns.append([make_answer(reply, source) for reply in replies])
        return [list(pair) for pair in zip(*columns, strict=True)]


def put_before(prompt: Prompt, system: str | None) -> Prompt:
    """Return the prompt under a system prompt, or as it is without one."""
    return prompt if system is None else prepend_system_prompt(prompt, system)
