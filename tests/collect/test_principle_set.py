"""Files of principles, their requests, and the draw of principles for a prompt."""

from collections import Counter

import pytest

from mlx_dpo.collect.principles.principle_set import (
    Principle,
    PrincipleDraw,
    default_principles,
    principle_rubric,
    principles_digest,
    read_principles,
)
from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.judge import read_rubric

PRINCIPLES = [Principle(f"An answer is {letter}.") for letter in "abcdefgh"]
USER = "user"


def prompt(text):
    return [{"role": USER, "content": text}]


def write(tmp_path, text, name="principles.yaml"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def test_a_text_file_has_one_principle_per_line(tmp_path):
    name = write(
        tmp_path, "\ufeff# ours\n\n  An answer is kind.  \nAn answer is: short.\n", "p.txt"
    )
    assert read_principles(name) == [
        Principle("An answer is kind."),
        Principle("An answer is: short."),
    ]


def test_requests_name_the_principle():
    kind = Principle("An answer is kind.")
    assert kind.critique_request == (
        "Criticise your last answer by this principle: An answer is kind. Say briefly where it "
        "falls short."
    )
    assert kind.revision_request == (
        "Write your last answer again so that it follows this principle: An answer is kind. Keep "
        "what is right. Give only the new answer."
    )


def test_a_yaml_file_may_have_its_own_requests(tmp_path):
    name = write(
        tmp_path,
        "principles:\n  - An answer is kind.\n"
        "  - principle: An answer is short.\n    critique: What is too long?\n"
        "    revision: 'Again, but: {principle}'\n",
    )
    plain, own = read_principles(name)
    assert plain == Principle("An answer is kind.")
    assert own.critique_request == "What is too long?"
    assert own.revision_request == "Again, but: An answer is short."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("principles: An answer is kind.", "`principles` must be a list, found str"),
        ("rules: []", "unknown entry `rules`; use `principles`"),
        ("principles: []", "has no principle; write one per line"),
        ("principles: [3]", "principle 1: `principle` must be a text, found int"),
        ("principles: ['x', ' ']", "principle 2: `principle` must be a text, found an empty text"),
        ("principles: [{critique: x}]", "principle 1: `principle` must be a text, found nothing"),
        (
            "principles: [{principle: x, critique: 3}]",
            "principle 1: `critique` must be a text, found int",
        ),
        ("principles:\n  - An answer is: kind.", "unknown field `An answer is`.*quotation marks"),
        ("principles: [x, x]", "principle 2: has this principle twice"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_principles(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [("# none\n\n", "p.txt: has no principle"), ("x\n\nx\n", "p.txt:3: has this principle twice")],
)
def test_a_wrong_text_file_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_principles(write(tmp_path, text, "p.txt"))


def test_the_principles_of_the_package_are_readable_and_a_start_for_a_file(tmp_path):
    shipped = read_principles("default")
    assert read_principles(write(tmp_path, default_principles())) == shipped
    assert Principle("An answer is polite and kind.") in shipped
    assert all(p.text.startswith("An answer ") and p.text.endswith(".") for p in shipped)


def test_the_comments_of_the_shipped_file_state_the_usual_requests():
    comments = " ".join(
        line.lstrip("# ") for line in default_principles().splitlines() if line.startswith("#")
    )
    for request in (Principle("x").critique, Principle("x").revision):
        assert request in comments


def test_the_rubric_has_its_placeholders(tmp_path):
    path = tmp_path / "rubric.txt"
    path.write_text(principle_rubric())
    assert "{principles}" in read_rubric(path)


def test_the_draw_depends_on_prompt_and_seed_alone():
    drawn = [PrincipleDraw(PRINCIPLES, 2, seed=3).for_prompt(prompt(f"q{n}")) for n in range(80)]
    again = PrincipleDraw(PRINCIPLES, 2, seed=3)
    assert [again.for_prompt(prompt(f"q{n}")) for n in reversed(range(80))] == drawn[::-1]
    assert all(first != second for first, second in drawn)
    # Every principle is drawn, none far more often than the others (20 of 160 are expected).
    counts = Counter(principle for pair in drawn for principle in pair)
    assert len(counts) == 8 and max(counts.values()) < 40
    other = PrincipleDraw(PRINCIPLES, 2, seed=4)
    assert [other.for_prompt(prompt(f"q{n}")) for n in range(80)] != drawn


def test_more_revisions_than_principles_are_refused():
    assert len(PrincipleDraw(PRINCIPLES, 8).for_prompt(prompt("q"))) == 8
    with pytest.raises(ConfigError, match=r"`revisions` 9 needs 9 principles.*found 8"):
        PrincipleDraw(PRINCIPLES, 9)
    with pytest.raises(ConfigError, match="`revisions` must be at least 1, got 0"):
        PrincipleDraw(PRINCIPLES, 0)


def test_the_judge_is_asked_about_the_drawn_principles():
    draw = PrincipleDraw(PRINCIPLES, 2)
    first, second = draw.for_prompt(prompt("q"))
    assert draw.rubric_values(prompt("q")) == {"{principles}": f"{first.text}\n{second.text}"}


def test_the_digest_depends_on_the_requests():
    digests = {
        principles_digest([Principle("x")]),
        principles_digest([Principle("y")]),
        principles_digest([Principle("x", critique="c")]),
        principles_digest([Principle("x"), Principle("y")]),
    }
    assert len(digests) == 4
