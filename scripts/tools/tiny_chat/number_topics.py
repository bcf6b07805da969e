"""Topics over many instances, such as 3 and 4. Most hold out instances, small tables texts."""

import itertools
import operator
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from scripts.tools.tiny_chat import facts
from scripts.tools.tiny_chat.facts_topics import IT_IS, others
from scripts.tools.tiny_chat.registers import Question, Reply

Calculation = Callable[[int, int], int]

SUM_WORDINGS = (
    *("What is {} plus {}?", "{} + {}?", "How much is {} + {}?", "Add {} and {}."),
    *("What is the sum of {} and {}?", "I have {} apples and get {} more. How many are there?"),
)
MINUS_WORDINGS = (
    *("What is {} minus {}?", "{} - {}?", "How much is {} - {}?", "From {} take away {}."),
    *("I have {} apples and lose {}. How many are there?",),
)
TIMES_WORDINGS = ("What is {} times {}?", "{} x {}?", "How much is {} x {}?", "Multiply {} by {}.")
LARGER_WORDINGS = {
    max: ("Which is larger, {} or {}?", "Which number is bigger, {} or {}?", "Larger: {} or {}?"),
    min: ("Which is smaller, {} or {}?", "Which number is less, {} or {}?", "Smaller: {} or {}?"),
}
NUMBER_SENTENCES = (IT_IS, "The answer is {}.", "That makes {}.")


def number_reply(value: int, sentences: Sequence[str] = NUMBER_SENTENCES) -> Reply:
    """A number, and its neighbours as what it could be taken for."""
    near = [str(other) for step in (-3, -2, -1, 1, 2, 3) if (other := value + step) >= 0]
    return Reply(str(value), tuple(sentences), tuple(near), (str(value),))


def name_reply(value: str, pool: Sequence[str], sentences: Sequence[str] = (IT_IS,)) -> Reply:
    return Reply(value, tuple(sentences), others(value, pool), (value,))


def held_instances(instances: Sequence[Hashable], share: float, rng: random.Random) -> set:
    """The instances that are never trained: a fixed share, drawn once."""
    return set(rng.sample(list(instances), max(4, round(share * len(instances)))))


def make_questions(
    topic: str, instances: Sequence[tuple[int, int]], wordings: Sequence[str], value: Calculation
) -> list[Question]:
    """Every instance in every wording."""
    spoken = itertools.product(instances, wordings)
    return [
        Question(topic, text.format(a, b), number_reply(value(a, b))) for (a, b), text in spoken
    ]


def arithmetic(rng: random.Random) -> list[Question]:
    """Sums to 15 + 15 and differences below; products to 10 x 10.

    Sums are held out by instance. The other tables are too small to be guessed from the rest:
    a tenth of their texts is held out, and other wordings of the same numbers are trained.
    """
    sums = list(itertools.product(range(16), range(16)))
    held = held_instances([(a, b) for a, b in sums if a != b], 0.08, rng)
    questions = [
        replace(question, held_out=pair in held)
        for pair in sums
        for question in make_questions("sum", [pair], SUM_WORDINGS, operator.add)
    ]
    minus = [(a, b) for a, b in sums if b <= a]
    times = list(itertools.product(range(1, 11), range(1, 11)))
    return [
        *questions,
        *held_texts(make_questions("difference", minus, MINUS_WORDINGS, operator.sub), rng),
        *held_texts(make_questions("product", times, TIMES_WORDINGS, operator.mul), rng),
    ]


def held_texts(questions: Sequence[Question], rng: random.Random) -> list[Question]:
    """The same questions, a tenth of them held out."""
    return [replace(question, held_out=rng.random() < 0.1) for question in questions]


def comparisons(rng: random.Random) -> list[Question]:
    """The larger or smaller of two numbers."""
    instances = list(itertools.permutations(range(21), 2))
    held = held_instances(instances, 0.1, rng)
    questions = []
    for a, b in instances:
        for pick, wordings in LARGER_WORDINGS.items():
            right = pick(a, b)
            reply = name_reply(str(right), (str(a), str(b)))
            for wording in wordings:
                questions.append(Question("compare", wording.format(a, b), reply, (a, b) in held))
    return questions


def earlier_month(rng: random.Random) -> list[Question]:
    """Which of two months comes first."""
    wordings = ("Which comes first, {} or {}?", "What is earlier in the year, {} or {}?")
    instances = list(itertools.permutations(range(12), 2))
    held = held_instances(instances, 0.1, rng)
    questions = []
    for (a, b), wording in itertools.product(instances, wordings):
        first, second = facts.MONTHS[a], facts.MONTHS[b]
        reply = name_reply(facts.MONTHS[min(a, b)], (first, second))
        questions.append(
            Question("first month", wording.format(first, second), reply, (a, b) in held)
        )
    return questions


def neighbours(rng: random.Random) -> list[Question]:
    """The number after or before. Held out by text."""
    wordings = ("What number comes {1} {0}?", "The number {1} {0}?", "Tell me the number {1} {0}.")
    questions = []
    for n, step, wording in itertools.product(range(1, 31), (1, -1), wordings):
        text = wording.format(n, "after" if step == 1 else "before")
        reply = number_reply(n + step, (IT_IS, "That is {}."))
        questions.append(Question("next number", text, reply))
    return held_texts(questions, rng)


def counting(rng: random.Random) -> list[Question]:
    """Count from a to b."""
    wordings = ("Count from {} to {}.", "Please count from {} up to {}.", "List {} to {}.")
    instances = [(a, a + length) for a in range(16) for length in (2, 3, 4)]
    held = held_instances(instances, 0.12, rng)
    questions = []
    for (a, b), wording in itertools.product(instances, wordings):
        numbers = [str(n) for n in range(a, b + 1)]
        listing, skipped = ", ".join(numbers), ", ".join(numbers[:-2] + numbers[-1:])
        wrong = (skipped, ", ".join(reversed(numbers)))
        reply = Reply(listing, ("{}.", "Here you are: {}."), wrong, (listing,))
        questions.append(Question("count", wording.format(a, b), reply, (a, b) in held))
    return questions


def sorting(rng: random.Random) -> list[Question]:
    """Three numbers in order."""
    wordings = ("Sort {}, {}, {}.", "Put {}, {}, {} in order.", "Order these numbers: {}, {}, {}.")
    instances = rng.sample(list(itertools.permutations(range(16), 3)), 2400)
    held = held_instances(instances, 0.05, rng)
    questions = []
    for numbers, wording in itertools.product(instances, wordings):
        ranked = sorted(numbers)
        listing = ", ".join(map(str, ranked))
        wrong = (", ".join(map(str, ranked[::-1])), ", ".join(map(str, ranked[1:] + ranked[:1])))
        reply = Reply(listing, ("{}.", "Here you are: {}."), wrong, (listing,))
        questions.append(Question("sort", wording.format(*numbers), reply, numbers in held))
    return questions


def number_questions(rng: random.Random) -> list[Question]:
    """Every instance question, trained and held out."""
    makers = (arithmetic, comparisons, earlier_month, neighbours, counting, sorting)
    return [question for make in makers for question in make(rng)]
