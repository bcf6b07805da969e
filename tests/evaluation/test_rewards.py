import sys

import pytest

from mlx_dpo.demo.rules import courtesy
from mlx_dpo.errors import ConfigError
from mlx_dpo.evaluation.rewards import load_reward

PROMPT = [{"role": "user", "content": "hi"}]
CODE = """\
import dataclasses


@dataclasses.dataclass
class Weights:
    each: float = 2.0


def length(prompt, answer):
    return Weights().each * len(answer)


def first_turn(prompt, answer):
    prompt[0]["content"] += "!"
    return len(prompt[0]["content"])


def fails(prompt, answer):
    return _deeper(answer)


def _deeper(answer):
    raise KeyError("colour\\nmissing")


def words(prompt, answer):
    return "good"


def not_a_number(prompt, answer):
    return float("nan")


CONSTANT = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(CODE)
    return path


def test_a_function_of_a_file_scores_and_ranks(file):
    reward = load_reward(f"{file}:length")
    assert reward(PROMPT, "abc") == 6.0
    [ranking] = reward.rank([PROMPT], [["abc", "a", "abcd", "x"]])
    assert ranking.points == (6, 2, 8, 2)
    assert (ranking.best, ranking.worst, ranking.is_tie) == (2, 3, False)
    assert reward.rank([PROMPT], [["ab", "cd"]])[0].is_tie


def test_what_the_function_does_to_the_prompt_stays_with_it(file):
    reward = load_reward(f"{file}:first_turn")
    assert [reward(PROMPT, ""), reward(PROMPT, "")] == [3, 3]
    assert PROMPT[0]["content"] == "hi"


def test_the_file_runs_only_when_the_reward_is_loaded(tmp_path):
    path = tmp_path / "loud.py"
    path.write_text("open(__file__ + '.ran', 'w').close()\ndef f(prompt, answer): return 1\n")
    ran = tmp_path / "loud.py.ran"
    with pytest.raises(ConfigError):
        load_reward(f"{path}:")
    assert not ran.exists()
    load_reward(f"{path}:f")
    assert ran.exists()


def test_a_function_of_a_module_is_found_by_its_name():
    reward = load_reward("mlx_dpo.demo.rules:courtesy")
    assert reward(PROMPT, "Of course! It is 7. I hope that helps!") == 2.0


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        ("7.", 0),
        ("GLADLY! 7.", 1),
        ("Of course! 7. Please ask me again any time!", 2),
        ("Of course! Certainly! Gladly! 7.", 1),
        ("7. I hope that helps! I hope that helps! I hope that helps! I hope that helps!", 0),
    ],
)
def test_the_reward_that_ships_counts_courteous_phrases(answer, points):
    assert courtesy(PROMPT, answer) == points


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "{file}:23: the reward failed (KeyError: 'colour\\\\nmissing')"),
        ("words", "{file}:words: the reward must be a finite number, got 'good'"),
        ("not_a_number", "{file}:not_a_number: the reward must be a finite number, got nan"),
    ],
)
def test_a_reward_that_fails_is_told_in_one_line_with_its_place(file, name, message):
    with pytest.raises(ConfigError) as error:
        load_reward(f"{file}:{name}")(PROMPT, "x")
    assert str(error.value) == message.replace("{file}", str(file)).replace("\\\\", "\\")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{file}", "`reward` must be `file.py:function` or `package.module:function`"),
        ("{file}:no-name", "`reward` must be `file.py:function`"),
        ("{file}:nothing", "no function `nothing` in it (found `Weights`, `length`"),
        ("{file}:CONSTANT", "no function `CONSTANT` in it"),
        ("nowhere.py:f", "nowhere.py: no such file"),
        ("no.such.module:f", "no.such.module: cannot be imported (ModuleNotFoundError"),
    ],
)
def test_what_is_no_reward_is_said_in_one_line(file, spec, message):
    with pytest.raises(ConfigError) as error:
        load_reward(spec.replace("{file}", str(file)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("code", "place"), [("x = (\n", 1), ("a = 1\n\nb = a / 0\n", 3), ("import nowhere_at_all\n", 1)]
)
def test_a_file_that_cannot_run_is_told_with_its_line(tmp_path, code, place):
    path = tmp_path / "broken.py"
    path.write_text(code)
    with pytest.raises(ConfigError, match=rf"broken\.py:{place}: cannot be imported"):
        load_reward(f"{path}:f")
    sys.modules.pop("_reward_broken", None)


def test_the_code_that_was_loaded_is_what_the_facts_are_of(file):
    reward = load_reward(f"{file}:length")
    before = reward.facts()
    file.write_text(CODE.replace("2.0", "3.0"))
    assert reward(PROMPT, "abc") == 6.0
    assert reward.facts() == before != load_reward(f"{file}:length").facts()
