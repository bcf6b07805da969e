import json
import math
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.perplexity import eval_ppl

from mlx_dpo.adapters.switch import AdapterSwitch
from mlx_dpo.cli import cli
from mlx_dpo.evaluation.measurements.perplexity import (
    Perplexity,
    Windows,
    measure_perplexity,
    split_windows,
)
from mlx_dpo.models.load import load_model
from mlx_dpo.runs.folder import RunPaths
from mlx_dpo.saved_runs.open import SwitchableModel
from mlx_dpo.saved_runs.stored_evaluations import read_evaluations
from tests.checkpoints import add_bos_token, make_checkpoint
from tests.edited_files import read_entries

BOOK = "".join(f"The cat sat on mat number {n}, and then it left.\n" for n in range(40))


def run(*words):
    return CliRunner().invoke(cli, ["eval", "run", *words])


def measured(*words):
    result = run("--perplexity", *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["perplexity"]


@pytest.fixture
def book(workplace):
    (workplace / "book.txt").write_text(BOOK)
    return workplace


def test_numbers_by_hand():
    # Four tokens of probability 1/2 in eight bytes: 2 per token, half a bit per byte.
    figures = Perplexity(nats=4 * math.log(2), tokens=4, num_bytes=8).to_dict()
    assert figures["token_perplexity"] == pytest.approx(2)
    assert figures["byte_perplexity"] == pytest.approx(math.sqrt(2))
    assert figures["bits_per_byte"] == pytest.approx(0.5)
    assert math.isfinite(Perplexity(1e6, 1, 1).to_dict()["token_perplexity"])  # JSON has no inf


def test_windows_by_hand():
    parts = list(split_windows(range(8), 4, 2))
    assert [(list(part.tokens), part.start) for part in parts] == [
        ([0, 1, 2, 3], 1),
        ([2, 3, 4, 5], 2),
        ([4, 5, 6, 7], 2),
    ]


@pytest.mark.parametrize("length", range(2, 30))
def test_each_token_is_scored_once_with_context_within_the_window(length):
    for window in range(2, 12):
        for stride in range(1, window):
            scored = []
            for tokens, start, _ in split_windows(range(length), window, stride):
                assert len(tokens) <= window and start >= 1
                assert start >= min(tokens[start], window - stride)
                scored.extend(tokens[start:])
            assert scored == list(range(1, length))


def test_windows_without_overlap_give_the_perplexity_of_mlx_lm(book):
    """mlx-lm's blocks of 65 tokens predict 64 each: our windows of 65 that move by 64."""
    tokenizer = mlx_lm.load("base")[1]
    lengths = range(900, 1100)
    text = next(BOOK[:n] for n in lengths if len(tokenizer.encode(BOOK[:n])) % 64 == 1)
    Path("book.txt").write_text(text)
    figures = measured("book.txt", "--window", "65", "--stride", "64")
    ids = tokenizer.encode(text)
    blocks = mx.array([ids[i : i + 65] for i in range(0, len(ids) - 1, 64)])
    for state, adapter in (("base", None), ("aligned", "run")):
        model, _ = mlx_lm.load("base", adapter_path=adapter)
        expected, _ = eval_ppl(model, blocks)
        assert figures[state]["token_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert figures["base"] != figures["aligned"]


def test_strided_windows_equal_one_pass_per_token(book):
    """An own loop: each token alone, with the tokens that its window has before it."""
    text = BOOK[:400]
    Path("book.txt").write_text(text)
    figures = measured("book.txt", "--window", "32", "--stride", "8")
    model, tokenizer = mlx_lm.load("base")
    ids = tokenizer.encode(text)
    nats = 0.0
    for index in range(1, len(ids)):
        end = 32 if index < 32 else 32 + 8 * math.ceil((index - 31) / 8)
        end = min(end, len(ids))
        context = ids[max(0, end - 32) : index]
        logits = np.array(model(mx.array([context]))[0, -1].astype(mx.float32), np.float64)
        nats -= logits[ids[index]] - logits.max() - math.log(np.exp(logits - logits.max()).sum())
    assert figures["tokens"] == len(ids) - 1
    first = len(tokenizer.decode([ids[0]]).encode())
    assert figures["bytes"] == len(text.encode()) - first
    assert figures["base"]["token_perplexity"] == pytest.approx(
        math.exp(nats / (len(ids) - 1)), rel=1e-5
    )


def test_all_tokens_of_a_text_count_if_a_token_begins_it(tmp_path):
    base = load_model(str(add_bos_token(make_checkpoint(tmp_path / "base"))))
    switch = AdapterSwitch(base.model)
    switch.save_state("base")
    switch.save_state("aligned")
    model = SwitchableModel(base, switch, None, None, ())
    text = "The cat sat."
    found = measure_perplexity(model, [text, "A"], Windows(), subject="x").to_dict()
    ids = [base.tokenizer.encode(part) for part in (text, "A")]
    assert all(row[0] == base.tokenizer.bos_token_id for row in ids)
    assert (found["tokens"], found["bytes"]) == (len(ids[0]) + len(ids[1]) - 2, len(text) + 1)
    nats = 0.0
    for row in ids:
        logits = np.array(base.model(mx.array([row[:-1]]))[0], np.float64)
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= sum(logps[i, token] for i, token in enumerate(row[1:]))
    bits = nats / math.log(2) / (len(text) + 1)
    assert found["base"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize(("text", "first"), [("🙂 cat", 1), ("é sat", 1), ("The cat", 3)])
def test_a_first_token_may_be_a_part_of_a_character(tmp_path, text, first):
    base = load_model(str(make_checkpoint(tmp_path / "base")))
    ids = base.tokenizer.encode(text)
    assert len(base.tokenizer.convert_ids_to_tokens(ids[0])) == first
    switch = AdapterSwitch(base.model)
    switch.save_state("base")
    switch.save_state("aligned")
    model = SwitchableModel(base, switch, None, None, ())
    found = measure_perplexity(model, [text], Windows(), subject="x").to_dict()
    assert found["bytes"] == len(text.encode()) - first


def test_documents_are_scored_on_their_own_whatever_the_order(book):
    rows = [BOOK[:300], "A hat.", BOOK[300:700], " ", "Café ☕"]
    for name, texts in (("a.jsonl", rows), ("b.jsonl", rows[::-1])):
        Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    first, second = measured("a.jsonl"), measured("b.jsonl")
    assert first["documents"] == 4
    assert first["notes"] == ["1 document without a token to score was left out"]
    assert first["base"] == pytest.approx(second["base"], rel=1e-6)
    parts = []
    for number, text in enumerate(rows[:3]):
        Path(f"{number}.txt").write_text(text)
        parts.append(measured(f"{number}.txt", "--no-save"))
    Path("c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows[:3]))
    bits = sum(part["base"]["bits_per_byte"] * part["bytes"] for part in parts)
    size = sum(part["bytes"] for part in parts)
    assert measured("c.jsonl")["base"]["bits_per_byte"] == pytest.approx(bits / size, rel=1e-6)


def test_the_results_are_stored_with_what_they_are_of(book):
    figures = measured("book.txt", "--window", "64")
    [stored] = read_evaluations(RunPaths(Path("run")), adapter_digest=None)
    assert (stored.measurement, stored.subject) == ("perplexity", "book.txt")
    assert stored.settings == {"window": 64, "stride": 32}
    assert stored.results["aligned"] == figures["aligned"]
    assert read_evaluations(RunPaths(Path("run")), adapter_digest="another") == []
    measured("book.txt", "--window", "32")  # replaces it
    assert run("--json").exit_code == 0
    pairs, text = read_evaluations(RunPaths(Path("run")), adapter_digest=stored.adapter_digest)[
        ::-1
    ]
    assert {pairs.measurement, text.measurement} == {"pairs", "perplexity"}
    assert "eval_loss" in {**pairs.results, **text.results}
    entries = read_entries(Path("run/evaluations/perplexity-book.txt.json"))
    assert entries["settings"]["window"] == 32


def test_nothing_is_stored_if_not_wanted_and_a_failure_is_no_loss(book):
    assert run("--no-save").exit_code == 0
    assert not Path("run/evaluations").exists()
    Path("run/evaluations").write_text("in the way")
    result = run()
    assert result.exit_code == 0
    assert "Warning: the results are not stored: run/evaluations" in result.stderr
    assert "held-out pairs" in result.stdout


def test_the_table_has_before_and_after(book):
    shown = run("--perplexity", "book.txt").stdout
    assert "Perplexity of book.txt" in shown
    assert "base" in shown and "aligned" in shown and "bits per byte" in shown
    assert "accuracy" not in shown  # held-out pairs are measured only if nothing else is asked for
    assert "accuracy" in run("pairs.jsonl", "--perplexity", "book.txt").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--window", "8"], "`--window` has no effect without --perplexity"),
        (["--stride", "8"], "`--stride` has no effect without --perplexity"),
        (["--perplexity", "book.txt", "--bad-pairs", "drop"], "`--bad-pairs` has no effect"),
        (["--perplexity", "book.txt", "--window", "600"], "the model's context is 512"),
        (["--perplexity", "book.txt", "--window", "8", "--stride", "8"], "below the window of 8"),
        (["--perplexity", "none.txt"], "none.txt: no such file"),
        (["--perplexity", "pairs.jsonl"], "pairs.jsonl:1: `text` must be a document as text"),
        (["--perplexity", "empty.txt"], "empty.txt: contains no text"),
    ],
)
def test_mistakes_are_one_line(book, words, message):
    Path("empty.txt").write_text(" \n")
    result = run(*words)
    assert result.exit_code == 1
    assert message in result.stderr.strip().splitlines()[-1]
    assert not Path("run/evaluations").exists()
