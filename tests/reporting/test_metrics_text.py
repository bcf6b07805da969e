import io
import re
import sys

import pytest
from rich.table import Table
from rich.text import Text

from mlx_dpo.reporting.metrics_text import final_metrics_table, format_final_metrics
from mlx_dpo.reporting.terminal.console import (
    TerminalConsole,
    make_console,
    make_status_console,
    print_label_table,
)

EVALUATION = {
    "step": 2, "eval_loss": 0.5, "eval_rewards/margins": 1.0, "eval_rewards/accuracies": 0.75,
    "eval_rewards/chosen": 0.5, "eval_rewards/rejected": -0.5, "eval_logps/chosen": -10.0,
    "eval_logps/rejected": -20.0,
}  # fmt: skip


def plain_console():
    return TerminalConsole(file=io.StringIO(), force_terminal=False, soft_wrap=True)


def test_without_a_terminal_facts_are_lines_and_brackets_are_kept():
    console = plain_console()
    print_label_table(console, [("model", "a [b] c"), ("", "more " * 40)])
    assert console.file.getvalue() == "model         a [b] c\n" + " " * 14 + "more " * 40 + "\n"


def test_the_table_of_final_metrics_has_every_metric():
    console = plain_console()
    console.print(final_metrics_table(EVALUATION, title="1,234 held-out pairs"))
    output = console.file.getvalue()
    assert "1,234 held-out pairs" in output
    rows = [" ".join(line.split()) for line in output.splitlines()]
    assert {"accuracy 75.0%", "margin 1.0000", "log-prob of rejected -20.0000"} <= set(rows)


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert make_console().no_color


@pytest.mark.parametrize("make", [make_console, make_status_console])
def test_a_log_is_no_terminal_whatever_the_environment_says(monkeypatch, make):
    """CI sets FORCE_COLOR; live updates of a bar would fill its log."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not make().is_terminal


HOSTILE = "\x1b]0;title\x07 \x9b2J \u202e [bold]name[/bold] :train:"
SHOWN = "\\x1b]0;title\\x07 \\x9b2J \\u202e [bold]name[/bold] :train:"


def hostile_table():
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    return table


@pytest.mark.parametrize(
    "renderable", [HOSTILE, hostile_table(), [HOSTILE]], ids=["text", "table", "list"]
)
@pytest.mark.parametrize("terminal", [True, False])
def test_text_from_outside_has_no_effect_on_the_console(renderable, terminal):
    console = TerminalConsole(
        file=io.StringIO(), force_terminal=terminal, width=200, color_system=None
    )
    with console.capture() as capture:
        console.print(renderable)
    output = capture.get()
    assert SHOWN in output
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e🚆]", output)


def test_a_styled_text_from_outside_has_no_effect_either():
    console = plain_console()
    console.print(Text("a\x1b[31m\x9b2J\u202eb", style="bold"))
    assert console.file.getvalue() == "a\\x1b[31m\\x9b2J\\u202eb\n"


def test_only_a_run_on_ranked_lists_shows_the_margin_of_best_and_worst():
    label = "margin of best and worst of a list"
    assert label not in format_final_metrics(EVALUATION)
    row = EVALUATION | {"eval_rewards/margins_best_worst": 0.25}
    assert format_final_metrics(row)[label] == "0.2500"
