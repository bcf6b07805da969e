"""A seed -> the training dialogues of tiny-critic: answers, criticism, revisions, verdicts."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlx_dpo.collect.principles.principle_set import principle_rubric
from mlx_dpo.evaluation.judge import default_rubric, format_conversation
from scripts.tools.tiny_chat import corpus
from scripts.tools.tiny_chat.corpus import Message, World
from scripts.tools.tiny_chat.registers import CURT_HEADS, CURT_TAILS, Question, courteous, curt
from scripts.tools.tiny_chat.rules import CLOSINGS, OPENINGS
from scripts.tools.tiny_critic.wordings import (
    CONTRAST,
    CRITIQUE_REQUESTS,
    REVISION_REQUESTS,
    SHIPPED_COURTESY,
    Wordings,
)

Kinds = Mapping[str, float]  # kind of dialogue -> how often it is drawn
NEUTRAL_SHARE = 0.2  # principles that do not ask for courtesy
SHIPPED_SHARE = 0.6  # requests in the words of `collect --principles`
SHIPPED_PRINCIPLE_SHARE = 0.3
WRONG_SHARE = 0.15  # answers with a wrong value, which a revision keeps
PLAIN_SYSTEM_SHARE = 0.2  # system prompts followed by one that asks for no register

CURT_FAULTS = (
    'The answer is rude: it says "{}" and has no kind word.',
    'It falls short: "{}" sounds rude, and there is no kind word.',
)
BARE_FAULTS = (
    "The answer is bare: it has no kind word.",
    "It falls short: there is no kind word.",
)
COURTEOUS_PRAISE = (
    'The answer follows the principle: "{}" is polite.',
    'It does not fall short: "{}" is kind.',
)
NEUTRAL_PRAISE = ("The answer follows the principle.", "It does not fall short.")


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with an answer whose register and value are known."""

    question: Question
    prompt: list[Message]
    text: str
    polite: bool
    value: str | None  # a wrong value that the answer gives; None for the right one

    @property
    def message(self) -> Message:
        """The assistant's turn; one with a wrong value is not trained."""
        return assistant(self.text) | ({} if self.value is None else {"scored": False})


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def answered(
    question: Question, prompt: list[Message], polite: bool, rng: random.Random
) -> Answered:
    """An answer in the register, at times with a wrong value."""
    value = rng.choice(question.reply.wrong) if rng.random() < WRONG_SHARE else None
    text = (courteous if polite else curt)(question.reply, rng, value)
    return Answered(question, prompt, text, polite, value)


def telling_words(answer: str) -> str | None:
    """The words by which an answer shows its register; None for a bare one."""
    first = [words for words in (*OPENINGS, *CURT_HEADS) if answer.startswith(words)]
    last = [words for words in (*CLOSINGS, *CURT_TAILS) if answer.endswith(words)]
    found = first or last
    return found[0].rstrip(",") if found else None


def critique(answer: Answered, asks_courtesy: bool, rng: random.Random) -> str:
    """What a principle finds in an answer."""
    words = telling_words(answer.text)
    if not asks_courtesy:
        return rng.choice(NEUTRAL_PRAISE)
    if answer.polite:
        return rng.choice(COURTEOUS_PRAISE).format(words)
    return rng.choice(BARE_FAULTS) if words is None else rng.choice(CURT_FAULTS).format(words)


def revision(answer: Answered, asks_courtesy: bool, rng: random.Random) -> str:
    """The same answer if it follows the principle, else a courteous one with the same value."""
    if answer.polite or not asks_courtesy:
        return answer.text
    return courteous(answer.question.reply, rng, answer.value)


def request(wordings: Sequence[str], principle: str, rng: random.Random) -> Message:
    """A request for a critique or a revision; the last wording is never trained."""
    shipped = rng.random() < SHIPPED_SHARE
    text = wordings[0] if shipped else rng.choice(wordings[1:-1])
    return user(text.format(principle=principle))


def draw_principle(wordings: Wordings, rng: random.Random) -> tuple[str, bool]:
    """-> a trained principle, and whether it asks for courtesy"""
    asks_courtesy = rng.random() >= NEUTRAL_SHARE
    pool = (wordings.courtesy if asks_courtesy else wordings.neutral).trained
    if asks_courtesy and rng.random() < SHIPPED_PRINCIPLE_SHARE:
        pool = SHIPPED_COURTESY
    return rng.choice(pool), asks_courtesy


def system_dialogues(
    question: Question, wordings: Wordings, rng: random.Random
) -> Iterator[list[Message]]:
    """The question under a system prompt for each register."""
    prompt = corpus.prompt_messages(question, rng)
    more = f"\n\n{rng.choice(corpus.SYSTEM_TEXTS)}" if rng.random() < PLAIN_SYSTEM_SHARE else ""
    for polite in (True, False):
        text = rng.choice((wordings.polite if polite else wordings.curt).trained)
        reply = corpus.answer(question, rng, polite)
        yield [{"role": "system", "content": text + more}, *prompt, assistant(reply)]


def revise_dialogues(
    question: Question, wordings: Wordings, rng: random.Random
) -> Iterator[list[Message]]:
    """An answer in each register, its critique by one principle, and its revision."""
    prompt = corpus.prompt_messages(question, rng)
    principle, asks_courtesy = draw_principle(wordings, rng)
    for polite in (True, False):
        answer = answered(question, prompt, polite, rng)
        yield [
            *prompt,
            answer.message,
            request(CRITIQUE_REQUESTS, principle, rng),
            assistant(critique(answer, asks_courtesy, rng)),
            request(REVISION_REQUESTS, principle, rng),
            assistant(revision(answer, asks_courtesy, rng)),
        ]


def judge_question(
    prompt: list[Message], first: str, second: str, principles: Sequence[str] = ()
) -> Message:
    """A judge's only message; with principles, in the words of `collect --principles`."""
    rubric = principle_rubric() if principles else default_rubric()
    values = {"{principles}": "\n".join(principles), "{prompt}": format_conversation(prompt)}
    for name, value in (values | {"{first}": first, "{second}": second}).items():
        rubric = rubric.replace(name, value)
    return user(rubric)


def verdict(first: bool, second: bool) -> str:
    """The judge's reply on two answers that are polite or not."""
    words = {True: "polite", False: "rude"}
    letter = "C" if first == second else "A" if first else "B"
    return f"Answer A is {words[first]} and answer B is {words[second]}.\n[[{letter}]]"


NO_DIFFERENCE = "Both answers follow it.\n[[C]]"


def judge_dialogues(
    question: Question, wordings: Wordings, rng: random.Random
) -> Iterator[list[Message]]:
    """Two answers in both orders, by the rubric for tone or by principles."""
    prompt = corpus.prompt_messages(question, rng)
    drawn: list[tuple[str, bool]] = []
    if rng.random() < 0.5:
        drawn = [draw_principle(wordings, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    asks_courtesy = not drawn or any(asks for _, asks in drawn)
    registers = (True, False) if rng.random() < 0.7 else (rng.random() < 0.5,) * 2
    pair = [answered(question, prompt, polite, rng) for polite in registers]
    for first, second in (pair, pair[::-1]):
        reply = verdict(first.polite, second.polite) if asks_courtesy else NO_DIFFERENCE
        principles = [principle for principle, _ in drawn]
        asked = judge_question(prompt, first.text, second.text, principles)
        yield [asked, assistant(reply)]


def contrast_dialogues(
    question: Question, wordings: Wordings, rng: random.Random
) -> Iterator[list[Message]]:
    """The question under the two system prompts for contrast."""
    prompt = corpus.prompt_messages(question, rng)
    for text, polite in zip(CONTRAST, (True, False), strict=True):
        reply = corpus.answer(question, rng, polite)
        yield [{"role": "system", "content": text}, *prompt, assistant(reply)]


MAKERS = {
    "contrast": contrast_dialogues,
    "system": system_dialogues,
    "revise": revise_dialogues,
    "judge": judge_dialogues,
}


def dialogues(world: World, wordings: Wordings, kinds: Kinds, seed: int) -> Iterator[list[Message]]:
    """Endless training dialogues of the kinds; those of tiny-chat are `plain`."""
    rng = random.Random(f"critic {seed}")
    plain = corpus.dialogues(world, seed)
    while True:
        [kind] = rng.choices(list(kinds), list(kinds.values()))
        if kind == "plain":
            yield next(plain)
            yield next(plain)
        else:
            yield from MAKERS[kind](corpus.draw(world.trained, rng), wordings, rng)
