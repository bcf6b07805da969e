import json
import re
import zlib

import pytest

from mlx_dpo.errors import DamagedFileError
from mlx_dpo.reporting.metrics_log import MetricsLog, read_metrics, undamaged_rows


def lines(path):
    return path.read_text().splitlines()


def test_rows_are_lines_in_the_order_of_writing(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    row = {"step": 1, "loss": 0.1 + 0.2}
    assert log.write(row) is row
    log.write({"step": 2, "loss": 1.0})
    first, second = map(json.loads, lines(log.path))
    assert first == {"crc32": f"{zlib.crc32(json.dumps(row)[1:].encode()):08x}", **row}
    assert {"crc32": second.pop("crc32"), **second}.keys() == first.keys()
    assert read_metrics(log.path)[0]["loss"] == 0.1 + 0.2  # floats are written exactly


def test_a_resume_drops_later_steps_and_an_incomplete_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsLog(path, after=2).write({"step": 3, "again": 1})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": 1}]
    assert all(line.startswith('{"crc32": "') for line in lines(path))


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
    with pytest.raises(
        DamagedFileError, match=rf"^{re.escape(str(path))}:2: damaged \(not a metrics row: "
    ):
        read_metrics(path)


def test_a_missing_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_changed_digit_is_not_believed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        log.write({"step": step, "loss": 0.5})
    log.path.write_text(
        log.path.read_text().replace('"step": 2, "loss": 0.5', '"step": 2, "loss": 0.7')
    )
    with pytest.raises(DamagedFileError, match=r"metrics\.jsonl:2: damaged"):
        read_metrics(log.path)
    rows, damage = undamaged_rows(log.path)
    assert [row["step"] for row in rows] == [1] and damage is not None


@pytest.mark.parametrize("line", ['{"crc33": "', '{"crc32":"', '{"step'])
def test_a_line_that_lost_its_checksum_is_damaged(tmp_path, line):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "loss": 0.5})
    log.path.write_text(log.path.read_text().replace('{"crc32": "', line))
    with pytest.raises(DamagedFileError, match=":1: damaged"):
        read_metrics(log.path)


def test_missing_rows_are_named(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "loss": 0.5})
    with pytest.raises(DamagedFileError, match=r"damaged \(1 of 2 rows are left\)"):
        read_metrics(log.path, num_rows=2)
