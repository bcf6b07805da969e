"""What the ranks of a run must have in common, compared before anything is written."""

import os
import platform
import socket
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.data.sources import STDIN
from mlx_dpo.distributed.ranks import Ranks
from mlx_dpo.errors import ConfigError, DPOError
from mlx_dpo.io.notices import notify
from mlx_dpo.models.device import device_kind
from mlx_dpo.profiling.device_memory import available_memory
from mlx_dpo.runs.distributed.peers import Peers
from mlx_dpo.runs.folder import PROVENANCE_NAMES, day_of_run
from mlx_dpo.runs.inputs import Datasets
from mlx_dpo.startup import openblas

PACKAGES = ("mlx-dpo", "mlx", "mlx-lm")
# Facts that may differ between ranks. Those in CHANGES_BITS change the last bits of the results.
RECORDED = ("host", "python", "system", "chip", "memory_gb", "free_gb")
CHANGES_BITS = ("chip", "system")
# Variables that change last bits: of MLX's compiled operations, of its matrix products on GPUs with
# TF32, and of those of OpenBLAS. From MLX's sources: by default operations are compiled, and TF32
# is used.
VARIABLES = ("MLX_DISABLE_COMPILE", "MLX_ENABLE_TF32", "OPENBLAS_CORETYPE")
CPU_INFO = Path("/proc/cpuinfo")


def compare_machines(ranks: Ranks) -> Peers:
    """Exchange what each rank runs on, and check that their programs compute the same numbers.

    Raises:
        SharedError: versions, devices or the threads of BLAS differ.
    """
    peers = Peers(ranks, ranks.all_gather_json("hosts", describe_machine()))
    if not ranks.is_alone:
        peers.check_same(software(), "install the same version on all hosts")
        peers.check_same(_device_facts(), "the ranks of a run need devices of the same kind")
        peers.check_same(
            {"BLAS": _blas()},
            "use the same version, and set OPENBLAS_NUM_THREADS to the same number for all ranks",
        )
        peers.check_same(_variables(), "set the variable on all hosts, or on none")
    return peers


def must_be_same() -> dict[str, str]:
    """Return all that `compare_machines` compares, by name."""
    return software() | _device_facts() | {"BLAS": _blas()} | _variables()


def _variables() -> dict[str, str]:
    """Return the environment variables that change the numbers of a rank."""
    return {f"the variable {name}": os.environ.get(name, "not set") for name in VARIABLES}


def software() -> dict[str, str]:
    """Return the versions that must be the same on all ranks, by name."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {name: version(name) for name in PACKAGES} | {"Python": python}


def _device_facts() -> dict[str, str]:
    return {"the device": f"{device_kind()} ({platform.system()} {platform.machine()})"}


def _blas() -> str:
    """Return the library that multiplies matrices on the CPU, with its number of threads."""
    if platform.system() != "Linux" or device_kind() != "cpu":
        return "the system's"
    threads = openblas.num_threads()
    if not threads:
        return "MLX's own"
    return f"OpenBLAS {openblas.version()} with {threads} thread{'s' * (threads != 1)}"


def describe_machine() -> dict[str, Any]:
    """Return facts about this machine, which may differ between ranks, for the run record."""
    facts = (
        socket.gethostname(),
        platform.python_version(),
        f"{platform.system()} {platform.release()}",
        _chip(),
        round(available_memory().bytes / 1e9, 1),
        _free_memory_gb(),
    )
    return dict(zip(RECORDED, facts, strict=True))


def _chip() -> str:
    """Return the name of the GPU; without one, that of the processor."""
    name = str(mx.device_info(mx.default_device()).get("device_name", ""))
    if device_kind() == "cpu" and CPU_INFO.is_file():
        lines = CPU_INFO.read_text(errors="replace").splitlines()
        name = next((line.split(":", 1)[1] for line in lines if line.startswith("model n")), name)
    return name.strip() or platform.machine()


def _free_memory_gb() -> float | None:
    """Return the memory that no process uses, in GB; None where the system does not say."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:  # macOS
        return None
    return round(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


class StartedRun(Protocol):
    """What of a `DPOTrainer` `check_run_settings` reads."""

    config: DPOConfig
    datasets: Datasets
    resume: bool
    overwrite: bool
    force: bool


FLAGS = ("resume", "overwrite", "force")


def check_run_settings(peers: Peers, run: StartedRun) -> None:
    """Check that all ranks were started for the same run.

    Raises:
        ConfigError: the pairs come from standard input, which only one rank can read.
        SharedError: settings or flags differ.
    """
    if peers.ranks.is_alone:
        return
    flags = {name: getattr(run, name) for name in FLAGS}
    values = {f"`{name}`": value for name, value in (run.config.to_dict() | flags).items()}
    values["the list of splits in memory"] = run.datasets.splits
    peers.check_same(values, "start all ranks with the same settings")
    if STDIN in (*run.config.pairs, run.config.valid):
        raise peers.shared(
            ConfigError(f"`{STDIN}`: several ranks cannot share standard input; name a file")
        )
    size, pairs = peers.ranks.size, run.config.batch_size
    if size > pairs:
        notify(
            f"{size} ranks are more than the {pairs} pair{'s' * (pairs != 1)} of a step "
            "(--batch-size), so that in each step some of them compute no gradient"
        )


def share_day(ranks: Ranks, earlier: Mapping[str, Any] | None) -> date:
    """Return the day on which a resumed run began, given its record; today on rank 0 for a new one.

    Chat templates may print the day.
    """
    return date.fromisoformat(ranks.broadcast_json("the day", str(day_of_run(earlier))))


def check_inputs(peers: Peers, provenance: Mapping[str, Any]) -> None:
    """Check that all ranks have loaded the same model and pairs, given their digests.

    Raises:
        SharedError: the content of an input differs.
    """
    if not peers.ranks.is_alone:
        peers.check_same(
            {PROVENANCE_NAMES[key]: value for key, value in provenance.items()},
            "copy the same files to all hosts",
        )


def add_ranks(
    record: dict[str, Any], peers: Peers, earlier: Mapping[str, Any] | None, step: int
) -> None:
    """Add to the run record on which ranks and hosts the steps after `step` are trained.

    The record of a run that has always been one process says nothing.

    Args:
        earlier: record of the run that is resumed.
    """
    parts: list[dict[str, Any]] = [
        part for part in (earlier or {}).get("ranks") or [] if part["from_step"] < step
    ]
    if peers.ranks.is_alone and not parts:
        return
    if step and not parts:
        parts = [{"from_step": 0, "ranks": [{}]}]  # one process, which recorded nothing of itself
    record["ranks"] = [*parts, {"from_step": step, "ranks": list(peers.facts)}]
    _notify_of_different_machines(peers)


def _notify_of_different_machines(peers: Peers) -> None:
    """Log a notice if the ranks run on different chips or systems, which rounds differently."""
    if not peers.ranks.is_main:
        return
    for name in CHANGES_BITS:
        if len(found := sorted({str(facts[name]) for facts in peers.facts})) > 1:
            notify(
                f"the ranks have different {name}s ({', '.join(found)}): the run is the same on "
                "all of them, but none of the machines reproduces it alone, bit for bit"
            )


def share_settings(
    peers: Peers, resolve: Callable[[], Any], kinds: tuple[type[Exception], ...] = (DPOError,)
) -> Any:
    """Return what `resolve` returns on rank 0, a value of JSON; other ranks do not call it.

    Args:
        kinds: types of errors that end all ranks.
    """
    value = None
    with peers.sharing_errors(kinds):
        if peers.ranks.is_main:
            value = resolve()
    return peers.ranks.broadcast_json("settings", value)
