"""Commands in README and docs: they parse, and the README keeps its length."""

import re
import shlex
from pathlib import Path

import click
import pytest

from mlx_dpo.cli import COMMANDS, cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_WORDS = 1200  # a README is read once, by a stranger, on a phone


def commands(page):
    """Return the words of every `mlx-dpo` command in the shell blocks of a page."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0].removeprefix(".venv/bin/") == "mlx-dpo" and "…" not in line:
                cuts = [words.index(sign) for sign in ("<", ">", "|") if sign in words]
                found.append(words[1 : min(cuts, default=len(words))])
    return found


def parse(words):
    """Parse a command as the program does, without running it."""
    command, ctx = cli, click.Context(cli)
    while isinstance(command, click.Group) and words:
        name, *words = words
        command = command.get_command(ctx, name)
        assert command is not None, name
        ctx = click.Context(command, parent=ctx, info_name=name)
    command.make_context(ctx.info_name, list(words), parent=ctx.parent)


EXAMPLES = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), EXAMPLES, ids=lambda value: " ".join(value))
def test_a_command_of_a_page_parses(page, words):
    parse(words)


def test_a_flag_that_does_not_exist_fails_to_parse():
    with pytest.raises(click.UsageError, match="--no-such-flag"):
        parse(["data", "check", "pairs.jsonl", "--no-such-flag"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_that_a_page_names_exists(page):
    names = set(re.findall(r"`mlx-dpo ([a-z][\w-]*)", page.read_text(encoding="utf-8")))
    assert names - set(COMMANDS) == set()


def test_the_readme_is_short():
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    assert len(words) <= MAX_WORDS
