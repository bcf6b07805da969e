"""Settings of connections to OpenAI-compatible servers, the API key, and counts of requests."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from threading import Lock

from mlx_dpo.errors import ConfigError
from mlx_dpo.openai_client.address import Address, check_address, is_address, parse_address
from mlx_dpo.units import format_bytes

OPENAI_HOST, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"


@dataclass
class RequestCounts:
    """Counts of what was sent to servers and what came back, over all servers of a command."""

    requests: int = 0  # sent, retries included
    sent_bytes: int = 0  # of the bodies
    retries: int = 0
    replies: int = 0
    cached: int = 0  # replies that an earlier request had brought
    cut: int = 0  # replies that ended at the token limit
    filtered: int = 0  # replies that a filter of the server withheld
    unusable: int = 0  # replies that were no answer after all attempts
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, **counts: int) -> None:
        """Add to the counts; any thread may call this."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def describe(self) -> str | None:
        """Return the counts as one line; None if no server was used."""
        if not self.requests and not self.cached:
            return None
        parts = []
        if self.requests:
            sent = format_bytes(self.sent_bytes)
            parts.append(f"{self.replies:,} from {self.requests:,} requests ({sent} sent)")
        for count, text in (
            (self.cached, "from the cache"),
            (self.retries, "requests repeated"),
            (self.cut, "cut at the token limit"),
            (self.filtered, "withheld by the server's filter"),
            (self.unusable, "not usable"),
        ):
            if count:
                parts.append(f"{count:,} {text}")
        return f"Replies of addresses: {', '.join(parts)}"


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Settings of the connections of one command to OpenAI-compatible servers.

    The API key itself is no setting: it is read from the environment when a request is made.

    Raises:
        ConfigError: a setting is out of its bounds.
    """

    allow_remote: bool = False  # whether text may be sent to other machines
    api_key_env: str | None = None  # the environment variable of the API key
    key_host: str | None = None  # the only host that gets this key; None: that of any address
    max_concurrency: int = 4  # requests at the same time
    request_timeout: float = 600.0  # seconds for one request, from connecting to its last byte
    counts: RequestCounts = field(default_factory=RequestCounts, compare=False)

    def __post_init__(self) -> None:
        if self.max_concurrency < 1:
            raise ConfigError(f"`max_concurrency` must be at least 1, got {self.max_concurrency}")
        if not 0 < self.request_timeout < float("inf"):
            raise ConfigError(f"`request_timeout` must be above 0, got {self.request_timeout}")

    def open(self, spec: str) -> Address:
        """Return the address that `spec` is, after checking that it may be used.

        Raises:
            ConfigError: the address is not valid, or text may not be sent there.
        """
        address = parse_address(spec)
        check_address(address, allow_remote=self.allow_remote)
        return address

    def api_key(self, address: Address) -> str | None:
        """Return the API key for an address from the environment; None if it gets none.

        Without `api_key_env`, only OpenAI's own host gets a key, that of `OPENAI_API_KEY`.

        Raises:
            ConfigError: the variable is not set, or its value cannot be sent in a header.
        """
        name, key = self.api_key_env, ""
        if name is None and address.host == OPENAI_HOST and address.is_encrypted:
            name = OPENAI_KEY
        if name is None or self.key_host not in (None, address.host):
            return None
        key = os.environ.get(name, "").strip()
        if not key:
            raise ConfigError(f"{name}: the environment variable is not set; put the API key in it")
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(
                f"{name}: not an API key (a character is not an ASCII letter, digit or sign); set "
                "it again"
            )
        return key


def bind_connection(connection: Connection, specs: Sequence[str | None]) -> Connection:
    """Return the connection settings for a command that opens the addresses among `specs`.

    A key goes to one host only: the only one that is not this machine, else this machine.

    Raises:
        ConfigError: an address may not be used, a setting has no effect, or two hosts would get
            the same key.
    """
    addresses = [connection.open(spec) for spec in specs if is_address(spec)]
    remote = sorted({address.host for address in addresses if not address.is_loopback})
    default = Connection()
    if not addresses:
        for name in ("api_key_env", "max_concurrency", "request_timeout"):
            if getattr(connection, name) != getattr(default, name):
                raise ConfigError(f"`{name}` has no effect without an address of a server")
    if connection.allow_remote and not remote:
        raise ConfigError("`allow_remote` has no effect without an address of another machine")
    if connection.api_key_env is None:
        return connection
    hosts = remote or sorted({address.host for address in addresses})
    if len(hosts) > 1:
        raise ConfigError(
            f"`api_key_env` names one key, which {' and '.join(hosts)} would both get; use "
            "addresses of one host"
        )
    return replace(connection, key_host=hosts[0])
