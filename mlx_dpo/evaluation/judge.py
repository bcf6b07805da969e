"""A language model as judge of answers (LLM-as-a-judge), shown two answers in both orders."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any, Self

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.rewards import LOSS, TIE, WIN, Conversation, Judge, Ranking, load_reward
from mlx_dpo.evaluation.run_reward import PREFIX, open_run_reward
from mlx_dpo.generation.responder import Responder
from mlx_dpo.io.bounded import read_text
from mlx_dpo.openai_client.address import is_address
from mlx_dpo.openai_client.connection import Connection
from mlx_dpo.saved_runs.respond import open_any_responder
from mlx_dpo.types import Message

JUDGE_SAMPLING = Sampling(max_tokens=512)  # greedy: the same verdict each time
# The thinking of a judge at an address counts, and cannot be switched off from here.
JUDGE_SAMPLING_WITH_THINKING = Sampling(max_tokens=4096)
SENT_TO_JUDGE = "prompts, answers and the rubric"
PLACEHOLDERS = ("{prompt}", "{first}", "{second}")
VERDICT = re.compile(r"\[\[([ABC])\]\]")
VERDICT_OUTCOMES = {"A": WIN, "C": TIE, "B": LOSS}  # for the answer shown first
INCONSISTENT = "the two orders disagree"
NO_VERDICT = "the judge gave no verdict"
WORST_BEAT_BEST = "the worst answer beat the best one"

GenerateReplies = Callable[[Sequence[Sequence[Message]]], list[str]]
StripThinking = Callable[[Sequence[Message], str], str]
RubricValues = Callable[[Conversation], Mapping[str, str]]  # further placeholders, for a prompt


class _PairwiseVerdict:
    """The verdict on two answers, which the judge was shown in both orders.

    If a reply has no verdict or if the two orders disagree, the answers tie and the verdict is
    marked as unreliable.
    """

    def __init__(
        self,
        first: int,
        second: int,
        replies: Sequence[str],
        outcome: float | None,
        swapped_outcome: float | None,
    ) -> None:
        self.first, self.second, self.replies = first, second, replies
        self.outcome, self.warning = TIE, ""
        if outcome is None or swapped_outcome is None:
            self.warning = NO_VERDICT
        elif outcome != WIN - swapped_outcome:
            self.warning = INCONSISTENT
        else:
            self.outcome = outcome

    def warning_about(self, best: int) -> str:
        """Return why a preference for answer `best` is unreliable; empty if it is reliable."""
        lost = self.outcome == (LOSS if best == self.first else WIN)
        return self.warning or (WORST_BEAT_BEST if lost else "")


class ModelJudge:
    """A judge that prompts a language model to compare two answers by a rubric, in both orders.

    The format of verdicts is that of MT-Bench (Zheng et al. 2023, arXiv:2306.05685). Both orders
    are used because judges favor the answer in the first position, as the paper measured.

    Args:
        generate: function that returns the model's reply to each conversation.
        strip_thinking: function that removes the thinking from a reply, because a verdict in the
            thinking is provisional.
        values: function that returns what further placeholders of the rubric stand for, by prompt.
    """

    scores_are_rewards = False  # they are wins over the other answers to the prompt

    def __init__(
        self,
        name: str,
        generate: GenerateReplies,
        rubric: str,
        *,
        strip_thinking: StripThinking = lambda conversation, reply: reply,
        values: RubricValues = lambda prompt: {},
        **provenance: Any,
    ) -> None:
        self.name = name
        self.rubric = rubric
        self._generate, self._strip_thinking, self._values = generate, strip_thinking, values
        self._provenance = provenance

    def with_values(self, values: RubricValues) -> Self:
        """Return the same judge with other values of the further placeholders."""
        judge = copy(self)
        judge._values = values
        return judge

    def provenance(self) -> dict[str, Any]:
        """Return the judge's name, model digest and rubric, to be stored with its decisions."""
        return {"by": f"judge {self.name}", **self._provenance, "rubric": self.rubric}

    def rank(
        self, prompts: Sequence[Conversation], answers: Sequence[Sequence[str]]
    ) -> list[Ranking]:
        """Return one ranking per prompt; an answer's score is its number of wins over others.

        Ties and unreliable verdicts count as half a win for both answers.
        """
        pairs = [
            (number, first, second)
            for number, texts in enumerate(answers)
            for first, second in combinations(range(len(texts)), 2)
        ]
        conversations = []  # two per pair: one for each order
        for number, first, second in pairs:
            texts = answers[number]
            for ordered in ((texts[first], texts[second]), (texts[second], texts[first])):
                conversations.append(self._fill_rubric(prompts[number], *ordered))
        replies = self._generate(conversations)
        outcomes = [
            parse_verdict(self._strip_thinking(conversation, reply))
            for conversation, reply in zip(conversations, replies, strict=True)
        ]
        verdicts: list[list[_PairwiseVerdict]] = [[] for _ in answers]
        for index, (number, first, second) in enumerate(pairs):
            both = slice(2 * index, 2 * index + 2)
            verdict = _PairwiseVerdict(first, second, replies[both], *outcomes[both])
            verdicts[number].append(verdict)
        return [
            _make_ranking(len(texts), of_prompt)
            for texts, of_prompt in zip(answers, verdicts, strict=True)
        ]

    def _fill_rubric(self, prompt: Conversation, first: str, second: str) -> list[Message]:
        text = format_conversation(prompt)
        values = {"{prompt}": text, "{first}": first, "{second}": second, **self._values(prompt)}
        # One pass: an answer may itself contain the name of a placeholder.
        pattern = "|".join(map(re.escape, values))
        filled = re.sub(pattern, lambda match: values[match.group()], self.rubric)
        return [{"role": "user", "content": filled}]


def _make_ranking(answer_count: int, verdicts: Sequence[_PairwiseVerdict]) -> Ranking:
    """Return the ranking of the answers to one prompt, from a verdict on every two of them."""
    scores = [0.0] * answer_count
    for verdict in verdicts:
        scores[verdict.first] += verdict.outcome
        scores[verdict.second] += WIN - verdict.outcome
    replies = tuple(text for verdict in verdicts for text in verdict.replies)
    ranking = Ranking(tuple(scores), judge_replies=replies)
    # With more than two answers, only the verdict on best and worst concerns the preference pair.
    ends = {ranking.best, ranking.worst}
    warnings = [v.warning_about(ranking.best) for v in verdicts if {v.first, v.second} == ends]
    return replace(ranking, warnings=tuple(warning for warning in warnings if warning))


def format_conversation(prompt: Conversation) -> str:
    """Return a conversation as text; if it has several turns, each begins with its role."""
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def parse_verdict(text: str) -> float | None:
    """Return the verdict in a judge's reply: `WIN`, `TIE` or `LOSS` of the first answer, or None.

    The last verdict in the reply counts.
    """
    verdicts = VERDICT.findall(text)
    return VERDICT_OUTCOMES[verdicts[-1]] if verdicts else None


def check_verdicts(name: str, rankings: Sequence[Ranking]) -> None:
    """Check that the judge gave a verdict on at least one prompt.

    Raises:
        ConfigError: no ranking has a verdict; the message quotes a reply.
    """
    if all(NO_VERDICT in ranking.warnings for ranking in rankings):
        reply = " ".join(rankings[0].judge_replies[0].split())[:120]
        raise ConfigError(
            f"{name}: {NO_VERDICT} on any prompt (its reply was {reply!r}); use another judge, or "
            "a --rubric it can follow"
        )


def default_rubric() -> str:
    """Return the text of the default rubric for judges."""
    return (files("mlx_dpo.evaluation") / "rubric.txt").read_text("utf-8")


def read_rubric(path: Path) -> str:
    """Read the user's rubric from a text file.

    Raises:
        ConfigError: the file cannot be read or lacks a placeholder.
    """
    text = read_text(path.expanduser(), ConfigError, accept_pipe=True)
    missing = [name for name in PLACEHOLDERS if name not in text]
    if missing:
        raise ConfigError(f"{path}: the rubric has no {' and no '.join(missing)}; add it")
    return text


def check_judge(reward: str | None, judge: str | None, rubric: str | None) -> None:
    """Check that the arguments for a judge fit together, without loading a model or a function.

    Raises:
        ConfigError: two arguments contradict each other, or one has no effect.
    """
    if reward is not None and judge is not None:
        raise ConfigError("`judge` has no effect with `reward`; leave out one of them")
    if rubric is not None and judge is None:
        raise ConfigError("`rubric` has no effect without `judge`")


def open_judge(
    reward: str | None,
    judge: str | None,
    rubric: str | None,
    connection: Connection | None = None,
    *,
    default: str | None = None,
) -> Judge:
    """Load a judge: the reward function or the run that `reward` names, or the model `judge`.

    Args:
        reward: `file.py:function`, `package.module:function` or `run:RUN`.
        judge: a model (a folder or a Hub id), a run folder, or an address of a server.
        rubric: file with the instructions for the model.
        connection: settings of the connection to an address.
        default: instructions without such a file; None for the default rubric.

    Raises:
        ConfigError: neither or both are given, or the function, the rubric or the address is not
            valid.
        RunError: the run of `reward` cannot be read.
        ModelError: the model cannot be read, or its server cannot be reached.
    """
    check_judge(reward, judge, rubric)
    if reward is not None:
        return open_run_reward(reward) if reward.startswith(PREFIX) else load_reward(reward)
    if judge is None:
        raise ConfigError(
            "missing judge: pass --reward FILE:FUNCTION, --reward run:RUN or --judge MODEL"
        )
    text = (default or default_rubric()) if rubric is None else read_rubric(Path(rubric))
    responder = open_any_responder(judge, connection, sends=SENT_TO_JUDGE)
    # An address may leave open which model answers; the provenance has its name.
    name = responder.provenance["model"] if is_address(judge) else judge
    return make_model_judge(name, responder, text)


def make_model_judge(name: str, responder: Responder, rubric: str) -> ModelJudge:
    """Return a judge that asks a loaded model, which errors and decisions call by `name`."""
    sampling = JUDGE_SAMPLING_WITH_THINKING if is_address(name) else JUDGE_SAMPLING

    def generate(conversations: Sequence[Sequence[Message]]) -> list[str]:
        if not conversations:
            return []
        return responder.answer(conversations, sampling, name=f"{name}: question to judge")

    digests = {
        f"judge_{part}": responder.provenance[f"{source}_digest"]
        for source, part in (("model", "digest"), ("adapter", "adapter_digest"))
        if f"{source}_digest" in responder.provenance
    }
    return ModelJudge(name, generate, rubric, strip_thinking=responder.strip_thinking, **digests)
