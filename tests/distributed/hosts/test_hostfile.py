"""Hostfiles are MLX's own; what cannot work is refused in one line with file, place and remedy."""

import json

import pytest
from mlx._distributed_utils.common import Host as MLXHost
from mlx._distributed_utils.common import Hostfile as MLXHostfile

from mlx_dpo.distributed.hosts import hostfile
from mlx_dpo.distributed.hosts.hostfile import Host, read_hostfile
from mlx_dpo.errors import ConfigError

A = {"ssh": "mac1", "ips": ["10.0.0.1"]}
B = {"ssh": "anna@mac2.local", "ips": ["10.0.0.2"], "rdma": []}
RDMA = [
    A | {"rdma": [None, "rdma_en5"]},
    {"ssh": "mac2", "ips": ["10.0.0.2"], "rdma": [["rdma_en5", "rdma_en6"], None]},
]


@pytest.fixture
def read(tmp_path):
    def read_document(document):
        path = tmp_path / "hosts.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return read_hostfile(path)

    return read_document


@pytest.fixture
def jaccl(monkeypatch):
    monkeypatch.setattr(hostfile, "is_backend_available", lambda name: name in ("ring", "jaccl"))


def test_a_list_of_hosts_is_for_ring(read):
    file = read([A | {"ips": ["10.0.0.1", "10.0.1.1"]}, B | {"ips": ["10.0.0.2", "10.0.1.2"]}])
    assert file.backend == "ring"
    assert file.environment == {}
    assert file.hosts == (
        Host("mac1", ("10.0.0.1", "10.0.1.1"), ()),
        Host("anna@mac2.local", ("10.0.0.2", "10.0.1.2"), ()),
    )


def test_an_object_has_backend_and_variables(read, jaccl):
    file = read({"backend": "jaccl", "envs": ["A=1=2", "B="], "hosts": RDMA})
    assert (file.backend, file.environment) == ("jaccl", {"A": "1=2", "B": ""})
    assert file.hosts[1].rdma == (["rdma_en5", "rdma_en6"], None)


# MLX does not close the file that it reads.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_what_mlx_writes_is_read_as_mlx_reads_it(read, tmp_path):
    hosts = [MLXHost(0, "mac1", ["10.0.0.1"], []), MLXHost(1, "mac2", ["10.0.0.2"], [])]
    file = read(MLXHostfile(hosts, "", ["A=b"]).to_json())
    theirs = MLXHostfile.from_file(tmp_path / "hosts.json")
    assert [(h.ssh, list(h.addresses), list(h.rdma)) for h in file.hosts] == [
        (h.ssh_hostname, h.ips, h.rdma) for h in theirs.hosts
    ]
    assert [f"{name}={value}" for name, value in file.environment.items()] == theirs.envs
    assert file.backend == "ring"  # as `mlx.launch` takes "", where there is no CUDA


def test_several_ranks_of_this_machine_may_use_loopback(read):
    local = {"ssh": "localhost", "ips": ["127.0.0.1"]}
    assert read([local, local]).ranks_on("localhost") == 2
    assert len(read([local, {"ssh": "127.0.0.2", "ips": ["127.0.0.2"]}]).hosts) == 2


WRONG = [
    ("{", r"hosts\.json: "),
    ('[{"ssh": "a", "ssh": "b"}]', "ssh"),
    ("3", r"is not a hostfile of MLX .*; write \[\{"),
    ([], r"`hosts` has no entry; write"),
    ({"backend": "ring"}, r"`hosts` has no entry; write"),
    ([A], r"has one host only; add another one, or leave --hosts out"),
    ({"hosts": [A, B], "backends": "ring"}, r"unknown key `backends`; did you mean `backend`\?"),
    ([A, B | {"ip": "10.0.0.2"}], r"hosts\[1\]: unknown key `ip`; did you mean `ips`\?"),
    ([A, B | {"name": 1}], r"hosts\[1\]: unknown key `name`; known are ssh, ips, rdma"),
    ([A, "mac2"], r"hosts\[1\]: is not an object \('mac2'\); write"),
    ([A, {"ips": ["10.0.0.2"]}], r"hosts\[1\]: `ssh` is not the name of a host \(missing\); fix"),
    ([A, B | {"ssh": ""}], r"hosts\[1\]: `ssh` is not the name of a host \(''\); fix"),
    ([A, B | {"ssh": "-oProxyCommand=x"}], r"hosts\[1\]: `ssh` is not the name of a host .*; fix"),
    ([A, B | {"ssh": "mac2; rm"}], r"hosts\[1\]: `ssh` is not the name of a host .*; fix"),
    ([A, {"ssh": "mac2"}], r"hosts\[1\] \(mac2\): `ips` has no address; give"),
    ([A, B | {"ips": []}], r"hosts\[1\] .*: `ips` has no address; give"),
    ([A, B | {"ips": "10.0.0.2"}], r"hosts\[1\] .*: `ips` has no address; give"),
    ([A, B | {"ips": ["mac2"]}], r"'mac2' in `ips` is not a numeric address; write it as 10"),
    ([A, B | {"ips": [7]}], r"7 in `ips` is not a numeric address"),
    ([A, B | {"ips": ["fe80::1"]}], r"MLX connects by IPv4 only, not fe80::1; write"),
    ([A, B | {"ips": ["0.0.0.0"]}], r"0\.0\.0\.0 is not the address of a host; fix"),
    ([A, B | {"ips": ["10.0.0.2", "10.0.0.2"]}], r"has 10\.0\.0\.2 twice; remove one of them"),
    ([A, B | {"ips": ["10.0.0.1"]}], r"mac1 and .* have the same address 10\.0\.0\.1; give each"),
    (
        [A, B | {"ips": ["127.0.0.1"]}],
        r"127\.0\.0\.1 of .* is a loopback address, which mac1 cannot reach; give",
    ),
    (
        [A, B | {"ips": ["10.0.0.2", "10.0.1.2"]}],
        r"`ips` has 1 for mac1, 2 for anna@mac2\.local; ring needs as many for each host",
    ),
    ([A, B | {"rdma": [0]}], r"hosts\[1\] .*: `rdma` is not a list of devices and null; fix it"),
    ({"hosts": [A, B], "envs": {"A": "1"}}, r'envs: is not a list; write \["NAME=value"\]'),
    ({"hosts": [A, B], "envs": ["A"]}, r"envs: 'A' is not a variable; write \"NAME=value\""),
    ({"hosts": [A, B], "envs": ["A B=1"]}, r"envs: 'A B=1' is not a variable; write"),
    ({"hosts": [A, B], "envs": ["A=1", "A=2"]}, r"envs: A is set twice; remove one"),
    ({"hosts": [A, B], "envs": ["MLX_RANK=1"]}, r"MLX_RANK is set for each rank .*; remove it"),
    ({"hosts": [A, B], "backend": "rings"}, r"unknown backend 'rings'; choose one of ring, jaccl"),
    ({"hosts": [A, B], "backend": 1}, r"unknown backend 1; choose one of"),
    ({"hosts": [A, B], "backend": "mpi"}, r"cannot start .* `mpi`; start the ranks with `mpirun`"),
]


@pytest.mark.parametrize(("document", "message"), WRONG)
def test_a_wrong_file_is_refused_in_one_line(read, document, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(document)
    assert "hosts.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_backend_that_this_mlx_lacks_is_refused(read, monkeypatch):
    monkeypatch.setattr(hostfile, "is_backend_available", lambda name: name == "ring")
    with pytest.raises(ConfigError, match=r"this MLX has no backend `jaccl`; .* use `ring`"):
        read({"backend": "jaccl-ring", "hosts": RDMA})


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ([A, B], r"hosts\[0\] \(mac1\): `rdma` has 0 devices for 2 hosts; let"),
        ([RDMA[0] | {"rdma": ["x", "y"]}, RDMA[1]], r"`rdma\[0\]` is the host itself; write null"),
        ([RDMA[0] | {"rdma": [None, None]}, RDMA[1]], r"has no device towards mac2; let"),
    ],
)
def test_jaccl_needs_a_device_between_all_hosts(read, jaccl, hosts, message):
    with pytest.raises(ConfigError, match=message):
        read({"backend": "jaccl", "hosts": hosts})


def test_jaccl_in_a_ring_needs_devices_to_the_neighbours_only(read, jaccl):
    hosts = [
        {
            "ssh": f"mac{n}",
            "ips": [f"10.0.0.{n + 1}"],
            "rdma": [None if m == n or (m - n) % 9 not in (1, 8) else "rdma_en5" for m in range(9)],
        }
        for n in range(9)
    ]
    assert read({"backend": "jaccl-ring", "hosts": hosts}).backend == "jaccl-ring"
    with pytest.raises(ConfigError, match=r"`jaccl` connects at most 8 hosts, not 9; use `ring`"):
        read({"backend": "jaccl", "hosts": hosts})
