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
    assert ranking.scores == (6, 2, 8, 2)
    assert (ranking.best, ranking.worst, ranking.is_tie) == (2, 3, False)
    assert reward.rank([PROMPT], [["ab", "cd"]])[0].is_tie


def test_a_function_cannot_change_the_prompt_of_the_caller(file):
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
def test_the_courtesy_reward_counts_courteous_phrases(answer, points):
    assert courtesy(PROMPT, answer) == points


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "{file}:23: the reward failed (KeyError: 'colour\\\\nmissing')"),
        ("words", "{file}:words: the reward must be a finite number, got 'good'"),
        ("not_a_number", "{file}:not_a_number: the reward must be a finite number, got nan"),
    ],
)
def test_a_failing_reward_gives_a_one_line_error_with_its_location(file, name, message):
    with pytest.raises(ConfigError) as error:
        load_reward(f"{file}:{name}")(PROMPT, "x")
    assert str(error.value) == message.replace("{file}", str(file)).replace("\\\\", "\\")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{file}", "`reward` must be `file.py:function` or `package.module:function`"),
        ("{file}:no-name", "`reward` must be `file.py:function`"),
        ("{file}:nothing", "no function `nothing` (found `Weights`, `length`"),
        ("{file}:CONSTANT", "no function `CONSTANT` (found"),
        ("nowhere.py:f", "nowhere.py: no such file"),
        ("no.such.module:f", "no.such.module: cannot be imported (ModuleNotFoundError"),
    ],
)
def test_an_invalid_reward_gives_a_one_line_error(file, spec, message):
    with pytest.raises(ConfigError) as error:
        load_reward(spec.replace("{file}", str(file)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("code", "line"), [("x = (\n", 1), ("a = 1\n\nb = a / 0\n", 3), ("import nowhere_at_all\n", 1)]
)
def test_a_file_that_cannot_be_imported_gives_its_line(tmp_path, code, line):
    path = tmp_path / "broken.py"
    path.write_text(code)
    with pytest.raises(ConfigError, match=rf"broken\.py:{line}: cannot be imported"):
        load_reward(f"{path}:f")
    sys.modules.pop("_reward_broken", None)


def test_the_provenance_is_of_the_loaded_code(file):
    reward = load_reward(f"{file}:length")
    before = reward.provenance()
    file.write_text(CODE.replace("2.0", "3.0"))
    assert reward(PROMPT, "abc") == 6.0
    assert reward.provenance() == before != load_reward(f"{file}:length").provenance()
