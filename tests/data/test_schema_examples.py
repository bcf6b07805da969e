"""Every schema gives the tokens of the same content in TRL's explicit conversational form."""

from pathlib import Path

import pytest

from mlx_dpo.config.dpo_config import get_settings
from mlx_dpo.data.load import load_pairs
from mlx_dpo.data.sources import read_rows
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.schemas import SCHEMAS, find_schema
from mlx_dpo.schemas.schema import RowRules
from mlx_dpo.schemas.supervised import SUPERVISED_SCHEMAS
from tests.data.template_families import byte_level

EXAMPLES = Path(__file__).parent / "examples"
# Plain text without turns has no messages of the same content; labelled rows are no pairs.
WITHOUT_EXAMPLES = {"whole-strings", "labelled", "anything-llm"}
RULES = TokenRules(vocab_size=1000, max_length=4096)


def example(name):
    """Return the file of an example: the exports of annotation tools are lists in `.json` files."""
    [path] = EXAMPLES.glob(f"{name}.json*")
    return path


def tokens(path, rows=None):
    """Return whole rows, because the boundary of a continued prompt is elsewhere."""
    pairs = load_pairs(path, byte_level("qwen-2.5"), RULES, rows=rows or RowRules()).pairs
    return [(p.prompt + p.chosen, p.prompt + p.rejected) for p in pairs], [p.prompt for p in pairs]


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.json*")))
def test_the_tokens_are_those_of_the_explicit_form(name):
    rows, prompts = tokens(example(name))
    explicit_rows, explicit_prompts = tokens(EXAMPLES / "explicit" / f"{name}.jsonl")
    assert rows == explicit_rows
    assert (prompts == explicit_prompts) == (name != "prefilled")


@pytest.mark.parametrize("name", ["sharegpt", "openai", "explicit/openai"])
def test_tools_reach_the_tokens(name):
    _, prompts = tokens(EXAMPLES / f"{name}.jsonl")
    assert "Looks a word up." in byte_level("qwen-2.5").decode(prompts[-1])
    assert "Looks a word up." not in byte_level("qwen-2.5").decode(prompts[0])


@pytest.mark.parametrize("name", sorted(SCHEMAS.keys() - WITHOUT_EXAMPLES))
def test_the_schema_of_an_example_is_detected_and_reported(name):
    for row in read_rows(example(name)):
        assert find_schema(row).name == name
    report = load_pairs(example(name), byte_level("qwen-2.5"), RULES).report
    assert report.lines()[0].endswith(f"(schema {name})")


@pytest.mark.parametrize("name", sorted(SCHEMAS.keys() - WITHOUT_EXAMPLES))
def test_naming_the_schema_gives_the_same_tokens(name):
    path = example(name)
    assert tokens(path, RowRules(schema=name)) == tokens(path)


def test_the_settings_offer_every_schema_there_is():
    schema = get_settings()["schema"]
    assert set(schema.choices) == SCHEMAS.keys() | SUPERVISED_SCHEMAS.keys()
