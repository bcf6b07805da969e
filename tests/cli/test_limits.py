"""Memory, threads and files that run out are reported in one line; other errors are not."""

import errno
from importlib import import_module

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import OUT_OF_FILES, OUT_OF_MEMORY, OUT_OF_THREADS, cli, limit_message
from mlx_dpo.errors import DPOError


class PanicException(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), OUT_OF_MEMORY),
        (RuntimeError("[malloc] Unable to allocate 5 bytes"), OUT_OF_MEMORY),
        (RuntimeError("can't start new thread"), OUT_OF_THREADS),
        (PanicException("The global thread pool: ThreadPoolBuildError { kind: IOError }"),
         OUT_OF_THREADS),
        (OSError(errno.EMFILE, "Too many open files", "x"), OUT_OF_FILES),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"),
         "x: the name is too long for a file; choose another name"),
    ],
)  # fmt: skip
def test_what_ran_out_is_reported_in_one_line(monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(import_module("mlx_dpo.cli.losses"), "describe", fail)
    result = CliRunner().invoke(cli, ["losses"])
    assert result.exit_code == 1
    assert result.output.endswith(f"\nError: {message}\n")


def test_other_exceptions_are_not_explained():
    for error in (RuntimeError("bug"), PanicException("bug"), DPOError("x"), ValueError("y")):
        assert limit_message(error) is None
