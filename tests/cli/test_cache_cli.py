"""`mlx-dpo cache` as a person types it."""

import json
import os
import pty
import subprocess
import sys
from datetime import datetime

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.data.files import RowLocations
from mlx_dpo.data.tokenization.pair_file import PairFileWriter, pairs_to_arrays
from mlx_dpo.openai_client.reply import Reply
from mlx_dpo.openai_client.reply_cache import ReplyCache, list_entries
from mlx_dpo.training.logps_cache import labels, write_logps
from mlx_dpo.types import PairLogps, TokenizedPair
from tests.damaged_files import damage
from tests.temporary_files import ended_process, temporary_path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path))
    return tmp_path / "reference"


def run(*words):
    return CliRunner().invoke(cli, ["cache", *words])


def stored(folder, name, pairs=2, *, model=None, days_ago=0):
    path = folder / f"{name}.safetensors"
    said = None if model is None else labels(model, "cpu float32")
    write_logps(path, PairLogps(mx.zeros((pairs,)), mx.ones((pairs,))), said)
    used = datetime.now().timestamp() - 86_400 * days_ago
    os.utime(path, (used, used))
    return path


@pytest.fixture
def some(folder):
    """Two files of one model, an old one of another, and one from before there were names."""
    return {
        "new": stored(folder, "a", 256, model="org/one"),
        "more": stored(folder, "b", 1000, model="org/one"),
        "old": stored(folder, "c", 3, model="two", days_ago=40),
        "nameless": stored(folder, "d", 9),
    }


def left(folder):
    return sorted(path.name[0] for path in folder.iterdir())


def test_an_empty_cache_is_one_friendly_line(folder):
    result = run()
    assert result.stdout == (
        f"The cache at {folder.parent} is empty. (Set MLX_DPO_CACHE to move it.)\n"
    )
    assert run("clear").stdout == f"Nothing to clear in {folder.parent}\n"
    assert json.loads(run("--json").stdout) == {
        "folder": str(folder), "models": [], "damaged": [], "half_written": [],
        "tokens": {
            "folder": str(folder.parent / "tokens"), "sources": [],
            "damaged": [], "half_written": [],
        },
        "replies": {
            "folder": str(folder.parent / "replies"), "models": [],
            "damaged": [], "half_written": [],
        },
    }  # fmt: skip


def test_cached_files_are_listed_by_model(folder, some):
    shown = run().stdout
    assert shown.startswith(f"{folder} (set MLX_DPO_CACHE to move it)\n\n")
    rows = [line.split() for line in shown.splitlines()[2:]]
    size = sum(some[name].stat().st_size for name in ("new", "more")) / 1000
    today = f"{datetime.now():%Y-%m-%d}"
    assert rows[0] == ["model", "computed", "on", "files", "pairs", "size", "last", "used"]
    assert rows[1] == [
        "org/one", "cpu", "float32", "2", "1,256", f"{size:.1f}", "kB", today,
    ]  # fmt: skip
    assert rows[2][:5] == ["two", "cpu", "float32", "1", "3"]
    assert rows[3][:4] == ["unknown", "unknown", "1", "9"]
    assert shown.splitlines()[-1].startswith("4 files, ")


def test_the_list_is_available_as_json(folder, some):
    models = json.loads(run("--json").stdout)["models"]
    assert [(m["model"], m["files"], m["pairs"]) for m in models] == [
        ("org/one", 2, 1256), ("two", 1, 3), ("unknown", 1, 9),
    ]  # fmt: skip
    age = datetime.now().astimezone() - datetime.fromisoformat(models[1]["last_used"])
    assert age.days == 40
    assert models[2]["first_written"] is None


def test_damaged_and_half_written_files_are_named(folder, some):
    some["old"].write_bytes(b"not this")
    leftover = temporary_path(some["new"], ended_process())
    leftover.write_bytes(b"half")
    lines = run().stdout.splitlines()
    assert lines[-2:] == [
        "damaged or of another version, its pairs will be scored again: c.safetensors",
        f"unfinished file of an ended process: {leftover.name}",
    ]
    found = json.loads(run("--json").stdout)
    assert (found["damaged"], len(found["half_written"])) == (["c.safetensors"], 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: damage(path, "flipped", 60),
        lambda path: path.write_bytes(path.read_bytes().replace(b"org/one", b"org/\xe4\xe4\xe4")),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.symlink_to(path.name)),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: path.write_bytes(b""),
    ],
    ids=["flip", "not UTF-8", "pipe", "link loop", "folder", "empty"],
)
@pytest.mark.parametrize("kind", ["reference", "tokens", "replies"])
def test_no_entry_of_a_cache_blocks_the_others(folder, some, make, kind):
    tokens = write_tokens(folder, "t")
    ReplyCache(folder.parent / "replies", "org/one").add("a", Reply("[[A]]", "stop"))
    [replies] = (folder.parent / "replies").iterdir()
    path = {"reference": some["new"], "tokens": tokens, "replies": replies}[kind]
    make(path)
    listed = run()
    assert listed.exit_code == 0, listed.output
    assert "org/one" in listed.stdout and "two" in listed.stdout
    assert listed.stdout.count("damaged or of another version") == 1
    assert f": {path.name}\n" in listed.stdout
    cleared = run("clear", "--yes")
    assert cleared.exit_code == 0, cleared.output
    assert not list(folder.iterdir()) and not list(tokens.parent.iterdir())
    assert not list(replies.parent.iterdir())


def test_a_name_with_a_number_that_no_process_has_is_listed_and_cleared(folder, some):
    some["new"].rename(folder / ".x-99999999999999999999.safetensors")
    assert run().exit_code == 0
    assert run("clear", "--yes").exit_code == 0 and not list(folder.iterdir())


def test_labels_of_the_wrong_type_are_damage(folder):
    tokens = write_tokens(folder, "t", model=["a"])
    assert f"damaged or of another version, its pairs will be tokenized again: {tokens.name}" in (
        run().stdout
    )


def test_without_a_home_folder_there_is_no_cache(folder, monkeypatch):
    for name in ("MLX_DPO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "")
    for words in ((), ("clear", "--yes")):
        done = run(*words)
        assert done.exit_code == 1 and done.output == (
            "Error: no cache folder: the home folder is unknown; set HOME or MLX_DPO_CACHE\n"
        )


def test_clearing_takes_all_but_what_a_live_process_writes(folder, some):
    some["old"].write_bytes(b"not this")
    live = temporary_path(some["new"], os.getppid())
    for path in (live, temporary_path(some["new"], ended_process())):
        path.write_bytes(b"half")
    result = run("clear", "--yes")
    freed = result.stdout.splitlines()
    assert freed[0].startswith(f"Files to remove from {folder}: 5 files, 1,265 pairs, ")
    assert freed[1] == "Freed " + freed[0].rpartition(", ")[2]
    assert [path.name for path in folder.iterdir()] == [live.name]


@pytest.mark.parametrize(
    ("words", "remaining"),
    [
        (("--older-than", "30"), ["a", "b", "d"]),
        (("--older-than", "41"), ["a", "b", "c", "d"]),
        (("--model", "org/one"), ["c", "d"]),
        (("--model", "org/one", "--older-than", "1"), ["a", "b", "c", "d"]),
        (("--model", "unknown"), ["a", "b", "c"]),
        ((), []),
    ],
)
def test_clearing_removes_the_requested_files(folder, some, words, remaining):
    assert run("clear", "--yes", *words).exit_code == 0
    assert left(folder) == remaining


def test_the_error_of_an_unknown_model_lists_the_known_models(folder, some):
    result = run("clear", "--model", "three", "--yes")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: --model: the cache has no entries of `three` (found `org/one`, `two`, `unknown`)\n"
    )
    assert left(folder) == ["a", "b", "c", "d"]


def test_without_a_terminal_nothing_is_removed_without_yes(folder, some):
    result = run("clear")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: `cache clear` asks for confirmation, but stdin is not a terminal; add --yes\n"
    )
    assert left(folder) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(("answer", "remaining"), [("n", ["a", "b", "c", "d"]), ("y", [])])
def test_on_a_terminal_it_asks(folder, some, answer, remaining):
    main, terminal = pty.openpty()
    os.write(main, f"{answer}\n".encode())
    done = subprocess.run(
        [sys.executable, "-c", "from mlx_dpo.cli import main; main()", "cache", "clear"],
        stdin=terminal, capture_output=True, text=True, check=False,
    )  # fmt: skip
    os.close(main)
    os.close(terminal)
    assert "Remove them? [y/N]: " in done.stdout
    assert left(folder) == remaining
    assert done.returncode == (0 if answer == "y" else 1)


def test_json_and_clear_do_not_go_together(folder):
    result = run("--json", "clear")
    assert result.stderr == "Error: `--json` has no effect with `cache clear`\n"


def test_looking_at_the_cache_loads_no_model_library(folder, some):
    program = (
        "import sys; from mlx_dpo.cli import cli; cli(['cache'], standalone_mode=False)"
        "; print('loaded', {'mlx_lm', 'transformers', 'huggingface_hub'} & sys.modules.keys())"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines()[-1] == "loaded set()"


def write_tokens(folder, name, pairs=3, *, model="org/one", days_ago=0):
    """A file of tokens."""
    path = folder.parent / "tokens" / f"{name}.pairs"
    path.parent.mkdir(exist_ok=True)
    one = TokenizedPair((1, 2), (3,), (4,), "x.jsonl:1", "0" * 64)
    with path.open("wb") as stream:
        writer = PairFileWriter(stream)
        writer.add(pairs_to_arrays([one] * pairs, RowLocations(["x.jsonl"])))
        writer.finish({"name": "data/x.jsonl", "model": model, "pairs": pairs, "written": "then"})
    used = datetime.now().timestamp() - 86_400 * days_ago
    os.utime(path, (used, used))
    return path


def test_tokens_are_listed_source_by_source(folder, some):
    path = write_tokens(folder, "t")
    shown = run().stdout
    first, _, second = shown.partition(f"\n{path.parent} (set MLX_DPO_CACHE to move it)\n\n")
    assert first.splitlines()[-1].startswith("4 files, ")
    rows = [line.split() for line in second.splitlines()]
    assert rows[0] == ["tokens", "of", "model", "pairs", "size", "last", "used"]
    size = path.stat().st_size
    assert rows[1][:5] == ["data/x.jsonl", "org/one", "3", str(size), "bytes"]
    assert second.splitlines()[-1] == f"1 file, {size} bytes"
    [source] = json.loads(run("--json").stdout)["tokens"]["sources"]
    assert (source["name"], source["pairs"], source["path"]) == ("data/x.jsonl", 3, "t.pairs")


def test_damaged_tokens_are_named(folder):
    write_tokens(folder, "t").write_bytes(b"not this")
    assert run().stdout.splitlines()[-1] == (
        "damaged or of another version, its pairs will be tokenized again: t.pairs"
    )
    assert json.loads(run("--json").stdout)["tokens"]["damaged"] == ["t.pairs"]


@pytest.mark.parametrize(
    ("words", "answers", "tokens"),
    [
        ((), [], []),
        (("--only", "tokens"), ["a", "b", "c", "d"], []),
        (("--only", "reference"), [], ["t", "u"]),
        (("--model", "org/one"), ["c", "d"], ["u"]),
        (("--older-than", "30"), ["a", "b", "d"], ["t"]),
        (("--only", "tokens", "--model", "three"), ["a", "b", "c", "d"], ["t"]),
    ],
)
def test_clearing_removes_the_requested_token_files(folder, some, words, answers, tokens):
    write_tokens(folder, "t")
    write_tokens(folder, "u", model="three", days_ago=40)
    result = run("clear", "--yes", *words)
    assert result.exit_code == 0
    assert left(folder) == answers
    assert left(folder.parent / "tokens") == tokens
    lines = result.stdout.splitlines()
    assert len(lines) == 1 + (len(answers) < 4) + (len(tokens) < 2)
    assert lines[-1].startswith("Freed ")


@pytest.fixture
def replies(folder):
    """The replies of two models, of which one was used 40 days ago."""
    addresses = ["http://127.0.0.1:1/v1#a", "http://127.0.0.1:1/v1#b"]
    for address, count in zip(addresses, (3, 1), strict=True):
        cache = ReplyCache(folder.parent / "replies", address)
        for number in range(count):
            cache.add(str(number), Reply("[[A]]", "stop"))
    used = datetime.now().timestamp() - 86_400 * 40
    [old] = [e.path for e in list_entries(folder.parent / "replies") if e.model == addresses[1]]
    os.utime(old, (used, used))
    return addresses


def test_replies_are_listed_and_cleared_by_address(folder, replies):
    rows = [line.split() for line in run().stdout.splitlines()[2:5]]
    assert rows[0] == ["replies", "of", "replies", "size", "last", "used"]
    assert sorted((row[0], row[1]) for row in rows[1:]) == [(replies[0], "3"), (replies[1], "1")]
    listed = json.loads(run("--json").stdout)["replies"]["models"]
    assert sorted((row["model"], row["replies"]) for row in listed) == [
        (replies[0], 3),
        (replies[1], 1),
    ]
    result = run("clear", "--only", "replies", "--older-than", "30", "--yes")
    assert "1 file, 1 reply, " in result.stdout, result.output
    [left] = list_entries(folder.parent / "replies")
    assert left.model == replies[0]
    assert "3 replies" in run("clear", "--model", replies[0], "--yes").stdout
    assert list_entries(folder.parent / "replies") == []
