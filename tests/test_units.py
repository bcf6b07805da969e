import pytest

from mlx_dpo.units import format_bytes, format_items


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (812, "812 bytes"),
        (1_340, "1.3 kB"),
        (200_000, "0.2 MB"),
        (4_140_000, "4.1 MB"),
        (350e6, "350 MB"),
        (1.5e9, "1.5 GB"),
    ],
)
def test_sizes_have_decimal_units(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("count", "items", "text"),
    [
        (1, "held-out pairs", "1 held-out pair"),
        (1, "pairs of pairs.jsonl", "1 pair of pairs.jsonl"),
        (1, "answers of a.jsonl", "1 answer of a.jsonl"),
        (1, "warnings", "1 warning"),
        (1, "steps", "1 step"),
        (0, "held-out pairs", "0 held-out pairs"),
        (1_200, "held-out pairs", "1,200 held-out pairs"),
    ],
)
def test_one_item_is_singular(count, items, text):
    assert format_items(count, items) == text
