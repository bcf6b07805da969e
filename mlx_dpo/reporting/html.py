"""Render HTML pages from the templates of this package.

Every page is a single file without scripts.
"""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_environment = Environment(
    loader=PackageLoader("mlx_dpo.reporting"),
    autoescape=True,  # prompts, completions, names and settings are other people's text
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render_page(template: str, **values: Any) -> str:
    """Return the HTML page of a template in `templates/`, filled with the escaped values."""
    return _environment.get_template(template).render(values)
