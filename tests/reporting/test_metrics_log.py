import json
import re

import pytest

from mlx_dpo.errors import RunError
from mlx_dpo.reporting.metrics_log import MetricsLog, read_metrics


def lines(path):
    return path.read_text().splitlines()


def test_rows_are_lines_in_the_order_of_writing(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    row = {"step": 1, "loss": 0.1 + 0.2}
    assert log.write(row) is row
    log.write({"step": 2, "loss": 1.0})
    assert [json.loads(line) for line in lines(log.path)] == [row, {"step": 2, "loss": 1.0}]
    assert read_metrics(log.path)[0]["loss"] == 0.1 + 0.2  # floats are written exactly


def test_a_resume_drops_later_steps_and_an_incomplete_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsLog(path, after=2).write({"step": 3, "again": 1})
    assert lines(path) == ['{"step": 1}', '{"step": 2}', '{"step": 3, "again": 1}']


def test_the_last_evaluation_of_a_step_is_returned(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "loss": 1.0})
    assert log.evaluation_at(1) is None
    log.write({"step": 1, "eval_loss": 0.5})
    log.write({"step": 2, "loss": 1.0})
    assert log.evaluation_at(1) == {"step": 1, "eval_loss": 0.5}
    assert log.evaluation_at(2) is None


@pytest.mark.parametrize("line", [b'{"step": 2, "lo', b"[1]", b"", b'{"loss": 1}', b"\xff\xfe"])
def test_a_damaged_line_is_an_error_with_its_location(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(RunError, match=rf"^{re.escape(str(path))}:2: not a metrics row \(found"):
        read_metrics(path)


def test_a_missing_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []
