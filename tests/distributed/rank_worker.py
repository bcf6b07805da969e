"""A rank of a `RankPool`: runs the calls that come as lines of JSON, and replies to each."""

import json
import os
import sys
import tempfile
import threading
import traceback
from functools import reduce
from importlib.metadata import version
from queue import Queue
from unittest.mock import patch

import mlx_dpo  # noqa: F401  (first: it loads OpenBLAS before MLX is imported)

import mlx.core as mx  # isort: skip
import numpy as np

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.distributed import ranks as ranks_module
from mlx_dpo.distributed.connect import connect
from mlx_dpo.errors import DPOError
from mlx_dpo.io.arrays import named_arrays
from mlx_dpo.profiling.device_memory import MemoryBudget
from mlx_dpo.runs import auto_batch_size
from mlx_dpo.runs.distributed.saving import digest
from mlx_dpo.training.monitor import samples
from tests.run_settings import SAMPLE_TOKENS

SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3e38, 6e4)


def add_random_arrays(*, seed, cases):
    """Add random arrays in shared-out passes; return the cases that differ from a left fold.

    The fold is computed by NumPy where it has the dtype. Rows of ranks without a pass are random
    as well: they must have no effect.
    """
    with patch.object(ranks_module, "CHUNK_BYTES", 64):
        return list(find_wrong_sums(connect(), np.random.default_rng(seed), cases))


def find_wrong_sums(ranks, draw, cases):
    for case in range(cases):
        dtype = (mx.float32, mx.bfloat16, mx.float16)[case % 3]
        width = 64 // dtype.size
        size = int(draw.choice([1, width - 1, width, width + 1, 2 * width, 5 * width + 3]))
        count = int(draw.integers(1, 8))
        arrays = [to_dtype(random_array(draw, size, case), dtype) for _ in range(count)]
        unused = to_dtype(random_array(draw, size, case), dtype)
        total = None
        for round_ in ranks.rounds(count):
            number = round_[ranks.rank]
            mine = unused if number is None else arrays[number]
            order = sorted((n, rank) for rank, n in enumerate(round_) if n is not None)
            total = ranks.add_in_order("test", total, mine, [rank for _, rank in order])
        expected = fold(arrays)
        if bits(total) != bits(expected) or total.dtype != dtype:
            yield (
                f"case {case}: {count} arrays of {size} {dtype}: {total.tolist()} is not "
                f"{expected.tolist()}"
            )


def random_array(draw, size, case):
    """Return float32 values of very different magnitudes, in some cases with special ones. (n,)"""
    values = draw.standard_normal(size) * 10.0 ** draw.integers(-4, 4, size)
    if case % 2:
        values = np.where(draw.random(size) < 0.3, draw.choice(SPECIAL, size), values)
    elif case % 8 == 0:
        values = np.full(size, -0.0)  # a sum that began with +0 would be +0
    return values.astype(np.float32)


def to_dtype(values, dtype):
    array = mx.array(values).astype(dtype)
    mx.eval(array)
    return array


def fold(arrays):
    if arrays[0].dtype == mx.bfloat16:
        return reduce(mx.add, arrays)
    with np.errstate(all="ignore"):
        return mx.array(reduce(np.add, [np.array(array) for array in arrays]))


def bits(array):
    """Return the bits of the elements; those of a NaN are not defined, and are left out."""
    view = array.view({4: mx.uint32, 2: mx.uint16}[array.itemsize])
    return mx.where(mx.isnan(array), 0, view).tolist(), mx.isnan(array).tolist()


def train(*, settings, folder, resume=False, stop_after=None, stop_rank=0):
    """Train a run in `folder`, with its working directory, cache and temporary files there.

    After step `stop_after`, rank `stop_rank` asks for a stop.
    """
    os.chdir(f"{folder}/work")
    os.environ["MLX_DPO_CACHE"] = f"{folder}/cache"
    tempfile.tempdir = f"{folder}/temporary"  # not TMPDIR, where MLX looks for compiled kernels
    with DPOTrainer(DPOConfig.from_dict(settings), resume=resume) as trainer:
        steps = 0
        for row in trainer.steps():
            steps = row["step"]
            if steps == stop_after and connect().rank == stop_rank:
                trainer.request_stop()
    weights = digest(named_arrays(trainer.policy.trainable_parameters()))
    return {"steps": steps, "stopped": trainer.stopped, "weights": weights}


def train_with_version(*, package, versions, **arguments):
    """Train with `versions[rank]` as the version of an installed package."""
    own = versions[connect().rank]
    with patch(
        "mlx_dpo.runs.distributed.handshake.version",
        lambda name: own if name == package else version(name),
    ):
        return train(**arguments)


def train_with_memory(*, gigabytes, **arguments):
    """Train with `gigabytes[rank]` of memory."""
    own = MemoryBudget(int(gigabytes[connect().rank] * 1e9), "as the test says")
    with patch.object(auto_batch_size, "available_memory", lambda: own):
        return train(**arguments)


CALLS = {f.__name__: f for f in (add_random_arrays, train, train_with_version, train_with_memory)}


def read_lines(lines):
    """Put the lines of standard input into `lines`; end this process when they end."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def run(call):
    try:
        return {"value": CALLS[call["name"]](**call["arguments"])}
    except DPOError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    except BaseException:
        return {"traceback": traceback.format_exc()}


def main():
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed does not mix with replies
    lines = Queue()
    threading.Thread(target=read_lines, args=(lines,), daemon=True).start()
    samples.SAMPLE_TOKENS = SAMPLE_TOKENS
    connect()
    reply = {"value": "connected"}
    while True:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        reply = run(json.loads(lines.get()))


if __name__ == "__main__":
    main()
