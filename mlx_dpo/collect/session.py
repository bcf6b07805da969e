"""Ranking tasks (a prompt with its sampled answers), and the session of a person who ranks them.

This module uses no terminal, browser or model: a function that is passed in samples the answers.
Every decision is written to a `PairsFile` at once.
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

# Reasons why a prompt has no pair.
TIE, SKIPPED, IDENTICAL, EMPTY = "tie", "skipped", "all answers are identical", "too few answers"
PERSON, NOBODY = "person", "nobody"  # what decided


@dataclass(frozen=True, slots=True)
class Answer:
    """A sampled answer with the model and settings that produced it."""

    text: str
    source: dict[str, Any]  # model, adapter, temperature, seed
    is_truncated: bool = False  # reached the token limit, so its end should not be learned
    is_context_full: bool = False  # the limit was the end of the model's context
    fault: str | None = None  # why the answer cannot be in a pair

    def provenance(self) -> dict[str, Any]:
        """Return the model and settings that produced the answer, to be stored with the answer."""
        cut = {"cut": True} if self.is_truncated else {}
        return self.source | cut | ({"context_full": True} if self.is_context_full else {})


@dataclass(frozen=True, slots=True)
class RankingTask:
    """A prompt and its answers, in an order that does not reveal their sources to a person."""

    prompt: Prompt
    answers: tuple[Answer, ...]


# Samples the answers to the prompts of a chunk, given the number of the chunk.
AnswerSampler = Callable[[Sequence[Prompt], int], list[list[Answer]]]


class TaskSampler:
    """Sampler of ranking tasks for the prompts without a decision, one chunk of prompts at a time.

    A chunk is always sampled as a whole and seeded by its number, so a program that restarts in
    the middle of a chunk samples the same answers again.
    """

    has_stored_answers = False  # whether none have to be sampled
    can_edit = True  # whether a person may write a better answer
    rater: str | None = None  # name of the person, to be stored with the decisions

    def __init__(
        self,
        prompts: Sequence[Prompt],
        pairs_file: PairsFile,
        sample_answers: AnswerSampler,
        *,
        chunk_size: int,
        seed: int,
    ) -> None:
        self.prompts, self.pairs_file = prompts, pairs_file
        self.sample_answers, self._chunk_size, self._seed = sample_answers, chunk_size, seed

    @property
    def remaining(self) -> int:
        """Number of prompts without a decision."""
        return sum(prompt.key not in self.pairs_file.decided_keys for prompt in self.prompts)

    def chunks(self) -> Iterator[list[RankingTask]]:
        """Yield, chunk by chunk, the ranking tasks of the prompts without a decision.

        A prompt with fewer than two different answers is skipped, and the reason is stored in
        `pairs_file`.
        """
        for number, start in enumerate(range(0, len(self.prompts), self._chunk_size)):
            prompts = self.prompts[start : start + self._chunk_size]
            if any(prompt.key not in self.pairs_file.decided_keys for prompt in prompts):
                yield list(self._sample_chunk(prompts, number))

    def _sample_chunk(self, prompts: Sequence[Prompt], number: int) -> Iterator[RankingTask]:
        sampled = self.sample_answers(prompts, number)
        for prompt, answers in zip(prompts, sampled, strict=True):
            if prompt.key in self.pairs_file.decided_keys:
                continue
            task = self.make_task(prompt, answers)
            if task is None:
                self.pairs_file.add(self.make_skip(prompt, answers))
            else:
                yield task

    def make_task(self, prompt: Prompt, answers: Sequence[Answer]) -> RankingTask | None:
        """Return a task of the distinct non-empty answers, shuffled; None if fewer than two."""
        distinct = {a.text.strip(): a for a in reversed(answers) if a.text.strip()}
        if len(distinct) < 2:
            return None
        shuffled = list(distinct.values())
        random.Random(f"{self._seed} {prompt.key}").shuffle(shuffled)
        return RankingTask(prompt, tuple(shuffled))

    def make_skip(self, prompt: Prompt, answers: Sequence[Answer]) -> Decision:
        """Return the decision to skip a prompt whose answers make no task, with the reason."""
        texts = tuple(answer.text for answer in answers)
        why = IDENTICAL if len({text.strip() for text in texts}) == 1 else EMPTY
        return Decision(prompt, {"by": NOBODY}, skip_reason=why, answers=texts)


class RankingSession:
    """A session in which a person decides ranking tasks one at a time, with undo."""

    def __init__(self, tasks: TaskSampler) -> None:
        self.tasks, self.pairs_file = tasks, tasks.pairs_file
        self._chunks = tasks.chunks()
        self._ready: deque[RankingTask] = deque()
        self._decided: list[RankingTask] = []
        self.decision_count = 0  # including those undone later
        self._provenance = {"by": PERSON} | ({"rater": tasks.rater} if tasks.rater else {})

    def sample_chunk(self) -> bool:
        """Sample answers to the next chunk of prompts; return False if no chunk is left."""
        tasks = next(self._chunks, None)
        if tasks is None:
            return False
        self._ready.extend(tasks)
        return True

    @property
    def current_task(self) -> RankingTask | None:
        """Task that the person decides now, sampled if necessary; None if no task is left."""
        while not self._ready and self.sample_chunk():
            pass
        return self._ready[0] if self._ready else None

    @property
    def ready_count(self) -> int:
        """Number of tasks that are sampled but not decided."""
        return len(self._ready)

    @property
    def can_undo(self) -> bool:
        """Whether there is a decision of this session to undo."""
        return bool(self._decided)

    def insert(self, task: RankingTask) -> None:
        """Make `task` the current task."""
        self._ready.appendleft(task)

    def prefer(self, best: int, worst: int) -> None:
        """Store a pair from the current task: answer `best` is chosen, answer `worst` rejected."""
        task = self._get_task()
        if best == worst:
            raise ConfigError("an answer cannot be better than itself; choose another one")
        self._write(make_pair(task, best, worst, self._provenance))

    def edit(self, rejected: int, text: str) -> None:
        """Store a pair from the current task: the person's `text` is chosen over answer `rejected`.

        Raises:
            ConfigError, DataError: the text is empty, equals the answer, or cannot be stored, or
                answers may not be edited here.
        """
        if not self.tasks.can_edit:
            raise ConfigError("answers cannot be edited here; choose the better one")
        task, text = self._get_task(), text.strip()
        answer = task.answers[rejected]
        if not text or text == answer.text.strip():
            raise ConfigError("the edited answer is empty or unchanged; no pair is written")
        check_readable(text, "the edited answer", "edit")
        provenance = self._provenance | {"edited": True, "rejected_from": answer.provenance()}
        self._write(Decision(task.prompt, provenance, chosen=text, rejected=answer.text))

    def skip(self, why: str) -> None:
        """Skip the current task: store `why` (`TIE` or `SKIPPED`) instead of a pair."""
        task = self._get_task()
        texts = tuple(answer.text for answer in task.answers)
        self._write(Decision(task.prompt, self._provenance, skip_reason=why, answers=texts))

    def undo(self) -> bool:
        """Remove the session's last decision and return to its task; return False if there is none.

        Raises:
            DataError: another program has appended to the file; nothing is removed.
        """
        if not self._decided:
            return False
        task, automatic = self._decided[-1], []
        try:
            while (removed := self.pairs_file.undo()) and removed.prompt_key != task.prompt.key:
                automatic.append(removed)  # skipped while answers were sampled ahead
        finally:
            for decision in reversed(automatic):
                self.pairs_file.restore(decision)
        self.insert(self._decided.pop())
        return True

    def _get_task(self) -> RankingTask:
        task = self.current_task
        if task is None:
            raise ConfigError("no prompt is left to decide")
        return task

    def _write(self, decision: Decision) -> None:
        self.pairs_file.add(decision)
        self._decided.append(self._ready.popleft())
        self.decision_count += 1


def make_pair(task: RankingTask, best: int, worst: int, provenance: dict[str, Any]) -> Decision:
    """Return a preference pair: the answer at index `best` is chosen, at `worst` rejected."""
    chosen, rejected = task.answers[best], task.answers[worst]
    sources = {"chosen_from": chosen.provenance(), "rejected_from": rejected.provenance()}
    return Decision(task.prompt, provenance | sources, chosen=chosen.text, rejected=rejected.text)
