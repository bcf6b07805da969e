"""Critiques and revisions of a model's own answers (constitutional AI).

Bai et al. 2022, arXiv:2212.08073, section 3.1: the model answers, criticises its answer by a
principle, and revises it. Here the revision and the first answer are a preference pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mlx_dpo.collect.contrastive_pairs import PairRule
from mlx_dpo.collect.principles.principle_set import Principle, PrincipleDraw
from mlx_dpo.collect.sample import make_answer
from mlx_dpo.collect.session import Answer
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.generation.batch import GeneratedText
from mlx_dpo.generation.responder import Responder
from mlx_dpo.saved_runs.respond import (
    reply_without_thinking,
    response_provenance,
    with_chunk_seed,
)
from mlx_dpo.types import Message

REVISION_RULE = PairRule("the revision", "the first answer", "principles")
SENT_TO_CRITIC = "prompts and answers"  # by a critic at an address, to name what it gets
NO_ROOM = "no room in the model's context for a critique and a revision"
NO_CRITIQUE = "the critique is empty"
NO_REVISION = "the revision is empty"


class _Chain:
    """An answer to a prompt and its revisions so far."""

    def __init__(self, prompt: Prompt, first: Answer) -> None:
        self.prompt = prompt
        self.first = self.last = first
        self.fault: str | None = None  # of the last step that made no revision
        self._steps: list[dict[str, str]] = []

    def conversation(self, *texts: str) -> Prompt:
        """Return the prompt, the last answer, and further turns of user and model in turn."""
        turns: list[Message] = [
            {"role": "user" if number % 2 else "assistant", "content": text}
            for number, text in enumerate((self.last.text, *texts))
        ]
        return Prompt((*self.prompt.messages, *turns), self.prompt.location)

    def append(self, principle: Principle, critique: str, revision: Answer) -> None:
        """Replace the last answer by its revision."""
        self.last = revision
        self._steps.append(
            {"principle": principle.text, "critique": critique, "revision": revision.text}
        )

    def answers(self, critic: Responder | None) -> list[Answer]:
        """Return the last revision, with the steps that led to it, and the first answer."""
        source = self.last.source | {"revisions": self._steps}
        if critic is not None:
            source |= {"critic": critic.provenance}
        fault = None if self._steps else self.fault
        return [replace(self.last, source=source, fault=fault), self.first]


@dataclass(frozen=True)
class Reviser:
    """Sampler of two answers to each prompt: the last revision, then the first answer.

    A critique, and after it the revision, continue the conversation of the prompt and the answer.
    Each further revision starts again from the revised answer, with another principle. A
    step that gives nothing is left out.

    Args:
        responder: model that answers and revises.
        draw: principles for each prompt.
        sampling: settings of the first answers.
        critic: model that criticises; None for the same model.
        temperature: sampling temperature of critiques and revisions; 0 for greedy decoding, by
            which a small model loses less of the content.
    """

    responder: Responder
    draw: PrincipleDraw
    sampling: Sampling
    critic: Responder | None = None
    temperature: float = 0.0

    @cached_property
    def revision_sampling(self) -> Sampling:
        """Settings of critiques and revisions."""
        if self.temperature:
            return replace(self.sampling, temperature=self.temperature, seed=self.draw.seed)
        return Sampling(
            max_tokens=self.sampling.max_tokens,
            repetition_penalty=self.sampling.repetition_penalty,
        )

    def __call__(self, prompts: Sequence[Prompt], chunk: int) -> list[list[Answer]]:
        """Return the last revision and the first answer for each prompt."""
        sampling = with_chunk_seed(self.sampling, chunk, 0)
        source = response_provenance(self.responder, sampling)
        replies = reply_without_thinking(self.responder, prompts, sampling)
        firsts = [make_answer(reply, source) for reply in replies]
        chains = [_Chain(*pair) for pair in zip(prompts, firsts, strict=True)]
        for number in range(self.draw.count):
            self._revise([chain for chain in chains if chain.first.text.strip()], chunk, number)
        return [chain.answers(self.critic) for chain in chains]

    def _revise(self, chains: Sequence[_Chain], chunk: int, number: int) -> None:
        """Criticise and revise the last answer of each chain by its principle `number`."""
        principles = [self.draw.for_prompt(chain.prompt.messages)[number] for chain in chains]
        conversations = [
            chain.conversation(principle.critique_request)
            for chain, principle in zip(chains, principles, strict=True)
        ]
        sampling = with_chunk_seed(self.revision_sampling, chunk, 2 * number + 1)
        critiques = _reply_if_room(self.critic or self.responder, conversations, sampling)
        steps = []
        for chain, principle, critique in zip(chains, principles, critiques, strict=True):
            if critique is None or not critique.text.strip():
                chain.fault = NO_ROOM if critique is None else NO_CRITIQUE
            else:
                steps.append((chain, principle, critique.text.strip()))
        conversations = [
            chain.conversation(principle.critique_request, text, principle.revision_request)
            for chain, principle, text in steps
        ]
        sampling = with_chunk_seed(self.revision_sampling, chunk, 2 * number + 2)
        source = response_provenance(self.responder, sampling)
        revisions = _reply_if_room(self.responder, conversations, sampling)
        for (chain, principle, text), revision in zip(steps, revisions, strict=True):
            if revision is None or not revision.text.strip():
                chain.fault = NO_ROOM if revision is None else NO_REVISION
            else:
                chain.append(principle, text, make_answer(revision, source))


def _reply_if_room(
    responder: Responder, conversations: Sequence[Prompt], sampling: Sampling
) -> list[GeneratedText | None]:
    """Return a reply to each conversation; None if the model's context leaves no room for one."""
    has_room = [responder.clip_note([conversation], 1) is None for conversation in conversations]
    fitting = [c for c, fits in zip(conversations, has_room, strict=True) if fits]
    replies = iter(reply_without_thinking(responder, fitting, sampling) if fitting else ())
    return [next(replies) if fits else None for fits in has_room]
