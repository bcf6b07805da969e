"""Scan files for secrets and personal paths before an upload.

Text files are scanned completely, safetensors files only in their header, and PNG files except
for the pixels. Any other file, such as a compressed one, is reported because it cannot be
scanned.
"""

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_dpo.adapters.hf_checkpoint import read_safetensors_header
from mlx_dpo.errors import ModelError
from mlx_dpo.hub.secret_patterns import (
    compiled_patterns,
    find_assignments,
    is_crossed_out,
    is_placeholder,
)

# Escaped characters in JSON (backslash) and URLs (percent).
ESCAPES = re.compile(r"(?:\\u00|%)([2-7][0-9A-Fa-f])|\\(?:u00[01]\w|[abfnrtv])|\\([/\"'])")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
NOT_SCANNABLE = "content that cannot be scanned (neither text, PNG nor safetensors)"


@dataclass(frozen=True)
class SecretMatch:
    """Location and kind of a secret or personal path in a file; the secret itself is not stored."""

    location: str  # file:line, or the file
    kind: str  # such as "a Hugging Face token"


def scan_for_secrets(content: Path | bytes, name: str) -> Iterator[SecretMatch]:
    """Yield the locations of secrets and personal paths in a file.

    Args:
        content: path of the file, or its bytes.
        name: name of the file in the repository.
    """
    try:
        data = _read_text(content, name)
    except (ValueError, ModelError):
        yield SecretMatch(name, NOT_SCANNABLE)
        return
    found = dict.fromkeys(
        (text.count("\n", 0, offset) + 1, kind)
        for text in dict.fromkeys((data, ESCAPES.sub(_unescape, data)))
        for offset, kind in _find_in_text(text)
    )
    yield from (SecretMatch(f"{name}:{line}", kind) for line, kind in found)


def _find_in_text(text: str) -> Iterator[tuple[int, str]]:
    """Yield the offset and the kind of each secret and personal path in a text."""
    for kind, pattern in compiled_patterns():
        for match in pattern.finditer(text):
            values = [value for value in match.groups() if value]
            is_example = all(map(is_placeholder, values)) if values else is_crossed_out(match[0])
            if not is_example:
                yield match.start(), kind
    yield from ((offset, "a password or key") for offset in find_assignments(text))
    home = os.path.expanduser("~")
    if len(home) > len("/root"):  # shorter paths occur in ordinary words
        for match in re.finditer(re.escape(home), text):
            yield match.start(), "this machine's home folder"


def _read_text(content: Path | bytes, name: str) -> str:
    """Return the parts of a file that may contain text.

    Raises:
        ValueError, ModelError: the file is damaged, or is neither text, PNG nor safetensors.
    """
    if isinstance(content, Path):
        if name.endswith(".safetensors"):
            return read_safetensors_header(content).decode("utf-8", "replace")
        content = content.read_bytes()
    if content.startswith(PNG_SIGNATURE):
        return b"\n".join(_png_texts(content)).decode("utf-8", "replace")
    if b"\0" in content:
        raise ValueError
    return content.decode()


def _unescape(match: re.Match[str]) -> str:
    """Return the character that an escape sequence stands for.

    An escaped white space character becomes a blank, so that line numbers stay the same.
    """
    code, character = match.groups()
    return chr(int(code, 16)) if code else character or " "


def _png_texts(data: bytes) -> Iterator[bytes]:
    """Yield the decompressed metadata of a PNG file, and all bytes after the end of the image.

    Raises:
        ValueError: the file is damaged.
    """
    offset = len(PNG_SIGNATURE)
    while offset + 8 <= len(data):
        chunk_type = data[offset + 4 : offset + 8]
        end = offset + 12 + int.from_bytes(data[offset : offset + 4])
        if chunk_type not in PIXEL_CHUNKS:
            yield from _decompress(data[offset + 8 : end - 4])
        offset = end
        if chunk_type == b"IEND":
            yield data[offset:]
            return
    raise ValueError("the PNG file has no end")


def _decompress(chunk: bytes) -> Iterator[bytes]:
    """Yield a PNG chunk unchanged, then the data of each zlib stream that begins in it."""
    yield chunk
    for header in re.finditer(b"\x78[\x01\x5e\x9c\xda]", chunk):
        try:
            yield zlib.decompressobj().decompress(chunk[header.start() :])
        except zlib.error:
            continue  # these two bytes are not the header of a zlib stream
