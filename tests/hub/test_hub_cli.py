"""The commands fuse, export, card, push and pull, and a chat with the pulled adapter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from mlx_dpo.cli import cli
from tests.fake_hub import TOKEN, FakeHub

UPLOADED = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapters.safetensors",
    "curves.png",
]


def invoke(*words):
    return CliRunner().invoke(cli, list(words))


def test_fuse_prints_the_retained_margin(workplace):
    done = invoke("fuse", "run", "--output", "fused")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "margin", "change", "weights"]
    assert (
        lines[1].startswith("margin        100.00% retained: ") and "3 held-out pairs" in lines[1]
    )
    done = invoke("fuse", "run", "--output", "small", "--bits", "2")
    assert done.exit_code == 1 and "so it was not written" in done.output
    assert done.output.count("\n") == 1
    done = invoke("fuse", "run", "--output", "small", "--bits", "2", "--force")
    assert done.exit_code == 0 and "2 bits" in done.output


def test_export_prints_which_programs_load_the_adapter(workplace):
    done = invoke("export", "run", "--base-model", "base")
    assert done.output == "run: its adapter loads in mlx-lm and in PEFT\n"
    assert json.loads(Path("run/run.json").read_text())["adapter"] == "loads in mlx-lm and in PEFT"


def test_a_dry_run_lists_the_files_and_the_card_without_a_request(
    workplace,
):
    """Without the fake Hub a request would fail."""
    done = invoke("push", "run", "org/adapter", "--dry-run", "--base-model", "org/base")
    assert done.exit_code == 0, done.output
    listed = re.findall(r"^ *[\d.]+ (?:bytes|kB|MB)  (\S+)$", done.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(UPLOADED)
    assert done.stderr.startswith("Written to run/README.md\n")
    assert "Note: not on the card: prompts and answers; `mlx-dpo card --samples N`" in done.stderr
    assert "base_model: org/base" in done.output and "# org/adapter" in done.output
    assert done.output.endswith("Nothing was uploaded to org/adapter.\n")
    again = invoke("push", "run", "org/adapter", "--dry-run", "--base-model", "org/base")
    assert again.stdout == done.stdout and not again.stderr
    done = invoke("push", "run", "org/adapter", "--dry-run", "--base-model", "org/other")
    assert "`--base-model` has no effect: run/README.md already exists" in done.output
    Path("run/curves.png").write_bytes(b"mine")
    done = invoke("card", "run")
    assert "run/README.md: already exists; add --overwrite" in done.output
    assert Path("run/curves.png").read_bytes() == b"mine"
    assert invoke("card", "run", "--overwrite").exit_code == 0
    assert Path("run/curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_push_reports_that_nothing_changed(workplace, fake_hub):
    invoke("card", "run", "--name", "org/adapter")
    invoke("push", "run", "org/adapter")
    done = invoke("push", "run", "org/adapter")
    last = done.stdout.splitlines()[-1]
    assert f"{fake_hub.address}/org/adapter (private): up to date at commit" in last


def test_a_card_without_a_repository_name_is_not_sent(workplace):
    invoke("card", "run")
    done = invoke("push", "run", "org/adapter")
    assert done.exit_code == 1 and done.output.count("\n") == 1
    assert "run/README.md: says `ORG/NAME` instead of `org/adapter`; edit" in done.output


def test_push_pull_and_chat(workplace):
    with FakeHub().running() as hub:
        variables = os.environ | {
            "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(workplace / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip

        def run_program(*words, stdin=""):
            script = "import sys; sys.argv[0] = 'mlx-dpo'; from mlx_dpo.cli import main; main()"
            done = subprocess.run(
                [sys.executable, "-c", script, *words],
                env=variables, input=stdin, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout

        pushed = run_program("push", "run", "org/adapter", "--base-model", "org/base")
        assert f"{hub.address}/org/adapter (new, private): updated by commit " in pushed
        assert sorted(hub.files("org/adapter")) == sorted(UPLOADED)
        pulled = run_program("pull", "org/adapter", "--output", "mine")
        assert "mine: 0.2 MB, for org/base\nNext: " in pulled
        assert "chat --model org/base --adapter mine" in pulled
    assert (
        Path("mine/adapters.safetensors").read_bytes()
        == Path("run/adapters.safetensors").read_bytes()
    )
    chat = ("chat", "--temperature", "0", "--max-tokens", "8")
    answer = run_program(*chat, "--model", "base", "--adapter", "mine", stdin="What is 3?\n")
    assert answer == run_program(*chat, "run", stdin="What is 3?\n") != ""
