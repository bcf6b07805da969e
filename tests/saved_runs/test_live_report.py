"""A live report: what it says of a run at each moment, and that it sends only what is new."""

import fcntl
import json
import shutil

import pytest

from mlx_dpo.errors import ConfigError, RunError
from mlx_dpo.io.checksums import to_checked_line
from mlx_dpo.reporting.metrics_log import read_metrics
from mlx_dpo.reporting.samples import EvaluationSamples, Sample, SampledText, SamplesLog
from mlx_dpo.runs.folder import RunPaths, read_record, write_record
from mlx_dpo.saved_runs import live_report
from mlx_dpo.saved_runs.live_report import LiveReport, ReportServer


class Training:
    """A run folder that is written step by step, as a trainer would."""

    def __init__(self, trained, folder):
        self.finished = RunPaths(trained / "run")
        self.all_rows = read_metrics(self.finished.metrics)
        self.paths = RunPaths(folder)
        self.lock = None

    def start(self, **changes):
        self.paths.folder.mkdir(exist_ok=True)
        self.lock = self.paths.lock.open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        record = read_record(self.finished) | {"state": "unfinished", "evaluation": None}
        self.record = record | {"verdict": None, "warnings": []} | changes
        write_record(self.paths, self.record)

    def write_rows(self, rows, mode="a"):
        with self.paths.metrics.open(mode) as file:
            file.write("".join(map(to_checked_line, rows)))

    def stop(self):
        self.lock.close()


@pytest.fixture
def training(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(live_report, "ACTIVE_SECONDS", 0.0)  # only the lock shows who trains
    training = Training(trained, tmp_path / "run")
    yield training
    if training.lock is not None:
        training.stop()


def status_of(report):
    report.update("")
    [status] = report._statuses
    return status.kind, status.text


def test_every_state_of_a_run_is_named(training):
    """Expected remaining time: 10 steps of 50 tokens at 25 tokens per second are 20 s."""
    folder = str(training.paths.folder)
    report = LiveReport([folder])
    assert status_of(report) == ("waiting", f"Waiting for a run in {folder}")
    training.paths.folder.mkdir()
    training.lock = training.paths.lock.open("w")
    fcntl.flock(training.lock, fcntl.LOCK_EX)
    assert status_of(report) == ("waiting", "Loading the model and the pairs")
    training.stop()
    training.start(steps=12)
    assert status_of(report)[1].startswith("Waiting for the first of 12 steps")
    first = next(row for row in training.all_rows if "eval_loss" not in row)
    rows = [first | {"step": n, "num_tokens": 50 * n, "tokens_per_second": 25} for n in (1, 2)]
    training.write_rows(rows)
    assert status_of(report) == ("training", "Training: step 2 of 12, about 0:20 left")
    training.stop()
    command = f"mlx-dpo train --resume --output {folder}"
    interrupted = ("interrupted", f"Interrupted after step 2 of 12; resume with: {command}")
    assert status_of(report) == interrupted
    write_record(training.paths, training.record | {"state": "finished", "steps": 2})
    assert status_of(report) == ("finished", "Finished: 2 steps, in 0:04")
    training.paths.record.write_text("{")
    kind, text = status_of(report)
    assert kind == "failed" and str(training.paths.record) in text and "\n" not in text


def test_the_remaining_time_has_the_time_of_evaluations_as_watched(training, monkeypatch):
    """Two steps in 30 s on the clock are 15 s per step, whatever the rows say of the steps."""
    clock = iter([100.0, 130.0])
    monkeypatch.setattr(live_report, "monotonic", lambda: next(clock))
    training.start(steps=10)
    row = next(row for row in training.all_rows if "eval_loss" not in row)
    rows = [row | {"step": n, "num_tokens": 50 * n, "tokens_per_second": 25} for n in (1, 2, 3)]
    report = LiveReport([str(training.paths.folder)])
    training.write_rows(rows[:1])
    assert status_of(report)[1] == "Training: step 1 of 10"
    training.write_rows(rows[1:])
    assert status_of(report)[1] == "Training: step 3 of 10, about 1:45 left"


def test_a_stop_of_the_training_process_shows_at_once(training):
    """Its lock is still held then."""
    training.start()
    training.write_rows(training.all_rows[:2])
    report = LiveReport([str(training.paths.folder)])
    assert status_of(report)[0] == "training"
    report.is_over.set()
    assert status_of(report)[0] == "interrupted" and report.has_sent_last.is_set()


def points(page, news):
    """Apply an update to the points of a page, as its script does."""
    for run in news["restarted"]:
        for key in [key for key in page if key[1] == run]:
            del page[key]
    for line in news["lines"]:
        key = line["chart"], line["run"], line["completion"], line["heldOut"]
        old = page.get(key, [])
        page[key] = old[: line["start"]] + list(zip(line["x"], line["y"], strict=True))
    return page


def test_an_update_has_only_the_new_rows_and_parts(training):
    training.start()
    rows = training.all_rows
    report, page = LiveReport([str(training.paths.folder)]), {}
    training.write_rows(rows[:3])
    first = report.update("")
    assert set(first["parts"]) == {"summary", "samples", "evaluations", "settings"}
    points(page, first)
    again = report.update(first["cursor"])
    assert again["lines"] == [] and again["parts"] == {} and again["restarted"] == []
    training.write_rows(rows[3:4])
    second = report.update(again["cursor"])
    assert {len(line["x"]) for line in second["lines"]} == {1}
    assert {line["start"] for line in second["lines"] if line["chart"] == "Loss"} == {3}
    assert set(second["parts"]) == {"summary"}
    points(page, second)
    # A line that is not complete yet is not a row, and is not lost.
    text = to_checked_line(rows[4])
    with training.paths.metrics.open("a") as file:
        file.write(text[:40])
        file.flush()
        assert report.update(second["cursor"])["lines"] == []
        file.write(text[40:])
    points(page, report.update(second["cursor"]))
    assert page == points({}, LiveReport([str(training.paths.folder)]).update(""))


def test_a_line_is_smoothed_in_every_update_or_in_none(training):
    """The first trailing means equal the values: the page still needs them."""
    training.start(steps=60)
    row = next(row for row in training.all_rows if "eval_loss" not in row)
    training.write_rows([row | {"step": 1}])
    report = LiveReport([str(training.paths.folder)])
    first = report.update("")
    training.write_rows([row | {"step": 2, "loss": row["loss"] + 1}])
    second = report.update(first["cursor"])
    for news, expected in ((first, [row["loss"]]), (second, [row["loss"] + 0.5])):
        [loss] = [line for line in news["lines"] if line["chart"] == "Loss"]
        assert loss["smoothed"] == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_is_drawn_from_its_beginning(training):
    """Step 4 was lost in a crash, and is computed again with another value."""
    training.start()
    rows = [row for row in training.all_rows if "eval_loss" not in row]
    training.write_rows(rows[:4])
    report, page = LiveReport([str(training.paths.folder)]), {}
    news = report.update("")
    points(page, news)
    training.write_rows([*rows[:3], rows[3] | {"loss": 0.25}, *rows[4:6]], "w")
    news = report.update(news["cursor"])
    assert news["restarted"] == [0]
    points(page, news)
    assert [x for x, _ in page["Loss", 0, "", False]] == [1, 2, 3, 4, 5, 6]
    assert page["Loss", 0, "", False][3] == (4, 0.25)
    shutil.rmtree(training.paths.folder)
    news = report.update(news["cursor"])
    assert points(page, news) == {} and "Waiting for a run" in news["parts"]["summary"]


def test_samples_warnings_and_the_verdict_appear_without_new_steps(training):
    training.start()
    training.write_rows(training.all_rows[:2])
    report = LiveReport([str(training.paths.folder)])
    news = report.update("")
    answer = SampledText("<b>Hi</b>", False)
    log = SamplesLog(training.paths.samples)
    log.write(EvaluationSamples(2, (Sample("Hello?", 1, None, answer),)))
    write_record(training.paths, training.record | {"warnings": ["it <falls>"]})
    news = report.update(news["cursor"])
    assert set(news["parts"]) == {"summary", "samples"} and news["lines"] == []
    assert "&lt;b&gt;Hi&lt;/b&gt;" in news["parts"]["samples"]
    assert "it &lt;falls&gt;" in news["parts"]["summary"]


def test_several_runs_have_progress_and_their_differing_settings(training, trained):
    training.start(steps=30)
    training.write_rows(training.all_rows[:3])
    settings = training.record["settings"] | {"learning_rate": 0.25}
    write_record(training.paths, training.record | {"settings": settings})
    report = LiveReport([str(training.paths.folder), str(trained / "run")])
    news = report.update("")
    assert news["progress"] == 10  # of the run that trains
    assert {line["run"] for line in news["lines"]} == {0, 1}
    assert "<code>learning_rate</code></th>" in news["parts"]["summary"]
    assert "<td>0.25</td>" in news["parts"]["summary"]


@pytest.mark.parametrize(
    "cursor",
    ["x", "[]", "{}", '{"runs": [], "parts": {}}', '{"runs": [[1, ["a"]]], "parts": {}}',
     '{"runs": [[1, [-1]]], "parts": {}}', '{"runs": [[1, 2]], "parts": 3}', "[" * 100_000],
)  # fmt: skip
def test_any_other_cursor_gives_everything(training, cursor):
    training.start()
    training.write_rows(training.all_rows[:2])
    report = LiveReport([str(training.paths.folder)])
    assert report.update(cursor) == report.update("")


def test_a_damaged_row_is_named_and_goes_away_with_the_damage(training):
    training.start()
    training.write_rows(training.all_rows[:2])
    good = training.paths.metrics.read_text()
    training.paths.metrics.write_text(good + "{}\n")
    report = LiveReport([str(training.paths.folder)])
    kind, text = status_of(report)
    assert kind == "failed" and "metrics.jsonl:3" in text
    training.paths.metrics.write_text(good)
    assert status_of(report)[0] == "training"


def test_what_cannot_become_a_run_is_refused(trained, tmp_path):
    with pytest.raises(RunError, match="base: a model, not a run folder"):
        LiveReport([str(trained / "base")])
    with pytest.raises(ConfigError, match="is named twice"):
        LiveReport([str(tmp_path), f"{tmp_path}/../{tmp_path.name}"])


def test_the_server_waits_for_the_last_state_only_if_a_page_is_open(training, monkeypatch):
    training.start()
    report = LiveReport([str(training.paths.folder)])
    server = ReportServer(report)
    waits = []
    monkeypatch.setattr(report.has_sent_last, "wait", waits.append)
    with server.running():
        server.finish()
        assert waits == []
        report.update("")
        server.finish()
    assert waits == [live_report.LAST_REQUEST_SECONDS]
    assert json.loads(json.dumps(report.update("")))["isOver"] is True
