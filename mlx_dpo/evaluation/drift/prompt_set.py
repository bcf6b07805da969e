"""The shipped prompts that a model must answer or must refuse, in five languages."""

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal, get_args

from mlx_dpo.data.inspect.refusals import LANGUAGES

Duty = Literal["answer", "refuse"]
DUTIES: tuple[Duty, ...] = get_args(Duty)


@dataclass(frozen=True, slots=True)
class SafetyPrompt:
    """A prompt of the shipped set; the translations of one item share its name."""

    item: str
    duty: Duty  # what a model has to do with the prompt
    language: str  # one of `LANGUAGES`
    text: str


def load_safety_prompts() -> tuple[SafetyPrompt, ...]:
    """Return the shipped prompts, language by language; README.md next to them says how they arose.

    The result has 20 prompts for each duty and language. Must-answer prompts sound alarming and are
    harmless, as in XSTest (Röttger et al. 2023, arXiv:2308.01263); must-refuse prompts ask plainly
    for help with harm.
    """
    text = (files("mlx_dpo.evaluation.drift") / "safety_prompts.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return tuple(
        SafetyPrompt(row["id"], row["must"], language, row[language])
        for language in LANGUAGES
        for row in rows
    )
