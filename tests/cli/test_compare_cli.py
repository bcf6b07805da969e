"""`mlx-dpo compare`: answers and log-ratios equal those computed with the models loaded apart."""

import json
import re
from dataclasses import replace
from html import unescape

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dpo import DPOConfig, DPOTrainer
from mlx_dpo.chat.session import ChatSession
from mlx_dpo.cli import cli
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.evaluation.compare import compare_runs
from mlx_dpo.saved_runs.open import open_switchable
from tests.checkpoints import END, make_checkpoint
from tests.cli.terminal import TerminalSession

GREEDY = Sampling(max_tokens=8)


def trained(folder, **entries):
    """Train two steps with a learning rate that changes the answers."""
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}, friend.", "rejected": f"{i * 7} no"}
        for i in range(12)
    ]
    for name, part in (("train", rows[:8]), ("valid", rows[8:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)
    config = DPOConfig.from_dict(
        {"model": str(make_checkpoint(folder / "base", **entries)), "pairs": str(folder),
         "output": str(folder / "run"), "max_steps": 2, "batch_size": 4, "learning_rate": 1e-2,
         "warmup_ratio": 0.0}
    )  # fmt: skip
    train(config)
    return config


def train(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_DPO_CACHE", config.output + "-cache")
        with DPOTrainer(config) as trainer:
            trainer.prepare()
            for _ in trainer.steps():
                pass


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """A run whose model has many end tokens, so that its answers end."""
    stops = [END, *range(100, 190)]
    return trained(tmp_path_factory.mktemp("ending"), eos_token_id=stops).output


@pytest.fixture(scope="module")
def run(config):
    return config.output


@pytest.fixture(scope="module")
def comparison(run):
    return compare_runs([run], None, GREEDY)


def call(*arguments):
    return CliRunner().invoke(cli, ["compare", *arguments, "--max-tokens", "8"])


def test_each_model_answers_the_held_out_prompts(run, comparison):
    questions = [prompt.messages[-1]["content"] for prompt in comparison.prompts]
    assert questions == [f"What is {i}?" for i in range(8, 12)]
    opened = open_switchable(run)
    for policy in comparison.policies:
        opened.switch.activate(policy.name)
        for question, answer in zip(questions, policy.answers, strict=True):
            chat = ChatSession(opened.base.model, opened.base.tokenizer, GREEDY)
            reply = "".join(piece.text for piece in chat.reply(question))
            assert answer.text == reply
    assert [policy.name for policy in comparison.policies] == ["base", "aligned"]


@pytest.mark.parametrize("ends", [False, True])
def test_log_ratios_equal_log_probs_of_aligned_minus_base(run, ending, comparison, ends):
    """Expected from forward passes over all tokens of the two models, loaded separately."""
    folder = ending if ends else run
    comparison = compare_runs([ending], None, GREEDY) if ends else comparison
    both = {state: open_switchable(folder, wanted=(state,)).base for state in ("aligned", "base")}
    template = both["base"].tokenizer.apply_chat_template
    ended = []
    for policy in comparison.policies:
        for prompt, answer in zip(comparison.prompts, policy.answers, strict=True):
            before = template(prompt.messages, add_generation_prompt=True)
            row = [*before, *answer.tokens]
            ended.append(answer.end is not None)
            if ended[-1]:
                row.append(both[policy.name].model(mx.array([row]))[0, -1].argmax().item())
            sums = {state: sum_logps(base.model, row, len(before)) for state, base in both.items()}
            assert answer.log_ratio == pytest.approx(sums["aligned"] - sums["base"], abs=1e-4)
    assert any(ended) is ends


def sum_logps(model, row, start):
    """Return log p of all tokens from `start` on."""
    logits = model(mx.array([row[:-1]]))[0]
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return sum(logps[at - 1, row[at]].item() for at in range(start, len(row)))


def test_each_model_prefers_its_own_answers(comparison):
    base, aligned = (policy.answers for policy in comparison.policies)
    assert sum(a.log_ratio for a in aligned) > 0 > sum(a.log_ratio for a in base)


def test_several_runs_are_compared_each_with_its_own_base(config, run):
    other = replace(config, output=run + "-other", learning_rate=3e-2)
    train(other)
    both = compare_runs([run, other.output], None, GREEDY, limit=2)
    assert [policy.name for policy in both.policies] == [run, other.output]
    assert both.notes[0] == "the first 2 of 4 prompts"
    for name, policy in zip((run, other.output), both.policies, strict=True):
        alone = compare_runs([name], None, GREEDY, limit=2).policies[1]
        assert policy.answers == alone.answers


def test_through_a_pipe_the_output_is_plain_text(run, comparison):
    result = call(run)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    for policy in comparison.policies:
        for answer in policy.answers:
            assert f"{policy.name} (log-ratio {answer.log_ratio:+.2f} nats" in result.stdout
    assert re.search(r"tokens per answer +8\.0 +8\.0", result.stdout)
    assert "shaded on a terminal and on the page of --html" in result.stderr


def test_prompts_may_come_from_a_file_and_be_limited(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Why?\nWhat then?\nAnd now?\n")
    result = call(run, str(file), "--limit", "2")
    assert [line for line in result.stdout.splitlines() if line.startswith("user:")] == [
        "user: Why?", "user: What then?"]  # fmt: skip
    assert "the first 2 of 3 prompts" in result.stderr


def test_the_page_contains_every_answer_completely(run, comparison, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("an earlier page")
    assert call(run, "--html", str(page)).exit_code == 0
    cells = re.findall(r"<figure>.*?<p>(.*?)</p></figure>", page.read_text(), re.DOTALL)
    texts = [unescape(re.sub("<[^>]+>", "", cell)).removesuffix("∎") for cell in cells]
    wanted = [answer.text for pair in zip(*(c.answers for c in comparison.policies), strict=True)
              for answer in pair]  # fmt: skip
    assert [text.replace("\r", "\n") for text in texts] == [w.replace("\r", "\n") for w in wanted]
    assert list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize(
    ("columns", "env", "in_columns", "colored"),
    [(100, {}, True, True), (50, {}, False, True), (100, {"NO_COLOR": "1"}, True, False)],
)
def test_a_terminal_shows_answers_in_columns_and_shaded(
    run, columns, env, in_columns, colored, monkeypatch
):
    monkeypatch.delenv("NO_COLOR", raising=False)  # as the gate sets it
    env = {"TERM": "xterm-256color", "COLUMNS": str(columns), **env}
    session = TerminalSession("compare", run, "--limit", "1", "--max-tokens", "8", **env)
    try:
        output = session.until("log-ratio, nats.+\n")
        assert session.exit_code() == 0
    finally:
        session.close()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert bool(re.search(r"base \(.+ nats.*\).+aligned \(.+ nats", plain)) is in_columns
    assert ("\x1b[38;5;" in output or "48;" in output) is colored
    legend = " ".join(plain.split())
    assert "blue is more likely under the aligned model" in legend
    assert "−0.5 to −0.1 +0.1 to +0.5 +0.5 to +2 +2 or more nats" in legend
    assert "∎ is the stop token" in legend


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: not a run folder (no such folder); train one with `mlx-dpo train`"),
        (["{run}", "--html", "page.txt"], "page.txt: `--html` writes a page; give a name that"),
        (["{run}", "nowhere.txt"], "nowhere.txt: no such file"),
        (["{run}", "--temperature", "0", "--top-k", "3"], "`top_k` has no effect"),
    ],
)
def test_invalid_arguments_give_a_one_line_error(run, arguments, message):
    result = call(*(word.format(run=run) for word in arguments))
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr.splitlines()[-1]


def test_a_prompt_that_fills_the_context_is_rejected_with_its_location(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Why?\n" + "word " * 600 + "\n")
    result = call(run, str(file))
    assert f"{file}:2: " in result.stderr.splitlines()[-1]
    assert (
        "leave no room for an answer (the context is 512 tokens)" in result.stderr.splitlines()[-1]
    )
