"""Try inputs in a process of their own, which is killed when an input takes too long.

`python -m tests.fuzz.watchdog AREA/INDEX AREA/FIRST-LAST ...` tries inputs and prints what became
of them. With MLX_DPO_FUZZ_FOLDERS=1 the folder of each input is left for inspection.
"""

import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.case import Case

SECONDS = 30  # of processor time for one input; the slowest takes about two
SILENCE = 300.0  # seconds of the clock for one input, which may wait for a busy machine
MEMORY = 8 << 30  # bytes of address space of the process that tries inputs
Outcome = dict[str, str]


def try_inputs(
    names: Sequence[str], material: Path, *, seconds: int = SECONDS, silence: float = SILENCE
) -> Iterator[Outcome]:
    """Yield what became of each input: name, mutation, outcome, and the failure or an empty text.

    Args:
        names: areas and indices such as `pairs/12`.
        material: folder of undamaged files, from `make_material`.
        seconds: processor time that an input may take.
        silence: time of the clock that an input may take.
    """
    waiting = list(names)
    while waiting:
        for outcome in _one_process(waiting, material, seconds, silence):
            waiting.remove(outcome["name"])
            yield outcome


def _one_process(
    names: Sequence[str], material: Path, seconds: int, silence: float
) -> Iterator[Outcome]:
    """Yield outcomes until the process ends; the last is that of an input that ended it."""
    receiver, sender = os.pipe()
    words = [sys.executable, "-m", "tests.fuzz.watchdog", "--child", str(sender), str(seconds)]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*words, str(material), *names],
            pass_fds=[sender],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=child_environment(),
        )
        os.close(sender)
        current: Outcome | None = None
        try:
            for line in _lines(receiver, process, silence):
                current = json.loads(line)
                if "failure" in current:
                    yield current
                    current = None
        finally:
            os.close(receiver)
            process.kill()
            status = process.wait()
        if current is None and status == 0:
            return
        output.seek(0)
        tail = output.read().decode("utf-8", "replace")[-300:]
        if current is None:
            raise AssertionError(f"the process ended between inputs with {status}: {tail}")
        yield current | {"failure": _describe_end(status, tail)}


def child_environment() -> dict[str, str]:
    """Return the environment of a process that tries inputs: no network, one thread."""
    return os.environ | {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


def _describe_end(status: int, tail: str) -> str:
    if status == -signal.SIGXCPU:
        return "took too much processor time"
    if status == -signal.SIGKILL:
        return "waited for too long"
    return f"the process died with {status}: {tail!a}"


def _lines(receiver: int, process: subprocess.Popen[bytes], silence: float) -> Iterator[str]:
    """Yield lines until the process ends; kill it when it is silent for too long."""
    patience = SILENCE  # for the imports
    buffer = b""
    while True:
        if not select.select([receiver], [], [], patience)[0]:
            process.kill()
            return
        if not (piece := os.read(receiver, 1 << 16)):
            process.wait()
            return
        *lines, buffer = (buffer + piece).split(b"\n")
        yield from (line.decode() for line in lines)
        patience = silence


def run_child(sender: int, seconds: int, material: Path, names: Sequence[str]) -> None:
    """Try inputs in this process, and write a line before and after each to a pipe."""
    from tests.fuzz.areas import AREAS
    from tests.fuzz.case import Case

    if sys.platform == "linux":  # macOS does not enforce it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with os.fdopen(sender, "w") as stream:

        def write(**outcome: str) -> None:
            stream.write(json.dumps(outcome) + "\n")
            stream.flush()

        for name in names:
            area, _, index = name.partition("/")
            announce = partial(_announce, write, name)
            announce("")
            _limit_time(seconds)
            case = Case(area, int(index), material, announce)
            write(name=name, **_try_one(case, AREAS[area].run))


def _limit_time(seconds: int) -> None:
    """End this process when it has used so much more processor time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _announce(write: Callable[..., None], name: str, mutation: str) -> None:
    write(name=name, mutation=mutation[:500])


def _try_one(case: "Case", run: "Callable[[Case], None]") -> Outcome:
    from tests.fuzz.case import FailedInputError, describe

    folder = tempfile.mkdtemp(prefix="mlx-dpo-fuzz-")
    os.chdir(folder)
    os.environ["MLX_DPO_CACHE"] = "cache"
    failure = ""
    began = time.process_time()
    try:
        run(case)
    except FailedInputError as error:
        failure = str(error)
    except Exception as error:  # a fault of the harness, which must not end the whole suite
        failure = f"the harness itself: {describe(error)}"
    finally:
        os.chdir("/")
        if not os.environ.get("MLX_DPO_FUZZ_FOLDERS"):
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "mutation": "; ".join(case.mutations)[:500],
        "outcome": " | ".join(case.outcomes),
        "failure": failure,
        "seconds": f"{time.process_time() - began:.2f}",
        "folder": folder,
    }


def write_material(folder: Path) -> Path:
    """Write the undamaged files in a process of its own, and return their folder."""
    program = (
        "import sys; from pathlib import Path; from tests.fuzz.material import make_material; "
        "make_material(Path(sys.argv[1]))"
    )
    words = [sys.executable, "-c", program, str(folder)]
    subprocess.run(words, env=child_environment(), check=True, capture_output=True)
    return folder


def main(words: Sequence[str]) -> int:
    """Try the inputs that the command line names, and print what became of them."""
    if words[0] == "--child":
        run_child(int(words[1]), int(words[2]), Path(words[3]), words[4:])
        return 0
    names = [name for word in words for name in parse_range(word)]
    saved = os.environ.get("MLX_DPO_FUZZ_MATERIAL")
    material = Path(saved or f"{tempfile.mkdtemp(prefix='mlx-dpo-fuzz-')}/material")
    if not material.exists():
        write_material(material)
    failures, seconds = 0, 0.0
    for outcome in try_inputs(names, material):
        failures += bool(outcome["failure"])
        seconds += float(outcome.get("seconds", SECONDS))
        if outcome["failure"] or len(names) < 20:
            print(json.dumps(outcome, indent=1), flush=True)
    print(f"{len(names)} inputs, {failures} failures, {seconds:.0f} s of processor time")
    return 1 if failures else 0


def parse_range(word: str) -> list[str]:
    """Return the names of inputs that `AREA/INDEX` or `AREA/FIRST-LAST` stands for."""
    area, _, numbers = word.partition("/")
    first, _, last = numbers.partition("-")
    return [f"{area}/{index}" for index in range(int(first), int(last or first) + 1)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
