"""Other programs are told every row once, and nothing else; what fails there ends no run."""

import gc
import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_dpo.errors import ConfigError
from mlx_dpo.reporting import trackers as programs
from mlx_dpo.reporting.trackers.base import Announced, Sinks, named_there
from tests.reporting import tracker_readers as readers

ROOT = Path(__file__).parents[2]
ROWS = [
    {"step": 1, "loss": 0.1 + 0.2, "rewards/chosen": -1e-9, "num_tokens": 17},
    {"step": 2, "loss": 1 / 3, "rewards/chosen": 2.5, "num_tokens": 34},
    {"step": 2, "eval_loss": 0.7, "eval_rewards/chosen": 1.0},
    {"step": 3, "loss": 1e-30, "rewards/chosen": 3.0, "num_tokens": 51},
]


@pytest.fixture
def announced(tmp_path):
    (tmp_path / "run").mkdir()
    return Announced(
        id="0123456789abcdef",
        name="a name",
        project="a-project",
        folder=tmp_path / "run",
        settings={"beta": 0.5, "loss_type": ["ipo", "sft"]},
    )


@pytest.fixture
def offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield wandb
    with suppress(ConnectionError):
        wandb.teardown()  # the next one reads its environment anew
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()  # it leaves its own process to end by itself


def as_float32(found):
    return [(step, name, float(np.float32(value))) for step, name, value in found]


def told(name, announced, rows, *, whole=True):
    sink = programs.begin(name, announced)
    for row in rows:
        sink.write(row)
    sink.close(whole=whole)
    if name == "wandb":
        sys.modules["wandb"].teardown()  # what it keeps is whole once its own process ends
    return sink


def test_names_are_those_of_transformers():
    row = {"step": 7, "loss": 1.0, "eval_loss": 2.0, "eval_rewards/chosen": 3.0, "logps/chosen": 4}
    assert named_there(row) == {
        "train/loss": 1.0, "eval/loss": 2.0, "eval/rewards/chosen": 3.0, "train/logps/chosen": 4,
    }  # fmt: skip


def test_tensorboard_reads_every_value_and_the_settings(announced):
    sink = told("tensorboard", announced, ROWS)
    assert readers.tensorboard(announced.folder) == as_float32(readers.expected(ROWS))
    assert sink.where == f"tensorboard --logdir {announced.folder}/tensorboard"
    [file] = (announced.folder / "tensorboard").iterdir()
    assert json.dumps(announced.settings, indent=2).encode() in file.read_bytes()


def test_tensorboards_own_reader_agrees(announced):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    told("tensorboard", announced, ROWS)
    told("tensorboard", announced, ROWS[:2])
    reader = accumulator.EventAccumulator(str(announced.folder / "tensorboard"))
    reader.Reload()
    found = {tag: reader.Scalars(tag) for tag in reader.Tags()["scalars"]}
    assert sorted(found) == ["train/loss", "train/num_tokens", "train/rewards/chosen"]
    assert [(e.step, e.value) for e in found["train/num_tokens"]] == [(1, 17), (2, 34)]


def test_a_tensorboard_that_is_looking_forgets_what_was_told_before(announced):
    """It reads the old file first; the new one says that the session starts again."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    told("tensorboard", announced, ROWS)
    [file] = (announced.folder / "tensorboard").iterdir()
    start = Event(session_log=SessionLog(status=SessionLog.START))
    assert start.SerializeToString()[-4:] in file.read_bytes()[:120]


def test_a_value_is_on_the_disk_when_the_next_step_begins(announced):
    sink = programs.begin("tensorboard", announced)
    sink.write(ROWS[0])
    assert readers.tensorboard(announced.folder) == as_float32(readers.expected(ROWS[:1]))
    sink.close(whole=False)


def test_wandb_is_told_every_value_the_settings_and_nothing_of_the_machine(announced, offline):
    sink = told("wandb", announced, ROWS)
    found = readers.wandb(announced.folder)
    assert sorted(found) == sorted(readers.expected(ROWS))
    records = list(readers.wandb_records(announced.folder))
    [run] = [record.run for record in records if record.HasField("run")]
    assert (run.run_id, run.display_name, run.project) == (
        "0123456789abcdef", "a name", "a-project",
    )  # fmt: skip
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    config.pop("_wandb")
    assert config == announced.settings
    kinds = {record.WhichOneof("record_type") for record in records}
    assert kinds & {"environment", "files", "stats", "output", "output_raw", "alert"} == set()
    everything = b"".join(record.SerializeToString() for record in records)
    for private in (os.uname().nodename, str(announced.folder), sys.executable, os.getcwd()):
        assert private.encode() not in everything
    assert sink.where.startswith(f"wandb sync {announced.folder}/wandb/offline-run-")


def test_wandb_draws_along_the_step(announced, offline):
    told("wandb", announced, ROWS)
    metrics = [r.metric for r in readers.wandb_records(announced.folder) if r.HasField("metric")]
    assert {(m.name, m.glob_name, m.step_metric) for m in metrics} == {
        ("train/global_step", "", ""), ("", "*", "train/global_step"),
    }  # fmt: skip


def test_what_a_server_of_wandb_has_is_not_told_again(announced, offline):
    """It has the rows below its step, of which an evaluation has one of its own."""
    sink = programs.begin("wandb", announced)
    sink._run._starting_step = 5  # it has the training row of step 2, not its evaluation
    for row in ROWS:
        sink.write(row)
    sink.close(whole=True)
    offline.teardown()
    assert sorted(readers.wandb(announced.folder)) == sorted(readers.expected(ROWS[2:]))


def test_a_run_that_broke_off_is_a_failed_one_there(announced, offline):
    told("wandb", announced, ROWS, whole=False)
    records = readers.wandb_records(announced.folder)
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_whoever_begins_anew_tells_everything_once(announced, offline, name):
    told(name, announced, ROWS[:3], whole=False)
    told(name, announced, ROWS)
    found = sorted(getattr(readers, name)(announced.folder))
    wanted = sorted(readers.expected(ROWS))
    assert found == (as_float32(wanted) if name == "tensorboard" else wanted)


IN_TRACKIO = """
from dataclasses import replace
from pathlib import Path
from mlx_dpo.reporting.trackers.base import Announced
from tests.reporting.test_trackers import ROWS, told
announced = Announced(id="0123456789abcdef", name="run", project=None, folder=Path("run"),
                      settings={"beta": 0.5})
told("trackio", replace(announced, id="another"), ROWS)
told("trackio", announced, ROWS[:3], whole=False)
told("trackio", announced, ROWS)
"""


def test_trackio_is_told_everything_once_and_other_runs_are_left_alone(tmp_path, monkeypatch):
    """In a process of its own, for trackio settles on a folder when it is imported."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program = [sys.executable, "-c", IN_TRACKIO]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in ("run-012345", "run-anothe"):
        found = readers.trackio(tmp_path / name)
        assert sorted(found) == sorted(readers.expected(ROWS))


ON_A_SERVER = """
from dataclasses import replace
from pathlib import Path
from mlx_dpo.reporting import trackers as programs
from mlx_dpo.reporting.trackers.base import Announced, Sinks
sink = programs.begin("trackio", Announced(
    id="0123456789abcdef", name="run", project=None, folder=Path("run"), settings={}, before=2))
sinks = Sinks([sink])
for step in range(1, 5):
    sinks.write({"step": step, "loss": 1.0})
print(sink.where, [entry["step"] for entry in sink._run._queued_logs])
sinks.close(whole=True)
print(*sinks.lost)
"""


def test_a_server_of_trackio_is_told_the_rest_and_what_it_did_not_get_is_said(
    tmp_path, monkeypatch
):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9/?write_token=sesame")
    program = [sys.executable, "-c", ON_A_SERVER]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    where, lost = done.stdout.splitlines()
    assert where == "http://127.0.0.1:9/ [3, 4]"  # and no password
    assert lost.startswith("trackio: Some logs could not be sent to the remote server")


def test_other_runs_in_the_same_folder_are_left_alone(announced, offline):
    other = announced.folder / "wandb" / "offline-run-20260101_000000-another"
    other.mkdir(parents=True)
    told("wandb", announced, ROWS)
    assert other.is_dir()


def test_wandbs_process_may_die_and_the_run_goes_on(announced, offline):
    sinks = Sinks([programs.begin(name, announced) for name in ("wandb", "tensorboard")])
    sinks.write(ROWS[0])
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())],
                              capture_output=True, text=True).stdout.splitlines()  # fmt: skip
    [core] = [int(line.split()[0]) for line in children if "wandb-core" in line]
    os.kill(core, signal.SIGKILL)
    os.waitid(os.P_PID, core, os.WEXITED | os.WNOWAIT)
    for row in ROWS[1:]:
        sinks.write(row)
    sinks.close(whole=True)
    [sentence] = sinks.lost
    assert sentence.startswith("wandb is told nothing from step ")
    assert sentence.endswith("; the run goes on, and all is in metrics.jsonl")
    assert readers.tensorboard(announced.folder) == as_float32(readers.expected(ROWS))


class Full:
    """A program whose disk is full after two rows."""

    name, where = "full", "nowhere"

    def __init__(self):
        self.rows, self.closed = [], []

    def write(self, row):
        if len(self.rows) == 2:
            raise OSError(28, "No space left on device")
        self.rows.append(row)

    def close(self, *, whole):
        self.closed.append(whole)
        raise OSError(28, "No space left on device")

    @staticmethod
    def failures():
        return (OSError,)


def test_a_program_that_fails_is_let_go_of_once_and_said(announced):
    full, other = Full(), programs.begin("tensorboard", announced)
    sinks = Sinks([full, other])
    for row in ROWS:
        sinks.write(row)
    sinks.close(whole=True)
    sinks.close(whole=True)
    assert sinks.lost == [
        "full is told nothing from step 2 on (No space left on device); the run goes on, and all "
        "is in metrics.jsonl"
    ]
    assert (full.rows, full.closed) == (ROWS[:2], [False])
    assert readers.tensorboard(announced.folder) == as_float32(readers.expected(ROWS))


def test_an_end_that_fails_is_said():
    full = Full()
    sinks = Sinks([full])
    sinks.write(ROWS[0])
    sinks.close(whole=True)
    assert full.closed == [True]
    assert sinks.lost == [
        "full may lack the end of the run (No space left on device); all is in metrics.jsonl"
    ]


def test_what_is_no_failure_of_the_program_keeps_its_traceback():
    class Wrong(Full):
        def write(self, row):
            raise KeyError("a fault of ours")

    with pytest.raises(KeyError):
        Sinks([Wrong()]).write(ROWS[0])


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_a_library_that_is_missing_is_named_with_its_remedy(monkeypatch, name):
    library = programs.PROGRAMS[name].library

    def gone(asked):
        assert asked == library
        raise ModuleNotFoundError(f"No module named {asked!r}", name=asked)

    monkeypatch.setattr(programs, "import_module", gone)
    with pytest.raises(ConfigError) as error:
        programs.check(name)
    assert str(error.value) == (
        f"`report_to` {name}: `{library}` is not installed; pip install 'mlx-dpo[{name}]'"
    )


def test_a_library_that_does_not_load_says_why(monkeypatch):
    def broken(asked):
        raise ImportError("cannot import name 'x' from 'google.protobuf'")

    monkeypatch.setattr(programs, "import_module", broken)
    with pytest.raises(ConfigError, match=r"cannot be loaded \(cannot import name 'x' from"):
        programs.check("tensorboard")


def test_nobody_logged_in_is_said_before_anything_begins(tmp_path, monkeypatch, offline):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError) as error:
        programs.check("wandb")
    assert str(error.value) == (
        "`report_to` wandb: nobody is logged in; `wandb login`, or WANDB_MODE=offline to keep it "
        "here"
    )


@pytest.mark.slow  # it tries for ten seconds
def test_a_server_that_cannot_be_reached_is_said_before_anything_begins(monkeypatch, offline):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(ConfigError) as error:
        programs.check("wandb")
    assert str(error.value).startswith("`report_to` wandb: ")
    assert "\n" not in str(error.value)


def test_offline_nobody_need_be_logged_in(offline):
    programs.check("wandb")
    programs.check("tensorboard")


def test_swanlab_without_a_login_is_said(monkeypatch, tmp_path):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path))
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    monkeypatch.setenv("SWANLAB_MODE", "online")
    with pytest.raises(ConfigError, match="swanlab: nobody is logged in; `swanlab login`, or SWAN"):
        programs.check("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    programs.check("swanlab")


def test_swanlab_leaves_ctrl_c_to_this_program(announced, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    before = signal.getsignal(signal.SIGINT)
    sink = programs.begin("swanlab", announced)
    assert signal.getsignal(signal.SIGINT) is before
    for row in ROWS:
        sink.write(row)
    mine = signal.signal(signal.SIGINT, lambda *_: None), signal.getsignal(signal.SIGINT)
    sink.close(whole=True)
    assert signal.getsignal(signal.SIGINT) is mine[1]
    signal.signal(signal.SIGINT, before)
    assert sorted(readers.swanlab(announced.folder)) == sorted(readers.expected(ROWS))


def test_a_name_that_a_program_does_not_take_is_said(announced, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    with pytest.raises(ConfigError) as error:
        programs.begin("swanlab", replace(announced, project="no spaces here"))
    assert str(error.value).startswith("`report_to` swanlab: cannot begin (")
    assert str(error.value).endswith("mend it, or go on with --resume --report-to none")


def test_no_library_is_imported_for_a_run_that_names_none():
    """mlx-lm itself imports wandb and swanlab where they are installed."""
    program = (
        "import sys, mlx_dpo.saved_runs\n"
        "sys.exit(', '.join({'tensorboardX', 'trackio'} & sys.modules.keys()) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
