"""What the README says is what the program does."""

import re
import shlex
from pathlib import Path

import click
import pytest

from mlx_dpo.cli import COMMANDS, cli
from mlx_dpo.paths import tiny_chat

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
WORDS = [
    shlex.split(line, comments=True)[1:]
    for kind, block in BLOCKS
    if kind == "sh"
    for line in block.splitlines()
    if line.removeprefix(".venv/bin/").startswith("mlx-dpo ")
]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_every_command_in_it_parses(words):
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None
    command.make_context(words[0], words[1:])


def test_every_command_is_in_it():
    assert {words[0] for words in WORDS} | {"demo", "doctor"} == set(COMMANDS)


def with_fewer_pairs(folder):
    """The model that ships, and the beginning of its pairs."""
    (folder / "preferences").mkdir(parents=True)
    for path in tiny_chat().iterdir():
        if path.name != "preferences":
            (folder / path.name).symlink_to(path)
    for path in (tiny_chat() / "preferences").iterdir():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "preferences" / path.name).write_text("".join(lines[:100]), encoding="utf-8")


def test_the_python_in_it_runs(tmp_path, monkeypatch, capsys):
    with_fewer_pairs(tmp_path / "models" / "tiny-chat")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    reward, program = [block for kind, block in BLOCKS if kind == "python"]
    exec(compile(reward, "README.md", "exec"), found := {})
    assert [found["courtesy"]([], answer) for answer in ("Please do.", "No.")] == [1.0, 0.0]
    assert "max_steps=20" in program
    exec(compile(program.replace("max_steps=20", "max_steps=2"), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # two steps and an evaluation
    assert lines[0].startswith("1 0.6931")
    assert (tmp_path / "runs" / "first" / "adapters.safetensors").is_file()
