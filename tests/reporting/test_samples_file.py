"""The samples file: what is written is read; resumed, damaged and printed samples."""

import json

import pytest
from rich.console import Console

from mlx_dpo.errors import DamagedFileError
from mlx_dpo.reporting.samples import (
    EvaluationSamples,
    Sample,
    SampledText,
    SamplesLog,
    print_samples,
    read_samples,
)
from mlx_dpo.reporting.terminal.console import TerminalConsole

BASE, POLICY = SampledText("Ugh. Paris.", False), SampledText("Of course! Par", True)
FIRST = Sample("What is the capital\nof France?", 1, BASE, POLICY)
SECOND = Sample("And\x1b[31m of Spain?", 2, BASE, BASE)
ALONE = Sample("Hi", 1, None, POLICY)


def item(step):
    return EvaluationSamples(step, (FIRST, SECOND, ALONE))


def test_samples_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert read_samples(path) == []
    log = SamplesLog(path)
    assert log.latest is None
    assert not path.exists()
    for step in (2, 4):
        log.write(item(step))
    assert read_samples(path) == [item(2), item(4)]
    record = json.loads(path.read_text().splitlines()[0])
    assert record["samples"][0] == {
        "prompt": "What is the capital\nof France?",
        "turn": 1,
        "base": {"text": "Ugh. Paris.", "cut": False},
        "policy": {"text": "Of course! Par", "cut": True},
    }
    assert record["samples"][2]["base"] is None


def test_a_resumed_run_ends_with_the_file_of_one_that_was_never_stopped(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    log = SamplesLog(straight)
    for step in (2, 4, 6):
        log.write(item(step))
    log = SamplesLog(resumed)
    for step in (2, 4):
        log.write(item(step))
    with resumed.open("a") as file:
        file.write('{"crc32": "00')  # killed while it wrote
    log = SamplesLog(resumed, after=2)  # the last checkpoint
    assert log.latest == item(2)
    for step in (2, 4, 6):  # the evaluation of step 2 may be repeated
        log.write(item(step))
    assert resumed.read_bytes() == straight.read_bytes()
    SamplesLog(resumed)
    assert not resumed.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace("Paris", "Pari5"),
        lambda line: '{"step": 2}',
        lambda line: '{"step": 2, "samples": [{"prompt": 3}]}',
        lambda line: "nonsense",
        lambda line: json.dumps(
            {k: v for k, v in json.loads(line).items() if k != "crc32"}
        ).replace("Paris", "\\ud800"),
    ],
)
def test_a_damaged_line_is_named_with_a_remedy(tmp_path, change):
    path = tmp_path / "samples.jsonl"
    SamplesLog(path).write(item(2))
    path.write_text(change(path.read_text().rstrip("\n")) + "\n")
    with pytest.raises(DamagedFileError, match=r"samples.jsonl:1: damaged.*delete it"):
        read_samples(path)


def printed(console, limit):
    with console.capture() as capture:
        print_samples(console, item(20), limit=limit)
    return capture.get()


def test_a_log_has_one_line_per_text_without_control_characters():
    assert printed(TerminalConsole(soft_wrap=True), 3).splitlines() == [
        "samples at step 20",
        "  prompt What is the capital\\nof France?",
        "  base   Ugh. Paris.",
        "  policy Of course! Par …",
        "  prompt (turn 2) And\\x1b[31m of Spain?",
        "  base   Ugh. Paris.",
        "  policy (same as base)",
        "  prompt Hi",
        "  policy Of course! Par …",
    ]
    assert "Spain" not in printed(TerminalConsole(soft_wrap=True), 1)


def test_a_terminal_wraps_a_long_text_within_its_column(monkeypatch):
    console = TerminalConsole(force_terminal=True, width=30, color_system=None)
    long = Sample("word " * 200, 1, SampledText("", False), POLICY)
    with console.capture() as capture:
        print_samples(console, EvaluationSamples(1, (long,)), limit=1)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 30
    assert lines[1].startswith("  prompt word")
    assert lines[2].startswith(" " * 9 + "word")
    assert " […] " in " ".join(line.strip() for line in lines)
    assert lines[-2].strip() == "base   (empty)"
    assert isinstance(console, Console)
