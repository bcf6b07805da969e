"""How strongly a log-ratio is shown: the same steps on a terminal and on a page."""

STEPS = (0.1, 0.5, 2.0)  # nats, from which on a bit is shaded a little, more, strongly
LEGEND = (
    "Blue, bold where strong: the aligned model likes this more than its base does; orange, "
    f"underlined where strong: less. Steps at {STEPS[0]}, {STEPS[1]} and {STEPS[2]:g} nats of "
    "log π − log π_ref."
)
END = "∎"  # where the model ended its answer


def shade(log_ratio: float) -> int:
    """-3 to 3; 0 is unshaded."""
    step = sum(abs(log_ratio) >= edge for edge in STEPS)
    return step if log_ratio > 0 else -step
