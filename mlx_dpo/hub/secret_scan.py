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

SECRETS = {
    "a Hugging Face token": rb"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "an OpenAI, Anthropic or DeepSeek key": rb"\bsk-[A-Za-z0-9_-]{20,}",
    "a model provider's key": rb"\b(?:gsk_|xai-|pplx-|r8_|nvapi-|tgp_v1_)[A-Za-z0-9_-]{24,}",
    "a GitHub token": rb"\b(?:gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a GitLab token": rb"\bgl(?:pat|ptt|dt|rt|cbt|soat)-[A-Za-z0-9_.-]{20,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": rb"\b(?:AIza[0-9A-Za-z_-]{35}|GOCSPX-[\w-]{20,}|ya29\.[\w-]{20,})",
    "a Slack token": rb"\bxox[abeoprs]-[0-9A-Za-z-]{10,}|\bxapp-[0-9A-Za-z-]{20,}"
    rb"|hooks\.slack\.com/services/T\w+/B\w+/\w+",
    "a Stripe key": rb"\b(?:sk|rk)_(?:live|test)_[0-9A-Za-z]{20,}|\bwhsec_[0-9A-Za-z]{20,}",
    "a token of a package registry": rb"\bnpm_[A-Za-z0-9]{36}|\bpypi-AgEI[\w-]{40,}",
    "a token of a cloud service": rb"\bdapi[0-9a-f]{32}|\bdo[opr]_v1_[0-9a-f]{64}"
    rb"|\bSG\.[\w-]{22}\.[\w-]{43}|\b\d{8,10}:AA[\w-]{33}|\blin_api_\w{32,}",
    "a W&B key": rb"(?i)wandb[\w \"':=-]{0,30}\b[0-9a-f]{40}\b|\bwandb_v\d_\w{40,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY|\bAGE-SECRET-KEY-1[A-Z0-9]{40,}",
    "a JSON web token": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.",
    "a password in a URL": rb"\b[a-z][a-z0-9+.-]*://[^\s/:@\"']*:[^\s/@\"']+@",
    "a password or key": rb"(?:(?i:password|passwd|[_-]secret|secret(?:[_-]\w+|(?=\s*=))"
    rb"|api[_-]?key|access[_-]?(?:key|token)|account[_-]?key|auth[_-]?token)(?i:[_-]\w+)?|[A-Z]_(?:KEY|TOKEN))"
    rb"[\"']?\s*[:=]\s*[\"']?(?!(?i:os\.|your|my|x{4}|[<$*.]))[^\s\"',{}\[\]]{8,}"
    rb"|(?i:\bbearer)\s+(?=\S*\d)[A-Za-z0-9._~+/-]{20,}",
}
PERSONAL_PATHS = {
    "a personal path": rb"(?:/home/|/Users/|[A-Za-z]:\\{1,2}Users\\{1,2})"
    rb"(?!user(?:name)?\b)[^\s/\\\"'`<>|:;,)]+"
    rb"|/root(?=[/\"'\s]|$)|/var/folders/|file://"
}
# Escaped characters in JSON (backslash) and URLs (percent).
ESCAPES = re.compile(rb"(?:\\u00|%)([2-7][0-9A-Fa-f])|\\(?:u00[01]\w|[abfnrtv])|\\([/\"'])")
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
    patterns = SECRETS | PERSONAL_PATHS
    home = os.path.expanduser("~")
    if len(home) > len("/root"):  # shorter paths occur in ordinary words
        patterns |= {"this machine's home folder": re.escape(home.encode())}
    variants = dict.fromkeys((data, ESCAPES.sub(_unescape, data)))
    matches = {
        (data.count(b"\n", 0, match.start()) + 1, kind): None
        for kind, pattern in patterns.items()
        for data in variants
        for match in re.finditer(pattern, data)
    }
    yield from (SecretMatch(f"{name}:{line}", kind) for line, kind in matches)


def _read_text(content: Path | bytes, name: str) -> bytes:
    """Return the parts of a file that may contain text, as bytes.

    Raises:
        ValueError, ModelError: the file is damaged, or is neither text, PNG nor safetensors.
    """
    if isinstance(content, Path):
        if name.endswith(".safetensors"):
            return read_safetensors_header(content)
        content = content.read_bytes()
    if content.startswith(PNG_SIGNATURE):
        return b"\n".join(_png_texts(content))
    content.decode()
    if b"\0" in content:
        raise ValueError
    return content


def _unescape(match: re.Match[bytes]) -> bytes:
    """Return the character that an escape sequence stands for.

    An escaped white space character becomes a blank, so that line numbers stay the same.
    """
    code, character = match.groups()
    return bytes.fromhex(code.decode()) if code else character or b" "


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
