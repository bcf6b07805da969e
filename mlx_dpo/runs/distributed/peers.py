"""The ranks of a run with the hosts they run on: compare values and errors of all ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from mlx_dpo.distributed.ranks import Ranks, RanksError
from mlx_dpo.errors import DPOError

AGREEMENT = "agreement"  # name of the operation in which ranks compare values and send errors


class SharedError(RanksError):
    """An error that all ranks raise at the same point of a run; rank 0 alone prints it."""

    is_shared = True


@dataclass(frozen=True)
class Peers:
    """The ranks of a run, and the host of each.

    Attributes:
        ranks: this process as one of the ranks.
        facts: what each rank runs on, in their order: `host`, `chip`, `memory_gb` and the like.
    """

    ranks: Ranks
    facts: Sequence[Mapping[str, Any]]

    @property
    def hosts(self) -> list[str]:
        """The host name of each rank."""
        return [str(facts["host"]) for facts in self.facts]

    @property
    def on_this_host(self) -> int:
        """Number of ranks that share the memory of this host, with this one."""
        hosts = self.hosts
        return hosts.count(hosts[self.ranks.rank])

    def name(self, rank: int) -> str:
        """Return the number of a rank and its host, such as `rank 1 (mac-2)`."""
        return f"rank {rank} ({self.hosts[rank]})"

    def check_same(self, values: Mapping[str, Any], advice: str) -> None:
        """Check that values of JSON are the same on all ranks.

        Args:
            values: values of this rank by their names, which the message begins with.
            advice: what to do if one differs.

        Raises:
            SharedError: a value differs; the message has the rank, its host and both values.
        """
        rows = self._agree(values)
        for rank, row in enumerate(rows):
            for name, value in row.items():
                if value != rows[0][name]:
                    raise SharedError(
                        f"{self.name(rank)}: {name} is {_shown(value)}, but {_shown(rows[0][name])}"
                        f" on {self.name(0)}; {advice}"
                    )

    def any(self, name: str, flag: bool) -> bool:
        """Return whether `flag` is true on any rank.

        Raises:
            SharedError: another rank has failed before its comparison.
        """
        return any(row[name] for row in self._agree({name: bool(flag)}))

    @contextmanager
    def sharing_errors(self, kinds: tuple[type[Exception], ...] = (DPOError,)) -> Iterator[None]:
        """Raise an error on all ranks if one of them raises one in the block.

        Rank 0 raises its own error, or else one that names the first rank with an error. If the
        others are still in the block, they get the error where they next compare values.

        Args:
            kinds: types of errors that are shared.

        Raises:
            SharedError: another rank failed, or this one is not rank 0.
        """
        if self.ranks.is_alone:
            yield
            return
        try:
            yield
        except RanksError:  # all ranks have it, or they cannot be reached
            raise
        except kinds as error:
            was_sent = self._send(error)
            raise (self.shared(error) if was_sent else error) from error.__cause__
        self._agree({})

    def _agree(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the values of all ranks. All comparisons and errors meet in this one operation.

        Raises:
            SharedError: another rank has sent an error instead.
            RanksError: another rank compares other values.
        """
        rows = self.ranks.all_gather_json(AGREEMENT, {"values": dict(values)})
        for rank, row in enumerate(rows):
            if (message := row.get("error")) is not None:
                raise SharedError(message if rank == 0 else f"{self.name(rank)}: {message}")
        for rank, row in enumerate(rows):
            if row["values"].keys() != values.keys():
                raise RanksError(f"{self.name(rank)} compares other values than this rank")
        return [row["values"] for row in rows]

    def _send(self, error: Exception) -> bool:
        """Send an error to the other ranks; return whether they were at an agreement."""
        try:
            self.ranks.all_gather_json(AGREEMENT, {"error": str(error)})
        except RanksError:
            return False
        return True

    def shared(self, error: Exception) -> Exception:
        """Return the error to raise if all ranks have the same `error`, which rank 0 prints."""
        if self.ranks.is_main or isinstance(error, SharedError):
            return error
        return SharedError(str(error))


class _HasPeers(Protocol):
    peers: Peers


Run = TypeVar("Run", bound=_HasPeers)
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def with_errors_of_all_ranks(
    method: Callable[Concatenate[Run, Arguments], Result],
) -> Callable[Concatenate[Run, Arguments], Result]:
    """Decorate a method of a run so that an error of one rank is raised on all of them."""

    @wraps(method)
    def call(run: Run, /, *args: Arguments.args, **named: Arguments.kwargs) -> Result:
        with run.peers.sharing_errors():
            return method(run, *args, **named)

    return call


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) > 16 and " " not in value:
        return f"{value[:12]}…"  # a digest
    return "none" if value is None else f"{value}"
