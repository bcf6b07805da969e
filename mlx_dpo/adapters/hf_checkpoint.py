"""Read the names and shapes of a Hugging Face checkpoint's tensors from its safetensors headers."""

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
from mlx_dpo.io.hub_token import check_hub_token
from mlx_dpo.models.files import weight_files

HUB_ERRORS = (HTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError)
MAX_HEADER_BYTES = 100_000_000  # bytes; what safetensors itself allows


@dataclass(frozen=True)
class HFCheckpoint:
    """Names and shapes of a Hugging Face checkpoint's tensors.

    `folder` is None for a checkpoint on the Hub.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    folder: Path | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the checkpoint was quantized by MLX, which stores tensors named `*.scales`."""
        return any(name.endswith(".scales") for name in self.shapes)

    def tensors(self) -> Arrays:
        """Return all tensors of the checkpoint, keyed by name and read lazily.

        The result is empty for a checkpoint on the Hub.
        """
        arrays: Arrays = {}
        for file in weight_files(self.folder) if self.folder else ():
            arrays |= read_arrays(file)[0]
        return arrays


def local_checkpoint(folder: Path, name: str) -> HFCheckpoint:
    """Return names and shapes of the tensors in the safetensors files of `folder`.

    Args:
        name: Name of the checkpoint for error messages.

    Raises:
        ModelError: a weight file is damaged, or there is no weight file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        entries = json.loads(read_safetensors_header(file))
        shapes |= {k: tuple(v["shape"]) for k, v in entries.items() if k != "__metadata__"}
    if not shapes:
        raise ModelError(f"{name}: no safetensors weights found; name a model folder")
    return HFCheckpoint(name, shapes, folder)


def hub_checkpoint(hub_id: str, revision: str | None = None) -> HFCheckpoint:
    """Return names and shapes of the tensors in a Hub repository.

    Only the headers of the weight files are downloaded.

    Raises:
        ModelError: the repository has no safetensors files, or the Hub cannot be reached.
    """
    check_hub_token()
    try:
        metadata = HfApi().get_safetensors_metadata(hub_id, revision=revision)
    except HFValidationError as error:
        raise ModelError(f"{hub_id}: no such folder, and not a Hub id (`ORG/NAME`)") from error
    except HUB_ERRORS as error:
        raise ModelError(
            f"{hub_id}: the names of its tensors cannot be read ({reason(error)}); name a Hub id "
            "or a folder that holds safetensors"
        ) from error
    shapes = {
        name: tuple(tensor.shape)
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return HFCheckpoint(hub_id, shapes)


def read_safetensors_header(file: Path) -> bytes:
    """Return the JSON header of a safetensors file.

    Raises:
        ModelError: the file does not begin with a safetensors header.
    """
    with file.open("rb") as stream:
        start = stream.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = stream.read(size) if 0 < size <= MAX_HEADER_BYTES else b""
    if not header.startswith(b"{"):
        raise ModelError(f"{file}: not a safetensors file; download it again")
    return header
