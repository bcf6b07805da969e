"""Widths to which sequences of different lengths are padded."""

import mlx.core as mx

PAD_MULTIPLE = 8  # the width of padded rows is a multiple of it
# Width of the continuations of a shared prompt, unless they are empty; see `scoring.shared_prefix`.
MIN_CONTINUATION = 2


def padded_width(length: int) -> int:
    """Return the number of tokens to which sequences of up to `length` tokens are padded.

    On a GPU this is one of a few widths, because each width needs its own buffers and compiled
    kernels: at most length / 8 + 7 positions are padding, and there are fewer than 70 widths up
    to 16,384. On the CPU this is `length`.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        return length
    # The largest power of two within length / 8 + 8, so 8 at least.
    return round_up(length, 1 << (length // 8 + 8).bit_length() - 1)


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple
