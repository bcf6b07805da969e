"""How well a model answers, revises, obeys system prompts and judges, on held-out questions."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_dpo.demo.rules import is_correct, is_courteous
from mlx_dpo.evaluation.judge import parse_verdict
from mlx_dpo.evaluation.rewards import LOSS, TIE, WIN
from scripts.tools.tiny_chat import corpus, measure
from scripts.tools.tiny_chat.corpus import Message, World
from scripts.tools.tiny_chat.rules import COURTEOUS_MARKERS
from scripts.tools.tiny_critic.dialogues import (
    Answered,
    answered,
    judge_question,
)
from scripts.tools.tiny_critic.wordings import (
    CRITIQUE_REQUESTS,
    REVISION_REQUESTS,
    SHIPPED_COURTESY,
    Split,
    Wordings,
)

LONGEST_REPLY = 60  # tokens
ROWS = 100
JUDGED = 30  # pairs of answers
Row = dict[str, Any]


class Requests(NamedTuple):
    """How a critique and a revision are asked for, by which principles."""

    principles: Sequence[str]
    critique: str
    revision: str


SHIPPED = Requests(SHIPPED_COURTESY, CRITIQUE_REQUESTS[0], REVISION_REQUESTS[0])


class Revised(NamedTuple):
    """One question's way through an answer, its critique and its revision."""

    row: Row
    answer: str
    critique: str
    revision: str


def polite(text: str) -> bool:
    return is_courteous(text, COURTEOUS_MARKERS)


def share(hits: Sequence[bool]) -> float:
    """The share of true ones, to three digits."""
    return round(sum(hits) / len(hits), 3)


class Measure:
    """A loaded model, and rows of held-out questions that all measures share."""

    def __init__(self, model: Any, tokenizer: Any, world: World, *, rows: int, seed: int) -> None:
        self.model, self.tokenizer, self.world = model, tokenizer, world
        self.rng = random.Random(f"measure critic {seed}")
        self.rows: list[Row] = corpus.preference_rows(world.held_out, rows, f"critic {seed}")
        mx.random.seed(seed)

    def replies(self, conversations: Sequence[list[Message]], temperature: float) -> list[str]:
        rows = [{"prompt": conversation} for conversation in conversations]
        return measure.answers(
            self.model, self.tokenizer, rows, temperature=temperature, longest=LONGEST_REPLY
        )

    def answers(self, temperature: float = 1.0) -> list[str]:
        return self.replies([row["prompt"] for row in self.rows], temperature)

    def revised(
        self, requests: Requests, temperature: float, answers: Sequence[str]
    ) -> list[Revised]:
        """Criticises and revises an answer to each row, each by a principle drawn at random."""
        principles = [self.rng.choice(requests.principles) for _ in self.rows]
        conversations = [
            [*row["prompt"], said("assistant", answer)]
            for row, answer in zip(self.rows, answers, strict=True)
        ]
        found: list[list[str]] = []
        for wording in (requests.critique, requests.revision):
            for conversation, principle in zip(conversations, principles, strict=True):
                conversation.append(said("user", wording.format(principle=principle)))
            found.append(self.replies(conversations, temperature))
            for conversation, reply in zip(conversations, found[-1], strict=True):
                conversation.append(said("assistant", reply))
        return [Revised(*parts) for parts in zip(self.rows, answers, *found, strict=True)]

    def obedience(self, systems: Split, *, wanted: bool) -> dict[str, float]:
        """Sampled answers under held-out system prompts: the share in the register, and right."""
        conversations = [
            [said("system", self.rng.choice(systems.held_out)), *row["prompt"]] for row in self.rows
        ]
        texts = self.replies(conversations, 1.0)
        pairs = list(zip(texts, self.rows, strict=True))
        return {
            "obeyed": share([polite(text) is wanted for text in texts]),
            "correct": share([is_correct(text, row) for text, row in pairs]),
        }

    def judged(self, principles: Sequence[str]) -> dict[str, float]:
        """Greedy verdicts on two answers in both orders, by the default rubric or by principles."""
        pairs = [self._pair() for _ in range(JUDGED)]
        asked = [
            judge_question(first.prompt, first.text, second.text, principles[:1])
            for pair in pairs
            for first, second in (pair, pair[::-1])
        ]
        replies = self.replies([[message] for message in asked], 0.0)
        outcomes = [parse_verdict(reply) for reply in replies]
        right = [
            outcome == expected
            for pair, *both in zip(pairs, outcomes[::2], outcomes[1::2], strict=True)
            for outcome, expected in zip(both, expected_outcomes(*pair), strict=True)
        ]
        differ = [first.polite != second.polite for first, second in pairs]
        both_right = [one and two for one, two in zip(right[::2], right[1::2], strict=True)]
        return {
            "right_in_both_orders": share(both_right),
            "preferred": share(
                [right for right, different in zip(both_right, differ, strict=True) if different]
            ),
        }

    def _pair(self) -> tuple[Answered, Answered]:
        question = corpus.draw(self.world.held_out, self.rng)
        prompt = corpus.prompt_messages(question, self.rng)
        first, second = self.rng.choice(
            [(True, False), (False, True), (True, False), (False, True), (True,) * 2, (False,) * 2]
        )
        return (
            answered(question, prompt, first, self.rng),
            answered(question, prompt, second, self.rng),
        )


def said(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def expected_outcomes(first: Answered, second: Answered) -> tuple[float, float]:
    """What a judge should say of the answer shown first, in both orders."""
    if first.polite == second.polite:
        return TIE, TIE
    return (WIN, LOSS) if first.polite else (LOSS, WIN)


def revision_figures(cases: Sequence[Revised]) -> dict[str, float]:
    """Shares over curt, courteous and correct answers."""
    curt = [case for case in cases if not polite(case.answer)]
    courteous = [case for case in cases if polite(case.answer)]
    right = [case for case in cases if is_correct(case.answer, case.row)]
    return {
        "answers_courteous": share([polite(case.answer) for case in cases]),
        "answers_correct": share([is_correct(case.answer, case.row) for case in cases]),
        "revisions_courteous": share([polite(case.revision) for case in cases]),
        "revisions_correct": share([is_correct(case.revision, case.row) for case in cases]),
        "curt_became_courteous": share([polite(case.revision) for case in curt]),
        "courteous_stayed": share([polite(case.revision) for case in courteous]),
        "courteous_repeated": share([case.revision == case.answer for case in courteous]),
        "content_kept": share([is_correct(case.revision, case.row) for case in right]),
        "critiques_right": share(
            [found_fault(case.critique) != polite(case.answer) for case in cases]
        ),
    }


def found_fault(critique: str) -> bool:
    return "no kind word" in critique


def figures(model: Any, tokenizer: Any, world: World, wordings: Wordings, seed: int) -> Row:
    """Every figure of build.json."""
    one = Measure(model, tokenizer, world, rows=ROWS, seed=seed)
    sampled = one.answers()
    new = Requests(wordings.courtesy.held_out, CRITIQUE_REQUESTS[-1], REVISION_REQUESTS[-1])
    neutral = SHIPPED._replace(principles=wordings.neutral.held_out)
    unmoved = one.revised(neutral, 0.0, sampled)
    return {
        "held_out_questions": ROWS,
        "shipped_principles": revision_figures(one.revised(SHIPPED, 1.0, sampled)),
        "shipped_principles_greedy": revision_figures(one.revised(SHIPPED, 0.0, sampled)),
        "held_out_principles_and_requests": revision_figures(one.revised(new, 1.0, sampled)),
        "other_principles_kept": share([case.revision == case.answer for case in unmoved]),
        "system_polite": one.obedience(wordings.polite, wanted=True),
        "system_curt": one.obedience(wordings.curt, wanted=False),
        "judge_default_rubric": one.judged([]),
        "judge_principles": one.judged(SHIPPED_COURTESY),
    }
