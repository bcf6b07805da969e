"""What tiny-critic is asked with: principles, requests, system prompts. Text only."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_dpo.collect.principles.principle_set import CRITIQUE_REQUEST, REVISION_REQUEST

# The requests of `collect --principles`, then other wordings of them. The last is held out.
CRITIQUE_REQUESTS = (
    CRITIQUE_REQUEST,
    "Read your last answer again. Where does it fall short of this principle? {principle}",
    "Here is a principle: {principle} Does your last answer follow it?",
    "This is the principle: {principle} Say briefly where your last answer falls short of it.",
)
REVISION_REQUESTS = (
    REVISION_REQUEST,
    "Now give only the new answer that follows this principle: {principle}",
    "Write your last answer again by this principle: {principle}",
    "Here is the principle: {principle} Give only the new answer, and keep what is right.",
)

# The principles about courtesy that ship with the package; they are always trained.
SHIPPED_COURTESY = (
    "An answer is polite and kind.",
    "An answer is friendly to the person who asks, and never rude or mocking.",
)
# System prompts for contrast prompts; they are always trained.
CONTRAST = ("Answer politely and kindly.", "Answer curtly and rudely.")

KIND = ("polite", "kind", "friendly", "courteous", "warm", "respectful", "gentle", "civil")
UNKIND = ("rude", "curt", "mocking", "gruff", "impatient", "cold", "harsh", "unkind", "blunt")
NEUTRAL = ("honest", "clear", "true", "right", "short", "fair", "safe", "harmless", "complete")
KINDLY = ("politely", "kindly", "courteously", "warmly", "respectfully", "gently", "nicely")
UNKINDLY = ("rudely", "curtly", "bluntly", "gruffly", "coldly", "harshly", "impatiently")

# What an answer is to be stands at {0} and {1}, what it is not to be at {2} and {3}.
# The last template is held out.
COURTESY_TEMPLATES = (
    "An answer is {0}.",
    "An answer is {0} and {1}.",
    "Answers are {0} and {1}.",
    "The answer should be {0}.",
    "A good answer is {0} and {1}.",
    "An answer sounds {0}, never {2}.",
    "An answer is {0}, and not {2} or {3}.",
    "An answer is {0} to the person who asks, and never {2} or {3}.",
    "The answer is {0} to the person who asks.",
    "Everyone who asks gets an answer that is {0}.",
    "The answer should be {0}, and never {2}.",
)
NEUTRAL_TEMPLATES = (*COURTESY_TEMPLATES[:5], *COURTESY_TEMPLATES[8:10])

# Adverbs stand at {0} and {1}, adjectives at {2} and {3}. The last template is held out.
SYSTEM_TEMPLATES = (
    "Answer {0}.",
    "Answer {0} and {1}.",
    "Reply {0}.",
    "Always answer {0}.",
    "Answer in a {2} way.",
    "Be {2}.",
    "Be {2} and {3}.",
    "You are an assistant that is {2}.",
    "You are an assistant that is {2}. Answer {0}.",
    "You are {2} and {3} to the person who asks.",
    "Your answers are {2} and {3}.",
    "Reply {0} and {1}.",
)
FILLINGS = 60  # of each template, fewer where its words give fewer
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Split:
    """Sentences that are trained, and those that never are."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wordings:
    """Principles that ask for courtesy or for something else, system prompts by register."""

    courtesy: Split
    neutral: Split
    polite: Split
    curt: Split


def build_wordings(seed: int) -> Wordings:
    """Every sentence, split by the seed."""
    rng = random.Random(f"wordings {seed}")
    curt = tuple(word for word in UNKIND if word != "mocking")
    return Wordings(
        courtesy=split(COURTESY_TEMPLATES, (KIND, UNKIND), SHIPPED_COURTESY, rng),
        neutral=split(NEUTRAL_TEMPLATES, (NEUTRAL, UNKIND), (), rng),
        polite=split(SYSTEM_TEMPLATES, (KINDLY, KIND), CONTRAST[:1], rng),
        curt=split(SYSTEM_TEMPLATES, (UNKINDLY, curt), CONTRAST[1:], rng),
    )


def split(
    templates: Sequence[str],
    words: tuple[Sequence[str], Sequence[str]],
    always: Sequence[str],
    rng: random.Random,
) -> Split:
    """Fillings of the templates; held out are the last template and a tenth of the others'."""
    *trained_templates, held_template = templates
    fillings = [text for one in trained_templates for text in filled(one, words, rng)]
    held = {text for text in fillings if rng.random() < HELD_OUT_SHARE} - set(always)
    trained = [text for text in fillings if text not in held]
    return Split(
        tuple(dict.fromkeys([*always, *trained])),
        tuple(sorted(held)) + tuple(filled(held_template, words, rng)),
    )


def filled(
    template: str, words: tuple[Sequence[str], Sequence[str]], rng: random.Random
) -> list[str]:
    """Different fillings of a template; its first two places take the first words."""
    drawn = (
        template.format(*rng.sample(words[0], 2), *rng.sample(words[1], 2)) for _ in range(FILLINGS)
    )
    return list(dict.fromkeys(drawn))
