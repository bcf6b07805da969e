"""The live bar in a pseudo-terminal of three widths: with a warning, an evaluation and Ctrl-C."""

import re

import pytest

from tests.cli.terminal import TerminalSession

PROGRAM = """
import signal, sys, time
from mlx_dpo.cli.output import print_warning
from mlx_dpo.reporting.terminal.console import make_console
from mlx_dpo.reporting.terminal.steps import show_steps

step = {"loss": 0.5, "rewards/margins": 0.1, "rewards/accuracies": 0.5, "learning_rate": 5e-6,
        "tokens_per_second": 1234.5, "peak_memory_gb": 1.25}
evaluation = {"step": 3, "eval_loss": 0.25, "eval_rewards/margins": 1.0,
              "eval_rewards/accuracies": 0.75}
signals = []
with show_steps(make_console(), total=30, done=0, every=1) as bar:
    def stop(*_):
        signals.append(1)
        bar.show_note("Saving after this step")
    signal.signal(signal.SIGINT, stop)
    for number in (1, 2, 3):
        bar.show(step | {"step": number})
        time.sleep(0.3)  # the bar is drawn several times in between
        if number == 1:
            print_warning("the policy has hardly moved")
    bar.show(evaluation)
    while not signals:
        time.sleep(0.05)
    time.sleep(0.6)
"""


class ProgramSession(TerminalSession):
    program = PROGRAM


def screen_lines(output, columns):
    """Return the lines on a terminal after it received `output`, without empty ones."""
    cells, row, column = {}, 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\s\S]", output):
        if token == "\n":
            row, column = row + 1, 0
        elif token == "\r":
            column = 0
        elif token.endswith("A") and len(token) > 1:
            row -= int(token[2:-1] or 1)
        elif token.endswith("K") and len(token) > 1:
            cells = {place: char for place, char in cells.items() if place[0] != row}
        elif len(token) == 1:
            if column == columns:
                row, column = row + 1, 0
            cells[row, column] = token
            column += 1
    rows = [
        "".join(cells.get((number, place), " ") for place in range(columns)).rstrip()
        for number in range(max(r for r, _ in cells) + 1)
    ]
    return [line for line in rows if line]


@pytest.mark.parametrize(
    ("columns", "last"), [(80, "1,234 tok/s"), (100, "mean of 3 steps"), (140, "1.25 GB")]
)
def test_the_bar_stays_one_bar_whatever_is_printed_and_typed(columns, last):
    session = ProgramSession(TERM="xterm", NO_COLOR="1", COLUMNS=str(columns))
    try:
        session.resize(columns)
        session.until("at step 3")
        session.type("\x03")
        session.until("Saving after this step")
        assert session.exit_code() == 0, session.output
    finally:
        session.close()
    warning, evaluation, bar, train = screen_lines(session.output, columns)
    assert warning == "Warning: the policy has hardly moved"
    assert evaluation.startswith("held out after step 3: loss 0.2500")
    assert bar.startswith("step 3/30 ") and len(bar) == columns - 3
    assert " elapsed, " in bar and bar.endswith(" left")
    assert train.startswith("train     loss 0.5000  margin +0.100") and train.endswith(last)
