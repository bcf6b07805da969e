"""Answers put before a person, one prompt after another, and what is decided written at once.

Knows no terminal, browser or model: answers come from a function, picks go into `Picks`.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_dpo.collect.pairs_file import Decision, PairsFile
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.schemas.messages import check_readable

TIE, SKIPPED, IDENTICAL, EMPTY = "tie", "skipped", "all answers are alike", "too few answers"
PERSON = "person"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, and how it came to say it."""

    text: str
    source: dict[str, Any]  # model, adapter, temperature, seed
    is_cut: bool = False  # it would have gone on, so that its end is not one to learn

    def told(self) -> dict[str, Any]:
        """Where it came from, for its row."""
        return self.source | ({"cut": True} if self.is_cut else {})


@dataclass(frozen=True, slots=True)
class RankingTask:
    """A prompt and its answers, in an order that tells nothing of where they came from."""

    prompt: Prompt
    answers: tuple[Answer, ...]


SampleAnswers = Callable[
    [Sequence[Prompt], int], list[list[Answer]]
]  # prompts of a chunk, its number


class TaskSampler:
    """The questions that are still to be answered, sampled a chunk at a time.

    A chunk is always sampled whole and its number seeds it, so a program that begins again in
    the middle of one gets the same answers.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        picks: PairsFile,
        sample: SampleAnswers,
        *,
        chunk: int,
        seed: int,
    ) -> None:
        self.prompts, self.picks = prompts, picks
        self.sample, self._size, self._seed = sample, chunk, seed

    @property
    def left(self) -> int:
        """Prompts of which nothing is decided."""
        return sum(prompt.key not in self.picks.done for prompt in self.prompts)

    def chunks(self) -> Iterator[list[RankingTask]]:
        """The questions of each chunk in which something is left, in the order of the prompts.

        A prompt of which there are no two different answers is passed over here.
        """
        for number, start in enumerate(range(0, len(self.prompts), self._size)):
            prompts = self.prompts[start : start + self._size]
            if any(prompt.key not in self.picks.done for prompt in prompts):
                yield list(self._questions(prompts, number))

    def _questions(self, prompts: Sequence[Prompt], number: int) -> Iterator[RankingTask]:
        sampled = self.sample(prompts, number)
        for prompt, answers in zip(prompts, sampled, strict=True):
            if prompt.key in self.picks.done:
                continue
            question = self.question(prompt, answers)
            if question is None:
                texts = tuple(answer.text for answer in answers)
                why = IDENTICAL if len({text.strip() for text in texts}) == 1 else EMPTY
                told = {"by": "nobody"}
                self.picks.add(Decision(prompt, told, passed=why, answers=texts))
            else:
                yield question

    def question(self, prompt: Prompt, answers: Sequence[Answer]) -> RankingTask | None:
        """The different answers that say anything, shuffled; None if there are fewer than two."""
        different = {a.text.strip(): a for a in reversed(answers) if a.text.strip()}
        if len(different) < 2:
            return None
        shuffled = list(different.values())
        random.Random(f"{self._seed} {prompt.key}").shuffle(shuffled)
        return RankingTask(prompt, tuple(shuffled))


class RankingSession:
    """A person's way through the questions: one at a time, with a way back."""

    def __init__(self, asked: TaskSampler) -> None:
        self.asked, self.picks = asked, asked.picks
        self._chunks = asked.chunks()
        self._ready: deque[RankingTask] = deque()
        self._decided: list[RankingTask] = []
        self.decisions = 0  # taken back or not

    def prepare(self) -> bool:
        """Sample the next chunk; False where none is left."""
        more = next(self._chunks, None)
        if more is None:
            return False
        self._ready.extend(more)
        return True

    @property
    def question(self) -> RankingTask | None:
        """What is to be decided now; None at the end. Samples where nothing is ready."""
        while not self._ready and self.prepare():
            pass
        return self._ready[0] if self._ready else None

    @property
    def ready(self) -> int:
        """Questions that need no more sampling."""
        return len(self._ready)

    def put(self, question: RankingTask) -> None:
        """Ask this next."""
        self._ready.appendleft(question)

    def prefer(self, best: int, worst: int) -> None:
        """One answer is better than another."""
        question = self._current()
        if best == worst:
            raise ConfigError("an answer cannot be better than itself; choose another")
        self._decide(make_pair(question, best, worst, {"by": PERSON}))

    def improve(self, worse: int, text: str) -> None:
        """A text of the person's own is better than an answer.

        Raises:
            ConfigError, DataError: it says nothing else, or cannot be written.
        """
        question, text = self._current(), text.strip()
        rejected = question.answers[worse]
        if not text or text == rejected.text.strip():
            raise ConfigError("the edited answer is empty or unchanged; nothing is kept")
        check_readable(text, "the edited answer", "improve")
        told = {"by": PERSON, "edited": True, "rejected_from": rejected.told()}
        self._decide(Decision(question.prompt, told, chosen=text, rejected=rejected.text))

    def pass_over(self, why: str) -> None:
        """Decide nothing: `TIE` or `SKIPPED`."""
        question = self._current()
        texts = tuple(answer.text for answer in question.answers)
        self._decide(Decision(question.prompt, {"by": PERSON}, passed=why, answers=texts))

    def undo(self) -> bool:
        """Take back the last decision of this session and ask again; False if there is none.

        Raises:
            DataError: another program has written behind it; nothing is taken back.
        """
        if not self._decided:
            return False
        question, passed = self._decided[-1], []
        try:
            while (kept := self.picks.undo()) is not None and kept.key != question.prompt.key:
                passed.append(kept)  # by nobody, while answers were sampled ahead
        finally:
            for kept in reversed(passed):
                self.picks.put_back(kept)
        self.put(self._decided.pop())
        return True

    def _current(self) -> RankingTask:
        question = self.question
        if question is None:
            raise ConfigError("no question is left; nothing can be decided")
        return question

    def _decide(self, pick: Decision) -> None:
        self.picks.add(pick)
        self._decided.append(self._ready.popleft())
        self.decisions += 1


def make_pair(question: RankingTask, best: int, worst: int, provenance: dict[str, Any]) -> Decision:
    """The pair of two answers of a question."""
    chosen, rejected = question.answers[best], question.answers[worst]
    told = provenance | {"chosen_from": chosen.told(), "rejected_from": rejected.told()}
    return Decision(question.prompt, told, chosen=chosen.text, rejected=rejected.text)
