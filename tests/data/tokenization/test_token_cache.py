"""Cache of tokenized pairs: when it is used, when it is not, and its listing."""

import io
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest

from mlx_dpo.data.chat_templates import template_date as clock
from mlx_dpo.data.load import load_pairs
from mlx_dpo.data.report import FROM_CACHE
from mlx_dpo.data.sources import STDIN, find_sources, resolve_source
from mlx_dpo.data.tokenization import cache as token_cache
from mlx_dpo.data.tokenization.cache import (
    DAMAGED,
    TokenCache,
    list_entries,
    load_source,
)
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.parallel import TokenizerWorkers
from mlx_dpo.data.tokenization.tokenize_rows import PairRules
from mlx_dpo.errors import SAME_TEXT, DataError
from mlx_dpo.schemas.schema import RowRules
from tests.data.byte_tokenizer import CHAT, EOS, ByteTokenizer

ROWS = [
    {"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no" if i % 3 else f"yes {i}", "s": i}
    for i in range(8)
]
RULES = PairRules(TokenRules(vocab_size=262), bad_pairs="drop")
TOKENIZER = ByteTokenizer(CHAT)


class CannotEncode(ByteTokenizer):
    """Has stop tokens, but raises an error for any text."""

    def encode(self, *args, **more):
        raise AssertionError("tokenized again")

    apply_chat_template = encode


@contextmanager
def no_progress_bar(rows):
    yield lambda more: None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "MIN_CACHED_BYTES", 0)
    return TokenCache(tmp_path / "cache" / "tokens", "digest", "org/model")


def read(source, cache, rules=RULES, tokenizer=TOKENIZER):
    source = resolve_source(str(source)) if isinstance(source, str | Path) else source
    hands = TokenizerWorkers(tokenizer, partial(ByteTokenizer, CHAT))
    return load_source(source, hands, rules, cache, progress=no_progress_bar)


def test_tokens_and_report_are_read_from_the_cache(write, cache):
    path = write(*ROWS)
    first = read(path, cache)
    second = read(path, cache, tokenizer=CannotEncode(CHAT))
    known = load_pairs(path, TOKENIZER, RULES.tokens, bad_pairs="drop")
    for found in (first, second):
        assert tuple(found.pairs) == tuple(known.pairs)
        assert [pair.prompt_digest for pair in found.pairs] == [
            pair.prompt_digest for pair in known.pairs
        ]
        assert found.report == known.report
        assert found.report.to_dict() == known.report.to_dict()
    assert first.report.lines() == known.report.lines()
    assert set(second.report.lines()) - set(known.report.lines()) == {FROM_CACHE}
    assert second.report.dropped == {SAME_TEXT: [f"pairs.jsonl:{n}" for n in (1, 4, 7)]}


def test_a_copy_of_a_file_is_found_with_its_own_locations(write, cache):
    read(write(*ROWS), cache)
    found = read(write(*ROWS, name="other.jsonl"), cache, tokenizer=CannotEncode(CHAT))
    assert found.report.source == "other.jsonl"
    assert [pair.location for pair in found.pairs][:2] == ["other.jsonl:2", "other.jsonl:3"]
    assert found.report.dropped[SAME_TEXT][0] == "other.jsonl:1"


def rows(**values):
    return replace(RULES, rows=replace(RULES.rows, **values))


def tokens(**values):
    return replace(RULES, tokens=replace(RULES.tokens, **values))


CHANGED = {
    "chat_template": tokens(chat_template="text"),
    "thinking": tokens(thinking=True),
    "system": tokens(system="be kind"),
    "max_length": tokens(max_length=12),
    "truncation": tokens(truncation="keep_end"),
    "vocab_size": tokens(vocab_size=263),
    "context": tokens(context=100),
    "judged": rows(judged=True),
    "supervised": rows(supervised=True),
    "assistant_turns": rows(assistant_turns="last"),
    "pair_labelled": rows(pair_labelled=True),
    "margin": rows(margin="s"),
    "weight": rows(weight="s"),
    "schema": rows(schema="strings"),
    "ranked": rows(ranked="all"),
    "renamed": rows(renamed={"prompt": "chosen"}),
    "bad_pairs": replace(RULES, bad_pairs="error"),
}


def test_rows_that_change_after_their_digest_are_not_cached_under_it(write, cache):
    path = write(*ROWS)

    class Slow(ByteTokenizer):
        """Changes the file after its digest was computed, when the stop tokens are read."""

        @property
        def eos_token_ids(self):
            if not cache.folder.exists() and kept_digests:
                write({"prompt": "q", "chosen": "new", "rejected": "other"})
            return {EOS}

        @eos_token_ids.setter
        def eos_token_ids(self, value):
            pass

    kept_digests = []
    digest = token_cache._digest
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            token_cache, "_digest", lambda path: kept_digests.append(path) or digest(path)
        )
        changed = read(path, cache, tokenizer=Slow(CHAT))
    assert len(changed.pairs) == 1
    write(*ROWS)
    assert len(read(path, cache).pairs) == 5


def test_there_is_a_case_for_every_rule():
    names = {*TokenRules.__dataclass_fields__, *RowRules.__dataclass_fields__, "bad_pairs"}
    assert CHANGED.keys() == names


def is_missed(path, cache, rules=RULES, tokenizer=None):
    """Return True if no cached file is used."""
    try:
        return read(path, cache, rules, tokenizer or CannotEncode(CHAT)).report.origin != FROM_CACHE
    except (AssertionError, DataError):
        return True


@pytest.mark.parametrize("name", CHANGED)
def test_every_rule_changes_the_key(write, cache, monkeypatch, name):
    monkeypatch.setattr(token_cache, "check_token_rules", lambda tokenizer, rules: None)
    path = write(*ROWS)
    read(path, cache)
    assert not is_missed(path, cache)
    assert is_missed(path, cache, CHANGED[name])


def test_tokenizer_libraries_and_rows_change_the_key(write, cache, monkeypatch):
    path = write(*ROWS)
    read(path, cache)
    assert is_missed(path, replace(cache, tokenizer_digest="other"))
    other: Any = CannotEncode(CHAT)
    other.eos_token_ids = [EOS, 7]
    assert is_missed(path, cache, tokenizer=other)
    for name, value in (
        ("_code_digest", lambda: "changed"),
        ("version", lambda name: "9"),
        ("LIBRARIES", ()),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(token_cache, name, value)
            assert is_missed(path, cache)
    Path("pairs.json").write_bytes(path.read_bytes())  # read as something else
    assert is_missed("pairs.json", cache)
    assert not is_missed(path, cache)
    assert is_missed(write(*ROWS[:-1], ROWS[-1] | {"chosen": "yes!"}), cache)
    assert is_missed(write(*ROWS[::-1]), cache)


def test_the_key_depends_on_the_code_that_reads_and_tokenizes_rows(monkeypatch):
    """A new schema or another reader of messages makes other pairs of the same rows."""
    digests = [token_cache._code_digest.__wrapped__()]
    for packages in (("mlx_dpo.data",), ("mlx_dpo.schemas",)):
        monkeypatch.setattr(token_cache, "CODE", packages)
        digests.append(token_cache._code_digest.__wrapped__())
    assert len(set(digests)) == 3


def test_a_template_with_the_date_has_another_key_on_another_day(write, cache, monkeypatch):
    dated = ByteTokenizer("{# strftime_now #}" + CHAT)
    silent = CannotEncode(dated.chat_template)
    path = write(*ROWS)
    read(path, cache, tokenizer=dated)
    read(path, cache)  # without a date in the template
    assert not is_missed(path, cache, tokenizer=silent)
    began = clock.today()
    monkeypatch.setattr(clock, "now", lambda: datetime(2100, 1, 1))
    assert is_missed(path, cache, tokenizer=silent)
    assert not is_missed(path, cache)
    clock.set_day(silent, began)  # a run that began on that day
    assert not is_missed(path, cache, tokenizer=silent)


def only(cache):
    [path] = cache.folder.iterdir()
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def flipped(at):
    def flip(path):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return flip


def emptied(path):
    path.write_bytes(b"")


def of_another(path):
    """Replace the file by a valid one with another key."""
    path.rename(path.with_name("kept"))
    other = replace(RULES, tokens=replace(RULES.tokens, max_length=99))
    read("pairs.jsonl", TokenCache(path.parent, "digest", "m"), other)
    path.with_name("kept").unlink()
    [others] = path.parent.iterdir()
    others.rename(path)


@pytest.mark.parametrize(
    "damage", [cut, flipped(0), flipped(50), flipped(-1), flipped(-60), emptied, of_another]
)
def test_a_damaged_or_foreign_file_is_made_again_and_reported(write, cache, damage):
    path = write(*ROWS)
    wanted = list(read(path, cache).pairs)
    damage(only(cache))
    again = read(path, cache)
    assert list(again.pairs) == wanted
    assert DAMAGED in again.report.lines()
    assert read(path, cache, tokenizer=CannotEncode(CHAT)).report.origin == FROM_CACHE


def test_loaded_pairs_outlive_their_file(write, cache):
    found = read(write(*ROWS), cache)
    only(cache).unlink()
    assert len(list(found.pairs)) == 5


def test_an_error_leaves_nothing_behind(write, cache):
    path = write(*ROWS)
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: chosen and rejected are the same text"):
        read(path, cache, replace(RULES, bad_pairs="error"))
    with pytest.raises(DataError, match="no usable pair"):
        read(write(ROWS[0]), cache)
    assert list(cache.folder.iterdir()) == []


def test_a_file_has_its_name_only_when_it_is_complete(write, cache, monkeypatch):
    def stopped(partial, path):
        assert partial.stat().st_size > 0
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        read(write(*ROWS), cache)
    assert list(cache.folder.iterdir()) == []


def test_a_file_that_changes_meanwhile_is_not_cached(write, cache):
    path = write(*ROWS)

    class Touching(ByteTokenizer):
        def encode(self, *args, **more):
            os.utime(path, (1, 1))
            return super().encode(*args, **more)

    assert len(read(path, cache, tokenizer=Touching(CHAT)).pairs) == 5
    assert list(cache.folder.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_reported_and_not_used(write, cache, tmp_path):
    (tmp_path / "file").write_text("")
    nowhere = replace(cache, folder=tmp_path / "file" / "tokens")
    found = read(write(*ROWS), nowhere)
    assert len(list(found.pairs)) == 5
    assert found.report.origin == f"tokens are not cached: {nowhere.folder}: Not a directory"


def test_small_files_and_standard_input_are_not_cached(write, cache, monkeypatch):
    path = write(*ROWS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    found = read(find_sources(STDIN).train[0], cache)
    assert [pair.location for pair in found.pairs][:2] == ["-:2", "-:3"]
    monkeypatch.setattr(token_cache, "MIN_CACHED_BYTES", 1 << 20)
    read(path, cache)
    assert not cache.folder.exists()


def test_rows_of_the_hub_are_cached_by_the_files_of_the_datasets_library(
    cache, tmp_path, monkeypatch
):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "table")
    loaded = datasets.load_from_disk(tmp_path / "table")
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *a, **more: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **more: loaded)
    [source] = find_sources("org/name").train
    first = read(source, cache)
    second = read(source, cache, tokenizer=CannotEncode(CHAT))
    assert [pair.location for pair in second.pairs][:2] == [
        "org/name:train[1]",
        "org/name:train[2]",
    ]
    assert list(first.pairs) == list(second.pairs)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **more: table)  # in memory
    assert is_missed(source, cache)


PROGRAM = """
import sys
from functools import partial
sys.path[:0] = sys.argv[2:]
import test_token_cache as t
t.token_cache.MIN_CACHED_BYTES = 0
found = t.read(sys.argv[1], t.TokenCache(t.Path("cache"), "digest", "m"))
print([pair.chosen for pair in found.pairs])
"""


def test_two_processes_that_write_at_once_leave_one_complete_file(write, cache):
    path, here = write(*ROWS * 200), Path(__file__)
    words = [sys.executable, "-c", PROGRAM, str(path), str(here.parent), str(here.parents[3])]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    [entry] = list_entries(Path("cache"))
    assert [path.name for path in Path("cache").iterdir()] == [entry.path.name]
    assert (entry.pairs, entry.damaged) == (1000, False)
    assert read(path, replace(cache, folder=Path("cache"))).report.origin == FROM_CACHE


def test_the_files_of_the_cache_are_listed(write, cache):
    read(write(*ROWS), cache)
    (cache.folder / "z.pairs").write_bytes(b"not this")
    whole, damaged = list_entries(cache.folder)
    assert (whole.model, whole.pairs, whole.damaged) == ("org/model", 5, False)
    assert whole.name == "pairs.jsonl"
    assert whole.size == whole.path.stat().st_size
    assert (damaged.damaged, damaged.model, damaged.pairs) == (True, "unknown", 0)
    assert list_entries(cache.folder / "none") == []
