from mlx_dpo.data.batches.collate import collate
from mlx_dpo.data.batches.padding import padded_width
from mlx_dpo.data.batches.token_counts import padded_row_tokens, shared_prompt_tokens
from tests.data.batches.pairs import of


def test_on_the_cpu_widths_are_not_padded():
    assert [padded_width(length) for length in (1, 13, 1000)] == [1, 13, 1000]


def test_on_a_gpu_there_are_few_widths_and_little_padding(on_a_gpu):
    widths = [padded_width(length) for length in range(1, 16_385)]
    assert widths == sorted(widths)
    assert len(set(widths)) < 70
    assert all(width % 8 == 0 for width in widths)
    for length, width in enumerate(widths, start=1):
        assert length <= width <= length + length / 8 + 7
    powers = [2**n for n in range(3, 15)]
    assert [padded_width(power) for power in powers] == powers  # usual limits cost nothing


def test_on_a_gpu_padded_batches_have_one_of_these_widths(on_a_gpu):
    assert collate([of(300, 9, 2)]).tokens.shape == (2, 320)
    assert padded_row_tokens([of(300, 9, 2)]).total == 2 * 319
    assert shared_prompt_tokens([of(300, 41, 2)], together=True).total == 300 + 40 + 2
    both = [of(300, 41, 2), of(9, 2, 2)]
    assert shared_prompt_tokens(both, together=True).total == 2 * (320 + 40 + 8)
    assert shared_prompt_tokens(both, together=False).total == (300 + 40 + 2) + (9 + 2 + 2)
