"""Benchmark tasks: the numbers of `mlx_lm.evaluate` on the fused model, from base and adapter."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_dpo import DPOConfig, DPOTrainer, fuse_run
from mlx_dpo.cli import cli
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.export.options import FuseOptions
from mlx_dpo.generation.batch import generate_tokens
from mlx_dpo.models.load import load_model
from mlx_dpo.paths import tiny_chat
from mlx_dpo.saved_runs.open import open_switchable
from tests.checkpoints import add_bos_token, make_checkpoint, make_gpt2_checkpoint
from tests.evaluation.measurements.local_tasks import NAMES, ROWS, write_tasks
from tests.trained_run import train

pytest.importorskip("lm_eval", reason="lm-eval is not installed (`mlx-dpo[tasks]`)")


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """`datasets` prepares the rows of the tasks in a cache of these tests."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a folder with a run on a tiny checkpoint, the fused model, and tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    make_checkpoint(folder / "base")
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}, friend.", "rejected": f"{i * 7} no"}
        for i in range(12)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(folder)
    fuse_run(str(folder / "run"), folder / "fused", FuseOptions(dtype="float32", force=True))
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """Return the same with the model that the package contains."""
    folder = tmp_path_factory.mktemp("chat")
    lines = (tiny_chat() / "preferences/train.jsonl").read_text().splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(lines[:40]))
    config = DPOConfig.from_dict(
        {
            "model": str(tiny_chat()),
            "pairs": [str(folder / "pairs.jsonl")],
            "output": str(folder / "run"),
            "valid_fraction": 0.1,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "max_steps": 6,
            "samples": 0,
        }
    )
    with DPOTrainer(config) as trainer:
        trainer.prepare()
        list(trainer.steps())
    fuse_run(str(folder / "run"), folder / "fused", FuseOptions(dtype="float32", force=True))
    write_tasks(folder / "tasks")
    return folder


def run(folder, *words):
    tasks = ["--tasks-folder", str(folder / "tasks")]
    return CliRunner().invoke(cli, ["eval", str(folder / "run"), *tasks, *words])


def measured(folder, *words):
    result = run(folder, *words, "--json", "--no-save")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["tasks"]


def mlx_lm_results(model, folder, *, as_chat, num_fewshot=None):
    """Return the metrics of `mlx_lm.evaluate`, called as its `main` does."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from mlx_lm.evaluate import MLXLM

    results = simple_evaluate(
        model=MLXLM(str(model), use_chat_template=as_chat),
        tasks=list(NAMES),
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        fewshot_as_multiturn=False,
        apply_chat_template=as_chat,
        num_fewshot=num_fewshot,
        random_seed=123,
        numpy_random_seed=123,
        torch_random_seed=123,
        fewshot_random_seed=123,
        bootstrap_iters=1000,
    )
    return {
        task: {key.removesuffix(",none"): v for key, v in found.items() if "," in key}
        for task, found in results["results"].items()
    }


def assert_equal_metrics(ours, theirs):
    assert ours.keys() == theirs.keys() == set(NAMES)
    for task, found in theirs.items():
        numbers = {key: value for key, value in found.items() if isinstance(value, float)}
        assert ours[task] == pytest.approx(numbers, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("as_chat", [False, True])
def test_metrics_are_those_of_mlx_lm_on_the_fused_model(tiny, as_chat):
    flag = "--apply-chat-template" if as_chat else "--no-apply-chat-template"
    ours = measured(tiny, "--tasks", ",".join(NAMES), flag, "--num-fewshot", "2")
    aligned = mlx_lm_results(tiny / "fused", tiny, as_chat=as_chat, num_fewshot=2)
    assert_equal_metrics(ours["aligned"], aligned)
    if not as_chat:
        base = mlx_lm_results(tiny / "base", tiny, as_chat=False, num_fewshot=2)
        assert_equal_metrics(ours["base"], base)
    assert ours["base"]["local_rolling"] != ours["aligned"]["local_rolling"]
    facts = ours["tasks"]["local_choice"]
    assert (facts["num_fewshot"], facts["documents"]) == (2, len(ROWS))


def test_metrics_of_the_shipped_model_are_those_of_mlx_lm(chat):
    ours = measured(chat, "--tasks", ",".join(NAMES))  # in the chat template, as in training
    assert ours["settings"]["apply_chat_template"] is True
    assert_equal_metrics(ours["aligned"], mlx_lm_results(chat / "fused", chat, as_chat=True))


def lm_eval_model(base, **options):
    from mlx_dpo.evaluation.measurements.lm_eval_model import LmEvalModel

    settings = {"as_chat": False, "thinking": False, "max_tokens": None, "label": "base"}
    return LmEvalModel(base, **settings | options)


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.mark.parametrize("as_chat", [False, True])
def test_scores_and_answers_are_those_of_mlx_lm(tiny, as_chat):
    """Raw values per request: metrics such as accuracy hide small differences."""
    from mlx_lm.evaluate import MLXLM

    theirs = MLXLM(str(tiny / "fused"), use_chat_template=as_chat)
    model = open_switchable(str(tiny / "run"))
    ours = lm_eval_model(model.base, as_chat=as_chat)
    scored = requests(
        *[(row["question"], choice) for row in ROWS for choice in row["choices"]],
        ("The cat sat on the", " mat"),
        ("Where", "?"),
    )
    with model.switch.activated("aligned"):
        scores = ours.loglikelihood(scored)
        greedy = generate(ours, "Where is the cat?", max_gen_toks=4)
        rolling = requests(*[(row["question"],) for row in ROWS], ("The cat",))
        sums = ours.loglikelihood_rolling(rolling)
        prompts = requests(
            *[(row["question"], {"until": ["\n", "the"], "max_gen_toks": 30}) for row in ROWS],
            ("The cat", {"until": ["zebra"], "max_gen_toks": 400}),  # more than one round
        )
        answers = ours.generate_until(prompts)
        [(_, is_greedy)] = ours.loglikelihood(requests(("Where is the cat?", greedy)))
    expected = theirs.loglikelihood(scored)
    logps = [logp for logp, _ in scores]
    assert logps == pytest.approx([logp for logp, _ in expected], abs=1e-4)
    assert [flag for _, flag in scores] == [flag for _, flag in expected]
    assert sums == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-3, rel=1e-5)
    assert answers == theirs.generate_until(prompts)
    assert is_greedy


@pytest.mark.parametrize("as_chat", [False, True])
def test_a_token_that_begins_texts_is_written_by_tokenizer_or_template(tmp_path, as_chat):
    from mlx_lm.evaluate import MLXLM

    folder = add_bos_token(make_checkpoint(tmp_path / "base"))
    base = load_model(str(folder))
    assert base.tokenizer.encode("Why?")[0] == base.tokenizer.bos_token_id
    ours, theirs = (
        lm_eval_model(base, as_chat=as_chat),
        MLXLM(str(folder), use_chat_template=as_chat),
    )
    scored = requests(("Where is the cat?", " On the mat."), ("The", " cat"))
    expected = [logp for logp, _ in theirs.loglikelihood(scored)]
    assert [logp for logp, _ in ours.loglikelihood(scored)] == pytest.approx(expected, abs=1e-4)
    texts = requests(("Where is the cat?",), ("The",))
    sums = theirs.loglikelihood_rolling(texts)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(sums, abs=1e-3)
    assert (sums[1] == 0) is as_chat  # without the token, the only one has no context
    prompts = requests(("Where is the cat?", {"until": ["zebra"], "max_gen_toks": 8}))
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


def generate(model, prompt, **settings):
    [answer] = model.generate_until(requests((prompt, settings)))
    return answer


def test_a_score_by_hand(tmp_path):
    """Log-softmax of the logits after each token, in float64."""
    base = load_model(str(make_checkpoint(tmp_path / "base")))
    ours = lm_eval_model(base)
    context, continuation = "Where is the cat?", " On the mat."
    whole = base.tokenizer.encode(context + continuation)
    length = len(base.tokenizer.encode(context))
    logits = np.array(base.model(batch_of(whole))[0], np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = sum(logps[i - 1, whole[i]] for i in range(length, len(whole)))
    [(logp, is_greedy)] = ours.loglikelihood(requests((context, continuation)))
    assert logp == pytest.approx(expected, abs=1e-4)
    assert is_greedy is all(logits[i - 1].argmax() == whole[i] for i in range(length, len(whole)))
    # Without a token that begins texts, an empty context is the end token.
    [(logp, _)] = ours.loglikelihood(requests(("", "The")))
    ids = [base.tokenizer.eos_token_id, *base.tokenizer.encode("The")]
    logits = np.array(base.model(batch_of(ids))[0], np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = sum(logps[i - 1, ids[i]] for i in range(1, len(ids)))
    assert logp == pytest.approx(expected, abs=1e-4)
    assert ours.loglikelihood(requests(("The", ""))) == [(0.0, True)]


def batch_of(ids):
    return mx.array([ids])


def test_texts_stay_within_the_positions_that_a_model_has_learned(tmp_path):
    """Beyond its table of positions MLX reads other memory."""
    base = load_model(str(make_gpt2_checkpoint(tmp_path / "base", positions=32)))
    ours = lm_eval_model(base)
    long = "The cat sat on the mat. " * 10
    ids = base.tokenizer.encode(long)
    end = base.tokenizer.encode(" no")
    [(logp, _)] = ours.loglikelihood(requests((long, " no")))
    kept = [*ids, *end][-33:]
    logits = np.array(base.model(batch_of(kept[:-1]))[0], np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = sum(logps[i - 1, kept[i]] for i in range(33 - len(end), 33))
    assert logp == pytest.approx(expected, abs=1e-4)
    assert ours.loglikelihood(requests(("a", long))) == [(-float("inf"), False)]
    [rolled] = ours.loglikelihood_rolling(requests((long,)))
    assert np.isfinite(rolled) and rolled < 0
    stops, sampling = base.tokenizer.eos_token_ids, Sampling(max_tokens=50)
    [answer] = generate_tokens(base.model, stops, [ids[-16:]], sampling, context=32)
    assert len(answer.tokens) == 16
    # A limit of several rounds ends at the end of the context as well.
    for limit in (50, 600):
        text = generate(ours, long, max_gen_toks=limit)
        assert text == base.tokenizer.decode(answer.tokens)
    assert sorted(ours.warnings.values()) == [1, 3]


def test_an_answer_that_a_text_ends_is_not_generated_to_its_limit(tiny):
    model = load_model(str(tiny / "base"))
    ours = lm_eval_model(model)
    long = generate(ours, "The cat", max_gen_toks=60)
    end = long[len(long) // 4 :][:12]
    assert generate(ours, "The cat", until=end, max_gen_toks=60) == long[: long.index(end)]
    assert generate(ours, "The cat", until=["", end], max_gen_toks=60) == long[: long.index(end)]
    short = lm_eval_model(model, max_tokens=5)  # the user's limit is before the task's
    assert long.startswith(generate(short, "The cat", max_gen_toks=60))
    assert len(generate(short, "The cat", max_gen_toks=60)) < 40
    generate(ours, "The cat", max_gen_toks=2, do_sample=True, temperature=1.0)
    assert list(ours.warnings.values()) == [1]


def test_results_are_printed_and_stored_with_errors_and_differences(tiny):
    result = run(tiny, "--tasks", "local_choice,local_rolling", "--limit", "5")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "Benchmarks: local_choice, local_rolling" in shown
    assert "local_choice acc " in shown and "±" in shown
    assert "with chat template; documents per task: 5, examples per prompt: 0)" in shown
    assert "bootstrapping" not in result.output
    [file] = (tiny / "run/evaluations").iterdir()
    stored = json.loads(file.read_text())
    assert stored["settings"]["limit"] == 5
    assert stored["settings"]["lm-eval"]
    results = stored["results"]
    assert results["tasks"]["local_choice"]["documents"] == 5
    difference = results["difference"]["local_choice"]["acc"]
    metrics = [results[state]["local_choice"]["acc"] for state in ("base", "aligned")]
    assert difference["mean"] == pytest.approx(metrics[1] - metrics[0])
    assert "local_rolling" not in results["difference"]  # a perplexity is no mean


def test_the_code_of_a_task_that_fails_is_one_line(tiny):
    result = run(tiny, "--tasks", "local_broken")
    assert result.exit_code == 1
    assert "lm-eval failed (ZeroDivisionError" in result.stderr.splitlines()[-1]


def test_an_unknown_task_is_answered_with_the_nearest(tiny, monkeypatch):
    """lm-eval's own 14,000 tasks take seconds to list, and are left out here."""
    import lm_eval.tasks

    manager = partial(lm_eval.tasks.TaskManager, include_path=str(tiny / "tasks"))
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda **settings: manager(include_defaults=False)
    )
    result = run(tiny, "--tasks", "local_choise")
    assert result.exit_code == 1
    message = "`tasks` local_choise: no such task; did you mean local_choice or "
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", " ,"], "`--tasks` names no task"),
        (["--tasks", "local_unsafe"], "local_unsafe: runs code that the model writes"),
        (["--tasks", "local_gone"], "local_gone: cannot be loaded (FileNotFoundError"),
        ([], "`--tasks-folder` has no effect without --tasks"),
    ],
)
def test_mistakes_are_one_line(tiny, words, message):
    result = run(tiny, *words)
    assert result.exit_code == 1
    assert message in result.stderr.strip().splitlines()[-1]


def test_a_task_without_examples_keeps_none_and_says_so(tiny):
    figures = measured(tiny, "--tasks", "local_zero", "--num-fewshot", "3")
    assert figures["tasks"]["local_zero"]["num_fewshot"] == 0
    [note] = figures["notes"]
    assert note.startswith("--num-fewshot has no effect on local_zero")


def test_a_group_of_tasks_has_their_mean(tiny):
    figures = measured(tiny, "--tasks", "local_group", "--limit", "4")
    aligned = figures["aligned"]
    members = [aligned[name]["acc"] for name in ("local_choice", "local_zero")]
    assert aligned["local_group"]["acc"] == pytest.approx(sum(members) / 2)
    assert figures["tasks"]["local_choice"]["documents"] == 4
    assert "acc" in figures["difference"]["local_zero"]
    shown = " ".join(run(tiny, "--tasks", "local_group", "--limit", "4").stdout.split())
    assert "local_group acc" in shown and "documents per task: 4," in shown


def test_without_lm_eval_the_command_names_its_installation(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    result = run(tiny, "--tasks", "local_choice")
    assert result.exit_code == 1
    assert "pip install 'mlx-dpo[tasks]'" in result.stderr
