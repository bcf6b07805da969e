"""The command line as one of several ranks: which commands run, and who prints."""

import errno
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import DESCRIPTIONS, cli, output
from mlx_dpo.cli.output import echo, is_silent, print_warning, silence
from mlx_dpo.cli.ranks_flags import RanksFlags
from mlx_dpo.collect.iterative.trainer import IterativeDPO
from mlx_dpo.errors import ConfigError
from mlx_dpo.runs.distributed.peers import SharedError

SHARED = {"train", "doctor"}


@pytest.fixture
def as_rank(monkeypatch, tmp_path):
    def become(rank):
        (tmp_path / "hosts.json").write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
        monkeypatch.setenv("MLX_RANK", str(rank))
        monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))

    return become


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(output._Streams, "are_silent", True)


@pytest.mark.parametrize("command", sorted(DESCRIPTIONS.keys() - SHARED))
def test_other_commands_are_refused_without_connecting(as_rank, command):
    as_rank(0)
    result = CliRunner().invoke(cli, [command])
    assert result.exit_code == 1
    [line] = result.output.splitlines()
    assert line.startswith(f"Error: `mlx-dpo {command}` runs in one process, but this one was ")


def test_the_refusal_is_printed_by_rank_0_alone(as_rank, silent):
    as_rank(1)
    result = CliRunner().invoke(cli, ["losses"])
    assert (result.exit_code, result.output) == (1, "")


def test_iterative_dpo_is_refused(as_rank):
    as_rank(1)
    with pytest.raises(ConfigError, match="iterative DPO runs in one process"):
        IterativeDPO(None, None)


def test_a_silent_process_prints_errors_alone(capfd, monkeypatch, silent):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # is restored at the end
    silence()
    echo("text")
    echo("text", err=True)
    print_warning("text")
    print("text", file=sys.stdout)
    sys.stdout.close()
    assert is_silent()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("error", "shown"), [(ConfigError, "Error: why\n"), (SharedError, "")])
def test_an_error_of_one_rank_is_printed_there(silent, monkeypatch, error, shown):
    def fail(*args, **how):
        raise error("why")

    monkeypatch.setattr("mlx_dpo.cli.train.start_ranks", fail)
    result = CliRunner().invoke(cli, ["train", "pairs.jsonl", "--model", "m"])
    assert (result.exit_code, result.output) == (1, shown)


@pytest.mark.parametrize("by_rich", [False, True])
def test_the_others_end_with_rank_0_whose_output_is_not_read(monkeypatch, by_rich):
    """As in `mlx-dpo train ... | head -1`."""

    def fail(*args, **how):
        try:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        except BrokenPipeError:
            if by_rich:
                raise SystemExit(1) from None  # as `Console.on_broken_pipe`
            raise

    reported = []
    monkeypatch.setattr("mlx_dpo.cli.train.start_ranks", fail)
    monkeypatch.setattr("mlx_dpo.distributed.heartbeats.report_error", reported.append)
    result = CliRunner().invoke(cli, ["train", "pairs.jsonl", "--model", "m"])
    assert (result.exit_code, len(reported)) == (1, 1)


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (RanksFlags(), ""),
        (RanksFlags(rank_timeout=9), ""),
        (RanksFlags(ranks=3), " --ranks 3"),
        (RanksFlags(ranks=2, rank_timeout=9), " --ranks 2 --rank-timeout 9"),
        (
            RanksFlags(hosts="my hosts.json", starting_port=5000, host_python="/v/python"),
            " --hosts 'my hosts.json' --starting-port 5000 --host-python /v/python",
        ),
    ],
)
def test_the_command_that_resumes_has_the_flags_of_the_ranks(flags, shown):
    assert flags.shown() == shown


@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_ranks_show_no_phases(rank, tmp_path):
    """A wrong hostfile ends both ranks soon; rank 0 has shown that MLX is imported."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text("no JSON")
    done = subprocess.run(
        PROGRAM,
        env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "MLX_DPO_STATUS": "1"},
        capture_output=True,
        text=True,
    )
    assert ("Importing MLX" in done.stderr) == (rank == 0)
    assert done.returncode == 1


PROGRAM = [
    sys.executable,
    "-c",
    "import sys; sys.argv = ['mlx-dpo', 'train', 'p.jsonl', '--model', 'm', '-o', 'r']; "
    "from mlx_dpo.cli import main; main()",
]
