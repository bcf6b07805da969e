"""Read metrics back from the trackers' own files, as [(step, name in the tracker, value)]."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

from mlx_dpo.trackers.base import with_transformers_names

BLOCK = 32768  # bytes of a block in LevelDB's log format, which wandb's files have


def expected(rows):
    """Return the values that a tracker must have after `rows`, in order."""
    return [
        (int(row["step"]), name, value)
        for row in rows
        for name, value in with_transformers_names(row).items()
    ]


def tensorboard(folder):
    """Read the event files of a run folder; their values are float32."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data):
        crc = crc32c(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    values = []
    for file in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            payload = data[at + 12 : at + 12 + length]
            assert struct.unpack_from("<I", data, at + 8)[0] == masked(data[at : at + 8])
            assert struct.unpack_from("<I", data, at + 12 + length)[0] == masked(payload)
            event = Event.FromString(payload)
            values += [
                (event.step, value.tag, value.simple_value)
                for value in event.summary.value
                if value.HasField("simple_value")
            ]
            at += 16 + length
    return values


def wandb_records(folder):
    """Yield the records of the offline wandb runs of a run folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        data, at, content = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if BLOCK - at % BLOCK < 7:
                at += BLOCK - at % BLOCK
                continue
            crc, length, kind = struct.unpack_from("<IHB", data, at)
            piece = data[at + 7 : at + 7 + length]
            assert crc == zlib.crc32(piece, zlib.crc32(bytes([kind])))
            content += piece
            at += 7 + length
            if kind in (1, 4):  # a full record, or the last piece of one
                yield Record.FromString(content)
                content = b""


def wandb(folder):
    """Read the offline wandb runs of a run folder."""
    values = []
    for record in wandb_records(folder):
        items = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
        metrics = {k: v for k, v in items.items() if not k.startswith("_")}
        if metrics:
            step = metrics.pop("train/global_step")
            assert items["_step"] == 2 * step + any(name.startswith("eval/") for name in metrics)
            values += [(step, name, value) for name, value in metrics.items()]
    return values


def trackio(folder, project="mlx-dpo"):
    """Read trackio's database in a subprocess: trackio chooses its folder when it is imported."""
    program = (
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as S\n"
        f"print(json.dumps([S.get_logs({project!r}, r.name, run_id=r.id) "
        f"for r in trackio.Api().runs({project!r}) if r.name.startswith({folder.name!r})]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    [rows] = json.loads(done.stdout)  # exactly one run
    return [
        (row["step"], name, value)
        for row in rows
        for name, value in row.items()
        if name not in ("step", "timestamp")
    ]


def swanlab(folder):
    """Read the SwanLab logs of a run folder."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    values = []
    for file in sorted(Path(folder / "swanlog").glob("run-*/run-*.swanlab")):
        reader = DataStoreReader()
        reader.open(file)
        for data in reader:
            record = Record.FromString(data)
            if record.HasField("scalar"):
                scalar = record.scalar
                values.append((scalar.step, scalar.key, scalar.value.number))
        reader.close()
    return values
