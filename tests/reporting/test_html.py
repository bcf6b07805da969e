"""Templates of HTML pages: escaped, complete, and without scripts of others."""

import re
from importlib.resources import files

import pytest
from jinja2 import TemplateNotFound, UndefinedError

from mlx_dpo.reporting.html import _environment, render_page

TEMPLATES = [
    template
    for template in (files("mlx_dpo.reporting") / "templates").iterdir()
    if template.name.endswith(".html")
]


def test_a_value_is_escaped_and_never_read_as_a_template():
    template = _environment.from_string('<p title="{{ text }}">{{ text }}</p>')
    hostile = "<script> & \" ' {{ 7 * 7 }} {% raw %}"
    escaped = "&lt;script&gt; &amp; &#34; &#39; {{ 7 * 7 }} {% raw %}"
    assert template.render(text=hostile) == f'<p title="{escaped}">{escaped}</p>'


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        render_page("base.html")
    with pytest.raises(TemplateNotFound):
        render_page("none.html")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_a_template_marks_nothing_as_safe_and_has_no_script(template):
    """The report has a script, whose text is a file of the package, and JSON for it."""
    text = template.read_text("utf-8")
    if template.name == "report.html":
        data, script = re.findall(r"<script.*?</script>", text)
        assert data == '<script type="application/json" id="data">{{ data | tojson }}</script>'
        assert script.endswith('>{% include "report.js" %}</script>')
        text = text.replace(data, "").replace(script, "")
    assert not re.search(r"\|\s*safe|autoescape", text)
    assert "<script" not in text and "http:" not in text and "https:" not in text
