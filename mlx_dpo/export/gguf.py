"""Write GGUF files with llama.cpp's own programs, and measure what their quantization keeps.

llama.cpp's converter knows the tokenizers and the layouts of its architectures, so it is run as it
is. MLX cannot run its quantized file, so the file is measured by its values: the rows of the
quantized matrices are read back, by llama.cpp's package `gguf`, and put into a copy of the
checkpoint. MLX reads GGUF files, too, but in MLX 0.32.4 its values of Q4_K are wrong.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

import mlx.core as mx
import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from mlx_dpo.adapters.hf_checkpoint import local_checkpoint
from mlx_dpo.errors import ConfigError, ModelError, reason
from mlx_dpo.export.model_folder import write_hf
from mlx_dpo.io.arrays import Arrays
from mlx_dpo.io.atomic import atomic_file
from mlx_dpo.startup.jit_cache import user_environment

CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
ROWS = 65536  # rows that are hashed at a time
HEAD, EMBEDDINGS = "output.weight", "token_embd.weight"  # in GGUF files
HEAD_NAME = re.compile(r"lm_head|embed_out|^(?:model\.)?output\.weight$")  # in checkpoints


class _ProgramError(Exception):
    """A program of llama.cpp failed; the text is its last line."""


def find_gguf_converter(given: str | None) -> Path:
    """Return the path of llama.cpp's converter: `given`, or a program on the PATH.

    Raises:
        ConfigError: the converter is not found, or is not executable.
    """
    return _find_program(CONVERTER, given, "converter")


def find_quantizer(given: str | None) -> Path:
    """Return the path of llama.cpp's `llama-quantize`: `given`, or a program on the PATH.

    Raises:
        ConfigError: the program is not found, or is not executable.
    """
    return _find_program(QUANTIZER, given, "quantizer")


def _find_program(name: str, given: str | None, option: str) -> Path:
    program = given or shutil.which(name)
    path = Path(program).expanduser() if program else None
    if path is not None and path.is_dir():
        path /= name
    if path is None or not path.is_file():
        raise ConfigError(
            f"a GGUF file needs llama.cpp's `{name}` ({given or 'none found'}); it comes with "
            f"llama.cpp (`brew install llama.cpp`); name it with `--{option}`"
        )
    if not os.access(path, os.X_OK):
        raise ConfigError(f"{path}: not executable; make it so with `chmod +x`")
    return path


def check_output_file(output: Path) -> None:
    """Raise `ConfigError` if the output file exists already, or its folder does not exist."""
    if output.exists():
        raise ConfigError(f"{output}: already exists; choose another name")
    if not output.resolve().parent.is_dir():
        raise ConfigError(f"{output}: the folder {output.parent} does not exist; create it")


def write_gguf(converter: Path, model: Path, output: Path, *, outtype: str | None = None) -> None:
    """Convert the Hugging Face checkpoint in the folder `model` to the GGUF file `output`.

    Args:
        outtype: the converter's type of the matrices, such as `f16`; by default its own choice.

    Raises:
        ModelError: the converter fails, for example on an unknown architecture.
    """
    types = [] if outtype is None else ["--outtype", outtype]
    # Run by its own shebang line, because its imports are in another environment than this one.
    failure = _run_writer(
        output, lambda partial: [str(converter.resolve()), str(model), "--outfile", partial, *types]
    )
    if failure is not None:
        raise ModelError(
            f"{output}: {converter.name} cannot convert the model ({failure[:200]}); the "
            f"checkpoint itself is complete in {model}; check that the converter's requirements "
            "are installed and that it supports the architecture and the tokenizer"
        )


def quantize_gguf(quantizer: Path, source: Path, output: Path, gguf_type: str) -> None:
    """Quantize the GGUF file `source` to `output`, as llama.cpp's `gguf_type`.

    Raises:
        ModelError: the program fails.
    """
    failure = _run_writer(
        output,
        lambda partial: [str(quantizer.resolve()), str(source), partial, gguf_type.upper()],
    )
    if failure is not None:
        raise ModelError(
            f"{output}: {quantizer.name} cannot quantize the model to {gguf_type} "
            f"({failure[:200]}); choose another --gguf-type"
        )


def _run_writer(output: Path, command: Callable[[str], list[str]]) -> str | None:
    """Run a program that writes `output`, all or nothing; return why it failed, or None."""
    try:
        with atomic_file(output) as partial:
            done = subprocess.run(
                command(str(partial)),
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env=user_environment(),
            )
            if done.returncode or not partial.is_file():
                message = done.stderr.strip() or done.stdout.strip() or "it wrote nothing"
                raise _ProgramError(message.splitlines()[-1])
    except _ProgramError as error:
        return str(error)
    except OSError as error:
        return reason(error)
    return None


def write_rounded_checkpoint(folder: Path, checkpoint: Path, plain: Path, quantized: Path) -> None:
    """Write a copy of a checkpoint whose matrices have the values of a quantized GGUF file.

    The converter renames tensors and may permute their rows (llama), stack them (experts) or join
    them (query, key and value), but it keeps the rows of matrices. So each row of the unquantized
    GGUF file is looked up, by content, among the rows of the checkpoint in float16, and the row of
    the quantized file takes its place. Vectors are not quantized. Rows of the LM head and of the
    embeddings may be equal, but are quantized to different types, so their tensors decide.

    Args:
        folder: existing folder for the copy.
        checkpoint: folder of the Hugging Face checkpoint.
        plain: the GGUF file that was made of it, in float16.
        quantized: the GGUF file that was made of `plain`.

    Raises:
        ModelError: a quantized row is not a row of the checkpoint.
    """
    files = local_checkpoint(checkpoint, str(checkpoint))
    rows = _CheckpointRows(files.tensors())
    after = {tensor.name: tensor for tensor in GGUFReader(quantized).tensors}
    for tensor in GGUFReader(plain).tensors:
        before, rounded = _values(tensor), _values(after[tensor.name])
        if before.ndim < 2 or np.array_equal(before, rounded):
            continue
        if not rows.replace(before, rounded, tensor.name):
            raise ModelError(
                f"{quantized}: cannot be measured, because the converter wrote other values "
                f"for `{tensor.name}` than the checkpoint has; use --gguf-type f16"
            )
    write_hf(folder, rows.changed(), files, keep_dtype=False)


def _values(tensor: ReaderTensor) -> np.ndarray:
    """Return the values of a tensor of a GGUF file in float32, in the order of PyTorch's axes."""
    shape = tensor.shape[::-1].tolist()  # GGUF names the innermost axis first
    return np.asarray(dequantize(tensor.data, tensor.tensor_type)).reshape(shape)


class _CheckpointRows:
    """The rows of a checkpoint's matrices, found by their values in float16."""

    def __init__(self, tensors: Arrays) -> None:
        self._matrices = {name: value for name, value in tensors.items() if value.ndim >= 2}
        self._places: dict[bytes, list[tuple[str, int]]] = {}  # tensor and row of a digest
        self._changed: dict[str, np.ndarray] = {}
        for name, value in self._matrices.items():
            for index, digest in enumerate(_row_digests(value)):
                self._places.setdefault(digest, []).append((name, index))

    def replace(self, old: np.ndarray, new: np.ndarray, tensor: str) -> bool:
        """Replace the rows of `old` by those of `new`; return whether all of them were found.

        Args:
            tensor: name of the tensor in the GGUF file.
        """
        rows = new.reshape(-1, new.shape[-1])
        for row, digest in zip(rows, _row_digests(mx.array(old)), strict=True):
            if digest not in self._places:
                return False
            for name, index in _without_other(self._places[digest], tensor):
                self._matrix(name)[index] = row
        return True

    def _matrix(self, name: str) -> np.ndarray:
        """Return the new values of a tensor, at first its own. (rows, columns)"""
        if name not in self._changed:
            value = self._matrices[name].astype(mx.float16)
            self._changed[name] = np.array(value.reshape(-1, value.shape[-1]))
        return self._changed[name]

    def changed(self) -> Arrays:
        """Return the new values of the tensors with a replaced row, in float16, by name."""
        return {
            name: mx.array(value).reshape(self._matrices[name].shape)
            for name, value in self._changed.items()
        }


def _without_other(places: list[tuple[str, int]], tensor: str) -> list[tuple[str, int]]:
    """Return the places of a row of the LM head or of the embeddings without those in the other.

    Args:
        tensor: name of the tensor in the GGUF file. With tied embeddings there is no head.
    """
    if tensor not in (HEAD, EMBEDDINGS):
        return places
    own = [
        (name, index)
        for name, index in places
        if (HEAD_NAME.search(name) is not None) == (tensor == HEAD)
    ]
    return own or places


def _row_digests(value: mx.array) -> Iterator[bytes]:
    """Yield a digest of each row of a tensor in float16; its last axis is the row."""
    rows = value.reshape(-1, value.shape[-1])
    for start in range(0, rows.shape[0], ROWS):
        chunk = np.array(rows[start : start + ROWS].astype(mx.float16))
        for row in chunk:
            yield blake2b(row.tobytes(), digest_size=16).digest()
