"""Secrets and personal paths are found by file and line, and ordinary text is left in peace."""

import mlx.core as mx
import pytest

from mlx_dpo.arrays import write_arrays
from mlx_dpo.errors import ConfigError
from mlx_dpo.publishing.hub import refuse_leaks
from mlx_dpo.publishing.leaks import leaks_in

TAIL = "A1b2C3d4" * 5
PLANTED = {
    "hf_" + TAIL: "a Hugging Face token",
    "sk-" + "proj-" + TAIL: "an OpenAI or Anthropic key",
    "ghp_" + TAIL: "a GitHub token",
    "AKIA" + "ABCDEFGH12345678": "an AWS key",
    "AIza" + "x" * 35: "a Google key",
    "xoxb-" + "1234567890-abc": "a Slack token",
    "WANDB_API_KEY=" + "0123456789" * 4: "a W&B key",
    "-----BEGIN RSA PRIVATE " + "KEY-----": "a private key",
    "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0In0.x": "a JSON web token",
    "https://someone:" + "word@example.org/x": "a password in an address",
    '"api_key": ' + '"0123456789abc"': "a password or key",
    "/home/" + "someone/pairs.jsonl": "a personal path",
    "/Users/" + "someone/pairs.jsonl": "a personal path",
    "C:\\Users\\" + "someone": "a personal path",
    "/root/" + "data": "a personal path",
    "file:///" + "data": "a personal path",
}


@pytest.mark.parametrize(("text", "what"), PLANTED.items(), ids=range(len(PLANTED)))
@pytest.mark.parametrize("around", ["{}", '"x": "{}",', "see {}", "\ufeff{}\n"])
def test_what_must_stay_is_found_with_its_line(tmp_path, text, what, around):
    file = tmp_path / "README.md"
    file.write_text("one\ntwo\n" + around.format(text), encoding="utf-8")
    assert ("README.md:3", what) in [
        (leak.where, leak.what) for leak in leaks_in(file, "README.md")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/org/name and http://example.org:80/a@b",
        "the home/folder of /homework, a secret: none, tokens: 1234567890",
        "task-oriented, risk-" + "a" * 10 + ", hf_hub_download and `hf auth login`",
        '{"num_tokens": 5153, "padding_share": 0.0, "password": ""}',
        "sha256 " + "0123456789abcdef" * 4,
    ],
)
def test_ordinary_text_is_left_in_peace(tmp_path, text):
    (tmp_path / "x").write_text(text)
    assert list(leaks_in(tmp_path / "x", "x")) == []


def test_of_safetensors_the_header_is_searched_and_the_numbers_are_not(tmp_path):
    path = tmp_path / "x.safetensors"
    token = ("hf_" + TAIL).encode()
    write_arrays(path, {"a": mx.array(list(token), mx.uint8)}, {"made": "here"})
    assert token in path.read_bytes()
    assert list(leaks_in(path, "x")) == []
    write_arrays(path, {"a": mx.zeros((2,))}, {"made": "/home/" + "someone/run"})
    assert [leak.what for leak in leaks_in(path, "x")] == ["a personal path"]


def test_this_machines_own_home_is_a_personal_path_wherever_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/data/" + "someone")
    (tmp_path / "x").write_text("/data/" + "someone/pairs.jsonl")
    assert [leak.what for leak in leaks_in(tmp_path / "x", "x")] == ["this machine's home folder"]


def test_the_refusal_names_places_and_repeats_no_secret(tmp_path):
    (tmp_path / "a").write_text("\n".join("hf_" + TAIL for _ in range(7)))
    with pytest.raises(ConfigError) as error:
        refuse_leaks({"notes.txt": tmp_path / "a"})
    said = str(error.value)
    assert said.startswith("nothing was sent: notes.txt:1 has a Hugging Face token, notes.txt:2")
    assert "and 2 more; remove it, or leave the file out" in said
    assert TAIL not in said
