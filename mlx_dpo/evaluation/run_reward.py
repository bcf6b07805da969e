"""The run as a reward model: a judge that scores answers by a run's implicit rewards."""

from collections.abc import Sequence
from typing import Any

from mlx_dpo.errors import BadPairError, ConfigError
from mlx_dpo.evaluation.rewards import Conversation, Ranking
from mlx_dpo.saved_runs.implicit_rewards import (
    ImplicitRewards,
    check_chat_run,
    open_implicit_rewards,
)
from mlx_dpo.saved_runs.open import SwitchableModel
from mlx_dpo.types import TokenizedPair

PREFIX = "run:"  # of a value of `--reward` that names a run folder


class RunReward:
    """A judge that scores answers by the implicit rewards of a run; higher is better.

    Prompts are encoded as in training: with the chat template, the thinking mode and, if a prompt
    has no system message, the system message of the run.

    Args:
        name: `run:` and the run folder.
        rewards: the policy and the reference of the run.
    """

    scores_are_rewards = True

    def __init__(self, name: str, rewards: ImplicitRewards) -> None:
        self.name = name
        self.rewards = rewards

    def rank(
        self, prompts: Sequence[Conversation], answers: Sequence[Sequence[str]]
    ) -> list[Ranking]:
        """Return one ranking per prompt; the score of an answer is its implicit reward.

        If an answer cannot be scored, the answers to its prompt tie, with a warning.

        Raises:
            ConfigError: for each prompt, an answer cannot be scored.
            DataError: a prompt does not fit the chat template.
        """
        tokenized = [
            self._tokenize(prompt, texts, number)
            for number, (prompt, texts) in enumerate(zip(prompts, answers, strict=True), start=1)
        ]
        errors = [found for found in tokenized if isinstance(found, BadPairError)]
        if errors and len(errors) == len(tokenized):
            raise ConfigError(f"{self.name}: cannot score the answers to any prompt ({errors[0]})")
        scorable = [found for found in tokenized if not isinstance(found, BadPairError)]
        scores = iter(self.rewards.of_completions([x for examples in scorable for x in examples]))
        return [
            _unscored(found, len(texts))
            if isinstance(found, BadPairError)
            else Ranking(tuple(next(scores) for _ in texts))
            for found, texts in zip(tokenized, answers, strict=True)
        ]

    def provenance(self) -> dict[str, Any]:
        """Return the run, the digests of its model and adapter, and what the rewards are."""
        return {"by": f"reward {self.name}"} | self.rewards.provenance()

    def _tokenize(
        self, prompt: Conversation, texts: Sequence[str], number: int
    ) -> list[TokenizedPair] | BadPairError:
        """Tokenize the answers to a prompt; return the error of one that cannot be scored."""
        try:
            return [
                self.rewards.tokenize(prompt, text, f"prompt {number}, answer {position}")
                for position, text in enumerate(texts, start=1)
            ]
        except BadPairError as error:
            return error


def _unscored(error: BadPairError, count: int) -> Ranking:
    return Ranking((0.0,) * count, warnings=(f"an answer has no reward: {error.reason}",))


def open_run_reward(spec: str, loaded: SwitchableModel | None = None) -> RunReward:
    """Open the run that `spec` names as `run:RUN`, to score answers.

    Args:
        loaded: the same run, if it is loaded already with policy and reference.

    Raises:
        ConfigError: the loss of the run implies no reward.
        RunError: the folder is not that of a run, or the run was trained on plain text.
        ModelError: the model cannot be read.
    """
    folder = spec.removeprefix(PREFIX)
    if not folder:
        raise ConfigError("`reward` run: needs a run folder, as in `run:runs/first`")
    rewards = open_implicit_rewards(folder, loaded)
    check_chat_run(rewards.run)
    return RunReward(spec, rewards)
