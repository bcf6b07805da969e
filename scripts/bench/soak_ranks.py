"""Train many short runs on several ranks for hours, and compare each with the run on one rank.

    python -m scripts.bench.soak_ranks --hosts hosts.json --minutes 480     overnight, on two Macs
    python -m scripts.bench.soak_ranks --hosts hosts.json --ask             with a person to unplug
    python -m scripts.bench.soak_ranks --ranks 2 --minutes 1                a try on this machine

It tests the link by `mlx-dpo doctor`, then trains the shipped model. Every other run is interrupted
and resumed, on all ranks or on one. Adapters, optimizer state and metrics have to equal those of a
run on one rank, byte for byte. The file that it writes has versions, chips, systems, the link and
every run, without paths, names of machines or addresses. Interrupt it at any time: the same command
continues. Please send the file with an issue.
"""

import argparse
import getpass
import hashlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import mlx_dpo  # noqa: F401  the fast BLAS is loaded with it, before MLX
from mlx_dpo.errors import DataError, DPOError

# isort: split
import mlx.core as mx
import numpy as np

from mlx_dpo.hub.secret_scan import scan_for_secrets
from mlx_dpo.io.atomic import write_file
from mlx_dpo.reporting.metrics_log import read_metrics
from scripts.bench import machine

MODEL = machine.ROOT / "models" / "tiny-chat"
PROGRAM = "import sys; del sys.argv[0]; from mlx_dpo.cli import main; main()"
FORMAT = 1
PACKAGES = ("mlx-dpo", "mlx", "mlx-lm")
SPEEDS = ("tokens_per_second", "peak_memory_gb")  # of metrics: they differ between runs
POLL_SECONDS = 0.05
NOTE_LENGTH = 300
STEPS, ASKED_STEPS = 6, 60
ASKED_TIMEOUT = 30  # seconds of silence after which ranks are lost, while a person unplugs
QUESTIONS = ("pull the cable", "put the other Mac to sleep")
# What a run is trained with; passes of two pairs, so that each step has several rounds.
COMMON = (
    "--valid-fraction", "0", "--batch-size", "12", "--micro-batch-size", "2",
    "--learning-rate", "1e-3", "--save-steps", "2",
)  # fmt: skip
CASES = {
    "sigmoid": (),
    "part of the base": ("--recompute",),
    "large adapters": ("--lora-r", "64"),
    "last round not full": ("--batch-size", "10"),
    "dropout": ("--lora-dropout", "0.2"),
    "aot": ("--loss-type", "aot"),
    "dora": ("--fine-tune-type", "dora"),
    "full": ("--fine-tune-type", "full", "--learning-rate", "1e-5"),
    "moving reference": ("--sync-ref-model", "--sync-steps", "2", "--use-weighting"),
}

ON_RANKS = {"part of the base": ("--shard-base",)}  # added for several ranks


class Ended(NamedTuple):
    """How a command ended: its exit status, the last line of its errors, and its time."""

    status: int | None  # None: it was killed because it took too long
    message: str
    seconds: float


@dataclass(frozen=True)
class Attempt:
    """One run on several ranks, compared with the run on one."""

    case: str
    kind: str
    seconds: float
    statuses: list[int | None]  # exit status of each command; None if it did not end
    ended_after: float | None  # seconds from a person's Return to the end of all ranks
    adapters_equal: bool
    checkpoint_equal: bool
    metrics_equal: bool
    message: str  # of a command that failed

    @property
    def ok(self) -> bool:
        """Whether the last command succeeded and all is equal."""
        equal = self.adapters_equal and self.checkpoint_equal and self.metrics_equal
        return self.statuses[-1] == 0 and None not in self.statuses and equal


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="soak_ranks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--hosts", type=Path, help="hostfile of MLX, with this machine first")
    where.add_argument("--ranks", type=int, help="ranks on this machine")
    add("--minutes", type=float, default=480, help="time of all runs (default: 480)")
    add("--limit", type=float, default=900, help="seconds that a command may take (default: 900)")
    add("--ask", action="store_true", help="ask a person to pull the cable, and to let a Mac sleep")
    add("--output", type=Path, default=Path("soak-ranks.json"), help="file to write")
    return parser.parse_args(arguments)


class Soak:
    """The runs, and the file with their results."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        """Read the earlier results, if there are any.

        Raises:
            DataError: they were made in another way.
        """
        self.options, self.folder = options, folder
        self.private = private_names(options.hosts, folder)
        self.expected: dict[str, dict[str, str]] = {}  # digests by case, of runs on one rank
        self.results = read_results(options.output, where_of(options))

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """All runs so far, as they are in the file."""
        found: list[dict[str, Any]] = self.results["attempts"]
        return found

    def test_link(self) -> None:
        """Test the link between the ranks; the result becomes part of the file."""
        done = self._call(["doctor", *self._ranks(), "--json"], stdout=subprocess.PIPE)
        try:
            link = json.loads(done.output)
        except ValueError:
            link = {"ok": False, "message": self._anonymous(done.ended.message)}
        self.results["links"].append({"at": now(), "test": link})
        self._write()

    def run_next(self) -> None:
        """Train the next case in the next way."""
        number = len(self.attempts)
        case = list(CASES)[number // 2 % len(CASES)]
        kinds = ("whole", f"interrupted, resumed on {'one rank' if number % 4 == 3 else 'all'}")
        kind = kinds[number % 2]
        self._note(self._attempt(case, kind, STEPS))

    def run_asked(self, ask: Callable[[str], object] = input) -> None:
        """Train one run for each question to a person, and resume it on one rank."""
        for question in QUESTIONS:
            self._note(self._attempt("sigmoid", question, ASKED_STEPS, ask))

    def _attempt(
        self, case: str, kind: str, steps: int, ask: Callable[[str], object] | None = None
    ) -> Attempt:
        expected = self._expected(case, steps)
        output = self.folder / f"run-{len(self.attempts)}"
        train = [*train_words(output, steps), *CASES[case], *ON_RANKS.get(case, ())]
        ended_after, began = None, time.monotonic()
        if ask is not None:
            process = self._start([*train, *self._ranks(), "--rank-timeout", str(ASKED_TIMEOUT)])
            wait_for_rows(process, output)
            ask(f"Now {kind}, then press Return here: ")
            asked_at = time.monotonic()
            runs = [self._wait(process)]
            ended_after = time.monotonic() - asked_at
            ask("Connect the Macs again and wake them, then press Return: ")
            runs.append(self._call(["train", "--resume", "--output", str(output)]).ended)
        elif kind == "whole":
            runs = [self._call([*train, *self._ranks()]).ended]
        else:
            process = self._start([*train, *self._ranks()])
            wait_for_rows(process, output)
            process.send_signal(signal.SIGINT)
            runs = [self._wait(process)]
            again = [] if kind.endswith("one rank") else self._ranks()
            if runs[0].status != 0:
                resume = ["train", "--resume", "--output", str(output), *again]
                runs.append(self._call(resume).ended)
        found = digests(output)
        return Attempt(
            case, kind, round(time.monotonic() - began, 1), [run.status for run in runs],
            ended_after, *(found[name] == expected[name] for name in expected),
            message=self._anonymous(runs[-1].message) if runs[-1].status != 0 else "",
        )  # fmt: skip

    def _expected(self, case: str, steps: int) -> dict[str, str]:
        """Return the digests of the run on one rank, which is trained the first time."""
        name = f"{case}, {steps} steps"
        if name not in self.expected:
            output = self.folder / f"one-{len(self.expected)}"
            done = self._call([*train_words(output, steps), *CASES[case]]).ended
            if done.status != 0:
                raise DataError(f"{name}: the run on one rank failed ({done.message})")
            self.expected[name] = digests(output)
        return self.expected[name]

    def _note(self, attempt: Attempt) -> None:
        self.attempts.append(asdict(attempt) | {"at": now(), "ok": attempt.ok})
        self._write()
        print(describe(attempt), file=sys.stderr)

    def _write(self) -> None:
        """Write the results.

        Raises:
            DataError: they have something private, which is not written.
        """
        self.results["summary"] = summarize(self.attempts)
        text = json.dumps(self.results, indent=1) + "\n"
        secrets = [found.kind for found in scan_for_secrets(text.encode(), "results")]
        secrets += ["a name of a machine, an address or a path"] * (self._anonymous(text) != text)
        if secrets:
            raise DataError(f"the results contain {', '.join(secrets)}; please report this")
        write_file(self.options.output, text)

    def _anonymous(self, text: str) -> str:
        """Return a text without names of machines, addresses and paths."""
        for private, shown in self.private.items():
            text = text.replace(private, shown)
        return text

    # --- commands ------------------------------------------------------------------------------

    def _ranks(self) -> list[str]:
        if self.options.hosts is not None:
            return ["--hosts", str(self.options.hosts)]
        return ["--ranks", str(self.options.ranks)]

    def _start(self, words: Sequence[str], stdout: int | None = None) -> "subprocess.Popen[str]":
        errors = (self.folder / "errors.txt").open("w")
        with errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, "mlx-dpo", *words],
                env=os.environ | {"PYTHONPATH": str(machine.ROOT), "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if stdout is None else stdout,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        return process

    def _wait(self, process: "subprocess.Popen[str]") -> Ended:
        return self._finish(process).ended

    def _call(self, words: Sequence[str], stdout: int | None = None) -> "Done":
        return self._finish(self._start(words, stdout))

    def _finish(self, process: "subprocess.Popen[str]") -> "Done":
        began, output = time.monotonic(), ""
        try:
            output = process.communicate(timeout=self.options.limit)[0] or ""
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the ranks end with their launcher
                process.wait()
        lines = (self.folder / "errors.txt").read_text(errors="replace").strip().splitlines()
        message = lines[-1][:NOTE_LENGTH] if lines else ""
        return Done(Ended(status, message, time.monotonic() - began), output)


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    ended: Ended
    output: str


def train_words(output: Path, steps: int) -> list[str]:
    """Return the command of a run."""
    pairs = str(MODEL / "preferences" / "train.jsonl")
    run = ["--model", str(MODEL), "--output", str(output), "--max-steps", str(steps)]
    return ["train", pairs, *run, *COMMON]


def wait_for_rows(process: "subprocess.Popen[str]", output: Path) -> None:
    """Wait until the run has taken its first step, or ended."""
    metrics = output / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(POLL_SECONDS)


def digests(output: Path) -> dict[str, str]:
    """Return digests of adapters, of the last checkpoint and of the metrics without speeds.

    What a failed run has not written has an empty digest, which equals no other.
    """
    checkpoints = sorted((output / "checkpoints").glob("step-*"))
    last = checkpoints[-1] if checkpoints else output / "none"
    states = [last / "adapters.safetensors", last / "optimizer.safetensors"]
    rows = [
        {name: value for name, value in row.items() if name not in SPEEDS}
        for row in read_metrics(output / "metrics.jsonl")
    ]
    return {
        "adapters": digest([output / "adapters.safetensors"]),
        "checkpoint": digest(states),
        "metrics": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


def digest(files: Sequence[Path]) -> str:
    """Return the SHA-256 of all arrays of the files; empty if a file does not exist.

    Files with the same arrays may have them in another order.
    """
    if not all(file.exists() for file in files):
        return ""
    found = hashlib.sha256()
    for file in files:
        arrays: dict[str, mx.array] = mx.load(str(file))
        for name, array in sorted(arrays.items()):
            found.update(f"{name} {array.dtype} {array.shape} ".encode())
            found.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return found.hexdigest()


def where_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what all runs of a file have in common."""
    count = options.ranks
    if options.hosts is not None:
        content = json.loads(options.hosts.read_text())
        count = len(content["hosts"] if isinstance(content, dict) else content)
    return {
        "ranks": count,
        "over": "this machine" if options.hosts is None else "hosts",
        "versions": machine.versions(*PACKAGES),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        "chip": machine.processor(),
    }


def read_results(path: Path, where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results so far, or empty ones.

    Raises:
        DataError: the file is of other versions, ranks or machines.
    """
    if not path.exists():
        return {"format": FORMAT, "where": dict(where), "links": [], "attempts": [], "summary": {}}
    results: dict[str, Any] = json.loads(path.read_text())
    if results.get("format") != FORMAT or results.get("where") != where:
        raise DataError(
            f"{path}: was written with other versions, ranks or machines; give another --output"
        )
    return results


def private_names(hosts: Path | None, folder: Path) -> dict[str, str]:
    """Return what the results must not contain, the longest first, with what stands for it."""
    found = {
        str(machine.ROOT): "CHECKOUT",
        str(folder): "RUNS",
        str(Path.home()): "HOME",
        str(Path.cwd()): "FOLDER",
        socket.gethostname(): "rank-0",
    }
    if len(getpass.getuser()) > 4:  # a shorter one may be a part of other words
        found[getpass.getuser()] = "USER"
    if hosts is not None:
        content = json.loads(hosts.read_text())
        for rank, host in enumerate(content["hosts"] if isinstance(content, dict) else content):
            found |= dict.fromkeys([host["ssh"], *host.get("ips", ())], f"rank-{rank}")
    # A name such as `vm` is a part of other words as well.
    names = sorted((name for name in found if len(name) > 2), key=len, reverse=True)
    return {name: found[name] for name in names}


def summarize(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return counts of all runs: by kind, and of those that failed or differed."""
    return {
        "runs": len(attempts),
        "by_kind": dict(Counter(attempt["kind"] for attempt in attempts)),
        "failed": sum(attempt["statuses"][-1] != 0 for attempt in attempts),
        "did_not_end": sum(None in attempt["statuses"] for attempt in attempts),
        "different": sum(
            attempt["statuses"][-1] == 0 and not attempt["ok"] for attempt in attempts
        ),
    }


def describe(attempt: Attempt) -> str:
    """Return a line about a run."""
    names = ("adapters", "checkpoint", "metrics")
    different = [name for name in names if not getattr(attempt, f"{name}_equal")]
    text = "equal" if attempt.ok else f"{attempt.message} (different: {', '.join(different)})"
    return f"{attempt.case}, {attempt.kind}: {text}; {attempt.seconds:.0f} s"


def now() -> str:
    """Return the time in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")


def main(arguments: Sequence[str] | None = None, ask: Callable[[str], object] = input) -> int:
    """Run until the time is over; return 1 if a run, or the link, failed."""
    options = parse(arguments)
    until = time.monotonic() + 60 * options.minutes
    try:
        with tempfile.TemporaryDirectory() as name:
            soak = Soak(options, Path(name))
            soak.test_link()
            if options.ask:
                soak.run_asked(ask)
            while True:
                soak.run_next()
                if time.monotonic() > until:
                    break
    except DPOError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    summary = soak.results["summary"]
    print(json.dumps(summary))
    print(f"Written to {options.output}; please send it with an issue.")
    link_ok = all(link["test"]["ok"] for link in soak.results["links"])
    return 0 if link_ok and all(attempt["ok"] for attempt in soak.attempts) else 1


if __name__ == "__main__":
    sys.exit(main())
