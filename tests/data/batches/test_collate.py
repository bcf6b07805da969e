import pytest

from mlx_dpo.data.batches.collate import collate
from mlx_dpo.types import TokenizedPair

PAIRS = [
    TokenizedPair(prompt=(1, 2, 3), chosen=(10, 11), rejected=(20,)),
    TokenizedPair(prompt=(4,), chosen=(12, 13, 14, 15), rejected=(21, 22)),
]


def test_rows_are_all_chosen_then_all_rejected_padded_on_the_right():
    batch = collate(PAIRS, pad_multiple=1)
    assert batch.tokens.tolist() == [
        [1, 2, 3, 10, 11],
        [4, 12, 13, 14, 15],
        [1, 2, 3, 20, 0],
        [4, 21, 22, 0, 0],
    ]
    assert batch.completion_mask.tolist() == [
        [False, False, False, True, True],
        [False, True, True, True, True],
        [False, False, False, True, False],
        [False, True, True, False, False],
    ]
    assert (str(batch.tokens.dtype), str(batch.completion_mask.dtype)) == (
        "mlx.core.int32",
        "mlx.core.bool",
    )


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (5, 5), (4, 8), (8, 8), (32, 32)])
def test_the_width_is_rounded_up_and_no_padding_is_scored(multiple, width):
    batch = collate(PAIRS, pad_multiple=multiple)
    assert batch.tokens.shape == batch.completion_mask.shape == (4, width)
    assert batch.completion_mask.sum(axis=1).tolist() == [2, 4, 1, 2]
    assert batch.tokens.sum(axis=1).tolist() == [27, 58, 26, 47]
