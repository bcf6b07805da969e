"""The ranks of a run: processes, on one or several machines, that share the work of each step.

All ranks run the same program and take the same decisions. What differs between machines is sent by
rank 0; what is computed apart is gathered and put together in a fixed order. Each collective
operation follows a header that all ranks compare, because MLX would mix up operations of different
names or sizes without an error.

This is the only module that uses MLX's distributed backends.
"""

import io
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import mlx.core as mx
import numpy as np

from mlx_dpo.distributed.environment import RANK, Backend, find_backend
from mlx_dpo.errors import ConfigError, DPOError, reason

CHUNK_BYTES = 2**25  # of a payload that are gathered at once
ADVICE = {  # by backend, where the other ranks cannot be reached
    "mpi": "MLX needs Open MPI: start the ranks with its `mpirun`, and name its library in "
    "MLX_MPI_LIBNAME if it is not libmpi.so (Debian: libmpi.so.40)",
}


class RanksError(DPOError):
    """The ranks of a run do not agree, or one of them was lost."""


class Ranks:
    """This process as one of the ranks of a run. A single process is rank 0 of 1.

    All ranks must call the collective methods in the same order. Each method takes a name, which is
    part of the header that the ranks compare.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        backend: MLX's backend between them; None for a single process.
        gathered_bytes: bytes that this rank has sent into gathers.
        in_lockstep: whether a rank that has no pass in a round repeats another one and drops the
            result, because passes gather weights and all ranks must take part.
    """

    def __init__(self, group: Any = None, backend: Backend | None = None) -> None:
        """Take part in `group`, an `mx.distributed.Group`; None is a single process."""
        self.rank: int = group.rank() if group is not None else 0
        self.size: int = group.size() if group is not None else 1
        self.backend = backend
        self.gathered_bytes = 0
        self._group = group
        self._operations = 0  # collective operations so far
        self.in_lockstep = False
        self._on_progress: Callable[[], None] = lambda: None
        self._explain_loss: Callable[[str], RanksError] = RanksError

    @classmethod
    def from_environment(cls) -> Self:
        """Connect to the other ranks, as variables of MLX's launcher, ours or `mpirun` say.

        Without such variables this is a single process.

        Raises:
            ConfigError: variables are missing, or the other ranks cannot be reached.
        """
        if (backend := find_backend(os.environ)) is None:
            return cls()
        advice = ADVICE.get(backend, "try `mlx-dpo doctor --hosts FILE`")
        try:
            group = mx.distributed.init(strict=True, backend=backend)
        except RuntimeError as error:
            raise ConfigError(
                f"rank {os.environ.get(RANK, '?')}: the other ranks cannot be reached by "
                f"`{backend}` ({reason(error)}); {advice}"
            ) from error
        return cls(group, backend) if group.size() > 1 else cls()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reads and writes the run folder and prints."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    @property
    def operations(self) -> int:
        """Number of collective operations that this rank has begun."""
        return self._operations

    def watch(
        self, on_progress: Callable[[], None], explain_loss: Callable[[str], RanksError]
    ) -> None:
        """Set the functions of the heartbeats.

        Args:
            on_progress: called after each pass and each collective operation.
            explain_loss: takes the message of MLX when a rank was lost; returns the error to raise.
        """
        self._on_progress, self._explain_loss = on_progress, explain_loss

    def note_progress(self) -> None:
        """Tell the other ranks, by the next heartbeat, that this rank still works."""
        self._on_progress()

    def release_group(self) -> None:
        """Let MLX leave the group when the process ends; no operation may follow.

        Open MPI calls a process failed that ends without `MPI_Finalize`, which MLX calls when
        nothing refers to the group.
        """
        self._group = None

    # --- sharing out ---------------------------------------------------------------------------

    def rounds(self, count: int) -> list[list[int | None]]:
        """Share out `count` passes; return each round as one pass number, or None, per rank.

        Neighbouring passes have similar lengths, so that a round takes equally long everywhere.
        Every other round goes by descending rank, because the later pass is the longer one.
        """
        rounds: list[list[int | None]] = []
        for first in range(0, count, self.size):
            numbers = [n if n < count else None for n in range(first, first + self.size)]
            rounds.append(numbers[::-1] if len(rounds) % 2 else numbers)
        return rounds

    # --- collective operations -----------------------------------------------------------------

    def all_gather_bytes(self, name: str, payload: bytes) -> list[bytes]:
        """Return the payloads of all ranks, in their order. Payloads may have different sizes."""
        if self.is_alone:
            return [payload]
        sizes = self._compare_headers(name, len(payload))
        rows: list[bytearray] = [bytearray() for _ in sizes]
        for start in range(0, max(sizes), CHUNK_BYTES):
            width = min(CHUNK_BYTES, max(sizes) - start)
            padded = np.zeros((1, width), np.uint8)
            part = np.frombuffer(payload[start : start + width], np.uint8)
            padded[0, : len(part)] = part
            gathered = np.array(self._all_gather(mx.array(padded)))
            for row, size, content in zip(rows, sizes, gathered, strict=True):
                row += content[: max(0, size - start)].tobytes()
        return [bytes(row) for row in rows]

    def all_gather_json(self, name: str, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order. They must be values of JSON."""
        if self.is_alone:
            return [value]
        return [json.loads(row) for row in self.all_gather_bytes(name, json.dumps(value).encode())]

    def all_gather_arrays(
        self, name: str, arrays: Mapping[str, np.ndarray]
    ) -> list[dict[str, np.ndarray]]:
        """Return the named arrays of all ranks, in their order. Shapes may differ."""
        if self.is_alone:
            return [dict(arrays)]
        return [_unpack(row) for row in self.all_gather_bytes(name, _pack(arrays))]

    def broadcast_bytes(self, name: str, payload: bytes | None) -> bytes:
        """Return the payload of rank 0; the other ranks pass None."""
        return self.all_gather_bytes(name, (payload or b"") if self.is_main else b"")[0]

    def broadcast_json(self, name: str, value: Any) -> Any:
        """Return the value of rank 0; those of other ranks are not used."""
        return self.all_gather_json(name, value if self.is_main else None)[0]

    def any(self, name: str, flag: bool) -> bool:
        """Return whether `flag` is true on any rank."""
        return any(self.all_gather_json(name, bool(flag)))

    def add_in_order(
        self, name: str, total: mx.array | None, mine: mx.array, order: Sequence[int]
    ) -> mx.array:
        """Return `total` plus the arrays of the ranks in `order`, added one after the other. (n,)

        A single process that adds the same arrays in this order gets the same bits. A reduction of
        the backend would add them in an order that depends on the number of ranks.

        Args:
            total: the sum so far, (n,); None begins with the first array of `order`.
            mine: array of this rank, (n,); ranks that are not in `order` pass one of any content.

        Raises:
            RanksError: the arrays have different sizes.
        """
        if not self.is_alone and len(set(sizes := self._compare_headers(name, mine.nbytes))) > 1:
            raise RanksError(f"{name}: arrays of different sizes ({sizes} bytes by rank)")
        parts: list[mx.array] = []
        width = max(1, CHUNK_BYTES // mine.itemsize)
        for start in range(0, mine.size, width):
            chunk = mine[start : start + width][None]
            rows = chunk if self.is_alone else self._all_gather(chunk)
            part = None if total is None else total[start : start + width]
            for rank in order:
                part = rows[rank] if part is None else part + rows[rank]
            mx.eval(part)
            parts.append(cast("mx.array", part))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def all_gather_rows(self, name: str, mine: mx.array) -> mx.array:
        """Return the arrays of all ranks, which have the same shape and dtype. (size, ...)

        Raises:
            RanksError: the arrays have different sizes.
        """
        if self.is_alone:
            return mine[None]
        if len(set(sizes := self._compare_headers(name, mine.nbytes))) > 1:
            raise RanksError(f"{name}: arrays of different sizes ({sizes} bytes by rank)")
        return self._all_gather(mine[None])

    def _compare_headers(self, name: str, size: int) -> list[int]:
        """Return the payload sizes of all ranks, in bytes, after a check that all are here.

        Raises:
            RanksError: another rank is at another operation.
        """
        self._operations += 1
        header = mx.array([[self._operations, zlib.crc32(name.encode()), size]], dtype=mx.int64)
        headers = np.array(self._all_gather(header))
        for rank, other in enumerate(headers):
            if (other[:2] != headers[self.rank][:2]).any():
                raise RanksError(
                    f"rank {self.rank} is at operation {self._operations} (`{name}`), rank {rank} "
                    f"at another one (number {other[0]}); the ranks did not run the same program"
                )
        return cast("list[int]", headers[:, 2].tolist())

    def _all_gather(self, mine: mx.array) -> mx.array:
        """Return the arrays (1, ...) of all ranks as rows of one array. (size, ...)"""
        # What goes in was computed before and what comes out is waited for at once: Metal ends a
        # computation that waits for the network for too long, and the order of two operations in
        # one graph is not defined.
        mx.eval(mine)
        try:
            rows = mx.distributed.all_gather(mine, group=self._group, stream=mx.cpu)
            mx.eval(rows)
        except RuntimeError as error:
            raise self._explain_loss(reason(error)) from error
        self.gathered_bytes += mine.nbytes
        self._on_progress()
        return rows


SINGLE_PROCESS = Ranks()


def is_backend_available(backend: str) -> bool:
    """Return whether this MLX was built with a backend and finds the libraries that it needs."""
    return bool(mx.distributed.is_available(backend))


def _pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return named arrays in NumPy's npz format; `_unpack` reads it without pickle."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _unpack(content: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)
