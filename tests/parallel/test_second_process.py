"""The second process: order of replies, errors, its end, and what it shares with this process."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import count

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.errors import TrainingError
from mlx_dpo.parallel import second_process
from mlx_dpo.parallel.second_process import SecondProcess, can_compute_two_passes
from mlx_dpo.startup import openblas

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


def squares(numbers):
    for number in numbers:
        value = mx.array(float(number)) ** 2
        mx.eval(value)
        yield {"square": value, "process": os.getpid()}


def test_replies_come_in_order_from_another_process():
    with SecondProcess(squares) as second:
        assert not second.is_running
        second.ask([1, 2, 3])
        second.ask([4])
        replies = [second.receive() for _ in range(4)]
    assert [reply["square"].item() for reply in replies] == [1.0, 4.0, 9.0, 16.0]
    assert {reply["process"] for reply in replies} != {os.getpid()}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint32])
def test_arrays_arrive_bit_for_bit(dtype):
    sent = (100 * mx.random.normal((3, 5), key=mx.random.key(0))).astype(dtype)
    with SecondProcess(lambda array: [array[1:]]) as second:
        second.ask(sent)
        received = second.receive()
    assert received.dtype == dtype
    assert mx.array_equal(received, sent[1:])


def test_replies_larger_than_a_pipe_do_not_block_the_process():
    """It goes on while this process computes and takes no reply."""
    with SecondProcess(lambda count: (np.zeros(10**6) for _ in range(count))) as second:
        second.ask(3)
        time.sleep(0.2)
        second.ask(1)
        assert sum(second.receive().size for _ in range(4)) == 4 * 10**6


def test_an_error_is_raised_here_after_the_replies_before_it():
    def answer(question):
        yield 1
        raise TrainingError("step 3: the loss is not a finite number")

    with SecondProcess(answer) as second:
        second.ask(None)
        assert second.receive() == 1
        with pytest.raises(TrainingError, match=r"^step 3: the loss is not a finite number$"):
            second.receive()


def test_the_death_of_the_process_is_an_error_with_its_cause():
    def answer(question):
        os.kill(os.getpid(), signal.SIGKILL)

    with SecondProcess(answer) as second:
        second.ask(None)
        with pytest.raises(TrainingError, match=r"^the second process of the run ended \(exit cod"):
            second.receive()


def test_leaving_ends_a_process_that_still_computes():
    with pytest.raises(KeyboardInterrupt), SecondProcess(lambda _: [time.sleep(60)]) as second:
        second.ask(None)
        raise KeyboardInterrupt
    assert multiprocessing.active_children() == []


def test_a_question_to_a_dead_process_is_the_same_error():
    """As when memory runs out while this process evaluates between two steps."""
    with SecondProcess(squares) as second:
        second.ask([1])
        second.receive()
        os.kill(second.pid, signal.SIGKILL)
        second._reader.join()
        with pytest.raises(TrainingError, match=r"^the second process of the run ended \(exit cod"):
            second.ask([2])


def test_a_process_that_cannot_begin_is_an_error_with_its_cause(monkeypatch):
    def refuse():
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "fork", refuse)
    with (
        SecondProcess(squares) as second,
        pytest.raises(TrainingError, match=r"cannot begin \(Can"),
    ):
        second.ask([1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_left_to_the_first_process(number):
    """A terminal sends them to both; the handler of the first one would run and print twice."""
    before = signal.signal(number, lambda *_: os.write(2, b"handled"))

    def answer(question):
        yield signal.getsignal(number)

    try:
        with SecondProcess(answer) as second:
            second.ask(None)
            assert second.receive() == signal.SIG_IGN
    finally:
        signal.signal(number, before)


LEFT_OPEN = """
from mlx_dpo.parallel.second_process import SecondProcess
second = SecondProcess(lambda question: [question])
second.ask(1)
print(second.receive())
"""


def test_python_ends_although_a_process_was_not_closed():
    ended = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, timeout=20)
    assert (ended.stdout, ended.returncode) == (b"1\n", 0)


def test_a_process_that_stands_still_is_an_error(monkeypatch):
    """As with work for a stream of the first process, for which it would wait for ever."""
    monkeypatch.setattr(second_process, "STALL_SECONDS", 0.2)
    lazy = mx.array([1.0, 2.0]) + 1

    def answer(question):
        mx.eval(lazy)
        yield lazy

    with SecondProcess(answer) as second:
        second.ask(None)
        with pytest.raises(TrainingError, match=r"\(pid \d+\) does not compute; use OPENBLAS_NUM"):
            second.receive()


def test_a_process_that_computes_for_long_is_waited_for(monkeypatch):
    """As long as its CPU time grows, whatever a busy machine gives it."""
    ticks = count()
    monkeypatch.setattr(second_process, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(second_process, "_cpu_ticks", lambda pid: next(ticks))

    def answer(question):
        time.sleep(0.3)
        yield "done"

    with SecondProcess(answer) as second:
        second.ask(None)
        assert second.receive() == "done"
    assert next(ticks) > 1


def test_peak_memory_includes_what_the_second_process_had_beside():
    def answer(size):
        mx.eval(mx.zeros((size,)))
        yield None

    second_process.reset_peak_memory()
    before = second_process.peak_memory()
    with SecondProcess(answer) as second:
        second.ask(10**6)
        second.receive()
    assert second_process.peak_memory() - before >= 4 * 10**6
    second_process.reset_peak_memory()
    assert second_process.peak_memory() < before + 10**6


def test_openblas_has_half_of_its_threads_in_both_processes_meanwhile(monkeypatch):
    threads = [4]
    monkeypatch.setattr(openblas, "num_threads", lambda: threads[0])
    monkeypatch.setattr(openblas, "set_num_threads", lambda count: threads.__setitem__(0, count))
    with SecondProcess(lambda question: [openblas.num_threads()]) as second:
        with pytest.raises(ValueError), second.sharing_cores():
            second.ask(None)
            assert (threads, second.receive()) == ([2], 2)
            raise ValueError
        assert threads == [4]


@pytest.mark.parametrize(("threads", "possible"), [(0, False), (1, False), (2, True), (8, True)])
def test_two_passes_need_two_threads_of_openblas(threads, possible, monkeypatch):
    monkeypatch.setattr(openblas, "num_threads", lambda: threads)
    assert can_compute_two_passes() is possible


def test_a_daemon_computes_one_pass_after_the_other(monkeypatch):
    """Python forbids it to have children."""
    monkeypatch.setattr(openblas, "num_threads", lambda: 2)
    monkeypatch.setitem(vars(multiprocessing.current_process())["_config"], "daemon", True)
    assert can_compute_two_passes() is False


PARENT = """
import os, signal, threading, time
from mlx_dpo.parallel.second_process import SecondProcess
def answer(question):
    yield os.getpid()
    time.sleep(60)
def ask():
    second.ask(None)
    print(second.receive(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
with SecondProcess(answer) as second:
    CALL
"""


@pytest.mark.parametrize("call", ["ask()", "threading.Thread(target=ask).start()"])
def test_the_process_ends_when_the_first_one_is_killed(call):
    """Otherwise it would hold the lock of the run folder while it computes."""
    program = PARENT.replace("CALL", f"{call}; time.sleep(60)")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    second = int(ended.stdout)
    deadline = time.monotonic() + 10
    while is_running(second):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_process_outlives_the_thread_that_began_it():
    """A web server may ask for each step in another thread."""
    with SecondProcess(squares) as second:
        thread = threading.Thread(target=lambda: second.ask([1]))
        thread.start()
        thread.join()
        second.receive()
        second.ask([2])
        assert second.receive()["square"].item() == 4


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
