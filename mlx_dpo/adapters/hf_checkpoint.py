"""The Hugging Face checkpoint that a base came from: its tensors by name, read from headers."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)

from mlx_dpo.errors import ModelError, reason
from mlx_dpo.io.arrays import Arrays, read_arrays
from mlx_dpo.models.files import weight_files

HUB_ERRORS = (HTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError)
MAX_HEADER_BYTES = 100_000_000  # bytes; what safetensors itself allows


@dataclass(frozen=True)
class HFCheckpoint:
    """Names and shapes of a checkpoint's tensors, and where its weights lie if that is here."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    folder: Path | None = None

    @property
    def is_packed(self) -> bool:
        """Whether MLX quantised it: then weights stand beside their scales."""
        return any(name.endswith(".scales") for name in self.shapes)

    def tensors(self) -> Arrays:
        """All tensors, read when they are used; none where only headers are known."""
        found: Arrays = {}
        for file in weight_files(self.folder) if self.folder else ():
            found |= read_arrays(file)[0]
        return found


def local_checkpoint(folder: Path, name: str) -> HFCheckpoint:
    """The checkpoint in a folder.

    Raises:
        ModelError: a weight file is damaged, or there are none.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        entries = json.loads(read_safetensors_header(file))
        shapes |= {k: tuple(v["shape"]) for k, v in entries.items() if k != "__metadata__"}
    if not shapes:
        raise ModelError(f"{name}: no weights that are safetensors; name a model's folder")
    return HFCheckpoint(name, shapes, folder)


def hub_checkpoint(hub_id: str, revision: str | None = None) -> HFCheckpoint:
    """The checkpoint of a Hub repository, of which headers alone are downloaded.

    Raises:
        ModelError: there is none, or the Hub cannot be asked.
    """
    try:
        found = HfApi().get_safetensors_metadata(hub_id, revision=revision)
    except HFValidationError as error:
        raise ModelError(f"{hub_id}: no such folder, and not a Hub id (`ORG/NAME`)") from error
    except HUB_ERRORS as error:
        raise ModelError(
            f"{hub_id}: the names of its tensors cannot be read ({reason(error)}); name a Hub id "
            "or a folder that holds safetensors"
        ) from error
    shapes = {
        name: tuple(tensor.shape)
        for file in found.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return HFCheckpoint(hub_id, shapes)


def read_safetensors_header(file: Path) -> bytes:
    """The JSON that a safetensors file begins with.

    Raises:
        ModelError: it begins with something else.
    """
    with file.open("rb") as stream:
        start = stream.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = stream.read(size) if 0 < size <= MAX_HEADER_BYTES else b""
    if not header.startswith(b"{"):
        raise ModelError(f"{file}: not a safetensors file; get it again")
    return header
