"""Second questions that mean nothing without the first one and its answer."""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from scripts.tools.tiny_chat.number_topics import number_reply
from scripts.tools.tiny_chat.registers import Question

Known = dict[str, dict[str, list[Question]]]  # topic -> subject -> trained questions

CALCULATIONS: tuple[tuple[tuple[str, ...], Callable[[int], int]], ...] = (
    (("And doubled?", "And twice that?", "Now double it."), lambda n: 2 * n),
    (("And one more?", "Now add one.", "And plus 1?"), lambda n: n + 1),
    (("And two more?", "Now add two.", "And plus 2?"), lambda n: n + 2),
    (("And one less?", "Now take away one.", "And minus 1?"), lambda n: n - 1),
)
OF_WORDINGS = ("And of {}?", "What about {}?", "And {}?")
ABOUT_WORDINGS = {
    "capital": ("And its capital?", "What is its capital?", "And which city is its capital?"),
    "sound": ("And what does it say?", "And its sound?", "What does it say?"),
    "young": ("And its young?", "What is its young called?", "And what is its young called?"),
    "letter": ("And its first letter?", "What letter does it start with?", "And the first letter?"),
}
ABOUT_PLANS = (
    *(("continent", "capital"), ("legs", "sound"), ("legs", "young"), ("sound", "young")),
    *(("young", "sound"), ("plural", "letter")),
)


def known_questions(questions: Sequence[Question]) -> Known:
    """The trained questions by topic and subject."""
    known: Known = defaultdict(lambda: defaultdict(list))
    for question in questions:
        if question.subject and not question.held_out:
            known[question.topic][question.subject].append(question)
    return known


def calculations(questions: Sequence[Question], rng: random.Random) -> list[Question]:
    """«What is 3 plus 4?» … «And doubled?» Held out with the sum that it follows."""
    sums = [q for q in questions if q.topic == "sum" and 1 <= int(q.reply.value) <= 20]
    follow_ups = []
    for first, (wordings, value) in itertools.product(sums, CALCULATIONS):
        reply = number_reply(value(int(first.reply.value)))
        text = rng.choice(wordings)
        follow_ups.append(
            Question("then a sum", text, reply, first.held_out, before=first, framed=False)
        )
    return follow_ups


def of_another(known: Known, rng: random.Random) -> list[Question]:
    """«The capital of France?» … «And of Spain?» Held out by the pair of subjects."""
    follow_ups = []
    for topic in ("capital", "continent", "young", "sound"):
        article = "a " if topic in ("young", "sound") else ""
        for first, second in itertools.permutations(known[topic], 2):
            held = rng.random() < 0.08
            reply = known[topic][second][0].reply
            for wording in OF_WORDINGS:
                text = wording.format(article + second)
                before = rng.choice(known[topic][first])
                follow_ups.append(
                    Question("of another", text, reply, held, before=before, framed=False)
                )
    return follow_ups


def about_it(known: Known, rng: random.Random) -> list[Question]:
    """«Which continent is Peru in?» … «And its capital?» Held out by both questions together."""
    follow_ups = []
    for first_topic, second_topic in ABOUT_PLANS:
        wordings = ABOUT_WORDINGS[second_topic]
        for subject, openers in known[first_topic].items():
            reply = known[second_topic][subject][0].reply
            for before, text in itertools.product(openers, wordings):
                held = rng.random() < 0.1
                follow_ups.append(
                    Question("about it", text, reply, held, before=before, framed=False)
                )
    return follow_ups


def follow_up_questions(questions: Sequence[Question], rng: random.Random) -> list[Question]:
    """Every two-turn question, trained and held out."""
    known = known_questions(questions)
    return calculations(questions, rng) + of_another(known, rng) + about_it(known, rng)
