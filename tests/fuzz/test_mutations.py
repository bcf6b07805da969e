"""Mutated files give a result or an error of one line, and no damage is believed.

`python -m tests.fuzz.watchdog AREA/INDEX` tries one input again; CONTRIBUTING.md tells more.
"""

import json
import random

import pytest

from tests.fuzz.areas import AREAS
from tests.fuzz.mutations import BYTES, VALUES, dump, mutate_bytes, mutate_value
from tests.fuzz.watchdog import try_inputs, write_material

PART = 500  # inputs that one process of the slow suite tries
FEW = 4  # inputs of each area in the gate
PARTS = [
    (name, first, min(first + PART, area.count))
    for name, area in AREAS.items()
    for first in range(0, area.count, PART)
]
ROW = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "score": 1.5}


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    return write_material(tmp_path_factory.mktemp("fuzz") / "material")


def assert_no_failure(names, material):
    failures = [outcome for outcome in try_inputs(names, material) if outcome["failure"]]
    assert not failures, "\n".join(json.dumps(failure, indent=1) for failure in failures)


def test_a_few_mutated_files_of_each_area_are_read_or_refused(material):
    names = [f"{name}/{i}" for name, area in AREAS.items() for i in range(FEW) if area.count]
    assert_no_failure(names, material)


@pytest.mark.slow
@pytest.mark.parametrize(("area", "first", "end"), PARTS)
def test_mutated_files_are_read_or_refused(material, area, first, end):
    assert_no_failure([f"{area}/{index}" for index in range(first, end)], material)


def test_there_are_ten_thousand_inputs():
    assert sum(area.count for area in AREAS.values()) >= 10_000


def test_an_input_that_hangs_dies_or_fails_is_named_and_the_others_are_tried(tmp_path):
    names = ["hangs/0", "hangs/1", "dies/0", "fails/3"]
    found = list(try_inputs(names, tmp_path, seconds=1))
    outcomes = {outcome["name"]: outcome["failure"] for outcome in found}
    assert list(outcomes) == names
    assert found[1]["mutation"] == "none"
    assert outcomes["hangs/0"] == ""
    assert outcomes["hangs/1"] == "took too much processor time"
    assert outcomes["dies/0"].startswith("the process died with -11")
    assert outcomes["fails/3"].startswith("exit status 2")


def test_an_input_that_waits_is_named(tmp_path):
    [outcome] = try_inputs(["waits/0"], tmp_path, silence=0.5)
    assert outcome["failure"] == "waited for too long"


def test_an_input_is_a_function_of_its_area_and_index():
    def make():
        draw = random.Random("pairs/7")
        return [mutate_value(ROW, draw)[0] for _ in range(20)], mutate_bytes(b"abc", draw, [])

    assert make() == make()


@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_any_length_can_be_mutated(name):
    for data in (b"", b"a", b'{"a": 1}\n{"b": 2}\n' * 9):
        changed = [BYTES[name](data, random.Random(seed), [b"other"]) for seed in range(20)]
        assert any(result != data for result in changed) or len(data) < 2


@pytest.mark.parametrize("name", VALUES)
def test_mutated_values_are_written(name):
    for seed in range(30):
        row = json.loads(json.dumps(ROW))
        VALUES[name](row, "prompt", random.Random(seed))
        assert dump(row)


def test_a_key_can_stand_twice():
    assert dump({"a": 1, "a@duplicate@": 2}) == b'{"a": 1, "a": 2}'
