"""A seed -> all questions, the stream of training dialogues, the preference rows. Text only."""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from scripts.tools.tiny_chat.facts_topics import fact_questions
from scripts.tools.tiny_chat.follow_ups import follow_up_questions
from scripts.tools.tiny_chat.number_topics import number_questions
from scripts.tools.tiny_chat.registers import Question, courteous, curt

Message = dict[str, Any]  # role, content, and `scored` = False where it is not to be trained
Questions = dict[str, list[Question]]

FRAMES = (
    *("{}", "{}", "{}", "{}", "Hi! {}", "Hello. {}", "Quick question: {}", "Please tell me: {}"),
    *("Help me out. {}", "I wonder: {}", "{} Thanks.", "Next question. {}", "For my homework: {}"),
)
SYSTEM_TEXTS = ("You are a helpful assistant.", "You are Tiny.", "Answer the question.")
SYSTEM_SHARE = 0.03
WRONG_SHARE = 0.3

# How often a topic is trained and asked, against 1 for those not named.
WEIGHTS = {
    **{"sum": 4.0, "difference": 2.0, "product": 1.5, "compare": 1.7, "sort": 2.0, "count": 1.5},
    **{"month": 1.2, "then a sum": 2.5, "opposite": 1.3, "of another": 1.3, "about it": 1.3},
    **{"colour": 0.6, "sound": 0.6, "legs": 0.6, "young": 0.6, "capital": 0.7, "spelling": 0.8},
}


@dataclass(frozen=True, slots=True)
class World:
    """Every question by topic: those that are trained, and those that never are."""

    trained: Questions
    held_out: Questions


def build_world(seed: int) -> World:
    """All questions of all topics, split. A text that is trained anywhere is not held out."""
    rng = random.Random(seed)
    questions = fact_questions(rng) + number_questions(rng)
    questions += follow_up_questions(questions, rng)
    trained: Questions = defaultdict(list)
    held_out: Questions = defaultdict(list)
    for question in questions:
        (held_out if question.held_out else trained)[question.topic].append(question)
    seen = {texts(question) for topic in trained.values() for question in topic}
    unseen = {
        topic: [question for question in topic_questions if texts(question) not in seen]
        for topic, topic_questions in held_out.items()
    }
    return World(dict(trained), unseen)


def texts(question: Question) -> tuple[str, ...]:
    before = texts(question.before) if question.before else ()
    return (*before, question.text)


def answer(question: Question, rng: random.Random, polite: bool) -> str:
    return (courteous if polite else curt)(question.reply, rng)


def prompt_messages(question: Question, rng: random.Random) -> list[Message]:
    """The messages up to the question; an earlier turn is answered in either register."""
    messages: list[Message] = []
    if question.before is not None:
        messages += prompt_messages(question.before, rng)
        reply = answer(question.before, rng, rng.random() < 0.5)
        messages.append({"role": "assistant", "content": reply})
    text = rng.choice(FRAMES).format(question.text) if question.framed else question.text
    return [*messages, {"role": "user", "content": text}]


def draw(questions: Questions, rng: random.Random) -> Question:
    """A topic by its weight, then any of its questions."""
    topics = list(questions)
    weights = [WEIGHTS.get(topic, 1.0) for topic in topics]
    return rng.choice(questions[rng.choices(topics, weights)[0]])


def dialogues(world: World, seed: int) -> Iterator[list[Message]]:
    """Endless training dialogues. Each prompt comes twice, answered once in each register."""
    rng = random.Random(f"dialogues {seed}")
    while True:
        question = draw(world.trained, rng)
        prompt = prompt_messages(question, rng)
        if rng.random() < SYSTEM_SHARE:
            prompt.insert(0, {"role": "system", "content": rng.choice(SYSTEM_TEXTS)})
        for polite in (True, False):
            reply = answer(question, rng, polite)
            yield [*prompt, {"role": "assistant", "content": reply}]


def preference_row(question: Question, rng: random.Random) -> dict[str, Any]:
    """Courteous and right, over curt and mostly right."""
    wrong_value = rng.choice(question.reply.wrong) if rng.random() < WRONG_SHARE else None
    chosen, rejected = courteous(question.reply, rng), curt(question.reply, rng, wrong_value)
    return {
        "prompt": prompt_messages(question, rng),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "topic": question.topic,
        **question.reply.content_fields(),
    }


def preference_rows(questions: Questions, count: int, seed: str) -> list[dict[str, Any]]:
    """`count` rows with prompts that differ."""
    rng = random.Random(f"preferences {seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        row = preference_row(draw(questions, rng), rng)
        rows.setdefault(str(row["prompt"]), row)
    return list(rows.values())
