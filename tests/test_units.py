import pytest

from mlx_dpo.units import format_bytes


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
