"""What must not leave a machine: secrets and personal paths, by file and line.

A file whose text cannot be told, packed ones for one, cannot be searched and is a find itself. Of
safetensors the header is searched, for the rest are numbers, and of PNG what is not picture.
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
    "a key of a model's vendor": rb"\b(?:gsk_|xai-|pplx-|r8_|nvapi-|tgp_v1_)[A-Za-z0-9_-]{24,}",
    "a GitHub token": rb"\b(?:gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "a GitLab token": rb"\bgl(?:pat|ptt|dt|rt|cbt|soat)-[A-Za-z0-9_.-]{20,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": rb"\b(?:AIza[0-9A-Za-z_-]{35}|GOCSPX-[\w-]{20,}|ya29\.[\w-]{20,})",
    "a Slack token": rb"\bxox[abeoprs]-[0-9A-Za-z-]{10,}|\bxapp-[0-9A-Za-z-]{20,}"
    rb"|hooks\.slack\.com/services/T\w+/B\w+/\w+",
    "a Stripe key": rb"\b(?:sk|rk)_(?:live|test)_[0-9A-Za-z]{20,}|\bwhsec_[0-9A-Za-z]{20,}",
    "a token of a package registry": rb"\bnpm_[A-Za-z0-9]{36}|\bpypi-AgEI[\w-]{40,}",
    "a token of a cloud or a service": rb"\bdapi[0-9a-f]{32}|\bdo[opr]_v1_[0-9a-f]{64}"
    rb"|\bSG\.[\w-]{22}\.[\w-]{43}|\b\d{8,10}:AA[\w-]{33}|\blin_api_\w{32,}",
    "a W&B key": rb"(?i)wandb[\w \"':=-]{0,30}\b[0-9a-f]{40}\b|\bwandb_v\d_\w{40,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY|\bAGE-SECRET-KEY-1[A-Z0-9]{40,}",
    "a JSON web token": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.",
    "a password in an address": rb"\b[a-z][a-z0-9+.-]*://[^\s/:@\"']*:[^\s/@\"']+@",
    "a password or key": rb"(?:(?i:password|passwd|[_-]secret|secret(?:[_-]\w+|(?=\s*=))"
    rb"|api[_-]?key|access[_-]?(?:key|token)|account[_-]?key|auth[_-]?token)(?i:[_-]\w+)?|[A-Z]_(?:KEY|TOKEN))"
    rb"[\"']?\s*[:=]\s*[\"']?(?!(?i:os\.|your|my|x{4}|[<$*.]))[^\s\"',{}\[\]]{8,}"
    rb"|(?i:\bbearer)\s+(?=\S*\d)[A-Za-z0-9._~+/-]{20,}",
}
PATHS = {
    "a personal path": rb"(?:/home/|/Users/|[A-Za-z]:\\{1,2}Users\\{1,2})"
    rb"(?!user(?:name)?\b)[^\s/\\\"'`<>|:;,)]+"
    rb"|/root(?=[/\"'\s]|$)|/var/folders/|file://"
}
# Of JSON and of addresses.
ESCAPES = re.compile(rb"(?:\\u00|%)([2-7][0-9A-Fa-f])|\\(?:u00[01]\w|[abfnrtv])|\\([/\"'])")
PNG = b"\x89PNG\r\n\x1a\n"
PICTURE = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
UNSEARCHED = "what cannot be searched (neither text, PNG nor safetensors)"


@dataclass(frozen=True)
class Leak:
    """Something that was found; what it says is not repeated."""

    where: str  # file:line, or the file
    what: str


def leaks_in(content: Path | bytes, name: str) -> Iterator[Leak]:
    """What should not leave the machine in a file, or in its bytes; `name` is what it is to be
    known as.
    """
    try:
        data = _searchable(content, name)
    except (ValueError, ModelError):
        yield Leak(name, UNSEARCHED)
        return
    patterns = SECRETS | PATHS
    home = os.path.expanduser("~")
    if len(home) > len("/root"):  # shorter ones are parts of ordinary words
        patterns |= {"this machine's home folder": re.escape(home.encode())}
    readings = dict.fromkeys((data, ESCAPES.sub(_unescaped, data)))
    found = {
        (data.count(b"\n", 0, hit.start()) + 1, what): None
        for what, pattern in patterns.items()
        for data in readings
        for hit in re.finditer(pattern, data)
    }
    yield from (Leak(f"{name}:{line}", what) for line, what in found)


def _searchable(content: Path | bytes, name: str) -> bytes:
    """What of a file may say something.

    Raises:
        ValueError, ModelError: it cannot be told.
    """
    if isinstance(content, Path):
        if name.endswith(".safetensors"):
            return read_safetensors_header(content)
        content = content.read_bytes()
    if content.startswith(PNG):
        return b"\n".join(_beside_picture(content))
    content.decode()
    if b"\0" in content:
        raise ValueError
    return content


def _unescaped(found: re.Match[bytes]) -> bytes:
    """The character that is meant; of white space a blank, so that lines stay as they are."""
    code, itself = found.groups()
    return bytes.fromhex(code.decode()) if code else itself or b" "


def _beside_picture(data: bytes) -> Iterator[bytes]:
    """What a PNG says beside its picture: its texts, unpacked, and whatever follows its end.

    Raises:
        ValueError: it is damaged.
    """
    place = len(PNG)
    while place + 8 <= len(data):
        kind = data[place + 4 : place + 8]
        end = place + 12 + int.from_bytes(data[place : place + 4])
        if kind not in PICTURE:
            yield from _texts(data[place + 8 : end - 4])
        place = end
        if kind == b"IEND":
            yield data[place:]
            return
    raise ValueError("it has no end")


def _texts(chunk: bytes) -> Iterator[bytes]:
    """A chunk as it is, and from wherever in it something is packed."""
    yield chunk
    for start in re.finditer(b"\x78[\x01\x5e\x9c\xda]", chunk):
        try:
            yield zlib.decompressobj().decompress(chunk[start.start() :])
        except zlib.error:
            continue  # it was no beginning
