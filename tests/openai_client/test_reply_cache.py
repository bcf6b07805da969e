"""The cache of replies on disk."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from mlx_dpo.io import notices
from mlx_dpo.openai_client.reply import Reply
from mlx_dpo.openai_client.reply_cache import ReplyCache, list_entries, request_key

MODEL = "http://127.0.0.1:1/v1#m"
ONE, CUT, FILTERED = Reply("é\n[[A]]", "stop"), Reply("", "length"), Reply("x", "stop", True)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "replies"


def stored(folder, **replies):
    cache = ReplyCache(folder, MODEL)
    for key, reply in replies.items():
        cache.add(key, reply)
    [path] = folder.iterdir()
    return path


def test_replies_are_found_again_by_the_next_process(folder):
    stored(folder, a=ONE, b=CUT, c=FILTERED)
    again = ReplyCache(folder, MODEL)
    assert [again.get(key) for key in "abcd"] == [ONE, CUT, FILTERED, None]
    assert ReplyCache(folder, MODEL + "2").get("a") is None


def test_the_key_depends_on_everything_that_the_answer_depends_on():
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "seed": 1}
    keys = {
        request_key(model, body | change)
        for model in ({}, {"id": "m"}, {"id": "m", "digest": "1"})
        for change in ({}, {"seed": 2}, {"temperature": 1.0}, {"messages": []}, {"model": "n"})
    }
    assert len(keys) == 15
    assert request_key({}, body) == request_key({}, dict(reversed(body.items())))


def test_only_the_user_can_read_the_file(folder):
    assert stat.S_IMODE(stored(folder, a=ONE).stat().st_mode) == 0o600


def test_half_a_line_of_a_killed_process_is_removed(folder):
    path = stored(folder, a=ONE, b=CUT)
    data = path.read_bytes()
    for length in range(data.index(b"\n", data.index(b"\n") + 1) + 2, len(data)):
        path.write_bytes(data[:length])
        cache = ReplyCache(folder, MODEL)
        assert (cache.get("a"), cache.get("b")) == (ONE, None)
        cache.add("c", FILTERED)
        again = ReplyCache(folder, MODEL)
        assert [again.get(key) for key in "abc"] == [ONE, None, FILTERED]
        assert path.read_bytes().startswith(data[: data.rindex(b"\n", 0, length) + 1])


@pytest.mark.parametrize("replaced", [b"[[B]]", b"\xff[[A]", b"\n[A]]"])
def test_a_damaged_line_is_left_out_and_reported(folder, replaced, caplog):
    path = stored(folder, a=ONE, b=CUT)
    path.write_bytes(path.read_bytes().replace(b"[[A]]", replaced))
    notices.notify_once.cache_clear()
    cache = ReplyCache(folder, MODEL)
    assert (cache.get("a"), cache.get("b")) == (None, CUT)
    count = 2 if replaced.startswith(b"\n") else 1
    assert f"{count} damaged lines are left out; those replies are requested again" in caplog.text


def test_a_folder_that_cannot_be_written_is_reported_once(folder, caplog):
    folder.write_text("a file")
    cache = ReplyCache(folder, MODEL)
    for key in "ab":
        cache.add(key, ONE)
    assert cache.get("a") == ONE and not cache.is_stored
    assert caplog.text.count("replies of servers cannot be stored") == 1


def test_a_cache_that_was_cleared_meanwhile_is_begun_again(folder):
    cache = ReplyCache(folder, MODEL)
    cache.add("a", ONE)
    [path] = folder.iterdir()
    path.unlink()
    cache.add("b", CUT)
    assert ReplyCache(folder, MODEL).get("b") == CUT
    [entry] = list_entries(folder)
    assert (entry.model, entry.replies, entry.damaged) == (MODEL, 1, False)


def test_two_programs_write_to_one_file(folder):
    caches = [ReplyCache(folder, MODEL) for _ in range(2)]

    def write(number):
        for n in range(40):
            caches[number].add(f"{number}-{n}", Reply("x" * 300 * n, "stop"))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = ReplyCache(folder, MODEL)
    keys = [f"{number}-{n}" for number in range(2) for n in range(40)]
    assert all(again.get(key) is not None for key in keys)
    [entry] = list_entries(folder)
    assert entry.replies == 80


def test_a_reply_is_on_disk_when_it_was_added(folder):
    program = f"""
import os
from pathlib import Path
from mlx_dpo.openai_client.reply import Reply
from mlx_dpo.openai_client.reply_cache import ReplyCache
ReplyCache(Path({str(folder)!r}), {MODEL!r}).add("a", Reply("kept", "stop"))
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", program], check=False)
    assert ReplyCache(folder, MODEL).get("a") == Reply("kept", "stop")


def test_entries_are_listed_with_their_model_and_the_last_use(folder):
    path = stored(folder, a=ONE, b=CUT)
    os.utime(path, (1e9, 1e9))
    [entry] = list_entries(folder)
    assert (entry.model, entry.replies, entry.pairs, entry.path) == (MODEL, 2, 0, path)
    assert entry.last_used.year == 2001
    ReplyCache(folder, MODEL)  # a command that uses them
    assert list_entries(folder)[0].last_used.year > 2001
    path.write_bytes(b"garbage\n" + path.read_bytes())
    assert list_entries(folder)[0].damaged
