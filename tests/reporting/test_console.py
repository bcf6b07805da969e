import io

import pytest
from rich.console import Console

from mlx_dpo.reporting.console import (
    closing_table,
    counting,
    make_console,
    print_facts,
    showing_steps,
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


def plain():
    return Console(file=io.StringIO(), force_terminal=False, soft_wrap=True, highlight=False)


def terminal():
    return Console(
        file=io.StringIO(), force_terminal=True, width=100, no_color=True, highlight=False
    )


def test_a_pipe_gets_one_whole_line_per_step():
    console = plain()
    with showing_steps(console, total=2, done=0, every=1) as steps:
        steps.show(STEP)
        steps.show(EVALUATION)
    assert console.file.getvalue() == (
        "step 2/2  loss 0.6931  margin -0.012  accuracy  50%  lr 5.00e-06  1,234 tok/s  1.25 GB\n"
        "held out after step 2: loss 0.5000  margin +1.000  accuracy 75.0%\n"
    )


def test_lines_come_every_so_many_steps_and_at_the_end():
    console = plain()
    with showing_steps(console, total=5, done=0, every=2) as steps:
        for step in range(1, 6):
            steps.show(STEP | {"step": step})
    shown = [line.split()[1] for line in console.file.getvalue().splitlines()]
    assert shown == ["2/5", "4/5", "5/5"]


def test_a_terminal_gets_a_bar_that_goes_on_where_the_run_does():
    console = terminal()
    with showing_steps(console, total=4, done=1, every=1) as steps:
        steps.show(STEP)
        steps.show(EVALUATION)
    drawn = console.file.getvalue()
    assert "2/4" in drawn
    assert "loss 0.6931" in drawn
    assert "held out after step 2" in drawn


@pytest.mark.parametrize(
    ("width", "last"),
    [(60, "loss 0.6931"), (80, "accuracy 50%"), (99, "1,234 tok/s"), (100, "1.25 GB")],
)
def test_the_bar_shows_the_figures_that_there_is_room_for_and_cuts_none(width, last):
    console = terminal()
    console.width = width
    with showing_steps(console, total=9999, done=0, every=1) as steps:
        steps.show(STEP)
    drawn = console.file.getvalue().rpartition("steps ")[2]
    assert "…" not in drawn and "2/9999 -:--:-- loss 0.6931" in drawn
    assert drawn.partition("\n")[0].rstrip().endswith(last)


def test_facts_are_lines_in_a_pipe_and_keep_brackets():
    console = plain()
    print_facts(console, [("model", "a [b] c"), ("", "more " * 40)])
    assert console.file.getvalue() == "model      a [b] c\n" + " " * 11 + "more " * 40 + "\n"


def test_counting_says_how_many_in_a_pipe_and_draws_on_a_terminal():
    console = plain()
    with counting(console, "reference", total=7) as count:
        count(7)
    assert console.file.getvalue() == "reference: 7 pairs\n"
    with counting(terminal(), "reference", total=7) as count:
        count(3)


def test_the_closing_table_shows_the_means():
    console = plain()
    console.print(closing_table(EVALUATION, title="1,234 held-out pairs"))
    shown = console.file.getvalue()
    assert "1,234 held-out pairs" in shown
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert {"accuracy 75.0%", "margin 1.0000", "log-prob of rejected -20.0000"} <= set(rows)


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert make_console().no_color
