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
