"""The frame of every HTML page: it needs nothing else, neither files nor the network."""

from html import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # for browsers: load nothing, run nothing
PICTURES = "; img-src data:"  # that stand in the page itself


def document(title: str, style: str, body: str, *, pictures: bool = False) -> str:
    """A whole page; `body` is markup, with `pictures` as data or none, `title` is text."""
    policy = POLICY + PICTURES * pictures
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}</body>\n</html>\n"
    )


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
