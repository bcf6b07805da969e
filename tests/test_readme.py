"""What the README says is what the program does. (tests/test_pages.py parses its commands.)"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_dpo.cli import COMMANDS
from mlx_dpo.paths import tiny_chat
from tests.test_pages import commands

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)


def test_every_command_is_in_it():
    named = {word for code in re.findall(r"`([^`\n]+)`", TEXT) for word in code.split()}
    assert set(COMMANDS) - named - {words[0] for words in commands(README)} == {"demo"}
    assert "\n./scripts/demo\n" in TEXT


def test_the_first_screen_says_that_nothing_was_measured_on_metal():
    assert "measured on Metal" in " ".join(TEXT.splitlines()[:12])


def with_fewer_pairs(folder, rows=100):
    """The model that ships, and the beginning of its pairs."""
    (folder / "preferences").mkdir(parents=True)
    for path in tiny_chat().iterdir():
        if path.name != "preferences":
            (folder / path.name).symlink_to(path)
    for path in (tiny_chat() / "preferences").iterdir():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "preferences" / path.name).write_text("".join(lines[:rows]), encoding="utf-8")


def test_the_python_in_it_runs(tmp_path, monkeypatch, capsys):
    with_fewer_pairs(tmp_path / "models" / "tiny-chat")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    [program] = [block for kind, block in BLOCKS if kind == "python"]
    assert "max_steps=20" in program
    exec(compile(program.replace("max_steps=20", "max_steps=2"), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # two steps and an evaluation
    assert lines[0].startswith("1 0.6931")
    assert (tmp_path / "runs" / "first" / "adapters.safetensors").is_file()


def test_its_pairs_are_pairs(tmp_path, monkeypatch):
    [rows] = [block for kind, block in BLOCKS if kind == "json"]
    (tmp_path / "pairs.jsonl").write_text(rows)
    done = run(["data", "check", "pairs.jsonl", "--strict"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_its_commands_run_as_typed_and_print_what_is_shown(page, tmp_path):
    """Lines of a `text` block are in the output of the commands before them, up to numbers."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny-chat").symlink_to(tiny_chat())
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    output = ""
    blocks = re.findall(r"```(sh|text)\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    for kind, block in blocks:
        if kind == "sh":
            output += "".join(run_line(line, tmp_path) for line in block.splitlines())
        else:
            shown = [simplify(line) for line in block.splitlines() if line.strip() not in ("", "…")]
            missing = [line for line in shown if line and line not in simplify(output)]
            assert missing == []


def run_line(line, folder):
    """Run a line of a page if it is a command of mlx-dpo; return what it printed."""
    words = shlex.split(line, comments=True)
    if line.startswith("./scripts/demo"):
        words = ["mlx-dpo", "demo"]
    if not words or words[0] != "mlx-dpo" or "mlx-community/" in line:
        return ""
    if "<" in words:
        words = words[: words.index("<")]
    done = run(words[1:], folder, input="What is 3 + 4?\n")
    assert done.returncode == 0, (line, done.stderr)
    return done.stderr + done.stdout + "\n"


def run(words, folder, **options):
    environment = os.environ | {
        "MLX_DPO_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "150",
    }
    program = "import sys; sys.argv[0] = 'mlx-dpo'; from mlx_dpo.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )


def simplify(text):
    """Return a text with one space between words, every number as 0, and no bars or frames."""
    text = re.sub(r"[+-]?\d[\d,.]*(e[+-]?\d+)?", "0", text)
    return re.sub(r"[\s…]+", " ", text).strip()
