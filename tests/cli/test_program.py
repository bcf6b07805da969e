import sys

import pytest

from mlx_dpo.cli import program


@pytest.fixture
def installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ".venv" / "bin" / "mlx-dpo"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_bare_name_is_enough_where_the_shell_finds_it(installed, monkeypatch):
    monkeypatch.setenv("PATH", str(installed.parent))
    monkeypatch.setattr(sys, "argv", [str(installed)])
    assert program() == "mlx-dpo"


@pytest.mark.parametrize("called", [".venv/bin/mlx-dpo", "scripts/../.venv/bin/mlx-dpo"])
def test_paths_are_shown_relative_to_the_current_folder(installed, monkeypatch, called):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", [str(installed.parents[2] / called)])
    assert program() == ".venv/bin/mlx-dpo"


def test_a_test_or_a_notebook_is_not_the_program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest"])
    assert program() == "mlx-dpo"
