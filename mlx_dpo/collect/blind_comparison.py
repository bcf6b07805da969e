"""Blind comparison of a run with an opponent by people: stored answers, and decisions by rater.

The answers are generated once and stored, so that every rater judges the same ones. A rater's
decisions are a `PairsFile` of their own. For `--decisions votes.jsonl` the files are:

    votes.answers.json    prompts with the answers of both models, and the settings they depend on
    votes.jsonl           decisions of a rater without a name; ties are in `votes.passed.jsonl`
    votes.ann.jsonl       decisions of the rater `ann`
"""

import errno
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_dpo.collect.pairs_file import PROVENANCE, PairsFile, StoredDecision
from mlx_dpo.collect.session import IDENTICAL, TIE, Answer, RankingTask, TaskSampler
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.errors import ConfigError, DataError, reason
from mlx_dpo.evaluation.person import RaterResult, Vote
from mlx_dpo.evaluation.rewards import LOSS, WIN
from mlx_dpo.evaluation.rewards import TIE as TIED_OUTCOME
from mlx_dpo.evaluation.winrate import AnswersOfBoth
from mlx_dpo.io.atomic import write_file
from mlx_dpo.io.checksums import read_checked_json, to_checked_json
from mlx_dpo.schemas.messages import parse_messages, parse_text

RUN, OPPONENT = "run", "opponent"
SHOWN = "shown"  # place of an answer on the screen, from 1
RATER_NAME = re.compile(r"\w[\w-]{0,39}")
RESERVED_NAMES = ("answers", "passed")  # parts of the names of other files
UNNAMED = "(no name)"


@dataclass(frozen=True)
class ComparisonFiles:
    """The files of a comparison, which `--decisions` names.

    Raises:
        ConfigError: the name of the file or of the rater cannot be used.
    """

    decisions: Path
    rater: str | None = None

    def __post_init__(self) -> None:
        if self.decisions.suffix != ".jsonl":
            raise ConfigError(
                f"{self.decisions}: decisions are written as JSON lines; give a name that ends in "
                "`.jsonl`"
            )
        if self.rater is None:
            return
        if not RATER_NAME.fullmatch(self.rater) or self.rater in RESERVED_NAMES:
            raise ConfigError(
                f"`rater` must be a name of letters, digits, `-` and `_`, got {self.rater!r}"
            )

    @property
    def answers(self) -> Path:
        """File with the prompts and the answers of both models."""
        return self.decisions.with_suffix(".answers.json")

    @property
    def own(self) -> Path:
        """File with the decisions of the rater."""
        return self.of_rater(self.rater)

    def of_rater(self, rater: str | None) -> Path:
        """Return the file with the decisions of a rater."""
        return self.decisions if rater is None else self.decisions.with_suffix(f".{rater}.jsonl")

    def raters(self) -> list[str | None]:
        """Return the raters with decisions: one without a name first, the others by name."""
        stem, found = self.decisions.stem, set()
        for path in self.decisions.parent.glob("*.jsonl"):
            name = path.name.removesuffix(".jsonl").removesuffix(".passed")
            if name == stem:
                found.add("")
            elif name.startswith(f"{stem}."):
                found.add(name.removeprefix(f"{stem}."))
        names = sorted(name for name in found if RATER_NAME.fullmatch(name))
        return [None, *names] if "" in found else [*names]


@dataclass(frozen=True)
class StoredAnswers:
    """The prompts and both answers to each of them, as all raters see them."""

    prompts: Sequence[Prompt]
    answers: Mapping[str, tuple[str, str]]  # key of the prompt -> answers of run and opponent
    seed: int  # of the order in which answers are shown


def open_answers(
    files: ComparisonFiles,
    settings: Mapping[str, Any],
    prompts: Sequence[Prompt] | None,
    answer: Callable[[], AnswersOfBoth],
) -> StoredAnswers:
    """Read the stored answers, or generate and store them if there are none yet.

    Args:
        files: the files of the comparison.
        settings: what the answers depend on, as JSON values: run, opponent, sampling.
        prompts: the prompts that the user names; None for those that are stored.
        answer: generates the answers.

    Raises:
        ConfigError: the stored answers have other settings or other prompts, or the file cannot
            be written.
        DamagedFileError, DataError: the stored answers cannot be read.
    """
    path = files.answers
    if not path.exists():
        _make_writable(path)
        stored = {"settings": dict(settings), "rows": _to_rows(answer())}
        _write(path, stored)
    content, _ = read_checked_json(path)
    _check_settings(content.get("settings"), settings, path)
    found = _read_rows(content.get("rows"), path)
    seed = settings["sampling"].get("seed") or 0
    result = StoredAnswers([prompt for prompt, _ in found], {p.key: a for p, a in found}, seed)
    if prompts is not None and {prompt.key for prompt in prompts} != result.answers.keys():
        raise ConfigError(
            f"{path}: its answers are to other prompts; name those prompts or none, or choose "
            "another file with --decisions"
        )
    return result


def _make_writable(path: Path) -> None:
    """Make the folder of a file, before answers are generated that could not be stored."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, reason(error)) from error
    if not os.access(path.parent, os.W_OK):
        raise _unwritable(path, os.strerror(errno.EACCES))


def _unwritable(path: Path, cause: str) -> ConfigError:
    return ConfigError(f"{path}: cannot be written ({cause}); choose another file with --decisions")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        write_file(path, to_checked_json(content), durable=True)
    except OSError as error:
        raise _unwritable(path, reason(error)) from error


def _to_rows(both: AnswersOfBoth) -> list[dict[str, Any]]:
    return [
        {"prompt": list(prompt.messages), RUN: ours, OPPONENT: theirs}
        for prompt, ours, theirs in zip(
            both.prompts, both.answers, both.opponent_answers, strict=True
        )
    ]


def _check_settings(stored: Any, given: Mapping[str, Any], path: Path) -> None:
    """Raise `ConfigError` if the stored answers were generated with other settings."""
    stored = stored if isinstance(stored, dict) else {}
    for name, value in given.items():
        if stored.get(name) == value:
            continue
        if name == "sampling" and isinstance(stored.get(name), dict):
            [differing, *_] = [key for key in value if stored[name].get(key) != value[key]]
            problem = f"`{differing}` {stored[name].get(differing)!r}, not {value[differing]!r}"
            advice = "repeat the settings"
        else:
            problem, advice = f"another {name}", f"name the {name} of the first time"
        raise ConfigError(
            f"{path}: the answers were generated with {problem}; {advice}, or choose another file "
            "with --decisions"
        )


def _read_rows(rows: Any, path: Path) -> list[tuple[Prompt, tuple[str, str]]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: `rows` must be a list of objects; restore the file")
    found = []
    for index, row in enumerate(rows):
        location = f"{path}[{index}]"
        ours, theirs = (parse_text(row.get(name), name, location) for name in (RUN, OPPONENT))
        prompt = Prompt(parse_messages(row.get("prompt"), "prompt", location), location)
        found.append((prompt, (ours, theirs)))
    return found


class ComparisonTasks(TaskSampler):
    """Tasks of two stored answers each, in an order that is random for every prompt and rater."""

    has_stored_answers = True
    can_edit = False  # a written answer says nothing about the two models

    def __init__(self, stored: StoredAnswers, pairs_file: PairsFile, rater: str | None) -> None:
        self.rater, self._stored = rater, stored
        super().__init__(stored.prompts, pairs_file, self._answers, chunk_size=1, seed=stored.seed)

    def _answers(self, prompts: Sequence[Prompt], chunk: int) -> list[list[Answer]]:
        return [
            [
                Answer(text, {"author": author})
                for author, text in zip((RUN, OPPONENT), self._stored.answers[p.key], strict=True)
            ]
            for p in prompts
        ]

    def make_task(self, prompt: Prompt, answers: Sequence[Answer]) -> RankingTask | None:
        """Return a task of both answers in random order; None if they are the same text."""
        if len({answer.text.strip() for answer in answers}) == 1:
            return None
        shuffled = list(answers)
        random.Random(f"{self._seed} {self.rater or ''} {prompt.key}").shuffle(shuffled)
        return RankingTask(
            prompt,
            tuple(
                replace(answer, source=answer.source | {SHOWN: place})
                for place, answer in enumerate(shuffled, start=1)
            ),
        )


def read_raters(files: ComparisonFiles, stored: StoredAnswers) -> list[RaterResult]:
    """Return the results of all raters who have decided something.

    Raises:
        DataError: a decision is about another prompt or about other answers.
    """
    return [
        rate_decisions(PairsFile(files.of_rater(rater)), stored, rater) for rater in files.raters()
    ]


def rate_decisions(pairs_file: PairsFile, stored: StoredAnswers, rater: str | None) -> RaterResult:
    """Return the result of one rater.

    Raises:
        DataError: a decision is about another prompt or about other answers.
    """
    votes, identical, skipped = [], 0, 0
    for decision in pairs_file.decisions:
        outcome, first_won = _read_outcome(decision, pairs_file, stored)
        if outcome is not None:
            ours, theirs = stored.answers[decision.prompt_key]
            votes.append(Vote(decision.prompt_key, outcome, len(ours) - len(theirs), first_won))
        elif decision.row.get("passed") == IDENTICAL:
            identical += 1
        else:
            skipped += 1
    decided = pairs_file.decided_keys
    undecided = sum(prompt.key not in decided for prompt in stored.prompts)
    return RaterResult(rater or UNNAMED, votes, identical, skipped, undecided)


def _read_outcome(
    decision: StoredDecision, pairs_file: PairsFile, stored: StoredAnswers
) -> tuple[float | None, bool | None]:
    """Return the outcome for the run, and whether the answer shown first won.

    Both are None for a prompt that was skipped, the second also for a tie.
    """
    answers = stored.answers.get(decision.prompt_key)
    if answers is None:
        raise _foreign(decision, "is about a prompt that has no stored answers")
    if decision.file is pairs_file.skipped:
        return (TIED_OUTCOME, None) if decision.row["passed"] == TIE else (None, None)
    source = decision.row[PROVENANCE].get("chosen_from", {})
    texts = {RUN: answers[0], OPPONENT: answers[1]}
    author, place = source.get("author"), source.get(SHOWN)
    if author not in texts or place not in (1, 2) or _answer(decision) != texts[author]:
        raise _foreign(decision, "is about other answers than those that are stored")
    return (WIN if author == RUN else LOSS), place == 1


def _answer(decision: StoredDecision) -> Any:
    """Return the text of the chosen answer of a stored pair."""
    chosen = decision.row.get("chosen")
    if isinstance(chosen, list) and len(chosen) == 1 and isinstance(chosen[0], dict):
        return chosen[0].get("content")
    return chosen


def _foreign(decision: StoredDecision, problem: str) -> DataError:
    return DataError(
        f"{decision.file.path}: decision {decision.number} {problem}; remove its row, or choose "
        "another file with --decisions"
    )
