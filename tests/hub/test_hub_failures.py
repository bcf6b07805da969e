"""The Hub fails at each request in turn: nothing is published partly, and a retry completes."""

from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.hub import push as hub
from mlx_dpo.hub.push import prepare_upload
from tests.edited_files import read_entries, write_edited
from tests.fake_hub import TOKEN
from tests.hub.test_push import NAME, SECRET, UPLOADED, push_run, run_with_card

__all__ = ["run_with_card"]
REQUESTS = ("info", "create", "validate", "preupload", "batch", "object", "commit")
FORBIDDEN = {"X_Error_Message": "Forbidden: no write access"}
INVALID_TOKEN = {"X_Error_Message": "Invalid credentials in Authorization header"}
ANY_REQUEST = {
    "lost": "the Hub cannot be reached",
    (500, ()): "the Hub answered 500 (no {} today); try again",
}
COMMIT_RESPONSES = {
    (429, (("Retry_After", "1"),)): "the Hub answered 429 (no {} today); try again later",
    (401, tuple(INVALID_TOKEN.items())): "the Hub refuses (401: Invalid credentials",
    (403, tuple(FORBIDDEN.items())): "the Hub refuses (403: Forbidden: no write access",
    (409, ()): "the Hub refuses (409: no {} today); choose another name",
    (412, ()): "the repository changed during the upload (412: no {} today); check it",
}


@pytest.fixture(autouse=True)
def no_progress_bars():
    disable_progress_bars()
    yield
    enable_progress_bars()


def fail(server, kind, how):
    server.cut_before = {kind} if how == "cut" else set()
    server.cut_after = {kind} if how == "lost" else set()
    server.responses = {} if isinstance(how, str) else {kind: (how[0], dict(how[1]))}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_failed_request_publishes_nothing_and_a_retry_completes(run_with_card, fake_hub, kind):
    for how, message in (ANY_REQUEST | (COMMIT_RESPONSES if kind == "commit" else {})).items():
        fake_hub.repos.clear()
        fake_hub.objects.clear()
        fail(fake_hub, kind, how)
        with pytest.raises(ModelError) as error:
            push_run()
        assert str(error.value).startswith(f"{NAME}: {message.format(kind)}")
        assert "\n" not in str(error.value) and "http" not in str(error.value)
        commits = fake_hub.repos.get(NAME, {"commits": []})["commits"]
        is_published = (kind, how) == ("commit", "lost")
        assert len(commits) == is_published
        fail(fake_hub, kind, "never")
        assert push_run().is_unchanged == is_published
        [(_, files)] = fake_hub.repos[NAME]["commits"]
        assert sorted(files) == sorted(UPLOADED)


def test_a_response_of_another_server_is_distinguished_from_a_bad_card(run_with_card, fake_hub):
    fake_hub.responses = {"preupload": (200, {})}  # like the login page of a network
    with pytest.raises(ModelError, match=r"the response is not from the Hub .*check the network"):
        push_run()


def test_an_error_of_hf_xet_is_one_line(run_with_card, fake_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    fake_hub.transfer = "xet"  # whose endpoints the fake Hub lacks
    with pytest.raises(ModelError) as error:
        push_run()
    assert "\n" not in str(error.value)
    assert fake_hub.repos[NAME]["commits"] == []


def test_another_commit_during_the_upload_is_not_overwritten(run_with_card, fake_hub):
    push_run()
    (run_with_card / "run/README.md").write_text(
        (run_with_card / "run/README.md").read_text() + "\nMore.\n"
    )
    commits = fake_hub.repos[NAME]["commits"]
    other = ("other", commits[-1][1] | {"README.md": b"other"})
    fake_hub.before_reply = {"commit": lambda: commits.append(other)}
    with pytest.raises(
        ModelError,
        match=r"the repository changed during the upload \(412: A commit has happened since",
    ):
        push_run(overwrite=True)
    assert fake_hub.files(NAME)["README.md"] == b"other"


def test_the_content_that_is_sent_is_the_content_that_was_scanned(run_with_card, fake_hub):
    """A file that changes during the upload is sent as it was, or not at all."""
    card, weights = run_with_card / "run/README.md", run_with_card / "run/adapters.safetensors"
    before, adapter = card.read_bytes(), weights.read_bytes()

    def change():
        card.write_bytes(before + SECRET.encode())
        weights.write_bytes(SECRET.encode())

    fake_hub.before_reply = {"create": change}
    with pytest.raises((ModelError, AssertionError)):
        push_run()
    assert SECRET.encode() not in b"".join(fake_hub.objects.values())
    assert fake_hub.repos[NAME]["commits"] == []
    weights.write_bytes(adapter)
    card.write_bytes(before)
    fake_hub.before_reply = {"info": lambda: card.write_bytes(before + SECRET.encode())}
    push_run()
    assert fake_hub.files(NAME)["README.md"] == before


def test_missing_permissions_are_reported(run_with_card, fake_hub):
    fake_hub.forbidden_organizations = {"org"}
    with pytest.raises(ModelError, match=r"refuses \(403: You don't have the rights to create"):
        push_run()
    fake_hub.forbidden_organizations = set()
    fake_hub.repos[NAME] = {"private": True, "commits": []}
    fake_hub.responses = {"info": (404, {"X_Error_Code": "RepoNotFound"})}
    with pytest.raises(ModelError, match=r"refuses \(409: You already created.*another name, or"):
        push_run()


def test_without_a_token_no_repository_is_created(run_with_card, fake_hub, monkeypatch):
    from huggingface_hub.utils import _auth

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(_auth, "get_token", lambda: None)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run_with_card / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(run_with_card / "no-tokens"))
    with pytest.raises(ModelError, match=r"refuses \(401: .*log in with `hf auth login`"):
        push_run()
    assert fake_hub.repos == {} and TOKEN.encode() not in fake_hub.received


def test_ctrl_c_during_the_upload_publishes_nothing(run_with_card, fake_hub, monkeypatch):
    from huggingface_hub import _commit_api

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_commit_api, "_send_commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            push_run()
    assert fake_hub.repos[NAME]["commits"] == []
    push_run()
    assert sorted(fake_hub.files(NAME)) == sorted(UPLOADED)


def test_only_files_of_the_run_folder_are_sent(run_with_card, fake_hub):
    secret = run_with_card / "secret.txt"
    secret.write_text("something private")
    (run_with_card / "run/link.txt").symlink_to(secret)
    for name in ("link.txt", "../secret.txt", str(secret), "checkpoints", "none.txt"):
        with pytest.raises(ConfigError, match="not a file of the run folder"):
            prepare_upload("run", (name,))
    (run_with_card / "run/curves.png").unlink()
    (run_with_card / "run/curves.png").symlink_to(secret)
    with pytest.raises(ConfigError, match=r"curves\.png: not a file of the run folder"):
        prepare_upload("run")
    (run_with_card / "run/curves.png").unlink()
    names = set(prepare_upload("run", ("./metrics.jsonl", "reference/../metrics.jsonl")).files)
    assert names == {*UPLOADED, "metrics.jsonl"} - {"curves.png"}


def test_weights_for_peft_are_sent_only_with_a_config_for_peft(run_with_card, fake_hub):
    """Otherwise the file is from an earlier adapter, or was not written completely."""
    path = Path("run/adapter_config.json")
    entries = read_entries(path)
    del entries["peft_type"]
    write_edited(path, entries)
    assert "adapter_model.safetensors" not in prepare_upload("run").files
    assert "adapter_model.safetensors" not in hub.ADAPTER_FILES[:3]
