"""Trackers get every metrics row once and nothing else, and a failure there ends no run."""

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
from typing import Any

import numpy as np
import pytest

from mlx_dpo import trackers
from mlx_dpo.errors import ConfigError
from mlx_dpo.trackers import TRACKERS, check_tracker, open_tracker
from mlx_dpo.trackers.base import OpenTrackers, RunInfo, with_transformers_names
from tests.trackers import tracker_readers as readers

ROOT = Path(__file__).parents[2]
ROWS = [
    {"step": 1, "loss": 0.1 + 0.2, "rewards/chosen": -1e-9, "num_tokens": 17},
    {"step": 2, "loss": 1 / 3, "rewards/chosen": 2.5, "num_tokens": 34},
    {"step": 2, "eval_loss": 0.7, "eval_rewards/chosen": 1.0},
    {"step": 3, "loss": 1e-30, "rewards/chosen": 3.0, "num_tokens": 51},
]


@pytest.fixture
def run_info(tmp_path):
    (tmp_path / "run").mkdir()
    return RunInfo(
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
        wandb.teardown()  # the next test's wandb reads the environment again
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()  # wandb does not wait for its service process


def as_float32(values):
    return [(step, name, float(np.float32(value))) for step, name, value in values]


def log_run(name, run_info, rows, *, completed=True):
    tracker = open_tracker(name, run_info)
    for row in rows:
        tracker.log(row)
    tracker.close(completed=completed)
    if name == "wandb":
        sys.modules["wandb"].teardown()  # its files are complete once its own process ends
    return tracker


def test_metric_names_are_those_of_transformers():
    row = {"step": 7, "loss": 1.0, "eval_loss": 2.0, "eval_rewards/chosen": 3.0, "logps/chosen": 4}
    assert with_transformers_names(row) == {
        "train/loss": 1.0, "eval/loss": 2.0, "eval/rewards/chosen": 3.0, "train/logps/chosen": 4,
    }  # fmt: skip


def test_tensorboard_reads_every_value_and_the_settings(run_info):
    tracker = log_run("tensorboard", run_info, ROWS)
    assert readers.tensorboard(run_info.folder) == as_float32(readers.expected(ROWS))
    assert tracker.location == f"tensorboard --logdir {run_info.folder}/tensorboard"
    [file] = (run_info.folder / "tensorboard").iterdir()
    assert json.dumps(run_info.settings, indent=2).encode() in file.read_bytes()


def test_tensorboards_own_reader_agrees(run_info):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_run("tensorboard", run_info, ROWS)
    log_run("tensorboard", run_info, ROWS[:2])
    reader = accumulator.EventAccumulator(str(run_info.folder / "tensorboard"))
    reader.Reload()
    found = {tag: reader.Scalars(tag) for tag in reader.Tags()["scalars"]}
    assert sorted(found) == ["train/loss", "train/num_tokens", "train/rewards/chosen"]
    assert [(e.step, e.value) for e in found["train/num_tokens"]] == [(1, 17), (2, 34)]


def test_a_running_tensorboard_drops_the_values_of_deleted_files(run_info):
    """The new event file begins with SessionLog.START."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    log_run("tensorboard", run_info, ROWS)
    [file] = (run_info.folder / "tensorboard").iterdir()
    start = Event(session_log=SessionLog(status=SessionLog.START))
    assert start.SerializeToString()[-4:] in file.read_bytes()[:120]


def test_a_value_is_on_the_disk_when_the_next_step_begins(run_info):
    tracker = open_tracker("tensorboard", run_info)
    tracker.log(ROWS[0])
    assert readers.tensorboard(run_info.folder) == as_float32(readers.expected(ROWS[:1]))
    tracker.close(completed=False)


def test_wandb_gets_every_value_and_the_settings_and_nothing_about_the_machine(run_info, offline):
    tracker = log_run("wandb", run_info, ROWS)
    found = readers.wandb(run_info.folder)
    assert sorted(found) == sorted(readers.expected(ROWS))
    records = list(readers.wandb_records(run_info.folder))
    [run] = [record.run for record in records if record.HasField("run")]
    assert (run.run_id, run.display_name, run.project) == (
        "0123456789abcdef", "a name", "a-project",
    )  # fmt: skip
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    config.pop("_wandb")
    assert config == run_info.settings
    kinds = {record.WhichOneof("record_type") for record in records}
    assert kinds & {"environment", "files", "stats", "output", "output_raw", "alert"} == set()
    everything = b"".join(record.SerializeToString() for record in records)
    for private in (os.uname().nodename, str(run_info.folder), sys.executable, os.getcwd()):
        assert private.encode() not in everything
    assert tracker.location.startswith(f"wandb sync {run_info.folder}/wandb/offline-run-")


def test_wandb_plots_over_the_optimizer_step(run_info, offline):
    log_run("wandb", run_info, ROWS)
    metrics = [r.metric for r in readers.wandb_records(run_info.folder) if r.HasField("metric")]
    assert {(m.name, m.glob_name, m.step_metric) for m in metrics} == {
        ("train/global_step", "", ""), ("", "*", "train/global_step"),
    }  # fmt: skip


def test_rows_that_wandbs_server_has_are_not_logged_again(run_info, offline):
    """The server has the rows below its own step; an evaluation row takes a step of its own."""
    tracker: Any = open_tracker("wandb", run_info)
    tracker._run._starting_step = 5  # the training row of step 2 is there, its evaluation is not
    for row in ROWS:
        tracker.log(row)
    tracker.close(completed=True)
    offline.teardown()
    assert sorted(readers.wandb(run_info.folder)) == sorted(readers.expected(ROWS[2:]))


def test_an_interrupted_run_is_marked_as_failed_in_wandb(run_info, offline):
    log_run("wandb", run_info, ROWS, completed=False)
    records = readers.wandb_records(run_info.folder)
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_restarted_run_has_every_row_once(run_info, offline, name):
    log_run(name, run_info, ROWS[:3], completed=False)
    log_run(name, run_info, ROWS)
    found = sorted(getattr(readers, name)(run_info.folder))
    wanted = sorted(readers.expected(ROWS))
    assert found == (as_float32(wanted) if name == "tensorboard" else wanted)


IN_TRACKIO = """
from dataclasses import replace
from pathlib import Path
from mlx_dpo.trackers.base import RunInfo
from tests.trackers.test_trackers import ROWS, log_run
run_info = RunInfo(id="0123456789abcdef", name="run", project=None, folder=Path("run"),
                   settings={"beta": 0.5})
log_run("trackio", replace(run_info, id="another"), ROWS)
log_run("trackio", run_info, ROWS[:3], completed=False)
log_run("trackio", run_info, ROWS)
"""


def test_trackio_gets_every_row_once_and_other_runs_stay_unchanged(tmp_path, monkeypatch):
    """Run in a subprocess, because trackio chooses its folder when it is imported."""
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
from mlx_dpo.trackers import open_tracker
from mlx_dpo.trackers.base import OpenTrackers, RunInfo
tracker = open_tracker("trackio", RunInfo(
    id="0123456789abcdef", name="run", project=None, folder=Path("run"), settings={},
    last_logged_step=2))
open_trackers = OpenTrackers([tracker])
for step in range(1, 5):
    open_trackers.log({"step": step, "loss": 1.0})
print(tracker.location, [entry["step"] for entry in tracker._run._queued_logs])
open_trackers.close(completed=True)
print(*open_trackers.warnings)
"""


def test_trackios_server_gets_the_missing_rows_and_lost_rows_are_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9/?write_token=sesame")
    program = [sys.executable, "-c", ON_A_SERVER]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    location, warning = done.stdout.splitlines()
    assert location == "http://127.0.0.1:9/ [3, 4]"  # without the password
    assert warning.startswith("trackio: Some logs could not be sent to the remote server")


def test_other_runs_in_the_same_folder_stay_unchanged(run_info, offline):
    other = run_info.folder / "wandb" / "offline-run-20260101_000000-another"
    other.mkdir(parents=True)
    log_run("wandb", run_info, ROWS)
    assert other.is_dir()


def test_a_run_continues_after_wandbs_process_died(run_info, offline):
    open_trackers = OpenTrackers(
        [open_tracker(name, run_info) for name in ("wandb", "tensorboard")]
    )
    open_trackers.log(ROWS[0])
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())],
                              capture_output=True, text=True).stdout.splitlines()  # fmt: skip
    [core] = [int(line.split()[0]) for line in children if "wandb-core" in line]
    os.kill(core, signal.SIGKILL)
    os.waitid(os.P_PID, core, os.WEXITED | os.WNOWAIT)
    for row in ROWS[1:]:
        open_trackers.log(row)
    open_trackers.close(completed=True)
    [warning] = open_trackers.warnings
    assert warning.startswith("wandb: logging stopped at step ")
    assert warning.endswith("; the run continues, and metrics.jsonl has every row")
    assert readers.tensorboard(run_info.folder) == as_float32(readers.expected(ROWS))


class FullDisk:
    """A tracker whose disk is full after two rows."""

    name, location = "full", "nowhere"

    def __init__(self):
        self.rows, self.completed = [], []

    def log(self, row):
        if len(self.rows) == 2:
            raise OSError(28, "No space left on device")
        self.rows.append(row)

    def close(self, *, completed):
        self.completed.append(completed)
        raise OSError(28, "No space left on device")

    @staticmethod
    def library_errors():
        return (OSError,)


def test_a_failing_tracker_is_closed_with_one_warning(run_info):
    full, other = FullDisk(), open_tracker("tensorboard", run_info)
    open_trackers = OpenTrackers([full, other])
    for row in ROWS:
        open_trackers.log(row)
    open_trackers.close(completed=True)
    open_trackers.close(completed=True)
    assert open_trackers.warnings == [
        "full: logging stopped at step 2 (No space left on device); the run continues, and "
        "metrics.jsonl has every row"
    ]
    assert (full.rows, full.completed) == (ROWS[:2], [False])
    assert readers.tensorboard(run_info.folder) == as_float32(readers.expected(ROWS))


def test_a_failure_at_the_end_is_a_warning():
    full = FullDisk()
    open_trackers = OpenTrackers([full])
    open_trackers.log(ROWS[0])
    open_trackers.close(completed=True)
    assert full.completed == [True]
    assert open_trackers.warnings == [
        "full: the last rows may be missing (No space left on device); metrics.jsonl has every row"
    ]


def test_any_other_exception_of_a_tracker_is_raised():
    class Faulty(FullDisk):
        def log(self, row):
            raise KeyError("a bug of ours")

    with pytest.raises(KeyError):
        OpenTrackers([Faulty()]).log(ROWS[0])


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, name):
    library = TRACKERS[name].library

    def import_missing(module):
        assert module == library
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(trackers, "import_module", import_missing)
    with pytest.raises(ConfigError) as error:
        check_tracker(name)
    assert str(error.value) == (
        f"`report_to` {name}: `{library}` is not installed; pip install 'mlx-dpo[{name}]'"
    )


def test_a_broken_library_is_reported_with_the_reason(monkeypatch):
    def import_broken(module):
        raise ImportError("cannot import name 'x' from 'google.protobuf'")

    monkeypatch.setattr(trackers, "import_module", import_broken)
    with pytest.raises(ConfigError, match=r"cannot be loaded \(cannot import name 'x' from"):
        check_tracker("tensorboard")


def test_a_missing_login_to_wandb_is_reported_before_the_run_starts(tmp_path, monkeypatch, offline):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError) as error:
        check_tracker("wandb")
    assert str(error.value) == (
        "`report_to` wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline to log "
        "locally"
    )


@pytest.mark.slow  # it tries for ten seconds
def test_an_unreachable_server_is_reported_before_the_run_starts(monkeypatch, offline):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(ConfigError) as error:
        check_tracker("wandb")
    assert str(error.value).startswith("`report_to` wandb: ")
    assert "\n" not in str(error.value)


def test_offline_no_login_is_needed(offline):
    check_tracker("wandb")
    check_tracker("tensorboard")


def test_a_missing_login_to_swanlab_is_reported(monkeypatch, tmp_path):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path))
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    monkeypatch.setenv("SWANLAB_MODE", "online")
    with pytest.raises(ConfigError, match="swanlab: not logged in; run `swanlab login`, or set"):
        check_tracker("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    check_tracker("swanlab")


def test_swanlab_leaves_the_ctrl_c_handler_of_this_program(run_info, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    before = signal.getsignal(signal.SIGINT)
    tracker = open_tracker("swanlab", run_info)
    assert signal.getsignal(signal.SIGINT) is before
    for row in ROWS:
        tracker.log(row)
    signal.signal(signal.SIGINT, lambda *_: None)
    handler = signal.getsignal(signal.SIGINT)
    tracker.close(completed=True)
    assert signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, before)
    assert sorted(readers.swanlab(run_info.folder)) == sorted(readers.expected(ROWS))


def test_a_project_name_that_swanlab_refuses_is_reported(run_info, monkeypatch):
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    with pytest.raises(ConfigError) as error:
        open_tracker("swanlab", replace(run_info, project="no spaces here"))
    assert str(error.value).startswith("`report_to` swanlab: cannot start (")
    assert str(error.value).endswith("fix it, or continue with --resume --report-to none")


def test_no_library_is_imported_for_a_run_without_trackers():
    """mlx-lm itself imports wandb and swanlab if they are installed."""
    program = (
        "import sys, mlx_dpo.saved_runs\n"
        "sys.exit(', '.join({'tensorboardX', 'trackio'} & sys.modules.keys()) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
