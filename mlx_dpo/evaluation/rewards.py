"""Interface of a judge that ranks answers, and the judge that calls a user's reward function."""

import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from mlx_dpo.errors import ConfigError, reason
from mlx_dpo.types import Message

WIN, TIE, LOSS = 1.0, 0.5, 0.0  # outcomes of a comparison of two answers, for the first one
Conversation = Sequence[Message]
RewardCallable = Callable[[list[Message], str], float]


@dataclass(frozen=True, slots=True)
class Ranking:
    """A judge's scores of the answers to one prompt; higher is better."""

    scores: tuple[float, ...]
    warnings: tuple[str, ...] = ()  # reasons why best against worst is unreliable; mostly empty
    judge_replies: tuple[str, ...] = ()  # the texts that a judge model generated

    @property
    def best(self) -> int:
        """Index of the answer with the highest score; the first one if several have it."""
        return self.scores.index(max(self.scores))

    @property
    def worst(self) -> int:
        """Index of the answer with the lowest score; the last one if several have it."""
        return len(self.scores) - 1 - self.scores[::-1].index(min(self.scores))

    @property
    def is_tie(self) -> bool:
        """Whether all answers have the same score."""
        return max(self.scores) == min(self.scores)

    def outcome(self) -> float:
        """Return `WIN`, `TIE` or `LOSS` for the first of exactly two answers."""
        first, second = self.scores
        return WIN if first > second else LOSS if first < second else TIE


def common_score(scores: Iterable[float]) -> float | None:
    """Return the score that all answers have, or None if they differ or there are none."""
    distinct = set(scores)
    return distinct.pop() if len(distinct) == 1 else None


class Judge(Protocol):
    """Anything that ranks answers: a reward function, a run, a judge model or a person."""

    name: str
    # Whether scores are rewards, so that their mean over prompts says how good answers are.
    scores_are_rewards: bool

    def rank(
        self, prompts: Sequence[Conversation], answers: Sequence[Sequence[str]]
    ) -> list[Ranking]:
        """Return, for each prompt, a ranking of its answers."""

    def provenance(self) -> dict[str, Any]:
        """Return what the rankings depend on (names, digests), to be stored with the decisions."""


class RewardFunction:
    """A judge that scores each answer by a function `(prompt, answer) -> float`; higher is better.

    Args:
        name: `file.py:function` or `package.module:function`.
        function: receives the prompt as a list of messages and the answer as text.
        file: the Python file of the function, for error locations and the digest.
    """

    scores_are_rewards = True

    def __init__(self, name: str, function: RewardCallable, file: Path | None = None) -> None:
        self.name = name
        self._function = function
        self._file = file
        # Computed now: the loaded code stays in use even if the file changes later.
        self._digest = sha256(file.read_bytes()).hexdigest() if file else None

    def __call__(self, prompt: Conversation, answer: str) -> float:
        """Return the reward of one answer.

        Raises:
            ConfigError: the function fails, or returns no finite number.
        """
        messages = [dict(message) for message in prompt]
        try:
            value = self._function(messages, answer)
        except Exception as error:  # the user's code may raise anything
            location = _error_location(error, self._file) or self.name
            cause = f"{type(error).__name__}: {reason(error)}"
            raise ConfigError(f"{location}: the reward failed ({cause})") from error
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        raise ConfigError(f"{self.name}: the reward must be a finite number, got {value!r}")

    def rank(
        self, prompts: Sequence[Conversation], answers: Sequence[Sequence[str]]
    ) -> list[Ranking]:
        """Return one ranking per prompt; the score of an answer is its reward."""
        return [
            Ranking(tuple(self(prompt, answer) for answer in texts))
            for prompt, texts in zip(prompts, answers, strict=True)
        ]

    def provenance(self) -> dict[str, Any]:
        """Return the function's name and its file's digest, to be stored with the decisions."""
        digest = {"reward_digest": self._digest} if self._digest else {}
        return {"by": f"reward {self.name}"} | digest


def load_reward(spec: str) -> RewardFunction:
    """Import the reward function that `spec` names as `file.py:function` or `module:function`.

    Importing runs the code of the file or module.

    Raises:
        ConfigError: there is no such file, module or function, or its code fails.
    """
    source, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier() or not source:
        raise ConfigError(
            f"`reward` must be `file.py:function` or `package.module:function`, got {spec!r}"
        )
    module = _import_module(source)
    function = getattr(module, name, None)
    if not callable(function):
        available = ", ".join(
            f"`{key}`" for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        )  # fmt: skip
        raise ConfigError(f"{source}: no function `{name}` (found {available or 'none'})")
    return RewardFunction(spec, function, Path(module.__file__) if module.__file__ else None)


def _import_module(source: str) -> ModuleType:
    """Import the module that `source` names: a path that ends in `.py`, or a dotted name."""
    path = Path(source).expanduser()
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        if not path.is_file():
            raise ConfigError(f"{source}: no such file")
        spec = importlib.util.spec_from_file_location(f"_reward_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickle look their module up here
        spec.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except Exception as error:  # the user's code may raise anything
        location = _error_location(error, path) or source
        raise ConfigError(
            f"{location}: cannot be imported ({type(error).__name__}: {reason(error)})"
        ) from error


def _error_location(error: BaseException, file: Path | None) -> str | None:
    """Return `file:line` of the innermost traceback frame in the user's file, or None."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    if file is None:
        return None
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).resolve() == file.resolve()]
    return f"{file}:{own[-1].lineno}" if own else None
