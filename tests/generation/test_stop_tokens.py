import mlx.core as mx
import mlx_lm
import pytest

from mlx_dpo.config.sampling import Sampling
from mlx_dpo.generation.generate import _generate_batched, _generate_sequentially, generate_tokens
from tests.checkpoints import END, make_checkpoint

ROWS = [[1, 40, 41, 3, 2], [1, 7, 3, 2], [1, 90, 91, 92, 93, 94, 95, 3, 2], [1, 8, 9, 3, 2]]
STOPS = frozenset({END, *range(100, 190)})
GREEDY = Sampling(max_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return mlx_lm.load(str(make_checkpoint(tmp_path_factory.mktemp("batched"))))[0]


@pytest.mark.parametrize("way", [_generate_batched, _generate_sequentially, generate_tokens])
def test_a_completion_is_the_likeliest_tokens_up_to_one_that_ends_it(model, way):
    """Each token from a forward pass over everything before it."""
    ends = []
    for row, said in zip(ROWS, way(model, STOPS, ROWS, GREEDY), strict=True):
        so_far, likeliest = list(row), None
        while len(so_far) < len(row) + GREEDY.max_tokens and likeliest not in STOPS:
            likeliest = model(mx.array([so_far]))[0, -1].argmax().item()
            so_far.append(likeliest)
        ends.append(likeliest if likeliest in STOPS else None)
        assert said.end == ends[-1]
        assert said.tokens == so_far[len(row) : len(so_far) - (said.end is not None)]
    assert len(set(ends)) > 1


def test_no_prompts_have_no_completions(model):
    assert generate_tokens(model, STOPS, [], GREEDY) == []
