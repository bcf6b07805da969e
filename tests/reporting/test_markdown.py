import pytest

from mlx_dpo.reporting.markdown import code_block, code_span, escape_markdown


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("![i](u) [l](u)", r"\!\[i\](u) \[l\](u)"),
        ("<script> & *b* _c_ `d` # $e$ |", r"\<script\> \& \*b\* \_c\_ \`d\` \# \$e\$ \|"),
        ("two\n\n# lines\x1b", r"two \# lines\\x1b"),
    ],
)
def test_markup_is_escaped(text, escaped):
    assert escape_markdown(text) == escaped


def test_names_in_backticks_stay_in_a_text_of_ours():
    assert escape_markdown("raise `max_grad_norm` <b>", keep_code=True) == (
        r"raise `max_grad_norm` \<b\>"
    )


def test_code_ends_where_it_is_meant_to():
    assert code_block("a\n```\nb\x07") == "````text\na\n```\nb\\x07\n````"
    assert code_span("a`b|c\nd") == "``a`b\\|c\\nd``"
    assert code_span("`a`") == "`` `a` ``"
