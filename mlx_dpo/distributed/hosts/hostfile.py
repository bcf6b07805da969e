"""Read the hostfile of MLX, which names the machines of a run.

The format is that of `mlx.launch` and `mlx.distributed_config` (`mlx/_distributed_utils/common.py`
in MLX 0.32.4): a list of hosts, or an object with `backend`, `envs` and `hosts`.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from mlx_dpo.distributed.ranks import is_backend_available
from mlx_dpo.errors import ConfigError
from mlx_dpo.io.bounded import parse_json, read_bytes

MAX_HOSTFILE_BYTES = 1_000_000
FILE_KEYS = ("backend", "envs", "hosts")
HOST_KEYS = ("ssh", "ips", "rdma")
# `mlx.launch` also knows `mpi`, started by `mpirun`, and `nccl`, which has one rank per GPU.
BACKENDS = ("ring", "jaccl", "jaccl-ring")
OTHER_BACKENDS = {
    "mpi": "start the ranks with `mpirun`",
    "nccl": "start the ranks with `mlx.launch`",
}
THIS_MACHINE = ("localhost", "127.0.0.1")  # names that need no ssh
MAX_MESH = 8  # peers that JACCL connects each with each, from MLX's source
FORM = '[{"ssh": "mac1", "ips": ["10.0.0.1"]}, {"ssh": "mac2", "ips": ["10.0.0.2"]}]'

SSH_NAME = re.compile(r"[A-Za-z0-9_.:%@\[\]-]+")
VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=([^\0]*)", re.DOTALL)
# Variables that tell a process its place among the ranks.
SET_BY_LAUNCHER = (
    "MLX_RANK",
    "MLX_HOSTFILE",
    "MLX_IBV_DEVICES",
    "MLX_JACCL_COORDINATOR",
    "MLX_JACCL_RING",
)


@dataclass(frozen=True)
class Host:
    """An entry of a hostfile: the machine of one rank.

    Attributes:
        ssh: name by which ssh reaches the machine.
        addresses: its numeric addresses; ring opens a connection for each.
        rdma: for JACCL, its device (or devices) towards each rank; None towards itself.
    """

    ssh: str
    addresses: tuple[str, ...]
    rdma: tuple[str | list[str] | None, ...]


@dataclass(frozen=True)
class Hostfile:
    """A hostfile: the machine of each rank, in their order.

    Attributes:
        path: the file.
        hosts: the machines; the first is that of rank 0.
        backend: MLX's backend between them: `ring`, `jaccl`, or `jaccl-ring`, JACCL in a ring.
        environment: variables that are set for each rank.
    """

    path: Path
    hosts: tuple[Host, ...]
    backend: str
    environment: Mapping[str, str]

    def ranks_on(self, ssh: str) -> int:
        """Return the number of ranks on the machine `ssh`."""
        return sum(host.ssh == ssh for host in self.hosts)


def read_hostfile(path: Path) -> Hostfile:
    """Read a hostfile of MLX, in either form.

    Raises:
        ConfigError: the file cannot be read, is not a hostfile, or its hosts cannot be connected.
    """
    data = read_bytes(path, ConfigError, limit=MAX_HOSTFILE_BYTES)
    document = parse_json(data, str(path), ConfigError, unique_keys=True)
    if isinstance(document, list):
        document = {"hosts": document}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: is not a hostfile of MLX (no list of hosts); write {FORM}")
    _check_keys(document, FILE_KEYS, str(path))
    backend = _read_backend(document.get("backend", "ring") or "ring", path)
    entries = document.get("hosts")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: `hosts` has no entry; write {FORM}")
    hosts = tuple(_read_host(entry, f"{path}: hosts[{n}]") for n, entry in enumerate(entries))
    if len(hosts) == 1:
        raise ConfigError(f"{path}: has one host only; add another one, or leave --hosts out")
    file = Hostfile(path, hosts, backend, _read_environment(document.get("envs", []), path))
    _check_addresses(file)
    if backend == "ring":
        _check_counts(file)
    else:
        _check_rdma(file)
    return file


def _check_keys(entry: Mapping[str, Any], known: tuple[str, ...], location: str) -> None:
    for key in entry:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            advice = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{location}: unknown key `{key[:80]}`; {advice}")


def _read_backend(name: Any, path: Path) -> str:
    if name in OTHER_BACKENDS:
        raise ConfigError(
            f"{path}: --hosts cannot start ranks for the backend `{name}`; {OTHER_BACKENDS[name]}"
        )
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise ConfigError(f"{path}: unknown backend {_show(name)}; choose one of {known}")
    if not is_backend_available(engine := name.partition("-")[0]):
        advice = "JACCL needs macOS 26.2 or newer and Thunderbolt 5; use `ring`"
        raise ConfigError(f"{path}: this MLX has no backend `{engine}`; {advice}")
    return cast("str", name)


def _read_environment(entries: Any, path: Path) -> dict[str, str]:
    location = f"{path}: envs"
    if not isinstance(entries, list):
        raise ConfigError(f'{location}: is not a list; write ["NAME=value"]')
    variables: dict[str, str] = {}
    for entry in entries:
        found = VARIABLE.fullmatch(entry) if isinstance(entry, str) else None
        if found is None:
            raise ConfigError(f'{location}: {_show(entry)} is not a variable; write "NAME=value"')
        name, value = found.groups()
        if name in SET_BY_LAUNCHER:
            raise ConfigError(f"{location}: {name} is set for each rank by itself; remove it")
        if name in variables:
            raise ConfigError(f"{location}: {name} is set twice; remove one of them")
        variables[name] = value
    return variables


def _read_host(entry: Any, location: str) -> Host:
    if not isinstance(entry, dict):
        raise ConfigError(f"{location}: is not an object ({_show(entry)}); write {FORM}")
    _check_keys(entry, HOST_KEYS, location)
    name = entry.get("ssh")
    # A name that begins with `-` would be an option of ssh.
    if not isinstance(name, str) or not SSH_NAME.fullmatch(name) or name.startswith("-"):
        found = "missing" if "ssh" not in entry else _show(name)
        raise ConfigError(f"{location}: `ssh` is not the name of a host ({found}); fix it")
    addresses = entry.get("ips", [])
    if not isinstance(addresses, list) or not addresses:
        raise ConfigError(
            f"{location} ({name}): `ips` has no address; give the numeric address of {name} at the "
            "link, or let `mlx.distributed_config` write the file"
        )
    for address in addresses:
        _check_address(address, f"{location} ({name})")
    rdma = entry.get("rdma", [])
    if not isinstance(rdma, list) or not all(_is_rdma(device) for device in rdma):
        raise ConfigError(f"{location} ({name}): `rdma` is not a list of devices and null; fix it")
    return Host(name, tuple(addresses), tuple(rdma))


def _is_rdma(device: Any) -> bool:
    devices = device if isinstance(device, list) and device else [device]
    return device is None or all(isinstance(d, str) and d for d in devices)


def _check_address(address: Any, location: str) -> None:
    try:
        parsed = ipaddress.ip_address(address if isinstance(address, str) else "")
    except ValueError:
        raise ConfigError(
            f"{location}: {_show(address)} in `ips` is not a numeric address; write it as 10.0.0.1"
        ) from None
    if parsed.version != 4:  # MLX's sockets are IPv4 alone, and a colon begins the port
        raise ConfigError(f"{location}: MLX connects by IPv4 only, not {address}; write 10.0.0.1")
    if parsed.is_unspecified or parsed.is_multicast:
        raise ConfigError(f"{location}: {address} is not the address of a host; fix it")


def _check_addresses(file: Hostfile) -> None:
    """Check that no address belongs to two machines and that the machines can be reached."""
    owners: dict[str, str] = {}
    for host in file.hosts:
        twice = [address for address, n in Counter(host.addresses).items() if n > 1]
        if twice:
            raise ConfigError(f"{file.path}: {host.ssh} has {twice[0]} twice; remove one of them")
        for address in host.addresses:
            if (owner := owners.setdefault(address, host.ssh)) != host.ssh:
                raise ConfigError(
                    f"{file.path}: {owner} and {host.ssh} have the same address {address}; give "
                    "each its own"
                )
    other_machines = [host.ssh for host in file.hosts if not _is_loopback(host.ssh)]
    for host in file.hosts:
        for address in filter(_is_loopback, host.addresses):
            if other_machines:
                raise ConfigError(
                    f"{file.path}: {address} of {host.ssh} is a loopback address, which "
                    f"{other_machines[0]} cannot reach; give the address at the link"
                )


def _check_counts(file: Hostfile) -> None:
    """Check that ring has as many connections to the next rank as from the one before."""
    first, *others = file.hosts
    for host in others:
        if len(host.addresses) != len(first.addresses):
            raise ConfigError(
                f"{file.path}: `ips` has {len(first.addresses)} for {first.ssh}, "
                f"{len(host.addresses)} for {host.ssh}; ring needs as many for each host"
            )


def _is_loopback(name: str) -> bool:
    host = name.rpartition("@")[2]
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_rdma(file: Hostfile) -> None:
    """Check that there is a device of JACCL between all ranks that it connects."""
    count, in_ring = len(file.hosts), file.backend == "jaccl-ring"
    if count > MAX_MESH and not in_ring:
        raise ConfigError(
            f"{file.path}: `jaccl` connects at most {MAX_MESH} hosts, not {count}; use `ring` or "
            "`jaccl-ring`"
        )
    for rank, host in enumerate(file.hosts):
        location = f"{file.path}: hosts[{rank}] ({host.ssh})"
        if len(host.rdma) != count:
            raise ConfigError(
                f"{location}: `rdma` has {len(host.rdma)} devices for {count} hosts; let "
                "`mlx.distributed_config` write the file"
            )
        if host.rdma[rank] is not None:
            raise ConfigError(f"{location}: `rdma[{rank}]` is the host itself; write null")
        peers = {(rank - 1) % count, (rank + 1) % count} if in_ring else set(range(count))
        for peer in sorted(peers - {rank}):
            if host.rdma[peer] is None:
                raise ConfigError(
                    f"{location}: `rdma` has no device towards {file.hosts[peer].ssh}; let "
                    "`mlx.distributed_config` write the file"
                )


def _show(value: Any) -> str:
    return repr(value)[:80]
