"""MLX_DPO_DEBUG=1 shows where an error comes from; without it an error is one line."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli, main, user_message
from mlx_dpo.errors import RunError

MESSAGE = "Error: nosuch: not a run folder (no such folder); train one with `mlx-dpo train`\n"


@pytest.mark.parametrize("value", [None, "", "0"])
def test_an_error_is_one_line(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["eval", "nosuch"], env={"MLX_DPO_DEBUG": value})
    assert (result.exit_code, result.stderr) == (1, MESSAGE)


def test_debugging_prints_the_traceback_before_the_same_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["eval", "nosuch"], env={"MLX_DPO_DEBUG": "1"})
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert "open_run" in result.stderr
    assert result.stderr.endswith("\n" + MESSAGE)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RunError("run: what"), "run: what"),
        (
            PermissionError(13, "Permission denied", "a/b"),
            "a/b: Permission denied; check its permissions, or choose another place",
        ),
        (
            OSError(28, "No space left on device", "a/b"),
            "a/b: No space left on device; free some space, or choose another disk",
        ),
        (ConnectionResetError(104, "Connection reset by peer"), None),
        (ImportError("No module named 'x'"), None),
    ],
)
def test_only_what_a_person_can_fix_becomes_a_line(error, message):
    assert user_message(error) == message


def test_help_without_a_backend_of_mlx_is_one_line(monkeypatch, capsys):
    def broken(*args):
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr("mlx_dpo.cli.import_module", broken)
    monkeypatch.setattr("sys.argv", ["mlx-dpo", "chat", "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("Error: ")]
    assert line.startswith("Error: MLX is installed without a backend")


def test_the_version_and_the_package_need_no_mlx():
    program = (
        "import sys; sys.modules['mlx.core'] = None; import mlx_dpo; "
        "from mlx_dpo.cli import cli; cli.main(['--version'], standalone_mode=False)"
    )
    env = {**os.environ, "MLX_DPO_OPENBLAS": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "version" in done.stdout
