"""Addresses of OpenAI-compatible servers, and which of them may be used without a permission."""

from dataclasses import dataclass
from ipaddress import ip_address
from typing import TypeGuard

import httpx2

from mlx_dpo.errors import ConfigError

SCHEMES = ("http://", "https://")
EXAMPLE = "http://127.0.0.1:1234/v1#MODEL"
MAX_PORT = 65535
MDNS = ".local"  # names that only the local network resolves (RFC 6762)


def is_address(spec: str | None) -> TypeGuard[str]:
    """Return whether `spec` is the address of a server, and not a folder or a Hub id."""
    return spec is not None and spec.lower().startswith(SCHEMES)


@dataclass(frozen=True)
class Address:
    """The address of an OpenAI-compatible server, with the model if the address names one.

    `url` is the base URL, which mostly ends in `/v1`, without the model and a final slash.
    """

    url: str
    host: str
    model: str | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine answers at the address."""
        return self.host == "localhost" or _is(self.host, "is_loopback")

    @property
    def is_encrypted(self) -> bool:
        """Whether the connection is encrypted."""
        return self.url.startswith("https://")

    def __str__(self) -> str:
        return self.url if self.model is None else f"{self.url}#{self.model}"


def parse_address(spec: str) -> Address:
    """Parse an address such as `http://127.0.0.1:1234/v1#model`; `#model` may be missing.

    Raises:
        ConfigError: the address is not valid, or contains a user name, a password or a query.
    """
    base, _, model = spec.partition("#")
    try:
        url = httpx2.URL(base)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{_shown(spec)}: not an address ({error}); use {EXAMPLE}") from None
    if url.userinfo or url.query:
        raise ConfigError(
            f"{_shown(spec)}: an address with a user name, a password or a query would be stored "
            "with the answers; leave them out, and give a key by --api-key-env"
        )
    port = 1 if url.port is None else url.port
    if not url.host or not 0 < port <= MAX_PORT:
        raise ConfigError(f"{_shown(spec)}: not an address; use {EXAMPLE}")
    return Address(str(url).rstrip("/"), url.host, model or None)


def check_address(address: Address, *, allow_remote: bool) -> None:
    """Raise `ConfigError` if text may not be sent to the address.

    Loopback is always allowed. Other hosts need `allow_remote`, and encryption unless they are in
    the local network: a private IP address or a name that ends in `.local`.
    """
    if address.is_loopback:
        return
    if not allow_remote:
        raise ConfigError(
            f"{address}: {address.host} is not this machine, and would get your prompts and "
            "answers; add --allow-remote to send them there"
        )
    if not address.is_encrypted and not _is_in_local_network(address.host):
        raise ConfigError(
            f"{address}: anyone between here and {address.host} could read what is sent over plain "
            "http; use https://, or an address in your own network"
        )


def _is_in_local_network(host: str) -> bool:
    return host.endswith(MDNS) or _is(host, "is_private")


def _is(host: str, quality: str) -> bool:
    """Return a property of an IP address, which is False for names."""
    try:
        return bool(getattr(ip_address(host), quality))
    except ValueError:
        return False


def _shown(spec: str) -> str:
    """Return an address without what may be a password: the part before `@`, and the query."""
    scheme, _, rest = spec.partition("://")
    rest = rest.rpartition("@")[2].partition("?")[0]
    return f"{scheme}://{rest}"
