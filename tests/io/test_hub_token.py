import pytest

from mlx_dpo.errors import ConfigError
from mlx_dpo.io.hub_token import check_hub_token


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(("token", "position"), [("hf_é", 4), ("hf qz", 3), ("“hf_a”", 1)])
def test_a_token_that_no_header_holds_is_refused(monkeypatch, token, position):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=f"^HF_TOKEN: not a token .* .character {position} ") as e:
        check_hub_token()
    assert token not in str(e.value)


def test_a_stored_token_is_named_by_its_file(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "token").write_text("hf_\N{ZERO WIDTH SPACE}a", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match="token: not a token of the Hub"):
        check_hub_token()


def test_an_ordinary_token_and_none_pass(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "not-a-real-token_1")
    check_hub_token()
    monkeypatch.delenv("HF_TOKEN")
    check_hub_token()


def test_nothing_is_checked_if_nothing_is_sent(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "é")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_hub_token()
