"""Tokenizers and files for the tests of this room."""

import json
from pathlib import Path

import pytest
from byte_tokenizer import CHAT, ByteTokenizer


@pytest.fixture
def plain():
    """A tokenizer without a chat template, which begins texts with its BOS."""
    return ByteTokenizer(adds_bos=True)


@pytest.fixture
def chat():
    """Makes a tokenizer with a chat template."""
    return lambda template=CHAT: ByteTokenizer(template)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rows to a file in the current folder and gives its relative path."""
    monkeypatch.chdir(tmp_path)

    def write(*rows, name="pairs.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Path(name)

    return write


@pytest.fixture(scope="session")
def material():
    """Real data sets and models, where they lie beside the checkout."""
    folder = Path(__file__).parents[2] / ".." / "shared" / "material"
    if not folder.is_dir():
        pytest.skip("no folder with real data beside the checkout")
    return folder


@pytest.fixture(scope="session")
def stories(material):
    """The tokenizer of a real model, in which one token begins and ends a text."""
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    return load_tokenizer(material / "models" / "stories260K")
