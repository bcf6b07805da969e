import pytest

from mlx_dpo.generation.stream import ThinkingSplitter

CASES = {
    "no marks": ("Just this.", False, "", "Just this."),
    "thought first": ("<think>hm</think>\n\nYes.", False, "<think>hm</think>", "\n\nYes."),
    "begun by the template": ("hm</think>Yes.", True, "hm</think>", "Yes."),
    "cut while thinking": ("<think>hm, well", False, "<think>hm, well", ""),
    "thought twice": ("<think>a</think>b<think>c</think>d", False,
                      "<think>a</think><think>c</think>", "bd"),
    "nearly a mark": ("a <thin line < 3", False, "", "a <thin line < 3"),
    "ends in half a mark": ("a <thi", False, "", "a <thi"),
    "an end without a start": ("a</think>b", False, "", "a</think>b"),
}  # fmt: skip


def cuts(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_same_however_the_text_comes(name, size):
    text, within, thought, answer = CASES[name]
    split = ThinkingSplitter("<think>", "</think>", within=within)
    parts = [part for cut in cuts(text, size) for part in split.feed(cut)] + [*split.finish()]
    assert "".join(part.text for part in parts) == text
    assert "".join(part.text for part in parts if part.thinking) == thought
    assert "".join(part.text for part in parts if not part.thinking) == answer


def test_a_model_that_knows_no_thinking_only_answers():
    split = ThinkingSplitter(None, None, within=True)
    assert [*split.feed("<think>")] == [("<think>", False)]
    assert [*split.finish()] == []


def test_only_what_may_begin_a_mark_is_held_back():
    split = ThinkingSplitter("<think>", "</think>")
    assert [*split.feed("well <")] == [("well ", False)]
    assert [*split.feed("3")] == [("<3", False)]
