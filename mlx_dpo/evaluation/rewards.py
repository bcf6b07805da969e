"""A function of the user's that scores answers: found by name, called, its errors in a line."""

import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from mlx_dpo.errors import ConfigError, reason
from mlx_dpo.types import Message

Conversation = Sequence[Message]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Points of each answer, higher is better, and why they may not be relied on."""

    points: tuple[float, ...]
    doubts: tuple[str, ...] = ()  # what went wrong in comparing them; empty where nothing did
    said: tuple[str, ...] = ()  # a judge model's own words

    @property
    def best(self) -> int:
        """Place of the best answer, the first of several."""
        return self.points.index(max(self.points))

    @property
    def worst(self) -> int:
        """Place of the worst answer, the last of several."""
        return len(self.points) - 1 - self.points[::-1].index(min(self.points))

    @property
    def is_tie(self) -> bool:
        """Whether no answer is better than another."""
        return max(self.points) == min(self.points)

    def outcome(self) -> float:
        """Of two answers: whether the first one won, tied or lost."""
        first, second = self.points
        return WIN if first > second else LOSS if first < second else TIE


class Judge(Protocol):
    """Whoever ranks answers."""

    name: str

    def rank(
        self, prompts: Sequence[Conversation], answers: Sequence[Sequence[str]]
    ) -> list[Ranking]:
        """One ranking for each prompt and its answers."""

    def facts(self) -> dict[str, Any]:
        """What the judgement depends on, for the rows that follow from it."""


RewardCallable = Callable[[list[Message], str], float]


class RewardFunction:
    """`function(prompt, answer) -> float`: higher is better. `prompt` is a list of messages."""

    def __init__(self, name: str, function: RewardCallable, file: Path | None = None) -> None:
        self.name = name
        self._function = function
        self._file = file
        # Now: the code that runs is this, whatever the file may say later.
        self._digest = sha256(file.read_bytes()).hexdigest() if file else None

    def __call__(self, prompt: Conversation, answer: str) -> float:
        """The reward of one answer.

        Raises:
            ConfigError: the function fails, or what it returns is no finite number.
        """
        asked = [dict(message) for message in prompt]
        try:
            value = self._function(asked, answer)
        except Exception as error:  # code of the user's may raise anything
            place = _error_location(error, self._file)
            told = f"{type(error).__name__}: {reason(error)}"
            raise ConfigError(f"{place or self.name}: the reward failed ({told})") from error
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        raise ConfigError(f"{self.name}: the reward must be a finite number, got {value!r}")

    def rank(
        self, prompts: Sequence[Conversation], answers: Sequence[Sequence[str]]
    ) -> list[Ranking]:
        """Points are the rewards."""
        return [
            Ranking(tuple(self(prompt, answer) for answer in of_one))
            for prompt, of_one in zip(prompts, answers, strict=True)
        ]

    def facts(self) -> dict[str, Any]:
        """Its name, and a digest of the file it stands in."""
        digest = {"reward_digest": self._digest} if self._digest else {}
        return {"by": f"reward {self.name}"} | digest


def load_reward(spec: str) -> RewardFunction:
    """The function that `file.py:function` or `package.module:function` names.

    Its code is run by this, and by nothing before it.

    Raises:
        ConfigError: there is no such file, module or function, or its code fails.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier() or not where:
        raise ConfigError(
            f"`reward` must be `file.py:function` or `package.module:function`, got {spec!r}"
        )
    module = _import_module(where)
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(
            f"`{key}`" for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        )  # fmt: skip
        raise ConfigError(f"{where}: no function `{name}` in it (found {there or 'none'})")
    return RewardFunction(spec, function, Path(module.__file__) if module.__file__ else None)


def _import_module(where: str) -> ModuleType:
    path = Path(where).expanduser()
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        if not path.is_file():
            raise ConfigError(f"{where}: no such file")
        found = importlib.util.spec_from_file_location(f"_reward_{path.stem}", path)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module  # dataclasses and pickle look their module up
        found.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except Exception as error:  # code of the user's may raise anything
        place = _error_location(error, path) or where
        raise ConfigError(
            f"{place}: cannot be imported ({type(error).__name__}: {reason(error)})"
        ) from error


def _error_location(error: BaseException, file: Path | None) -> str | None:
    """The innermost line of the user's own file that an error came through."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    if file is None:
        return None
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).resolve() == file.resolve()]
    return f"{file}:{own[-1].lineno}" if own else None


WIN, TIE, LOSS = 1.0, 0.5, 0.0
