import io
import re

import pytest
from rich.table import Table
from rich.text import Text

from mlx_dpo.reporting.console import (
    TerminalConsole,
    final_metrics_table,
    make_console,
    print_label_table,
    show_progress,
    show_steps,
)

STEP = {
    "step": 2, "loss": 0.6931, "rewards/margins": -0.0123, "rewards/accuracies": 0.5,
    "learning_rate": 5e-6, "tokens_per_second": 1234.5, "peak_memory_gb": 1.25,
}  # fmt: skip
EVALUATION = {
    "step": 2, "eval_loss": 0.5, "eval_rewards/margins": 1.0, "eval_rewards/accuracies": 0.75,
    "eval_rewards/chosen": 0.5, "eval_rewards/rejected": -0.5, "eval_logps/chosen": -10.0,
    "eval_logps/rejected": -20.0,
}  # fmt: skip


def plain_console():
    return TerminalConsole(file=io.StringIO(), force_terminal=False, soft_wrap=True)


def terminal_console():
    return TerminalConsole(file=io.StringIO(), force_terminal=True, width=100, no_color=True)


def test_without_a_terminal_every_row_is_a_line():
    console = plain_console()
    with show_steps(console, total=2, done=0, every=1) as steps:
        steps.show(STEP)
        steps.show(EVALUATION)
    assert console.file.getvalue() == (
        "step 2/2  loss 0.6931  margin -0.012  accuracy  50%  lr 5.00e-06  1,234 tok/s  1.25 GB\n"
        "held out after step 2: loss 0.5000  margin +1.000  accuracy 75.0%\n"
    )


def test_lines_are_printed_every_n_steps_and_at_the_end():
    console = plain_console()
    with show_steps(console, total=5, done=0, every=2) as steps:
        for step in range(1, 6):
            steps.show(STEP | {"step": step})
    steps = [line.split()[1] for line in console.file.getvalue().splitlines()]
    assert steps == ["2/5", "4/5", "5/5"]


def test_the_bar_of_a_resumed_run_starts_at_its_step():
    console = terminal_console()
    with show_steps(console, total=4, done=1, every=1) as steps:
        steps.show(STEP)
        steps.show(EVALUATION)
    output = console.file.getvalue()
    assert "2/4" in output
    assert "loss 0.6931" in output
    assert "held out after step 2" in output


@pytest.mark.parametrize(
    ("width", "last"),
    [(60, "loss 0.6931"), (80, "accuracy 50%"), (99, "1,234 tok/s"), (100, "1.25 GB")],
)
def test_the_bar_shows_as_many_metrics_as_fit_and_cuts_none(width, last):
    console = terminal_console()
    console.width = width
    with show_steps(console, total=9999, done=0, every=1) as steps:
        steps.show(STEP)
    output = console.file.getvalue().rpartition("steps ")[2]
    assert "…" not in output and "2/9999 -:--:-- loss 0.6931" in output
    assert output.partition("\n")[0].rstrip().endswith(last)


def test_without_a_terminal_facts_are_lines_and_brackets_are_kept():
    console = plain_console()
    print_label_table(console, [("model", "a [b] c"), ("", "more " * 40)])
    assert console.file.getvalue() == "model         a [b] c\n" + " " * 14 + "more " * 40 + "\n"


def test_progress_is_a_line_without_a_terminal_and_a_bar_on_one():
    console = plain_console()
    with show_progress(console, "reference", total=7) as advance:
        advance(7)
    assert console.file.getvalue() == "reference: 7 pairs\n"
    with show_progress(terminal_console(), "reference", total=7) as advance:
        advance(3)


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


@pytest.mark.parametrize("name", ["[b]:car:[/b]", "\x1b]0;\x9b2J"])
def test_the_description_of_a_progress_bar_has_no_effect(name):
    console = terminal_console()
    with console.capture() as capture, show_progress(console, name, total=2) as advance:
        advance(1)
    output = capture.get()
    assert ("[b]:car:[/b]" if name[0] == "[" else r"\x1b]") in output
    assert not re.search(r"\x1b\]|[\x07\x9b]", output)
