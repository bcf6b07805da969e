"""The steps of a run: a live bar of three widths, and lines in a log."""

import io

import pytest

from mlx_dpo.phases import phase
from mlx_dpo.reporting.terminal.console import OutputConsole
from mlx_dpo.reporting.terminal.steps import StepBar, StepTimer, show_steps

STEP = {
    "step": 2, "loss": 0.6931, "rewards/margins": -0.0123, "rewards/accuracies": 0.5,
    "learning_rate": 5e-6, "tokens_per_second": 1234.5, "peak_memory_gb": 1.25,
}  # fmt: skip
EVALUATION = {
    "step": 2, "eval_loss": 0.5, "eval_rewards/margins": 1.0, "eval_rewards/accuracies": 0.75,
}  # fmt: skip


def log_console():
    return OutputConsole(file=io.StringIO(), force_terminal=False, soft_wrap=True)


def terminal_console(width=100):
    return OutputConsole(
        file=io.StringIO(), force_terminal=True, width=width, color_system=None, _environ={}
    )


def make_bar(clock, width, total=4, done=0):
    console = terminal_console(width)
    return StepBar(console, StepTimer(total, done, clock), total, done)


def shown_lines(bar):
    console = terminal_console(bar._console.width)
    with console.capture() as capture:
        console.print(bar.render())
    return [line.rstrip() for line in capture.get().splitlines()]


def test_in_a_log_every_row_is_a_line_with_elapsed_and_remaining_time(clock):
    console = log_console()
    with show_steps(console, total=4, done=0, every=1, clock=clock) as steps:
        clock.now = 60
        steps.show(STEP)
        steps.show(EVALUATION)
        clock.now = 140
        steps.show(STEP | {"step": 4})
    row = "loss 0.6931  margin -0.012  accuracy  50%  lr 5.00e-06  1,234 tok/s  1.25 GB"
    assert console.file.getvalue() == (
        f"step 2/4  {row}  1:00 elapsed, 1:00 left\n"
        "held out after step 2: loss 0.5000  margin +1.000  accuracy 75.0%\n"
        f"step 4/4  {row}  2:20 elapsed\n"
    )


def test_lines_are_printed_every_n_steps_and_at_the_end():
    console = log_console()
    with show_steps(console, total=5, done=0, every=2) as steps:
        for step in range(1, 6):
            steps.show(STEP | {"step": step})
    steps = [line.split()[1] for line in console.file.getvalue().splitlines()]
    assert steps == ["2/5", "4/5", "5/5"]


def test_the_remaining_time_of_a_resumed_run_counts_only_its_own_steps(clock):
    """The steps before the resume took no time of this process."""
    timer = StepTimer(100, 90, clock)
    clock.now = 50
    assert timer.times(95) == "0:50 elapsed, 0:50 left"


@pytest.mark.parametrize(
    ("width", "last"),
    [
        (60, "accuracy  50%"),
        (80, "1,234 tok/s"),
        (100, "mean of 1 step"),
        (140, "1.25 GB"),
    ],
)
def test_the_bar_shows_as_many_metrics_as_fit_and_cuts_none(clock, width, last):
    bar = make_bar(clock, width)
    bar.show(STEP)
    bar.show(EVALUATION)
    first, train, held_out = shown_lines(bar)
    assert train.startswith("train     loss 0.6931  margin -0.012") and train.endswith(last)
    assert held_out.startswith("held out  loss 0.5000  margin +1.000  accuracy 75.0%")
    assert first.startswith("step 2/4 ") and len(first) == width - 3
    assert max(map(len, (first, train, held_out))) < width - 2  # room for ^C of the terminal


def test_the_bar_shows_means_of_the_last_ten_steps(clock):
    bar = make_bar(clock, 140, total=20)
    for step in range(1, 13):
        bar.show(STEP | {"step": step, "loss": float(step), "learning_rate": step * 1e-6})
    assert "loss 7.5000" in shown_lines(bar)[1]  # of the steps 3 to 12
    assert "lr 1.20e-05" in shown_lines(bar)[1]  # of the last one
    assert "mean of 10 steps" in shown_lines(bar)[1]


def test_a_metric_that_some_steps_lack_is_the_mean_over_the_others(clock):
    bar = make_bar(clock, 140)
    bar.show({key: value for key, value in STEP.items() if key != "rewards/margins"})
    bar.show(STEP)
    assert "margin -0.012" in shown_lines(bar)[1]


def test_the_bar_names_what_runs_between_two_steps_and_the_stop(clock):
    console = terminal_console()
    with show_steps(console, total=4, done=0, every=1, clock=clock) as bar:
        bar.show(STEP)
        with phase("Evaluating", 50) as advance:
            advance(12)
            assert shown_lines(bar)[-1] == "Evaluating 12/50 pairs"
        bar.show_note("Saving after this step")
        assert shown_lines(bar)[-1] == "Saving after this step"
    assert len(shown_lines(bar)) == 2


def test_a_note_writes_nothing_by_itself(clock):
    """A signal handler calls it, perhaps in the middle of another output."""
    bar = make_bar(clock, 80)
    bar.show_note("Saving after this step")
    assert bar._console.file.getvalue() == ""


def test_an_evaluation_is_printed_above_the_bar():
    console = terminal_console()
    with show_steps(console, total=4, done=1, every=1) as steps:
        steps.show(STEP)
        steps.show(EVALUATION)
    assert "held out after step 2: loss 0.5000" in console.file.getvalue()
