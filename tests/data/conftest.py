"""Tokenizers and files for the tests of data."""

import json
from pathlib import Path

import pytest

from tests.data.byte_tokenizer import CHAT, ByteTokenizer


@pytest.fixture
def plain():
    """Return a tokenizer without a chat template, which adds a BOS token."""
    return ByteTokenizer(adds_bos=True)


@pytest.fixture
def chat():
    """Return a function that makes a tokenizer with a chat template."""
    return lambda template=CHAT: ByteTokenizer(template)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes rows to a file in the current folder and returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(*rows, name="pairs.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Path(name)

    return write


@pytest.fixture(scope="session")
def material():
    """Return the folder with real datasets and models next to the checkout, or skip the test."""
    folder = Path(__file__).parents[2] / ".." / "shared" / "material"
    if not folder.is_dir():
        pytest.skip("no folder with real data next to the checkout")
    return folder


@pytest.fixture(scope="session")
def stories(material):
    """Return the tokenizer of a real model, with one token as BOS and stop token."""
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    return load_tokenizer(material / "models" / "stories260K")
