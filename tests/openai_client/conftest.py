"""Replies of one test are not those of another, and no test waits."""

import pytest

from mlx_dpo.io.notices import notify_once
from mlx_dpo.openai_client import client


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(client, "FIRST_DELAY", 0.001)
    notify_once.cache_clear()
    return tmp_path / "cache"
