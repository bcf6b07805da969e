"""Topics whose answers are known facts: the fact is trained, the last wording is held out."""

import itertools
import random
from collections.abc import Iterable, Sequence

from scripts.tools.tiny_chat import facts
from scripts.tools.tiny_chat.registers import Question, Reply

IT_IS = "It is {}."


def others(value: str, pool: Iterable[str]) -> tuple[str, ...]:
    """The false values of the same kind, each once, in the order of the pool."""
    return tuple(dict.fromkeys(other for other in pool if other != value))


def reply_of(value: str, sentences: Sequence[str], pool: Iterable[str]) -> Reply:
    return Reply(value, tuple(sentences), others(value, pool), (value,))


def worded(topic: str, subject: str, wordings: Sequence[str], reply: Reply) -> list[Question]:
    """One question for each wording; the last wording is never trained."""
    last = len(wordings) - 1
    return [
        Question(topic, wording.format(subject), reply, number == last, subject=subject)
        for number, wording in enumerate(wordings)
    ]


# topic: its wordings, one a line (the last is held out), and the sentences of an answer
WORDINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "opposite": (
        """
What is the opposite of {}?
Tell me the opposite of {}.
The opposite of {}?
Give me a word that is the opposite of {}.
{}: what is its opposite?
Which word is the opposite of {}?
""",
        ("The opposite is {}.", IT_IS),
    ),
    "plural": (
        """
What is the plural of {}?
Tell me the plural of {}.
The plural of {}?
Give me the plural form of {}.
{}: what is its plural?
Which word is the plural of {}?
""",
        ("The plural is {}.", IT_IS),
    ),
    "capital": (
        """
What is the capital of {}?
Tell me the capital of {}.
The capital of {}?
Which city is the capital of {}?
{}: what is its capital?
Name the capital city of {}.
""",
        ("The capital is {}.", IT_IS),
    ),
    "continent": (
        """
Which continent is {} in?
Tell me the continent of {}.
Where in the world is {}?
On which continent do I find {}?
{}: which continent?
What is the continent of {}?
""",
        ("It is in {}.", "The continent is {}."),
    ),
    "colour": (
        """
What colour is {}?
Tell me the colour of {}.
The colour of {}?
Which colour does {} have?
{}: what is its colour?
What is the colour of {}?
""",
        ("The colour is {}.", IT_IS),
    ),
    "sound": (
        """
What does a {} say?
Tell me the sound of a {}.
The sound of a {}?
Which sound does a {} make?
A {}: what does it say?
What is the sound of a {}?
""",
        ("It says {}.", "The sound is {}."),
    ),
    "legs": (
        """
How many legs has a {}?
Tell me the number of legs of a {}.
The legs of a {}?
How many legs does a {} have?
A {}: how many legs?
What is the number of legs of a {}?
""",
        ("It has {} legs.", "It has {}."),
    ),
    "young": (
        """
What is the young of a {} called?
Tell me the name of a young {}.
A young {}?
What do you call a young {}?
A {}: what is its young?
What is the name of a young {}?
""",
        ("It is a {}.", "It is called a {}."),
    ),
    "definition": (
        """
What is {}?
Tell me what {} is.
Can you explain {} to me?
Explain {} to me.
{}: what is it?
Do you know what {} is?
""",
        (IT_IS, "That is {}."),
    ),
    "letter": (
        """
What letter does {} start with?
Tell me the first letter of {}.
The first letter of {}?
{}: what is its first letter?
Which letter does {} begin with?
What is the first letter of {}?
""",
        ("It starts with {}.", "The first letter is {}."),
    ),
    "spelling": (
        """
How do you spell {}?
Spell {}.
Tell me how to spell {}.
{}: how is it spelled?
Spell the word {} for me.
Please tell me how to spell {}.
""",
        ("It is spelled {}.", IT_IS),
    ),
}


# {0} day or month, {1} after or before, {2} its name; the last is held out
ORDER_WORDINGS = """
What {0} comes {1} {2}?
Tell me the {0} {1} {2}.
The {0} {1} {2}?
Which {0} is {1} {2}?
Which {0} comes {1} {2}?
"""
LIST_WORDINGS = """
Name {} {}.
Tell me {} {}.
Can you name {} {}?
{} {}?
List {} {}.
Give me a list of {} {}.
Give me {} {}.
"""


def wordings_of(topic: str) -> tuple[list[str], tuple[str, ...]]:
    wordings, sentences = WORDINGS[topic]
    return wordings.strip().split("\n"), sentences


def fact_table(topic: str, table: Sequence[tuple[str, str]]) -> list[Question]:
    """All wordings of a topic over its (subject, value) table."""
    wordings, sentences = wordings_of(topic)
    values = [value for _, value in table]
    return [
        question
        for subject, value in table
        for question in worded(topic, subject, wordings, reply_of(value, sentences, values))
    ]


def definitions() -> list[Question]:
    """Definitions: the last word is what must appear."""
    table = [tuple(row.strip().split(": ")) for row in facts.DEFINITIONS.split(",")]
    wordings, sentences = wordings_of("definition")
    meanings = [meaning for _, meaning in table]
    questions = []
    for subject, meaning in table:
        key = meaning.split()[-1]
        reply = Reply(meaning, sentences, others(meaning, meanings), (key,))
        questions += worded("definition", " ".join(subject.split()), wordings, reply)
    return questions


def ordered_names(topic: str, names: Sequence[str]) -> list[Question]:
    """The day or month after and before each."""
    wordings = ORDER_WORDINGS.strip().split("\n")
    sentences = (IT_IS, f"That {topic} is {{}}.")
    questions = []
    for index, name in enumerate(names):
        for word, step in (("after", 1), ("before", -1)):
            reply = reply_of(names[(index + step) % len(names)], sentences, names)
            for number, wording in enumerate(wordings):
                text = wording.format(topic, word, name)
                questions.append(Question(topic, text, reply, number == len(wordings) - 1))
    return questions


def small_talk() -> list[Question]:
    """Greetings and questions about the model; each is held out behind one lead of six."""
    table = [line.split(": ") for line in facts.SMALL_TALK.strip().split("\n")]
    sentences = [sentence for sentence, _ in table]
    questions = []
    for sentence, wordings in table:
        word = sentence.split()[-1]
        reply = Reply(sentence, ("{}.",), others(sentence, sentences), (word,))
        texts = wordings.split(" | ")
        for text, lead in itertools.product(range(len(texts)), range(len(facts.LEADS))):
            held = (text + lead) % 6 == 5
            prompt = facts.LEADS[lead] + texts[text]
            questions.append(Question("small talk", prompt, reply, held, framed=False))
    return questions


def lists(rng: random.Random) -> list[Question]:
    """«Name three fruits.» Listings are in order of the alphabet, so that none repeats itself."""
    wordings = LIST_WORDINGS.strip().split("\n")
    kinds = {kind: tuple(names.split(", ")) for kind, names in facts.LISTS.items()}
    questions = []
    for kind, names in kinds.items():
        foreign = [name for other in kinds if other != kind for name in kinds[other]]
        foreign = [name for name in foreign if name not in names]
        for count, word in ((2, "two"), (3, "three")):
            for number, wording in enumerate(wordings):
                for _ in range(6):
                    listing = ", ".join(sorted(rng.sample(names, count)))
                    wrong = tuple(", ".join(rng.sample(foreign, count)) for _ in range(3))
                    reply = Reply(listing, ("{}.", "Here you are: {}."), wrong, names, count)
                    text = wording.format(word, kind)
                    text = text[:1].upper() + text[1:]
                    questions.append(Question("list", text, reply, number == len(wordings) - 1))
    return questions


def fact_questions(rng: random.Random) -> list[Question]:
    """Every fact question, trained and held out."""
    countries = facts.rows(facts.COUNTRIES)
    animals = facts.rows(facts.ANIMALS)
    pairs = [(row[0], row[1]) for row in facts.rows(facts.OPPOSITES)]
    plurals = [(row[0], row[1]) for row in facts.rows(facts.PLURALS)]
    spelled = facts.SPELLED.split()
    lettered = dict.fromkeys([*spelled, *(one for one, _ in plurals)])
    tables = {
        "opposite": pairs + [(value, subject) for subject, value in pairs],
        "plural": plurals,
        "capital": [(row[0], row[1]) for row in countries],
        "continent": [(row[0], row[2]) for row in countries],
        "colour": facts.subject_rows(facts.COLOURS),
        "sound": [(row[0], row[1]) for row in animals],
        "legs": [(row[0], row[2]) for row in animals],
        "young": [(row[0], row[3]) for row in animals],
        "letter": [(word, word[0].upper()) for word in lettered],
        "spelling": [(word, "-".join(word.upper())) for word in spelled],
    }
    questions = [q for topic, table in tables.items() for q in fact_table(topic, table)]
    questions += definitions() + small_talk() + lists(rng)
    return questions + ordered_names("day", facts.DAYS) + ordered_names("month", facts.MONTHS)
