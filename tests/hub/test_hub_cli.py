"""Fuse, export, card, push and pull at the command line, and a chat with what came back."""

import json
import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from mlx_dpo.cli import cli
from tests.fake_hub import TOKEN, FakeHub

SENT = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapters.safetensors",
    "curves.png",
]


def call(*words):
    return CliRunner().invoke(cli, list(words))


def test_fuse_prints_what_is_left(workplace):
    done = call("fuse", "run", "--output", "fused")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "margin", "change", "weights"]
    assert lines[1].startswith("margin     100.00% kept: ") and "3 held-out pairs" in lines[1]
    done = call("fuse", "run", "--output", "small", "--bits", "2")
    assert done.exit_code == 1 and "so it was not written" in done.output
    assert done.output.count("\n") == 1
    done = call("fuse", "run", "--output", "small", "--bits", "2", "--force")
    assert done.exit_code == 0 and "2 bits" in done.output


def test_export_says_where_the_adapter_loads(workplace):
    done = call("export", "run", "--base", "base")
    assert done.output == "run: its adapter loads in mlx-lm and in PEFT\n"
    assert json.loads(Path("run/run.json").read_text())["adapter"] == "loads in mlx-lm and in PEFT"


def test_a_dry_run_lists_every_file_with_its_size_and_the_card_and_asks_nobody(
    workplace,
):
    """There is no Hub here: a request would fail."""
    done = call("push", "run", "org/adapter", "--dry-run", "--base", "org/base")
    assert done.exit_code == 0, done.output
    listed = [line.split()[-1] for line in done.output.splitlines() if " bytes  " in line]
    assert sorted(listed) == sorted(SENT)
    assert done.stderr.startswith("Written to run/README.md\n")
    assert "base_model: org/base" in done.output and "# org/adapter" in done.output
    assert done.output.endswith("Nothing was sent to org/adapter.\n")
    again = call("push", "run", "org/adapter", "--dry-run", "--base", "org/base")
    assert again.stdout == done.stdout and not again.stderr
    done = call("push", "run", "org/adapter", "--dry-run", "--base", "org/other")
    assert "`--base` has no effect: run/README.md is there already" in done.output
    Path("run/curves.png").write_bytes(b"mine")
    done = call("card", "run")
    assert "run/README.md: is there already; add --overwrite" in done.output
    assert Path("run/curves.png").read_bytes() == b"mine"
    assert call("card", "run", "--overwrite").exit_code == 0
    assert Path("run/curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_push_of_the_same_says_so(workplace, fake_hub):
    call("card", "run", "--name", "org/adapter")
    call("push", "run", "org/adapter")
    done = call("push", "run", "org/adapter")
    said = done.stdout.splitlines()[-1]
    assert f"{fake_hub.address}/org/adapter (private) has all of it already, in commit" in said


def test_a_card_that_names_no_repository_is_not_sent(workplace):
    call("card", "run")
    done = call("push", "run", "org/adapter")
    assert done.exit_code == 1 and done.output.count("\n") == 1
    assert "run/README.md: it says `ORG/NAME` where `org/adapter` is meant; mend" in done.output


def test_push_pull_and_a_chat_with_it(workplace):
    with FakeHub().running() as hub:
        variables = os.environ | {
            "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(workplace / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip

        def program(*words, said=""):
            script = "import sys; sys.argv[0] = 'mlx-dpo'; from mlx_dpo.cli import main; main()"
            done = subprocess.run(
                [sys.executable, "-c", script, *words],
                env=variables, input=said, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout

        pushed = program("push", "run", "org/adapter", "--base", "org/base")
        assert f"{hub.address}/org/adapter (new, private) has it in commit " in pushed
        assert sorted(hub.files("org/adapter")) == sorted(SENT)
        pulled = program("pull", "org/adapter", "--output", "mine")
        assert "mine: 0.2 MB, for org/base\nNext: " in pulled
        assert "chat --model org/base --adapter mine" in pulled
    assert (
        Path("mine/adapters.safetensors").read_bytes()
        == Path("run/adapters.safetensors").read_bytes()
    )
    chat = ("chat", "--temperature", "0", "--max-tokens", "8")
    said = program(*chat, "--model", "base", "--adapter", "mine", said="What is 3?\n")
    assert said == program(*chat, "run", said="What is 3?\n") != ""
