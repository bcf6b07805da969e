import json

import mlx_lm
import pytest
from click.testing import CliRunner

from mlx_dpo.chat.session import ChatSession
from mlx_dpo.cli import cli
from mlx_dpo.config.sampling import Sampling
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("generate")))


@pytest.fixture(scope="module")
def expected(model):
    """What the model says to a prompt, computed without the command line."""

    def answer(prompt, *, raw=False, **settings):
        policy, tokenizer = mlx_lm.load(model)
        chat = ChatSession(policy, tokenizer, Sampling(max_tokens=8, **settings), raw=raw)
        return "".join(piece.text for piece in chat.reply(prompt))

    return answer


def run(model, *arguments, stdin=None):
    return CliRunner().invoke(
        cli, ["generate", "--model", model, "--max-tokens", "8", *arguments], input=stdin
    )


def test_stdout_has_the_answer_and_nothing_else(model, expected):
    result = run(model, "Where is the cat?")
    assert result.exit_code == 0
    assert result.stdout_bytes == f"{expected('Where is the cat?')}\n".encode()
    assert "The answer was cut after 8 tokens (--max-tokens)." in result.stderr.splitlines()


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_a_prompt_from_stdin_loses_only_its_last_newline(model, expected, arguments):
    result = run(model, *arguments, stdin=" the cat\n\n")
    assert result.stdout == expected(" the cat\n") + "\n"
    assert expected(" the cat\n") != expected(" the cat")


def test_raw_text_is_continued_without_the_template(model, expected):
    assert run(model, "--raw", "The cat").stdout == expected("The cat", raw=True) + "\n"
    assert expected("The cat", raw=True) != expected("The cat")


def test_json_tells_everything_that_made_the_answer(model, expected):
    result = run(model, "--json", "--temperature", "1", "--seed", "5", "the hat")
    answer = json.loads(result.stdout)
    assert answer.pop("tokens_per_second") > 0
    assert answer == {
        "prompt": "the hat",
        "completion": expected("the hat", temperature=1.0, seed=5),
        "tokens": 8,
        "finish_reason": "length",
        "settings": {
            "model": model,
            "run": None,
            "adapter": None,
            "reference": False,
            "raw": False,
            "system": None,
            "thinking": None,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "max_tokens": 8,
            "seed": 5,
            "repetition_penalty": 1.0,
        },
    }


def test_the_seed_that_json_tells_repeats_an_unseeded_answer(model):
    first = json.loads(run(model, "--json", "--temperature", "1", "the hat").stdout)
    seed = str(first["settings"]["seed"])
    again = json.loads(run(model, "--json", "--temperature", "1", "--seed", seed, "the hat").stdout)
    assert again["completion"] == first["completion"]


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["  "], None, "prompt: it is empty; give it as an argument or on stdin"),
        ([], "\n", "prompt: it is empty; give it as an argument or on stdin"),
        ([], b"\xff", "stdin: not UTF-8 (at byte 0); convert the text"),
        (["\udcff"], None, "prompt: it is not UTF-8; convert the text"),
        (
            ["--raw", "--system", "x", "hi"],
            None,
            "`system` has no effect with --raw, which uses no chat template",
        ),
        (
            ["--top-p", "0.5", "hi"],
            None,
            "`top_p` has no effect with `temperature` 0 (greedy decoding); "
            "set a temperature above 0",
        ),
        (["--temperature", "-1", "hi"], None, "`temperature` must be at least 0, got -1.0"),
    ],
)
def test_invalid_arguments_give_a_one_line_error_before_a_model_loads(arguments, stdin, message):
    result = run("no/such-model", *arguments, stdin=stdin)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thinking", "hi"], "`thinking` has no effect; the model's chat template has no"),
        (["--base", "hi"], "`--base` has no effect without a run or an --adapter"),
        (["word " * 600], "tokens leave no room for an answer (the context is 512 tokens)"),
    ],
)
def test_what_a_model_cannot_do_gives_a_one_line_error(model, arguments, message):
    result = run(model, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr.splitlines()[-1]


def test_a_prompt_without_a_run_is_answered_with_both_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["generate", "Why is it?"], input="")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "Error: `Why is it?` is not a run folder; for a prompt name a run (mlx-dpo generate RUN "
        "'Why is it?') or a model (mlx-dpo generate --model MODEL 'Why is it?')"
    )


def test_words_without_quotation_marks_are_not_taken_for_a_prompt(model):
    result = run(model, "Where", "is", "it?")
    assert result.exit_code == 2
    assert "put the prompt in quotation marks" in result.stderr


def train(folder, model, *flags):
    """A run folder whose adapter has changed what the model says."""
    pairs = [{"prompt": f"q{n}", "chosen": "the hat", "rejected": "no"} for n in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = ["train", str(folder / "pairs.jsonl"), "--model", model]
    command += ["--output", str(folder / "run"), "--learning-rate", "0.05", "--batch-size", "1"]
    result = CliRunner().invoke(cli, [*command, *flags])
    assert result.exit_code == 0, result.output
    return str(folder / "run")


def ask(run, *flags):
    result = CliRunner().invoke(cli, ["generate", run, "--max-tokens", "8", *flags, "q1"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_run_speaks_with_its_adapter_and_its_reference_without(model, expected, tmp_path):
    run = train(tmp_path, model)
    assert ask(run, "--base") == expected("q1") + "\n"
    assert ask(run) != ask(run, "--base")


def test_a_run_trained_on_plain_text_gets_plain_text_prompts(model, expected, tmp_path):
    run = train(tmp_path, model, "--chat-template", "text")
    assert ask(run, "--base") == expected("q1", raw=True) + "\n"
    assert json.loads(ask(run, "--json"))["settings"]["raw"] is True
