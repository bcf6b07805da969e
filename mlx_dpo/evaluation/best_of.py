"""Best-of-N sampling: answer a prompt several times, and keep the answer that a judge likes most.

Source: Nakano et al. 2021, arXiv:2112.09332, section 3.2 (rejection sampling, best-of-n).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.evaluation.rewards import Judge
from mlx_dpo.generation.batch import GeneratedText
from mlx_dpo.generation.responder import Responder


@dataclass(frozen=True)
class BestOf:
    """Several answers to one prompt with their rewards, and the place of the best one."""

    replies: Sequence[GeneratedText]
    rewards: Sequence[float | None]  # None for an answer without a reward
    best: int  # index; the first one of equally good answers

    @property
    def answer(self) -> GeneratedText:
        """The answer with the highest reward."""
        return self.replies[self.best]

    def notes(self) -> list[str]:
        """Return the rewards, and how many answers are equal, cut or without a reward, as text."""
        values = [reward for reward in self.rewards if reward is not None]
        distinct = len({reply.text for reply in self.replies})
        lines = [
            f"best of {len(self.replies)} answers ({distinct} different): reward "
            f"{max(values):.4g}, mean {sum(values) / len(values):.4g}, lowest {min(values):.4g}"
        ]
        best = {
            reply.text
            for reply, reward in zip(self.replies, self.rewards, strict=True)
            if reward == max(values)
        }
        cut = sum(reply.is_truncated for reply in self.replies)
        missing = len(self.rewards) - len(values)
        lines += [f"{len(best)} different answers tie for the best; this is the first of them"] * (
            len(best) > 1
        )
        lines += [f"{cut} of the answers were cut before their end"] * (cut > 0)
        lines += [f"{missing} of the answers are empty or too long for a reward"] * (missing > 0)
        return lines


def sample_best(
    responder: Responder, judge: Judge, prompt: Prompt, sampling: Sampling, count: int
) -> BestOf:
    """Sample `count` answers to the prompt, and let the judge score each.

    Args:
        judge: a judge whose scores are rewards.

    Raises:
        ConfigError: the prompt leaves no room in the model's context, or the judge fails.
    """
    replies = responder.reply([prompt] * count, sampling)
    rankings = judge.rank([prompt.messages] * count, [[reply.text] for reply in replies])
    rewards = [None if ranking.warnings else ranking.scores[0] for ranking in rankings]
    highest = max(reward for reward in rewards if reward is not None)
    return BestOf(replies, rewards, rewards.index(highest))
