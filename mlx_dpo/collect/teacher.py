"""Answers of another model, the teacher, to train on against the model's own answers.

The teacher's answer is chosen and the model's own answer rejected, as in SPIN (Chen et al. 2024,
arXiv:2401.01335), where the chosen answers are those of a data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_dpo.collect.contrastive_pairs import PairRule
from mlx_dpo.collect.sample import make_answer
from mlx_dpo.collect.session import Answer
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import Prompt
from mlx_dpo.generation.responder import Responder
from mlx_dpo.saved_runs.respond import reply_without_thinking, response_provenance, with_chunk_seed

TEACHER_RULE = PairRule("the teacher's answer", "the model's own answer", "teacher")
SENT_TO_TEACHER = "prompts"  # to a teacher at an address, to name what it gets


@dataclass(frozen=True)
class TeacherContrast:
    """Sampler of two answers to each prompt: the teacher's, then the model's own.

    Args:
        responder: model that is to be trained.
        teacher: model whose answers are chosen.
        sampling: settings of all answers.
    """

    responder: Responder
    teacher: Responder
    sampling: Sampling

    def __call__(self, prompts: Sequence[Prompt], chunk: int) -> list[list[Answer]]:
        """Return two answers to each prompt, without thinking; the first one is the teacher's."""
        columns = []
        for position, responder in enumerate((self.teacher, self.responder)):
            sampling = with_chunk_seed(self.sampling, chunk, position)
            source = response_provenance(responder, sampling)
            replies = reply_without_thinking(responder, prompts, sampling)
            columns.append([make_answer(reply, source) for reply in replies])
        return [list(pair) for pair in zip(*columns, strict=True)]
