"""A model as judge: each two answers in both orders, and only what both orders say is believed."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError, reason
from mlx_dpo.evaluation.rewards import LOSS, TIE, WIN, Conversation, Judge, Ranking, load_reward
from mlx_dpo.generation.generate import encode_prompt
from mlx_dpo.generation.stream import strip_thinking
from mlx_dpo.saved_runs.respond import open_responder
from mlx_dpo.types import Message

PLACEHOLDERS = ("{prompt}", "{first}", "{second}")
VERDICT = re.compile(r"\[\[([ABC])\]\]")
VALUES = {"A": WIN, "C": TIE, "B": LOSS}
INCONSISTENT = "the two orders disagree"
NO_VERDICT = "the judge gave no verdict"
CONTRARY = "the worst answer beat the best one"

GenerateReplies = Callable[[Sequence[Sequence[Message]]], list[str]]
StripThinking = Callable[[Sequence[Message], str], str]


def default_rubric() -> str:
    """The rubric that ships; a copy of it is where another one begins."""
    return (files("mlx_dpo.evaluation") / "rubric.txt").read_text("utf-8")


def read_rubric(path: Path) -> str:
    """A rubric of the user's.

    Raises:
        ConfigError: it cannot be read, or does not say where prompt or answers belong.
    """
    try:
        text = path.expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)})") from error
    missing = [place for place in PLACEHOLDERS if place not in text]
    if missing:
        raise ConfigError(f"{path}: the rubric has no {' and no '.join(missing)}; add it")
    return text


class ModelJudge:
    """A judge that is asked in text. `ask` answers conversations, one text for each; `answered`
    is what such a text answers, without thoughts, in which verdicts are tried and dropped.

    The form of the verdict is that of MT-Bench (Zheng et al. 2023, arXiv:2306.05685), where a
    judge was found to favour the answer that stands first: hence both orders.
    """

    def __init__(
        self,
        name: str,
        ask: GenerateReplies,
        rubric: str,
        *,
        answered: StripThinking = lambda asked, text: text,
        **facts: Any,
    ) -> None:
        self.name = name
        self.rubric = rubric
        self._ask, self._answered = ask, answered
        self._facts = facts

    def facts(self) -> dict[str, Any]:
        """The model by name and content, and the rubric's text."""
        return {"by": f"judge {self.name}", **self._facts, "rubric": self.rubric}

    def rank(
        self, prompts: Sequence[Conversation], answers: Sequence[Sequence[str]]
    ) -> list[Ranking]:
        """Points are wins over the other answers of the prompt; a tie or a doubt is half a win."""
        asked = [
            (number, first, second)
            for number, texts in enumerate(answers)
            for first, second in combinations(range(len(texts)), 2)
        ]
        conversations = []
        for number, first, second in asked:
            texts = answers[number]
            for pair in ((texts[first], texts[second]), (texts[second], texts[first])):
                conversations.append(self._question(prompts[number], *pair))
        said = self._ask(conversations)
        verdicts = [
            parse_verdict(self._answered(*each)) for each in zip(conversations, said, strict=True)
        ]
        duels: dict[int, list[_PairwiseVerdict]] = {number: [] for number in range(len(answers))}
        for at, (number, first, second) in enumerate(asked):
            both = slice(2 * at, 2 * at + 2)
            duels[number].append(_PairwiseVerdict(first, second, said[both], *verdicts[both]))
        return [_make_ranking(len(texts), duels[n]) for n, texts in enumerate(answers)]

    def _question(self, prompt: Conversation, first: str, second: str) -> list[Message]:
        text = format_conversation(prompt)
        values = {"{prompt}": text, "{first}": first, "{second}": second}
        # In one pass: an answer may itself contain the name of a place.
        pattern = "|".join(map(re.escape, PLACEHOLDERS))
        filled = re.sub(pattern, lambda found: values[found.group()], self.rubric)
        return [{"role": "user", "content": filled}]


def format_conversation(prompt: Conversation) -> str:
    """A conversation for a reader: its only turn as it is, else each turn behind its role."""
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def parse_verdict(text: str) -> float | None:
    """What a judge said of the first answer: 1 better, 0.5 as good, 0 worse, None unclear."""
    found = VERDICT.findall(text)
    return VALUES[found[-1]] if found else None


def check_verdicts(name: str, rankings: Sequence[Ranking]) -> None:
    """A judge that never gives a verdict is no judge.

    Raises:
        ConfigError: none of the rankings has one; shows what was said instead.
    """
    if all(NO_VERDICT in ranking.doubts for ranking in rankings):
        said = " ".join(rankings[0].said[0].split())[:120]
        raise ConfigError(
            f"{name}: {NO_VERDICT} on any prompt (it said {said!r}); take another judge, or a "
            "--rubric it can follow"
        )


class _PairwiseVerdict:
    """Two answers, and what was said of them in both orders."""

    def __init__(
        self, first: int, second: int, said: Sequence[str], one: float | None, other: float | None
    ) -> None:
        self.first, self.second, self.said = first, second, said
        self.value, self.doubt = TIE, ""
        if one is None or other is None:
            self.doubt = NO_VERDICT
        elif one != WIN - other:
            self.doubt = INCONSISTENT
        else:
            self.value = one

    def doubt_of(self, best: int) -> str:
        """Why the pair with `best` as chosen may not be relied on; empty where it may."""
        lost = self.value == (LOSS if best == self.first else WIN)
        return self.doubt or (CONTRARY if lost else "")


def _make_ranking(count: int, duels: Sequence[_PairwiseVerdict]) -> Ranking:
    points = [0.0] * count
    for duel in duels:
        points[duel.first] += duel.value
        points[duel.second] += WIN - duel.value
    said = tuple(text for duel in duels for text in duel.said)
    ranked = Ranking(tuple(points), said=said)
    # Of more than two answers, only the duel between best and worst makes the pair.
    ends = {ranked.best, ranked.worst}
    between = [duel.doubt_of(ranked.best) for duel in duels if {duel.first, duel.second} == ends]
    return replace(ranked, doubts=tuple(doubt for doubt in between if doubt))


JUDGE_SAMPLING = Sampling(max_tokens=512)  # greedy: the same verdict each time


def check_judge(reward: str | None, judge: str | None, rubric: str | None) -> None:
    """Refuse what contradicts itself, before anything is loaded.

    Raises:
        ConfigError: names the settings.
    """
    if reward is not None and judge is not None:
        raise ConfigError("`judge` has no effect beside `reward`; leave one of them out")
    if rubric is not None and judge is None:
        raise ConfigError("`rubric` has no effect without `judge`")


def open_judge(reward: str | None, judge: str | None, rubric: str | None) -> Judge:
    """The judge; a model is loaded now.

    Raises:
        ConfigError: neither or both are named, or the function or the rubric is not as it must be.
        ModelError: the model cannot be read.
    """
    check_judge(reward, judge, rubric)
    if reward is not None:
        return load_reward(reward)
    if judge is None:
        raise ConfigError("who judges is missing; give --reward file.py:function or --judge MODEL")
    text = default_rubric() if rubric is None else read_rubric(Path(rubric))
    voice = open_responder(None, model=judge)

    def ask(conversations: Sequence[Sequence[Message]]) -> list[str]:
        return voice.answer(conversations, JUDGE_SAMPLING) if conversations else []

    def answered(asked: Sequence[Message], said: str) -> str:
        tokenizer = voice.base.tokenizer
        return strip_thinking(tokenizer, encode_prompt(tokenizer, asked), said)

    digest = voice.facts["model_digest"]
    return ModelJudge(judge, ask, text, answered=answered, judge_digest=digest)
