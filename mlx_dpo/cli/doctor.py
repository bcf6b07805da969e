"""`mlx-dpo doctor`: show facts about this machine, and run a self-test of training."""

import math
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import Command
from mlx_dpo.cli.output import echo, echo_json
from mlx_dpo.cli.ranks_flags import RanksFlags, ranks_flags
from mlx_dpo.cli.start_ranks import start_ranks
from mlx_dpo.distributed.environment import find_rank
from mlx_dpo.phases import phase
from mlx_dpo.units import format_bytes

if TYPE_CHECKING:
    from mlx_dpo.doctor.checks import Check

BACKENDS = {"cpu": "CPU", "metal": "Metal", "cuda": "CUDA"}


@click.command(
    cls=Command,
    examples=(
        "mlx-dpo doctor",
        "mlx-dpo doctor --json > report.json",
        "mlx-dpo doctor --hosts hosts.json",
    ),
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object without personal data."
)
@partial(
    ranks_flags,
    ranks_help="Test the link between N processes on this machine.",
    hosts_help="Test the links between the machines of a hostfile of MLX; starts a process on each "
    "over ssh.",
)
def doctor(as_json: bool, **flags: Any) -> None:
    """Show versions, device and limits, and run a self-test of training on this device.

    The self-test takes a few seconds. It compares log-probabilities and gradients of a tiny model
    with NumPy in float64, takes one training step, and saves and loads adapters. Each line shows
    the measured error and its limit. Exits with 1 if a check fails. `NAX` tells whether MLX can use
    the neural accelerators in the GPU of an M5 or newer chip, and why.

    With --hosts or --ranks, the link between the ranks is tested instead: its latency and speed,
    values over it, and versions, devices and sleep settings of the hosts.
    """
    start_ranks(RanksFlags.pop(flags))
    if find_rank(os.environ) is not None:
        from mlx_dpo.cli.doctor_link import try_link

        sys.exit(try_link(as_json=as_json))

    from mlx_dpo.doctor.checks import self_test
    from mlx_dpo.doctor.machine import anonymous, collect_facts

    machine_facts = collect_facts()
    checks = []
    if not as_json:
        _print_facts(machine_facts)
        echo(f"\nself-test on {BACKENDS[machine_facts['device']['kind']]}")
    with phase("Running the self-test"):
        for check in self_test():
            checks.append(check)
            if not as_json:
                _print_check(check)
    passed = all(check.ok for check in checks)
    if as_json:
        report = {
            **machine_facts,
            "checks": [_check_record(check) for check in checks],
            "ok": passed,
        }
        echo_json(report, indent=2, default=anonymous)
    sys.exit(0 if passed else 1)


def _print_facts(machine_facts: dict[str, Any]) -> None:
    from mlx_dpo.doctor.accelerators import NeuralAccelerators
    from mlx_dpo.doctor.machine import from_home

    packages = dict(machine_facts["versions"])
    python, system = packages.pop("python"), packages.pop("system")
    folders = machine_facts["folders"]
    lines = {
        "versions": ", ".join(f"{name} {number or 'absent'}" for name, number in packages.items()),
        "system": f"Python {python} on {system}",
        "device": _describe_device(machine_facts["device"]),
        "products": _describe_speed(machine_facts["device"]),
        "NAX": NeuralAccelerators(**machine_facts["device"]["neural_accelerators"]).describe(),
        "memory": _describe_memory(machine_facts["memory"]),
        "models": _describe_folder(
            from_home(folders["hub_cache"]["path"]), folders["hub_cache"]["free"]
        ),
        "reference": "no cache folder: the home folder is unknown"
        if folders["reference_cache"]["path"] is None
        else _describe_folder(
            from_home(folders["reference_cache"]["path"]), folders["reference_cache"]["free"]
        ),
        "disk": f"{format_bytes(folders['current']['free'])} free in the current folder",
        "Hub token": "yes" if machine_facts["hub_token"] else "none (needed for gated models only)",
    }
    for name, line in lines.items():
        echo(f"{name:<10} {line}")


def _describe_device(device: dict[str, Any]) -> str:
    name = device["name"] or "name unknown"
    return f"{BACKENDS[device['kind']]}, {name}, {device['cores']} CPU cores"


def _describe_speed(device: dict[str, Any]) -> str:
    speed = f"{device['gflops']:,.0f} GFLOP/s in float32"
    notes = {
        None: "",
        True: ", with OpenBLAS",
        False: ", without OpenBLAS (Debian, Ubuntu: apt install libopenblas0-pthread)",
    }
    return speed + notes[device["openblas"]]


def _describe_memory(memory: dict[str, Any]) -> str:
    parts = [f"{format_bytes(memory['physical'])} in the machine"]
    for name, words in (("device", "on the device"), ("recommended", "recommended at most")):
        if memory[name]:
            parts.append(f"{format_bytes(memory[name])} {words}")
    limits = (format_bytes(memory["memory_limit"]), format_bytes(memory["cache_limit"]))
    return ", ".join([*parts, "MLX's limit {}, its cache's {}".format(*limits)])


def _describe_folder(path: Any, free: int) -> str:
    return f"{path} ({format_bytes(free)} free)"


def _print_check(check: "Check") -> None:
    measured = check.trouble or f"{check.measured:.1e}"
    echo("  ", nl=False)
    echo("ok    " if check.ok else "FAILED", nl=False, fg="green" if check.ok else "red")
    echo(f" {check.name:<40} {measured} (limit {check.limit:g})")


def _check_record(check: "Check") -> dict[str, Any]:
    return {
        "name": check.name,
        "ok": check.ok,
        "measured": check.measured if math.isfinite(check.measured) else None,
        "limit": check.limit,
        "trouble": check.trouble or None,
    }
