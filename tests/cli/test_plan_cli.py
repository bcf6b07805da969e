"""`mlx-dpo plan`: all of it from a configuration, a tokenizer and pairs."""

import json

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.models.empty_weights import load_empty_model
from mlx_dpo.models.load import load_model
from mlx_dpo.profiling.memory import parameter_bytes, trainable_parameters
from tests.checkpoints import make_checkpoint


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_DPO_CACHE", str(tmp_path / "cache"))
    make_checkpoint(tmp_path / "base", num_hidden_layers=6, max_position_embeddings=300)
    (tmp_path / "base" / "model.safetensors").unlink()  # plan has to do without
    rows = [
        {"prompt": f"What is {i}?", "chosen": "It is " + "so " * i, "rejected": f"{i * 7} no"}
        for i in range(12)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def plan(*words):
    return CliRunner().invoke(cli, ["plan", "pairs.jsonl", "--model", "base", *words])


def planned(*words):
    result = plan("--json", *words)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_all_lines_are_printed(tmp_path):
    result = plan()
    assert result.exit_code == 0, result.output
    names = [line[:10].strip() for line in result.output.splitlines()]
    assert [name for name in names if name] == [
        "model", "pairs", "scorer", "memory", "fits", "train", "rate", "epoch", "work", "time",
    ]  # fmt: skip
    assert "model         base, 285 K parameters" in result.output
    assert "11 to train on, 1 held out" in result.output
    assert "the context length of the model" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"base", "pairs.jsonl"}


def test_memory_parts_add_up():
    memory = planned()["memory"]
    parts = [memory[name] for name in ("weights", "adapters", "activations", "head")]
    assert min(parts) >= 0
    assert sum(parts) == memory["training"]
    assert memory["reference"] > memory["weights"]


def test_memory_of_weights_and_adapters_by_hand():
    memory = planned("--lora-r", "2", "--lora-target-modules", "q_proj")["memory"]
    block = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert memory["weights"] == (6 * block + 64 + 2 * 300 * 64) * 4
    assert memory["adapters"] == 5 * 6 * 2 * 2 * 64 * 4  # five copies in six blocks


def test_quantization_changes_nothing_on_the_cpu():
    plain, packed = planned(), planned("--bits", "4")
    assert packed["memory"]["weights"] == plain["memory"]["weights"]
    assert "on a Mac's GPU packed in 4 bits" in plan("--bits", "4").output


def test_tokens_of_an_epoch_by_hand(tmp_path):
    rows = [{"prompt": "What is it?", "chosen": "It is.", "rejected": "It is so."}] * 4
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("--valid-fraction", "0", "--chat-template", "text")
    found = planned(*settings, "--scorer", "shared")
    model = load_empty_model("base")
    texts = [model.tokenizer.encode(text) for text in ("What is it?", "It is.", "It is so.")]
    prompt, chosen, rejected = map(len, texts)
    chosen, rejected = chosen + 1, rejected + 1  # the stop token
    epoch = found["epoch"]
    assert found["pairs"] == 4
    assert epoch["tokens"] == 4 * (prompt + chosen - 1 + rejected - 1)
    assert epoch["rows"] == 4 * (chosen + rejected)
    assert (epoch["steps"], epoch["passes"]) == (1, 2)
    assert found["lengths"]["longest"] == prompt + max(chosen, rejected)
    # Both pairs of a pass are equal, and their completions begin alike.
    alike = next(i for i in range(chosen) if texts[1][i : i + 1] != texts[2][i : i + 1])
    epoch = planned(*settings)["epoch"]
    assert epoch["tokens"] == 2 * (prompt + chosen - 1 + rejected - 1 - alike)
    assert epoch["rows"] == 2 * (chosen + rejected - alike)
    assert epoch["tokens_pair_by_pair"] == 4 * (prompt + chosen - 1 + rejected - 1)
    assert (epoch["prompts"], epoch["passes"]) == (1, 2)
    saved = 1 - epoch["tokens"] / epoch["tokens_pair_by_pair"]
    line = f"4 pairs of 1 prompt; shared beginnings save {saved:.1%} of the tokens"
    assert line in " ".join(plan(*settings).output.split())


def test_capacity_shrinks_with_memory():
    roomy, none = (planned("--memory", size) for size in ("1GB", "0.001GB"))
    assert roomy["most"]["stored"]["context"] is True
    # Steps of 11 short pairs: 4 pairs in a pass leave at least two passes.
    assert roomy["chosen"] == {"micro_batch_size": 4, "recompute": False, "fits": True}
    assert none["chosen"] == {"micro_batch_size": 1, "recompute": True, "fits": False}
    assert none["most"]["recomputed"]["pairs"] == 0
    assert "train         refused: " in plan("--memory", "0.001GB").output


def test_recomputation_changes_memory_and_work():
    stored, again = planned("--no-recompute"), planned("--recompute")
    assert again["memory"]["activations"] < stored["memory"]["activations"]
    assert again["epoch"]["operations"] > stored["epoch"]["operations"]


def test_extra_forward_passes_count_and_no_reference_costs_nothing():
    """Each of these scores a step's pairs once more, without gradients."""
    usual = planned()["epoch"]
    requested = [
        planned(*words)["epoch"]["operations"] - usual["operations"]
        for words in (("--use-weighting",), ("--sync-ref-model",), ("--loss-type", "aot"))
    ]
    assert requested[0] == requested[1] == requested[2] > 0
    both = planned("--use-weighting", "--sync-ref-model")["epoch"]["operations"]
    assert both - usual["operations"] == 2 * requested[0]
    free = planned("--loss-type", "simpo")["epoch"]
    assert free["operations"] == usual["operations"]
    assert usual["reference_operations"] > free["reference_operations"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--memory", "lots"), "`memory` must be like 16GB, got `lots`"),
        (("--model", "elsewhere/"), "elsewhere/"),
        (("--bits", "4", "--group-size", "48"), "`group_size` must be one of 32, 64, 128"),
    ],
)
def test_errors_are_printed_in_one_line(words, message):
    result = plan(*words)
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1


def test_settings_of_the_run_folder_are_not_flags_of_plan():
    assert plan("--output", "run").exit_code == 2
    assert plan("--save-steps", "3").exit_code == 2


def test_a_missing_model_names_the_command():
    result = CliRunner().invoke(cli, ["plan", "pairs.jsonl"], prog_name="mlx-dpo")
    assert "Try 'mlx-dpo plan --help' for help.\n\nError: missing --model" in result.output


def test_an_empty_model_equals_a_loaded_one(tmp_path):
    """But for the numbers: the same shapes, types and bytes, packed ones unpacked on the CPU."""
    make_checkpoint(tmp_path / "loaded", tied=True)
    for changes in ({}, {"bits": 4, "group_size": 32}, {"dtype": "float16"}):
        loaded = load_model(str(tmp_path / "loaded"), **changes)
        drawn = load_empty_model(str(tmp_path / "loaded"), **changes)
        assert parameter_bytes(drawn.model) == parameter_bytes(loaded.model)
        assert drawn.vocab_size == loaded.vocab_size
        assert type(drawn.model) is type(loaded.model)
        assert trainable_parameters(drawn.model) == 0


def test_from_the_hub_no_weights_are_fetched(tmp_path, monkeypatch):
    requested = []

    def snapshot_download(repo, *, revision, allow_patterns):
        requested.extend(allow_patterns)
        return str(tmp_path / "base")

    monkeypatch.setattr("mlx_dpo.models.download.snapshot_download", snapshot_download)
    assert planned("--model", "somebody/model")["model"] == "somebody/model"
    assert {"*.json", "*.jinja"} <= set(requested)
    assert not [pattern for pattern in requested if "safetensors" in pattern]


def test_twice_the_pairs_take_twice_the_work_and_more_time(tmp_path):
    rows = (tmp_path / "pairs.jsonl").read_text()
    once = planned("--valid-fraction", "0")["epoch"]
    others = rows.replace('"prompt": "', '"prompt": "@')
    (tmp_path / "pairs.jsonl").write_text(rows + others)
    twice = planned("--valid-fraction", "0")["epoch"]
    assert twice["operations"] == pytest.approx(2 * once["operations"], rel=0.05)
    assert twice["reference_operations"] == pytest.approx(
        2 * once["reference_operations"], rel=0.05
    )
    assert min(once["seconds"], once["reference_seconds"]) > 0


def test_a_plan_for_several_ranks():
    settings = ("--batch-size", "4", "--micro-batch-size", "1", "--valid-fraction", "0")
    assert planned(*settings)["ranks"] is None
    one, two = planned(*settings, "--ranks", "1"), planned(*settings, "--ranks", "2")["ranks"]
    assert one["ranks"] is None
    assert (two["ranks"], two["passes"], two["rounds"], two["idle"]) == (2, 4, 2, 0)
    trained = one["memory"]["adapters"] // 5  # weights, two gradients and AdamW's two averages
    assert two["sent"] == 2 * trained
    assert two["memory"] == pytest.approx(one["memory"]["training"] + 4 * trained, rel=0.2)
    assert 1 < two["bound"] <= 2
    assert two["links"][0]["name"] == "Thunderbolt"
    text = plan(*settings, "--ranks", "2").output
    assert "ranks         2, each on a machine of its own; 4 passes per step, in 2 rounds" in text
    assert "1 Gbit/s Ethernet: " in text
    assert plan("--ranks", "0").exit_code == 2


@pytest.mark.slow
def test_a_model_larger_than_a_machine_is_planned_with_a_part_of_its_blocks():
    """Four ranks hold a quarter of six blocks each, and a whole one at a time."""
    settings = ("--lora-r", "1", "--micro-batch-size", "1", "--recompute")
    one = planned(*settings)
    ranks = planned(*settings, "--ranks", "4")["ranks"]
    block = (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) * 4
    absent = 6 * block - 6 * block // 4 - block
    assert ranks["memory"] == ranks["memory_whole"]
    # Metal may use two thirds of what `--memory` says, in GiB.
    size = f"{(ranks['memory'] - absent / 2) * 3 / 2 / 2**30:.6f}GB"
    tight = planned(*settings, "--ranks", "4", "--memory", size)
    found = tight["ranks"]
    assert (found["shard_base"], found["fits"]) == (True, True)
    # Measured peaks of two plans: a loaded machine frees some activations later.
    assert found["memory_whole"] - found["memory"] == pytest.approx(absent, rel=0.2)
    assert tight["memory"]["weights"] == one["memory"]["weights"] - absent
    assert found["sent"] > ranks["sent"]
    assert (
        "with --shard-base; without it" in plan(*settings, "--ranks", "4", "--memory", size).output
    )
