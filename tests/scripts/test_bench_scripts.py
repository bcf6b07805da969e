"""The benchmarks' own arithmetic, and each script once on a tiny model."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import llama
from tokenizers import Tokenizer

from mlx_dpo.adapters import attach as adapters
from mlx_dpo.errors import ConfigError, DataError
from mlx_dpo.profiling.bench.shapes import SHAPES, PassShape, Shape
from scripts.bench import (
    bench_data,
    bench_peers,
    bench_step,
    bench_two_passes,
    machine,
    options,
    processes,
    steps,
    tables,
    texts,
)
from scripts.bench.job import Job, ProcessUsage, Result
from scripts.bench.processes import PeerError
from scripts.bench.tables import Measurement
from scripts.bench.trainers import TRAINERS, Setting, Trainer
from scripts.bench.workload import Workload, make_workload, sample_pairs

SMALL = Shape(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    vocab_size=32,
)
RESULT = Result(
    pairs=12,
    tokens=100,
    trainable=8,
    reference_s=2.0,
    training_s=4.0,
    peak_bytes=1_500_000_000,
    resident_bytes=2_000_000_000,
    cpu_s=(7.0, 0.5),
    versions="x 1",
)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    rows = [
        {
            "prompt": f"what is the sum of {n} and {n + 1}",
            "chosen": f" the sum is {2 * n + 1}",
            "rejected": " nobody can know the sum" * (1 + n % 3),
        }
        for n in range(6)
    ]
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measured(trainer: str, turn: int = 0, setting: str = "a", **changes: object) -> Measurement:
    remark = str(changes.pop("remark", ""))
    result = replace(RESULT, **changes)
    return Measurement(trainer=trainer, setting=setting, round=turn, result=result, remark=remark)


# --- rates and ratios ------------------------------------------------------------------------


def test_a_first_epoch_counts_the_reference_and_a_cached_one_does_not():
    assert RESULT.first_epoch == 12 / 6
    assert RESULT.cached_epoch == 12 / 4
    inside = replace(RESULT, reference_s=None)
    assert (inside.first_epoch, inside.cached_epoch) == (3.0, None)


def test_ratios_are_formed_within_a_round_and_the_median_is_taken():
    # ours: 6, 3, 3 pairs/s; other: 3, 3, 1. Ratios 2, 1, 3, of which 2 is the median;
    # the ratio of medians would be 1.
    seconds = {"ours": (2.0, 4.0, 4.0), "other": (4.0, 4.0, 12.0)}
    runs = [
        measured(name, turn, reference_s=None, training_s=taken)
        for name, each in seconds.items()
        for turn, taken in enumerate(each)
    ]
    assert tables.speedups(runs, tables.first_epoch) == {"other": 2.0}


def test_each_trainer_enters_a_ratio_with_its_best_setting():
    runs = [
        measured("ours", reference_s=1.0, training_s=2.0),  # 4 and 6 pairs/s
        measured("other", setting="b", reference_s=None, training_s=4.0),  # 3 and none
        measured("other", setting="a", reference_s=2.0, training_s=4.0),  # 2 and 3
        measured("other", setting="c", training_s=0.1, remark="no reference"),
    ]
    assert tables.speedups(runs, tables.first_epoch) == {"other": pytest.approx(4 / 3)}
    assert tables.speedups(runs, tables.cached_epoch) == {"other": 2.0}


def test_a_trainer_without_a_cache_has_no_ratio_of_cached_epochs():
    runs = [measured("ours"), measured("other", reference_s=None)]
    assert tables.speedups(runs, tables.cached_epoch) == {}


def test_a_round_with_a_failed_trainer_is_left_out():
    runs = [
        measured("ours", 0, training_s=4.0),
        measured("other", 0, training_s=10.0),
        measured("other", 1, training_s=1.0),
    ]
    assert tables.speedups(runs, tables.first_epoch) == {"other": 2.0}


def test_the_best_setting_of_each_epoch_is_chosen_and_remarks_never_win():
    runs = [
        measured("x", setting="cached", reference_s=4.0, training_s=2.0),  # 2 and 6
        measured("x", setting="in the step", reference_s=None, training_s=4.0),  # 3 and none
        measured("x", setting="neither", reference_s=4.0, training_s=4.0),  # 1.5 and 3
        measured("x", setting="cheats", reference_s=0.1, training_s=0.1, remark="why"),
    ]
    assert tables.fastest_settings(runs) == ["in the step", "cached"]
    assert tables.fastest_settings(runs[-1:]) == []


# --- what is written down --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.00012345, "0.000123"), (123456.0, "123000"), (1.0, "1"), (0.0, "0"), (None, "")],
)
def test_figures_have_three_digits_and_no_exponent(value, shown):
    assert tables.format_number(value) == shown


def test_a_row_holds_rates_and_decimal_gigabytes():
    row = tables.peer_row(measured("ours"))
    assert row["first_epoch_pairs_per_s"] == "2"
    assert row["cached_epoch_pairs_per_s"] == "3"
    assert (row["peak_gb"], row["resident_gb"]) == ("1.5", "2")
    other = tables.peer_row(measured("other", reference_s=None, peak_bytes=None))
    assert (other["cached_epoch_pairs_per_s"], other["peak_gb"]) == ("", "")


def test_rows_are_appended_below_one_header(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    tables.append_csv(path, [{"a": "1", "b": "x, y"}])
    tables.append_csv(path, [{"a": "2", "b": "z"}])
    assert path.read_text() == 'a,b\n1,"x, y"\n2,z\n'


def test_a_csv_with_other_columns_is_left_as_it_is(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("b,a\n1,2\n")
    with pytest.raises(DataError, match=r"rows\.csv: has other columns \(b, a\); move it away"):
        tables.append_csv(path, [{"a": "1", "b": "2"}])
    assert path.read_text() == "b,a\n1,2\n"


def test_a_table_is_as_wide_as_its_widest_cells():
    table = tables.text_table([{"a": "1", "long": "x", "other": "-"}], ["long", "a"])
    assert table.splitlines() == ["| long | a |", "| ---- | - |", "| x    | 1 |"]


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "kind", "count"),
    [
        ([], "short", 64),
        (["--long"], "long", 16),
        (["--ranked"], "ranked", 48),
        (["--system"], "system", 16),
        (["--memory"], "memory", 1),
    ],
)
def test_the_kind_of_benchmark_decides_how_many_pairs(flags, kind, count):
    parsed = options.parse(["--pairs", "x", *flags])
    assert (parsed.kind, parsed.pairs_count) == (kind, count)
    assert options.parse(["--pairs", "x", "--pairs-count", "3", *flags]).pairs_count == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peers", "ours,trll"], "`--peers`: unknown `trll`; there are ours, trl, mlx-lm-lora"),
        (["--setting", "trl=batch 3"], r"is not one of its settings \(batch 1; batch 2;"),
        (["--setting", "nobody=batch 1"], r"is not one of its settings \(no such trainer\)"),
        (["--ours", "recompute"], "`--ours recompute`: is not KEY=VALUE"),
        (["--setting", "trl=batch 1", "--setting", "trl=batch 2"], "name a trainer once"),
    ],
)
def test_invalid_options_are_rejected(flags, message):
    with pytest.raises(ConfigError, match=message):
        options.parse(["--pairs", "x", *flags])


def test_a_setting_on_the_command_line_is_the_only_one_tried():
    parsed = options.parse(
        ["--pairs", "x", "--setting", "trl=batch 2", "--ours", "micro_batch_size=1"]
    )
    [trl] = options.settings(parsed, "trl")
    assert trl.options == {"batch_size": 2, "precompute": True}
    [ours] = options.settings(parsed, "ours")
    assert ours.options == {"micro_batch_size": 1}
    assert len(options.settings(parsed, "mlx-tune")) > 1


@pytest.mark.parametrize("text", ["1:2:3", "1:2:3:0", "a:1:1:1", "1:2:3:4:5"])
def test_a_point_has_four_positive_numbers(text, capsys):
    with pytest.raises(SystemExit):
        bench_step.parse(["--point", text])
    assert "PROMPT:CHOSEN:REJECTED:PAIRS" in capsys.readouterr().err


# --- workload -------------------------------------------------------------


def test_the_large_shape_is_that_of_smollm2_135m():
    assert SHAPES["smollm2-135m"].parameters() == 134_515_008  # what its own card counts


def test_a_shape_names_the_weights_that_the_model_has(pairs_file, tmp_path):
    work = make_workload(
        pairs_file, shape="tiny", kind="short", count=2, cache=tmp_path / "c", folder=tmp_path
    )
    stored = mx.load(str(work.model / "model.safetensors"))
    model = llama.Model(llama.ModelArgs.from_dict(SHAPES["tiny"].config()))
    model.load_weights(list(stored.items()), strict=True)
    assert sum(value.size for value in stored.values()) == SHAPES["tiny"].parameters()


def test_faulty_pairs_are_counted_and_every_completion_ends_with_one_stop_token(tmp_path):
    path = tmp_path / "p.jsonl"
    good = {"prompt": "a", "chosen": " b", "rejected": " c"}
    path.write_text(
        "".join(
            json.dumps(good | change) + "\n"
            for change in ({}, {"chosen": " c"}, {"prompt": " "}, {})
        )
    )
    pairs, faulty = texts.read_pairs(path)
    assert faulty == 2
    assert pairs == [{"prompt": "a", "chosen": " b<|end|>", "rejected": " c<|end|>"}] * 2


def test_messages_are_rejected(tmp_path):
    path = tmp_path / "p.jsonl"
    messages = [{"role": "user", "content": "a"}]
    path.write_text(json.dumps({"prompt": messages, "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(DataError, match="holds messages; the benchmark takes plain text"):
        texts.read_pairs(path)


def test_pairs_of_memory_have_exactly_the_lengths_of_the_issue(pairs_file, tmp_path):
    work = make_workload(
        pairs_file, shape="tiny", kind="memory", count=1, cache=tmp_path / "c", folder=tmp_path
    )
    [pair] = map(json.loads, work.pairs.read_text().splitlines())
    tokenizer = Tokenizer.from_file(str(work.model / "tokenizer.json"))
    prompt, chosen, rejected = (
        tokenizer.encode(text).ids
        for text in (
            pair["prompt"],
            pair["prompt"] + pair["chosen"],
            pair["prompt"] + pair["rejected"],
        )
    )
    assert (len(prompt), len(chosen), len(rejected)) == (1024, 1024 + 256, 1024 + 256)
    assert chosen[:1024] == rejected[:1024] == prompt
    assert chosen.count(tokenizer.token_to_id(texts.END_TOKEN)) == 1


def test_long_pairs_are_long_and_the_same_every_time(pairs_file):
    pairs, _ = texts.read_pairs(pairs_file)
    tokenizer = texts.train_tokenizer(pairs, 400)
    long = texts.long_pairs(pairs, tokenizer, 3)
    assert long == texts.long_pairs(pairs, tokenizer, 3)
    for pair in long:
        lengths = [len(tokenizer.encode(text).ids) for text in pair.values()]
        assert 900 <= lengths[0] <= 1000
        assert all(200 <= length <= 300 for length in lengths[1:])


def test_ranked_pairs_are_all_pairs_of_four_completions_in_their_order(pairs_file):
    pairs, _ = texts.read_pairs(pairs_file)
    tokenizer = texts.train_tokenizer(pairs, 400)
    ranked = texts.ranked_pairs(pairs, tokenizer, 8)
    assert ranked[:6] == texts.ranked_pairs(pairs, tokenizer, 6)
    first, second = ranked[:6], ranked[6:]
    assert len({pair["prompt"] for pair in first}) == 1
    assert {pair["prompt"] for pair in second} != {first[0]["prompt"]}
    a, (b, c, d) = first[0]["chosen"], (pair["rejected"] for pair in first[:3])
    expected = [(a, b), (a, c), (a, d), (b, c), (b, d), (c, d)]
    assert [(pair["chosen"], pair["rejected"]) for pair in first] == expected
    assert len({a, b, c, d}) == 4


def test_pairs_with_a_system_prompt_begin_with_the_same_600_tokens(pairs_file):
    pairs, _ = texts.read_pairs(pairs_file)
    tokenizer = texts.train_tokenizer(pairs, 400)
    prompts = [
        tokenizer.encode(pair["prompt"]).ids
        for pair in texts.system_prompt_pairs(pairs, tokenizer, 3)
    ]
    assert len({tuple(ids[:600]) for ids in prompts}) == 1
    assert len({tuple(ids[:640]) for ids in prompts}) == 3
    assert all(640 <= len(ids) <= 660 for ids in prompts)


def test_too_few_pairs_are_rejected(pairs_file, tmp_path):
    with pytest.raises(DataError, match="has 6 usable pairs; give --pairs-count at most that"):
        make_workload(
            pairs_file, shape="tiny", kind="short", count=7, cache=tmp_path / "c", folder=tmp_path
        )


def test_a_sample_is_spread_over_all_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{n}\n" for n in range(9)))
    few = sample_pairs(Workload(tmp_path, path, 9), 3)
    assert (few.count, few.pairs.read_text().split()) == (3, ["0", "3", "6"])


# --- processes -------------------------------------------------------------------------------

PEER = """
import atexit, os, subprocess
from scripts.bench import job as bench

def train(job, folder):
    {before}
    atexit.register(print, "late noise")
    print("noise of Python"); os.write(1, b"noise of C\\n"); subprocess.run(["echo", "noise"])
    return bench.Result(pairs=job.threads, tokens=0, trainable=0, reference_s=None,
        training_s=1.0, peak_bytes=None, resident_bytes=0, cpu_s=(0.0, 0.0),
        versions=job.setting["name"])

bench.run_job(train)
"""


def run_fake_trainer(tmp_path: Path, before: str, *, timeout: float = 60.0) -> Result:
    (tmp_path / "fake_peer.py").write_text(PEER.format(before=before))
    trainer = Trainer(
        name="fake", module="fake_peer", requirements=(), settings=(), memory_settings=()
    )
    setting = Setting(
        name="only",
        options={"name": "label"},
        env={"PYTHONPATH": f"{machine.ROOT}:{tmp_path}"},
    )
    python = processes.trainer_python(trainer, tmp_path)
    job = Job(model="", pairs="", threads=3)
    return processes.run(
        trainer, setting, job, python=python, folder=tmp_path / "run", timeout=timeout
    )


def test_cpu_seconds_include_ended_processes_only_on_request(monkeypatch):
    """Our second process computes every other pass; its time must not be missing."""
    monkeypatch.setattr("scripts.bench.job.os.times", lambda: (1.0, 0.5, 10.0, 5.0, 99.0))
    usage = ProcessUsage()
    monkeypatch.setattr("scripts.bench.job.os.times", lambda: (4.0, 0.7, 12.0, 5.5, 199.0))
    assert usage.cpu_seconds() == pytest.approx((3.0, 0.2))
    assert usage.cpu_seconds(with_children=True) == pytest.approx((5.0, 0.7))


def test_a_result_is_read_among_the_output_of_libraries(tmp_path):
    result = run_fake_trainer(tmp_path, "pass")
    assert (result.pairs, result.versions) == (3, "label")
    assert not (tmp_path / "run").exists()


def test_a_failed_trainer_is_reported_with_its_last_line(tmp_path):
    with pytest.raises(PeerError, match=r"fake: only ended with status 1 \(KeyError: 'gone'\)"):
        run_fake_trainer(tmp_path, "raise KeyError('gone')")


def test_a_result_does_not_count_if_the_trainer_crashed_after_it(tmp_path):
    with pytest.raises(PeerError, match="fake: only ended with status 3"):
        run_fake_trainer(tmp_path, "atexit.register(os._exit, 3)")


def test_a_trainer_that_hangs_is_stopped(tmp_path):
    with pytest.raises(PeerError, match="fake: only took over 1 s"):
        run_fake_trainer(tmp_path, "import time; time.sleep(30)", timeout=1.0)


def test_all_trainers_get_equal_threads_and_an_empty_cache(tmp_path):
    for trainer in TRAINERS.values():
        env = processes.environment(trainer, trainer.settings[0], 2, tmp_path)
        assert {env[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")} == {"2"}
        assert env["MLX_DPO_CACHE"] == str(tmp_path)
    blas = machine.openblas()
    preloads = {
        name: processes.environment(trainer, trainer.settings[0], 2, tmp_path).get("LD_PRELOAD")
        for name, trainer in TRAINERS.items()
    }
    assert preloads["mlx-lm-lora"] == preloads["mlx-tune"] == blas
    assert preloads["trl"] != blas or blas is None


# --- one pass --------------------------------------------------------------------------------


def test_tokens_and_rows_of_a_micro_batch_are_counted():
    model = steps.build(SMALL)
    tokens = mx.zeros((2, 5), mx.int32)
    with steps.count_work(model) as work:
        mx.eval(model(tokens))
    mx.eval(model(tokens))
    assert (work.layer_tokens, work.head_tokens) == (10, 10)


def test_both_scorers_process_the_expected_tokens():
    """Plain: two rows, padded to a multiple of 8, all but the last token of each.
    Trie: the prompt once, then both completions, each without its last token."""
    model = steps.build(SMALL)
    point = PassShape(prompt=9, chosen=3, rejected=5, pairs=2)
    plain, shared, recomputed = steps.scorer_variants(model, SMALL.vocab_size)
    assert recomputed.name == "trie, recomputed"
    for make in (steps.reference_pass, steps.training_pass):
        costs = {
            variant.name: steps.measure(model, make(model, variant, point.draw(32)), repeats=1)
            for variant in (plain, shared)
        }
        assert costs["plain"].layer_tokens == costs["plain"].head_tokens == 2 * 2 * 15
        assert abs(costs["trie"].layer_tokens - 2 * (9 + 3 + 5)) <= 2 * 2
        assert abs(costs["trie"].head_tokens - 2 * (3 + 5)) <= 2 * 2
    assert model.model.__class__ is llama.LlamaModel


def test_the_passes_of_both_scorers_compute_the_same():
    model = steps.build(SMALL)
    pairs = PassShape(prompt=9, chosen=3, rejected=5, pairs=2).draw(32)
    losses = []
    for variant in steps.scorer_variants(model, SMALL.vocab_size):
        loss, _ = steps.training_pass(model, variant, pairs)()
        chosen, _ = steps.reference_pass(model, variant, pairs)()
        losses.append((loss.item(), *chosen.tolist()))
    assert len(losses) == 3
    for others in losses[1:]:
        assert losses[0] == pytest.approx(others, rel=1e-5)


def test_the_reference_is_scored_without_adapters():
    model = steps.build(SMALL)
    pairs = PassShape(prompt=4, chosen=3, rejected=2, pairs=1).draw(32)
    [plain, *_] = steps.scorer_variants(model, SMALL.vocab_size)
    reference = steps.reference_pass(model, plain, pairs)().chosen.item()
    adapted = plain.scorer(model, pairs).chosen.item()
    for module in adapters.adapted_layers(model).values():
        module.lora_b = mx.zeros_like(module.lora_b)
    assert reference == pytest.approx(plain.scorer(model, pairs).chosen.item(), rel=1e-6)
    assert reference != pytest.approx(adapted, rel=1e-6)


# --- the scripts -----------------------------------------------------------------------------


def test_bench_step_writes_a_row_for_every_pass_and_scorer(tmp_path, capsys):
    path = tmp_path / "step.csv"
    arguments = ["--shape", "tiny", "--repeats", "1", "--csv", str(path), "--point", "6:2:3:2"]
    assert bench_step.main(arguments) == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["pass"], row["scorer"]) for row in rows] == [
        (name, scorer)
        for name in ("reference", "training")
        for scorer in ("plain", "trie", "trie, recomputed")
    ]
    assert all(row["cores"] and float(row["pairs_per_s"]) > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 6


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
def test_bench_two_passes_writes_a_row_for_every_pass_and_way(tmp_path, capsys):
    path = tmp_path / "two.csv"
    arguments = ["--shape", "tiny", "--repeats", "1", "--csv", str(path)]
    assert bench_two_passes.main(arguments) == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["pass"], row["way"]) for row in rows] == [
        (name, way)
        for name in ("training", "reference")
        for way in ("two threads", "two processes", "one thread")
    ]
    assert all(float(row["wall_s"]) > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 6


def test_bench_peers_runs_this_project_and_prints_the_work_done(pairs_file, tmp_path, capsys):
    path = tmp_path / "peers.csv"
    arguments = [
        *("--pairs", str(pairs_file), "--pairs-count", "4", "--shape", "tiny"),
        *("--peers", "ours", "--cache", str(tmp_path / "cache"), "--csv", str(path)),
    ]
    assert bench_peers.main(arguments) == 0
    [row] = csv.DictReader(path.read_text().splitlines())
    assert (row["trainer"], row["stage"], row["pairs"]) == ("ours", "run", "4")
    first, cached = (float(row[f"{name}_epoch_pairs_per_s"]) for name in ("first", "cached"))
    assert 0 < first < cached
    line = capsys.readouterr().out.splitlines()[-1]
    # Adapters: rank 8 times inputs plus outputs of the seven linear layers, in two blocks.
    widths = 2 * (48 + 48) + 2 * (48 + 16) + 3 * (48 + 96)
    assert line == f"pairs, tokens and adapter weights: 4, {row['tokens']}, {2 * 8 * widths}"


def test_bench_peers_reports_errors_in_one_line(tmp_path, capsys):
    assert (
        bench_peers.main(["--pairs", str(tmp_path / "none.jsonl"), "--cache", str(tmp_path)]) == 2
    )
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"Error: {tmp_path / 'none.jsonl'}: no such file or folder; a dataset on the Hub is "
        "written `org/name`"
    )


def test_bench_data_writes_a_row_for_every_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_data, "STARTS", ("first", "second"))
    csv = tmp_path / "data.csv"
    assert bench_data.main(["--pairs", "40", "--csv", str(csv)]) == 0
    rows = [line.split(",") for line in csv.read_text().splitlines()]
    start = rows[0].index("start") - len(rows[0])
    assert [row[start : start + 2] for row in rows[1:]] == [["first", "40"], ["second", "40"]]
    assert "| second | 40" in capsys.readouterr().out
