"""Phases on stderr: lines in a log, a spinner that disappears at a terminal."""

import io
import sys

import pytest

from mlx_dpo.phases import announce, paused, phase, shown_on
from mlx_dpo.reporting.terminal.console import StatusConsole, make_console
from mlx_dpo.reporting.terminal.status import StatusLines, StatusSpinner, status_on_stderr


def log_console():
    return StatusConsole(file=io.StringIO(), force_terminal=False, soft_wrap=True)


def terminal_console(width=80):
    return StatusConsole(
        file=io.StringIO(), force_terminal=True, width=width, color_system=None, _environ={}
    )


def run_phase(clock, total, seconds, items=1):
    console = log_console()
    with shown_on(StatusLines(console, clock)), phase("Scoring", total, unit="rows") as advance:
        for _ in range(total // items):
            clock.now += seconds
            advance(items)
    return console.file.getvalue().splitlines()


def test_a_log_has_a_line_before_a_phase_and_one_at_every_tenth(clock):
    lines = run_phase(clock, total=200, seconds=2)
    assert lines[0] == "Scoring: 200 rows…"
    assert lines[1] == "Scoring: 20/200 rows (10%), 0:40 elapsed, 6:00 left"
    assert lines[-1] == "Scoring: 200/200 rows (100%), 6:40 elapsed"
    assert len(lines) == 11


def test_a_phase_of_few_items_has_a_line_for_each(clock):
    assert len(run_phase(clock, total=3, seconds=60)) == 4


def test_a_fast_phase_has_no_line_within_a_second_of_the_last(clock):
    """Ten lines in half a second would hide the lines that matter."""
    assert run_phase(clock, total=1000, seconds=0.0005) == ["Scoring: 1,000 rows…"]


def test_the_line_comes_before_the_work(clock):
    console = log_console()
    with shown_on(StatusLines(console, clock)), phase("Loading model m"):
        assert console.file.getvalue() == "Loading model m…\n"


def test_a_phase_of_unknown_length_has_a_line_every_half_minute(clock):
    console = log_console()
    with shown_on(StatusLines(console, clock)), phase("Reading", unit="rows") as advance:
        for _ in range(100):
            clock.now += 1
            advance(1000)
    lines = console.file.getvalue().splitlines()
    assert lines[:2] == ["Reading…", "Reading: 30,000 rows, 0:30 elapsed"]
    assert len(lines) == 4


def test_a_short_phase_within_a_counted_one_has_no_line_and_a_long_one_has(clock):
    console = log_console()
    with shown_on(StatusLines(console, clock)), phase("Judging", 2):
        with phase("Generating", 4, unit="answers") as advance:
            clock.now += 9
            advance(2)
        assert console.file.getvalue() == "Judging: 2 pairs…\n"
        with phase("Generating", 4, unit="answers") as advance:
            clock.now += 11
            advance(2)
    assert "Generating: 2/4 answers (50%), 0:11 elapsed" in console.file.getvalue()


def test_lines_have_no_carriage_return_and_no_escape_code(clock, monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("MLX_DPO_STATUS")
    with status_on_stderr(), phase("Loading\x1b[31m", 2) as advance:
        advance(2)
    assert "Loading" in stderr.getvalue()
    assert not {"\r", "\x1b"} & set(stderr.getvalue())


def test_a_variable_turns_the_status_off(capsys, monkeypatch):
    monkeypatch.setenv("MLX_DPO_STATUS", "0")
    with status_on_stderr(), phase("Loading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_without_a_display_nothing_is_shown(capsys):
    announce("Importing")
    with phase("Loading", 2) as advance, paused():
        advance(1)
    assert capsys.readouterr() == ("", "")


def shown_line(spinner, console):
    separate = terminal_console(console.width)
    with separate.capture() as capture:
        separate.print(spinner._render())
    return capture.get().strip()


def test_a_terminal_shows_count_and_times_of_the_phase(clock):
    console = terminal_console()
    spinner = StatusSpinner(console, clock)
    with shown_on(spinner), phase("Evaluating", 50) as advance:
        advance(10)
        assert shown_line(spinner, console).endswith(" 10/50 pairs")
        clock.now += 5
        assert shown_line(spinner, console).endswith("10/50 pairs 0:05 elapsed, 0:20 left")


def test_the_line_of_a_terminal_is_never_wider_than_the_terminal(clock):
    console = terminal_console(width=40)
    spinner = StatusSpinner(console, clock)
    with shown_on(spinner), phase("Loading model " + "x" * 90, 1000) as advance:
        advance(10)
        clock.now += 5
        assert len(shown_line(spinner, console)) <= 40


def test_the_innermost_phase_is_shown_and_then_the_outer_one_again(clock):
    console = terminal_console()
    spinner = StatusSpinner(console, clock)
    with shown_on(spinner):
        announce("Importing MLX")
        assert "Importing MLX" in shown_line(spinner, console)
        with phase("Fusing"):
            with phase("Loading"):
                assert "Loading" in shown_line(spinner, console)
            assert "Fusing" in shown_line(spinner, console)
        assert shown_line(spinner, console) == ""


def test_a_phase_within_a_counted_one_stands_behind_its_count(clock):
    console = terminal_console(120)
    spinner = StatusSpinner(console, clock)
    with shown_on(spinner), phase("Judging", 4) as advance:
        advance(1)
        with phase("Generating", 6, unit="answers"):
            assert shown_line(spinner, console).endswith("1/4 pairs Generating 0/6 answers")


def test_output_removes_the_line_first_and_an_announcement_for_good(clock):
    console = terminal_console()
    spinner = StatusSpinner(console, clock)
    with shown_on(spinner):
        announce("Importing")
        with paused():
            assert spinner._live is None
        assert spinner._live is None
        with phase("Loading"):
            with paused(), paused():
                assert spinner._live is None
            assert spinner._live is not None
    assert spinner._live is None


def test_results_are_printed_while_no_line_is_on_the_terminal(clock, monkeypatch):
    spinner, states = StatusSpinner(terminal_console(), clock), []

    class Output(io.StringIO):
        def write(self, text):
            states.append(spinner._live is None)
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Output())
    with shown_on(spinner), phase("Loading"):
        make_console().print("result")
    assert states and all(states)


@pytest.mark.parametrize("title", ["[b]:car:[/b]", "\x1b]0;\x9b2J"])
def test_the_title_of_a_phase_has_no_effect_on_the_terminal(clock, title):
    console = terminal_console()
    spinner = StatusSpinner(console, clock)
    with shown_on(spinner), phase(title, 2):
        shown = shown_line(spinner, console)
    assert ("[b]:car:[/b]" if title[0] == "[" else r"\x1b]0;\x9b2J") in shown


def test_the_cursor_stays_visible(clock):
    """A killed program cannot show it again."""
    console = terminal_console()
    with shown_on(StatusSpinner(console, clock)), phase("Loading"):
        pass
    assert "\x1b[?25l" not in console.file.getvalue()


def test_a_phase_of_another_thread_may_end_after_the_display(clock):
    display = StatusSpinner(terminal_console(), clock)
    with display.show("Work", None, "pairs"):
        display.close()
