"""What must not leave a machine: secrets and personal paths, by file and line.

Looks at every byte of a file, but of safetensors at their header alone: the rest are numbers.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_dpo.publishing.checkpoint import header_of

SECRETS = {
    "a Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": rb"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": rb"\b(?:gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": rb"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": rb"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "a W&B key": rb"(?i)wandb[\w \"':=-]{0,30}\b[0-9a-f]{40}\b",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a JSON web token": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.",
    "a password in an address": rb"\b[a-z][a-z0-9+.-]*://[^\s/:@\"']+:[^\s/@\"']+@",
    "a password or key": rb"(?i)\b(?:password|passwd|secret|api[_-]?key|access[_-]?token)[\"']?"
    rb"\s*[:=]\s*[\"']?[^\s\"',{}\[\]]{8,}",
}
PATHS = {
    "a personal path": rb"(?:/home/|/Users/|[A-Za-z]:\\{1,2}Users\\{1,2})[^\s/\\\"'`<>|:;,)]+"
    rb"|/root(?=[/\"'\s]|$)|/private/var/folders/|file://"
}


@dataclass(frozen=True)
class Leak:
    """Something that was found; what it says is not repeated."""

    where: str  # file:line
    what: str


def leaks_in(file: Path, name: str) -> Iterator[Leak]:
    """What should not leave the machine in `file`, which is to be known as `name`."""
    data = header_of(file) if file.suffix == ".safetensors" else file.read_bytes()
    patterns = SECRETS | PATHS
    home = os.path.expanduser("~")
    if len(home) > len("/root"):  # shorter ones are parts of ordinary words
        patterns |= {"this machine's home folder": re.escape(home.encode())}
    for what, pattern in patterns.items():
        for found in re.finditer(pattern, data):
            line = data.count(b"\n", 0, found.start()) + 1
            yield Leak(f"{name}:{line}", what)
