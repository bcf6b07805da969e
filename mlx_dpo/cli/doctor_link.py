"""The part of `mlx-dpo doctor` that several ranks run: the link between them, and what they are."""

from typing import Any

from mlx_dpo.cli.output import echo, echo_json
from mlx_dpo.phases import phase
from mlx_dpo.units import format_bytes

BITS = 8
MILLISECONDS = 1e3
WRONG_SHOWN = 5  # wrong values that are named
PERSONAL = ("host", "system")  # names of machines; a kernel's version may contain a person's


def try_link(*, as_json: bool) -> int:
    """Test the link between the ranks and print the result; return the exit code.

    All ranks call this; only rank 0 prints, and only its exit code tells of a failure.

    Raises:
        ConfigError: the ranks cannot reach each other.
    """
    from mlx_dpo.distributed.connect import connect
    from mlx_dpo.distributed.hosts.link_test import measure_link

    ranks = connect()
    with phase("Testing the link"):
        hosts = ranks.all_gather_json("hosts", _describe_this_host())
        report = measure_link(ranks)
    checks = _check(hosts, report)
    passed = all(check["ok"] for check in checks)
    if as_json:
        shown = [{k: v for k, v in host.items() if k not in PERSONAL} for host in hosts]
        echo_json(
            {"ranks": shown, "link": report.as_record(), "checks": checks, "ok": passed}, indent=2
        )
    else:
        _print_hosts(hosts)
        _print_link(report, len(hosts))
        _print_checks(checks)
    return 0 if passed or not ranks.is_main else 1


def _describe_this_host() -> dict[str, Any]:
    """Return what this rank runs on, a value of JSON."""
    from mlx_dpo.distributed.hosts.remote.facts import read_sleep_minutes
    from mlx_dpo.runs.distributed.handshake import describe_machine, must_be_same

    return describe_machine() | {
        "must_be_same": must_be_same(),
        "sleeps_after": read_sleep_minutes(),
    }


def _check(hosts: list[dict[str, Any]], report: Any) -> list[dict[str, Any]]:
    """Return the checks, each with its name, whether it passed, and what was found."""
    wrong = [
        f"rank {w.receiver} received {w.dtype} of {w.size:,} elements from rank {w.sender} with a "
        f"wrong value at {w.index:,}"
        for w in report.wrong
    ]
    more = [f"and {len(wrong) - WRONG_SHOWN} more"] if len(wrong) > WRONG_SHOWN else []
    checks = [
        {
            "name": "values over the link",
            "ok": not wrong,
            "found": "; ".join(wrong[:WRONG_SHOWN] + more) or f"{report.compared:,} arrays equal",
        }
    ]
    first = hosts[0]["must_be_same"]
    for name in first:
        different = [
            f"rank {rank} has {host['must_be_same'][name]}"
            for rank, host in enumerate(hosts)
            if host["must_be_same"][name] != first[name]
        ]
        found = f"{'; '.join(different)}; rank 0 has {first[name]}" if different else first[name]
        checks.append({"name": name, "ok": not different, "found": found})
    return checks


def _print_hosts(hosts: list[dict[str, Any]]) -> None:
    for rank, host in enumerate(hosts):
        free = "" if host["free_gb"] is None else f" ({host['free_gb']:g} GB free)"
        echo(
            f"rank {rank:<5} {host['host']}: {host['chip']}, {host['memory_gb']:g} GB{free}, "
            f"{host['system']}, Python {host['python']}{_describe_sleep(host['sleeps_after'])}"
        )
    for name in ("chip", "system"):
        if len({host[name] for host in hosts}) > 1:
            echo(
                f"note       different {name}s: the ranks of a run agree with each other, but none "
                "of the machines reproduces the run alone, bit for bit"
            )


def _describe_sleep(minutes: int | None) -> str:
    """Return the sleep setting of a Mac; "" for other machines."""
    if minutes is None:
        return ""
    if minutes == 0:
        return ", never sleeps"
    return f", sleeps after {minutes} idle minutes (not while `mlx-dpo train` runs)"


def _print_link(report: Any, size: int) -> None:
    echo(f"\nlink of {size} ranks by {report.backend}")
    echo(
        f"  a small gather   {report.latency * MILLISECONDS:.2f} ms "
        f"(at most {report.worst_latency * MILLISECONDS:.2f} ms)"
    )
    for speed in report.speeds:
        echo(
            f"  {format_bytes(speed.size):<8} per rank {speed.seconds * MILLISECONDS:>8.1f} ms, "
            f"{speed.received / 1e6:>7,.0f} MB/s, {speed.received * BITS / 1e9:.2f} Gbit/s"
        )


def _print_checks(checks: list[dict[str, Any]]) -> None:
    echo("\nchecks")
    for check in checks:
        echo("  ", nl=False)
        echo("ok    " if check["ok"] else "FAILED", nl=False, fg="green" if check["ok"] else "red")
        echo(f" {check['name']:<22} {check['found']}")
