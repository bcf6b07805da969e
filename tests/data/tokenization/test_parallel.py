"""Worker processes give the same pairs, order, counts and errors as a single process."""

import json
from contextlib import contextmanager
from functools import partial

import pytest

from mlx_dpo.data.files import RowLocations
from mlx_dpo.data.load import load_pairs
from mlx_dpo.data.sources import resolve_source
from mlx_dpo.data.tokenization import parallel as tokenizing
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.data.tokenization.parallel import TokenizerWorkers, tokenize_chunks
from mlx_dpo.data.tokenization.tokenize_rows import PairRules, new_report
from mlx_dpo.errors import BadPairError, ConfigError, DataError
from mlx_dpo.schemas.schema import RowRules
from tests.data.byte_tokenizer import CHAT, ByteTokenizer

TOKENS = TokenRules(vocab_size=262, max_length=48, truncation="keep_end")
LOAD = partial(ByteTokenizer, CHAT)


def row(i):
    """Return the i-th row; some are dropped, truncated or of another schema."""
    if i % 7 == 3:
        return {"prompt": f"q{i}", "chosen": "same", "rejected": "same"}
    if i % 11 == 5:
        return {"prompt": f"q{i}", "chosen": "", "rejected": "b", "extra": i}
    if i % 13 == 6:
        answers = [f"yes {i}", f"no {i}"]
        messages = [{"role": "user", "content": "x" * i}]
        made = [[{"role": "assistant", "content": text}] for text in answers]
        return {"prompt": messages, "chosen": made[0], "rejected": made[1]}
    return {"prompt": f"what of {i}? " * (i % 5), "chosen": f"{i} <U>", "rejected": f"not {i}"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tokenizing, "MIN_PARALLEL_ROWS", 12)
    monkeypatch.setattr(tokenizing, "CHUNK_ROWS", 5)


@contextmanager
def no_progress_bar():
    yield lambda more: None


def tokenized(path, rules, processes, progress=no_progress_bar, load=LOAD):
    """Return the bytes of all columns, and the report."""
    source = resolve_source(str(path))
    report = new_report(source.name, rules.tokens, rules.rows)
    locations, workers = RowLocations([source.name]), TokenizerWorkers(LOAD(), load, processes)
    made = [*tokenize_chunks(source.rows(), workers, rules, report, locations, progress)]
    return {name: b"".join(one[name].tobytes() for one in made) for name in made[0]}, report


DROP = PairRules(TOKENS, bad_pairs="drop")
PAIRED = PairRules(TOKENS, RowRules(pair_labelled=True), "drop")
JUDGED = PairRules(TOKENS, RowRules(judged=True, weight="w"), "drop")


def rows_for(rules):
    if rules is DROP:
        return [row(i) for i in range(1, 90)]
    labelled = [
        {"prompt": f"p{i % 9}", "completion": f"answer {i}" * (i % 5), "label": i % 4 == 0, "w": i}
        for i in range(60)
    ]
    return labelled


@pytest.mark.parametrize("rules", [DROP, PAIRED, JUDGED], ids=["pairs", "paired", "judged"])
def test_two_processes_give_the_pairs_of_one(write, rules):
    path = write(*rows_for(rules))
    one, alone = tokenized(path, rules, 1)
    two, together = tokenized(path, rules, 2)
    assert two == one
    assert together == alone
    assert json.dumps(together.to_dict()) == json.dumps(alone.to_dict())  # in the same order
    assert together.lines() == alone.lines()
    known = load_pairs(path, LOAD(), TOKENS, rows=rules.rows, bad_pairs="drop")
    assert known.report == together
    assert alone.used >= 12
    assert len(alone.dropped) >= 1


GOOD = {"prompt": "hi", "chosen": "yo", "rejected": "no!"}
SAME = {"prompt": "hi", "chosen": "yo", "rejected": "yo"}


@pytest.mark.parametrize(
    ("faults", "kind", "message"),
    [
        (
            {40: SAME},
            BadPairError,
            "pairs.jsonl:40: chosen and rejected are the same text; fix it",
        ),
        ({40: SAME, 41: "{"}, BadPairError, "pairs.jsonl:40: "),
        ({40: "{", 41: SAME}, DataError, "pairs.jsonl:40: not JSON"),
        ({33: SAME, 39: SAME}, BadPairError, "pairs.jsonl:33: "),
        ({20: SAME, 59: "{"}, BadPairError, "pairs.jsonl:20: "),
        ({59: "{"}, DataError, "pairs.jsonl:59: not JSON"),
        ({30: {"prompt": "a"}}, DataError, "pairs.jsonl:30: missing `chosen`"),
        ({3: "{", 30: SAME}, DataError, "pairs.jsonl:3: not JSON"),
    ],
)
def test_the_first_error_is_that_of_a_single_process(write, faults, kind, message):
    path = write(*(faults.get(line, GOOD) for line in range(1, 61)))
    errors = []
    for processes in (1, 2):
        with pytest.raises(DataError) as error:
            tokenized(path, PairRules(TOKENS), processes)
        errors.append((type(error.value), str(error.value)))
    assert errors[0] == errors[1]
    assert errors[0][0] is kind
    assert errors[0][1].startswith(message)


def test_a_setting_without_effect_on_a_late_row_raises_an_error(write):
    late = {"instruction": "hi", "chosen": "yo", "rejected": "no!", "q": "x", "prompt": None}
    path = write(*[GOOD | {"q": "hi"}] * 30, late)
    rules = PairRules(TOKENS, RowRules(renamed={"prompt": "q"}, schema="strings"))
    assert tokenized(path, rules, 2)[1].used == 31
    with pytest.raises(ConfigError, match="`column` label=q has no effect"):
        tokenized(path, PairRules(TOKENS, RowRules(renamed={"label": "q"})), 2)


def test_the_progress_bar_counts_every_row_once(write):
    path = write(*rows_for(DROP))
    for processes in (1, 2):
        advanced = []

        @contextmanager
        def progress(advanced=advanced):
            yield advanced.append

        tokenized(path, DROP, processes, progress)
        assert sum(advanced) == 89


def test_few_rows_start_no_process_and_show_no_progress_bar(write, monkeypatch):
    monkeypatch.setattr(tokenizing, "WorkerPool", None)

    @contextmanager
    def never():
        raise AssertionError
        yield

    _, report = tokenized(write(*[GOOD] * 12), DROP, 2, never)
    assert report.used == 12


class Ending(ByteTokenizer):
    """Ends the process at the first text."""

    def apply_chat_template(self, *args, **more):
        raise SystemExit(3)


def test_a_worker_that_ends_is_an_error_of_one_line(write):
    path = write(*[GOOD] * 40)
    with pytest.raises(DataError, match=r"ended unexpectedly \(exit status 3\)") as error:
        tokenized(path, DROP, 2, load=partial(Ending, CHAT))
    assert "\n" not in str(error.value)


class Loud(ByteTokenizer):
    """Prints to stdout, which carries the results of a worker."""

    def apply_chat_template(self, *args, **more):
        print("noise")
        return super().apply_chat_template(*args, **more)


def test_the_output_of_a_library_does_not_mix_with_the_results(write):
    path = write(*[GOOD | {"prompt": f"{i}"} for i in range(30)])
    assert tokenized(path, DROP, 2, load=partial(Loud, CHAT)) == tokenized(path, DROP, 1)
