import json
import re
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner

from mlx_dpo import DPOConfig
from mlx_dpo.adapters.files import content_digest, load_adapter
from mlx_dpo.chat.session import ChatSession
from mlx_dpo.cli import cli
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.runs.inputs import read_inputs
from tests.checkpoints import END, make_adapter, make_checkpoint
from tests.cli.terminal import Session

GREEDY = ("--temperature", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model whose likeliest token is never the one that ends an answer."""
    folder = make_checkpoint(tmp_path_factory.mktemp("endless"), max_position_embeddings=10**6)
    weights = mx.load(str(folder / "model.safetensors"))
    weights["lm_head.weight"][END] = 0.0
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    return str(make_adapter(tmp_path_factory.mktemp("adapter"), model))


def answers(model, questions, tokens=6, adapter=None):
    """What a session says, computed without the command line."""
    policy, tokenizer = mlx_lm.load(model)
    if adapter is not None:
        load_adapter(policy, Path(adapter))
    chat = ChatSession(policy, tokenizer, Sampling(max_tokens=tokens))
    return ["".join(piece.text for piece in chat.reply(question)) for question in questions]


def pipe(model, stdin, *arguments):
    flags = ["--model", model, "--max-tokens", "6", *GREEDY, *arguments]
    return CliRunner().invoke(cli, ["chat", *flags], input=stdin)


def test_through_a_pipe_each_line_gets_its_answer_within_one_conversation(model):
    questions = ["Where is the cat?", "and the hat", "no"]
    result = pipe(model, "\n".join(questions))
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{answer}\n" for answer in answers(model, questions))
    assert answers(model, questions)[1:] != [answers(model, [q])[0] for q in questions[1:]]


def test_commands_work_through_a_pipe_and_are_not_sent_to_the_model(model):
    result = pipe(model, "cat\n/reset\n/help\n/etc\n\nhat\n/exit\nnever read\n")
    said = answers(model, ["cat"]) + answers(model, ["/etc", "hat"])
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{answer}\n" for answer in said)
    notes = [line for line in result.stderr.splitlines() if "was cut" not in line]
    assert [n for n in notes if n.startswith(("Started", "Unknown", "stdin"))] == [
        "Started over.",
        "stdin:5: the line is empty; no answer",
    ]
    assert any(note.split() == ["/reset", "start", "over"] for note in notes)


def test_a_line_that_is_not_text_ends_a_pipe_with_one_line(model):
    result = pipe(model, b"cat\n\xff\n")
    assert result.exit_code == 1
    assert result.stdout == answers(model, ["cat"])[0] + "\n"
    assert result.stderr.splitlines()[-1] == (
        "Error: stdin:2: the line is not UTF-8; convert the text"
    )


def test_a_full_context_ends_a_pipe_with_one_line(model):
    result = pipe(model, "word " * 600 + "\nnever asked\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "leave no room for an answer" in result.stderr.splitlines()[-1]


def test_a_model_without_a_template_says_that_it_continues_text(model, tmp_path):
    folder = make_checkpoint(tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    result = pipe(str(folder), "The cat\n")
    assert "continued as plain text" in result.stderr
    chat = ChatSession(*mlx_lm.load(model), Sampling(max_tokens=6), raw=True)
    assert result.stdout == "".join(p.text for p in chat.reply("The cat")) + "\n"


def test_a_run_or_a_model_must_be_named():
    result = CliRunner().invoke(cli, ["chat"])
    assert result.exit_code == 1
    assert result.stderr == "Error: name a run folder or a --model, and only one of them\n"


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = []

    def open_session(*arguments, **env):
        env = {"MLX_DPO_CACHE": str(tmp_path / "cache")} | env
        opened.append(Session("chat", *arguments, **env))
        return opened[-1]

    yield open_session
    for each in opened:
        each.close()


def test_a_session_at_a_terminal(endless, session):
    """An answer streams, Ctrl-C stops it, the next is answered, Ctrl-D leaves."""
    chat = session("--model", endless, "--max-tokens", "100000", *GREEDY)
    chat.until("Ctrl-D leaves\\.\n> ")
    chat.type("Where is the cat?\n")
    chat.until("cat\\?\n(.|\n){40}")  # the answer has begun
    chat.resize(40)
    chat.until("(.|\n){40}")  # and goes on
    chat.type("\x03")
    chat.until("Stopped\\.\n> ")
    chat.type("/reset\n")
    chat.until("Started over\\.\n> ")
    chat.resize(120)
    chat.type("no\n")
    chat.until("no\n(.|\n){40}")
    chat.type("\x03")
    chat.until("Stopped\\.\n> ")
    chat.type("\x04")
    chat.until("Goodbye\n")
    assert chat.exit_code() == 0
    written = chat.seen.replace("^C", "").replace("^D", "")
    assert not re.search(r"[\x00-\x07\x0b-\x0c\x0e-\x1f\x7f-\x9f]", written)


def test_ctrl_c_at_the_prompt_stays_once_and_leaves_twice(model, session):
    chat = session("--model", model, "--max-tokens", "4", *GREEDY)
    chat.until("> ")
    chat.say("hi", r"\(4 tokens, \d+ a second; context: \d+ of 512\)\n> ")
    for _ in range(2):
        time.sleep(0.5)  # Python draws the prompt just before it listens for signals
        chat.type("\x03")
        chat.until("Ctrl-C once more leaves.+\n> ")
        chat.say("/undo", "Taken back: hi\n> |nothing has been said yet.+\n> ")
    for pattern in ("once more leaves.+\n> ", "Goodbye\n"):
        time.sleep(0.5)
        chat.type("\x03")
        chat.until(pattern)
    assert chat.exit_code() == 0


def test_messages_of_several_lines_are_one_question_each(model, session):
    chat = session("--model", model, "--max-tokens", "4", *GREEDY)
    chat.until("leaves\\.\n> ")
    for line, pattern in (
        ("the cat \\", "\\.\\.\\. "),
        ("and the hat", r"tokens.+\n> "),
        ('"""', "\\.\\.\\. "),
        ("/help is no command here", "\\.\\.\\. "),
        ('no"""', r"tokens.+\n> "),
        ('/edit """', "\\.\\.\\. "),
        ("One", "\\.\\.\\. "),
        ('Two"""', "Written to .+\n> "),
        ("/save said.json", "Saved as said.json\\.\n> "),
    ):
        chat.say(line, pattern)
    said = [m["content"] for m in json.loads(Path("said.json").read_text())["messages"]]
    assert said[::2] == ["the cat \nand the hat", "/help is no command here\nno"]
    assert said[3] == "One\nTwo"


def test_what_was_typed_in_an_earlier_chat_can_be_called_back(model, session):
    first = session("--model", model, "--max-tokens", "4", *GREEDY)
    first.until("leaves\\.\n> ")
    first.say("/help")
    first.say("/exit", "Goodbye\n")
    assert first.exit_code() == 0
    assert (Path("cache") / "chat-history").stat().st_mode & 0o777 == 0o600
    second = session("--model", model, *GREEDY)
    second.until("leaves\\.\n> ")
    second.type("\x10")  # Ctrl-P: the line before
    second.until("/exit")


def rows(name):
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return [{"role": "assistant", "content": text}]


def test_answers_are_compared_judged_and_mended_at_a_terminal(model, adapter, session):
    """The files hold what was picked, and the conversation goes on with it."""
    [base] = answers(model, ["cat"])
    [aligned] = answers(model, ["cat"], adapter=adapter)
    chat = session("--model", model, "--adapter", adapter, "--max-tokens", "6", *GREEDY)
    header = chat.until("leaves\\.\n> ")
    assert "/edit and /compare write pairs to chat-pairs.jsonl" in header
    for line, pattern in (
        ("cat", r"of 512\)\n> "),
        ("/good", "Written to chat-judged.jsonl: good\\.\n> "),
        ("/compare", r"The base model says:\n(.|\n)+neither\)\? "),
        ("2", "Written to chat-pairs.jsonl\\.\n> "),
        ("/bad", "bad\\.\n> "),
        ("/base", "switches back\\.\nbase> "),
        ("/aligned", "from here on\\.\n> "),
        ("/edit On the mat.", "Written to chat-pairs.jsonl\\.\n> "),
        ("/edit", "Better: On the mat\\."),
        (" There.", "Written to chat-pairs.jsonl\\.\n> "),
        ("/nonsense", "Unknown command `/nonsense`; /help lists them\n> "),
        ("/good now", "Error: `/good` takes nothing behind it.+\n> "),
        ("/quit", "Goodbye\n"),
    ):
        chat.say(line, pattern)
    judged, pairs = rows("chat-judged.jsonl"), rows("chat-pairs.jsonl")
    assert [(r["completion"], r["label"]) for r in judged] == [
        (assistant(aligned), True), (assistant(base), False)]  # fmt: skip
    assert [(r["chosen"], r["rejected"]) for r in pairs] == [
        (assistant(base), assistant(aligned)),
        (assistant("On the mat."), assistant(base)),
        (assistant("On the mat. There."), assistant("On the mat.")),
    ]
    assert all(row["prompt"] == [user("cat")] for row in judged + pairs)
    told = [(r["provenance"]["chosen"], r["provenance"]["rejected"]) for r in pairs]
    sides = [[facts.get("side", facts.get("author")) for facts in pair] for pair in told]
    assert sides == [["base", "aligned"], ["person", "base"], ["person", "person"]]
    assert {r["provenance"]["judge"] for r in judged + pairs} == {"person"}
    assert judged[0]["provenance"]["adapter_digest"] == content_digest(Path(adapter))
    assert "adapter_digest" not in judged[1]["provenance"]


def test_train_reads_what_a_chat_wrote(model, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = "cat\n/good\n/edit On the mat.\n/bad\nhat\n/bad\n/edit No.\n"
    assert pipe(model, script, "--adapter", adapter).exit_code == 0
    for rules, file, count in (
        ({"loss_type": "kto"}, "chat-judged.jsonl", 3),
        ({}, "chat-pairs.jsonl", 2),
    ):
        flags = {"model": model, "pairs": file, "output": "run", "valid_fraction": 0.0}
        config = DPOConfig.from_dict(flags | rules)
        assert len(read_inputs(config).train) == count


def test_a_pipe_compares_without_asking_and_says_whose_answer_is_whose(model, adapter, tmp_path):
    said = answers(model, ["cat"], adapter=adapter) + answers(model, ["cat"])
    result = pipe(model, "/compare cat\n", "--adapter", adapter)
    assert result.stdout == "".join(f"{answer}\n" for answer in said)
    assert "The base model says:" in result.stderr.splitlines()


def test_the_reference_answers_first_where_it_is_asked_for(model, adapter):
    result = pipe(model, "cat\n/aligned\n/reset\ncat\n", "--adapter", adapter, "--reference")
    said = answers(model, ["cat"]) + answers(model, ["cat"], adapter=adapter)
    assert result.stdout == "".join(f"{answer}\n" for answer in said)


def test_all_of_stdin_can_be_one_question(model):
    text = "the cat\n/help\nand the hat\n"
    assert pipe(model, text, "--whole").stdout == answers(model, [text[:-1]])[0] + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/base", "there is nothing to switch to; name a run, or a --model with an --adapter"),
        ("/undo", "nothing has been said yet; ask something first"),
        ("/retry", "with `temperature` 0 the answer is always the same; set one above 0"),
        ("/good", "nothing has been said yet; ask something first"),
        ("hi\n/edit", "`/edit` needs the better answer behind it"),
    ],
)
def test_a_command_that_cannot_be_obeyed_ends_a_pipe_with_one_line(model, line, message):
    result = pipe(model, line + "\nnever asked\n")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"Error: {message}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", "513"], "the model places no more than 512 tokens; use --context 512"),
        (["--hide-thinking"], "`hide_thinking` has no effect; the model knows no thinking"),
        (["--pairs", "rows.json"], "rows.json: rows are written one a line"),
    ],
)
def test_a_flag_without_effect_is_refused_with_one_line(model, flags, message):
    result = pipe(model, "hi\n", *flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr.splitlines()[-1]


def test_a_conversation_is_not_saved_over_another_file(model, tmp_path):
    path = tmp_path / "there.json"
    path.write_text("mine")
    result = pipe(model, f"hi\n/save {path}\n")
    assert result.stderr.splitlines()[-1] == f"Error: {path}: is there already; choose another name"
    assert path.read_text() == "mine"
