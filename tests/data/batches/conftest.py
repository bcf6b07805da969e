import mlx.core as mx
import pytest


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
