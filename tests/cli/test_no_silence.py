"""Every command says on stderr what it does before it imports the model libraries."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import COMMANDS, cli
from tests.checkpoints import make_checkpoint
from tests.cli.terminal import TerminalSession
from tests.cli.test_train_cli import MATTER, write_pairs

MARK = "<mlx is imported>"
WORDS = ("train", "pairs.jsonl", "--model", "base", "--output", "run")
COMMAND = [sys.executable, "-c", "from mlx_dpo.cli import main; main()"]


@pytest.fixture
def status(monkeypatch):
    monkeypatch.setenv("MLX_DPO_STATUS", "1")


class ImportedError(Exception):
    pass


@pytest.mark.parametrize("name", COMMANDS)
def test_the_first_word_of_a_command_comes_before_its_module_is_imported(name, status, monkeypatch):
    def refuse(module):
        raise ImportedError(module)

    monkeypatch.setattr("mlx_dpo.cli.import_module", refuse)
    monkeypatch.delitem(sys.modules, "mlx_lm", raising=False)
    result = CliRunner().invoke(cli, [name, "word"])
    assert isinstance(result.exception, ImportedError)
    assert (result.stderr, result.stdout) == ("Importing MLX…\n", "")


@pytest.fixture
def fake_mlx(tmp_path, monkeypatch):
    """A package `mlx` that writes a mark when it is imported, and ends the program."""
    (tmp_path / "mlx").mkdir()
    text = f"import sys; sys.stderr.write({MARK!r}); sys.stderr.flush(); sys.exit(3)"
    (tmp_path / "mlx" / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")


def test_a_log_has_its_first_line_before_mlx_is_imported(fake_mlx, status):
    done = subprocess.run([*COMMAND, *WORDS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"Importing MLX…\n{MARK}"


def test_a_terminal_has_its_first_word_before_mlx_is_imported(fake_mlx, status):
    session = TerminalSession(*WORDS, TERM="xterm", NO_COLOR="1")
    try:
        shown = session.until(MARK)
    finally:
        session.close()
    assert "Importing MLX" in shown.partition(MARK)[0]


@pytest.mark.parametrize("flag", ["--help", "-h", "--help-all"])
def test_help_says_nothing_of_imports(flag, status, monkeypatch):
    monkeypatch.delitem(sys.modules, "mlx_lm", raising=False)
    assert CliRunner().invoke(cli, ["train", flag]).stderr == ""


def test_a_log_names_each_phase_and_has_no_escape_code(tmp_path, status, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    make_checkpoint(tmp_path / "base")
    write_pairs(tmp_path / "pairs.jsonl", 12)
    done = subprocess.run([*COMMAND, *WORDS, *MATTER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"\r", "\x1b"} & set(done.stdout + done.stderr)
    assert done.stderr.splitlines()[:6] == [
        "Importing MLX…",
        "Loading model base…",
        "Tokenizing pairs.jsonl…",
        "Checking the scorer…",
        "Estimating memory…",
        "Computing reference log-probs: 12 pairs…",
    ]
    assert "elapsed" in done.stdout
