"""The Hub fails at each request in turn: nothing is half-published, and a second try completes."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from mlx_dpo.errors import ConfigError, ModelError
from mlx_dpo.hub import push as hub
from mlx_dpo.hub.push import pack
from tests.fake_hub import TOKEN
from tests.hub.test_push_and_pull import NAME, SECRET, SENT, carded, send

__all__ = ["carded"]
REQUESTS = ("info", "create", "validate", "preupload", "batch", "object", "commit")
FORBIDDEN = {"X_Error_Message": "Forbidden: no write access"}
WRONG = {"X_Error_Message": "Invalid credentials in Authorization header"}
EVERYWHERE = {
    "lost": "the Hub cannot be reached",
    (500, ()): "the Hub answered 500 (no {} today); try again",
}
ANSWERS = {
    (429, (("Retry_After", "1"),)): "the Hub answered 429 (no {} today); try again later",
    (401, tuple(WRONG.items())): "the Hub refuses (401: Invalid credentials",
    (403, tuple(FORBIDDEN.items())): "the Hub refuses (403: Forbidden: no write access",
    (409, ()): "the Hub refuses (409: no {} today); take another name",
    (412, ()): "was changed meanwhile (412: no {} today); look at it",
}


@pytest.fixture(autouse=True)
def no_bars():
    disable_progress_bars()
    yield
    enable_progress_bars()


def fail(server, kind, how):
    server.breaking = {kind} if how == "cut" else set()
    server.losing = {kind} if how == "lost" else set()
    server.answers = {} if isinstance(how, str) else {kind: (how[0], dict(how[1]))}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_failure_publishes_nothing_and_the_second_try_completes(carded, fake_hub, kind):
    for how, said in (EVERYWHERE | (ANSWERS if kind == "commit" else {})).items():
        fake_hub.repos.clear()
        fake_hub.objects.clear()
        fail(fake_hub, kind, how)
        with pytest.raises(ModelError) as error:
            send()
        assert str(error.value).startswith(f"{NAME}: {said.format(kind)}")
        assert "\n" not in str(error.value) and "http" not in str(error.value)
        there = fake_hub.repos.get(NAME, {"commits": []})["commits"]
        all_of_it = (kind, how) == ("commit", "lost")
        assert len(there) == all_of_it
        fail(fake_hub, kind, "not at all")
        assert send().is_same == all_of_it
        [(_, files)] = fake_hub.repos[NAME]["commits"]
        assert sorted(files) == sorted(SENT)


def test_an_answer_of_something_else_is_told_from_a_bad_card(carded, fake_hub):
    fake_hub.answers = {"preupload": (200, {})}  # as a network's page to log in at
    with pytest.raises(ModelError, match=r"what answers is not the Hub .*look at the network"):
        send()


def test_a_failure_of_the_program_for_large_files_is_one_line(carded, fake_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    fake_hub.transfer = "xet"  # whose own addresses this Hub does not have
    with pytest.raises(ModelError) as error:
        send()
    assert "\n" not in str(error.value)
    assert fake_hub.repos[NAME]["commits"] == []


def test_a_change_that_came_in_between_is_not_undone(carded, fake_hub):
    send()
    (carded / "run/README.md").write_text((carded / "run/README.md").read_text() + "\nMore.\n")
    commits = fake_hub.repos[NAME]["commits"]
    theirs = ("theirs", commits[-1][1] | {"README.md": b"theirs"})
    fake_hub.meanwhile = {"commit": lambda: commits.append(theirs)}
    with pytest.raises(
        ModelError, match=r"was changed meanwhile \(412: A commit has happened since"
    ):
        send(overwrite=True)
    assert fake_hub.files(NAME)["README.md"] == b"theirs"


def test_what_is_sent_is_what_was_searched(carded, fake_hub):
    """A file that changes during the upload goes up as it was, or not at all."""
    page, weights = carded / "run/README.md", carded / "run/adapters.safetensors"
    before = page.read_bytes()

    def change():
        page.write_bytes(before + SECRET.encode())
        weights.write_bytes(SECRET.encode())

    fake_hub.meanwhile = {"create": change}
    with pytest.raises((ModelError, AssertionError)):
        send()
    assert SECRET.encode() not in b"".join(fake_hub.objects.values())
    assert fake_hub.repos[NAME]["commits"] == []
    shutil.copyfile("base/model.safetensors", weights)
    page.write_bytes(before)
    fake_hub.meanwhile = {"info": lambda: page.write_bytes(before + SECRET.encode())}
    send()
    assert fake_hub.files(NAME)["README.md"] == before


def test_where_one_may_not_write_and_what_one_may_not_see_is_said(carded, fake_hub):
    fake_hub.foreign = {"org"}
    with pytest.raises(ModelError, match=r"refuses \(403: You don't have the rights to create"):
        send()
    fake_hub.foreign = set()
    fake_hub.repos[NAME] = {"private": True, "commits": []}
    fake_hub.answers = {"info": (404, {"X_Error_Code": "RepoNotFound"})}
    with pytest.raises(ModelError, match=r"refuses \(409: You already created.*another name, or"):
        send()


def test_without_a_token_nothing_is_made(carded, fake_hub, monkeypatch):
    from huggingface_hub.utils import _auth

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(_auth, "get_token", lambda: None)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(carded / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(carded / "no-tokens"))
    with pytest.raises(ModelError, match=r"refuses \(401: .*log in with `hf auth login`"):
        send()
    assert fake_hub.repos == {} and TOKEN.encode() not in fake_hub.received


def test_ctrl_c_in_the_middle_publishes_nothing(carded, fake_hub, monkeypatch):
    from huggingface_hub import _commit_api

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_commit_api, "_send_commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            send()
    assert fake_hub.repos[NAME]["commits"] == []
    send()
    assert sorted(fake_hub.files(NAME)) == sorted(SENT)


def test_only_files_of_the_run_folder_go_up(carded, fake_hub):
    secret = carded / "secret.txt"
    secret.write_text("something private")
    (carded / "run/link.txt").symlink_to(secret)
    for name in ("link.txt", "../secret.txt", str(secret), "checkpoints", "none.txt"):
        with pytest.raises(ConfigError, match="no file of the run folder"):
            pack("run", (name,))
    (carded / "run/curves.png").unlink()
    (carded / "run/curves.png").symlink_to(secret)
    with pytest.raises(ConfigError, match=r"curves\.png: no file of the run folder"):
        pack("run")
    (carded / "run/curves.png").unlink()
    packed = set(pack("run", ("./metrics.jsonl", "reference/../metrics.jsonl")).files)
    assert packed == {*SENT, "metrics.jsonl"} - {"curves.png"}


def test_pefts_file_goes_along_only_if_the_settings_are_pefts_too(carded, fake_hub):
    """Else it is of an earlier adapter, or was being written when the machine stopped."""
    import json

    path = Path("run/adapter_config.json")
    entries = json.loads(path.read_text())
    del entries["peft_type"]
    path.write_text(json.dumps(entries))
    assert "adapter_model.safetensors" not in pack("run").files
    assert "adapter_model.safetensors" not in hub.ADAPTER_FILES[:3]
