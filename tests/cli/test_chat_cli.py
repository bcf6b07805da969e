import io
import json
import os
import re
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner

from mlx_dpo import DPOConfig
from mlx_dpo.adapters.adapter_files import adapter_digest, load_adapter
from mlx_dpo.chat.session import ChatSession
from mlx_dpo.cli import cli
from mlx_dpo.cli.chat import commands
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.runs.inputs import load_inputs
from tests.checkpoints import END, make_adapter, make_checkpoint
from tests.cli.terminal import TerminalSession

GREEDY = ("--temperature", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that never ends a greedy answer."""
    folder = make_checkpoint(tmp_path_factory.mktemp("endless"), max_position_embeddings=10**6)
    weights = mx.load(str(folder / "model.safetensors"))
    weights["lm_head.weight"][END] = 0.0
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    return str(make_adapter(tmp_path_factory.mktemp("adapter"), model))


def answers(model, questions, tokens=6, adapter=None):
    """The answers of a chat session, computed without the command line."""
    policy, tokenizer = mlx_lm.load(model)
    if adapter is not None:
        load_adapter(policy, Path(adapter))
    chat = ChatSession(policy, tokenizer, Sampling(max_tokens=tokens))
    return ["".join(piece.text for piece in chat.reply(question)) for question in questions]


def pipe(model, stdin, *arguments):
    flags = ["--model", model, "--max-tokens", "6", *GREEDY, *arguments]
    return CliRunner().invoke(cli, ["chat", *flags], input=stdin)


def test_through_a_pipe_each_line_is_a_question_of_its_own(model):
    questions = ["Where is the cat?", "and the hat", "no"]
    result = pipe(model, "\n".join(questions))
    alone = [answers(model, [question])[0] for question in questions]
    assert result.stdout == "".join(f"{answer}\n" for answer in alone)
    assert "Each line of stdin is a question of its own" in result.stderr


def test_through_a_pipe_the_lines_can_be_turns_of_one_conversation(model):
    questions = ["Where is the cat?", "and the hat", "no"]
    result = pipe(model, "\n".join(questions), "--conversation")
    assert "The lines of stdin are turns of one conversation." in result.stderr
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{answer}\n" for answer in answers(model, questions))
    assert answers(model, questions)[1:] != [answers(model, [q])[0] for q in questions[1:]]


def test_commands_work_through_a_pipe_and_are_not_sent_to_the_model(model):
    result = pipe(model, "cat\n/reset\n/help\n/etc\n\nhat\n/exit\nnever read\n")
    expected = [answers(model, [question])[0] for question in ("cat", "/etc", "hat")]
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{answer}\n" for answer in expected)
    notes = [line for line in result.stderr.splitlines() if "was cut" not in line]
    assert [n for n in notes if n.startswith(("Started", "Unknown", "stdin"))] == [
        "Started over.",
        "stdin:5: the line is empty; no answer",
    ]
    assert any(note.split() == ["/reset", "start", "over"] for note in notes)
    assert "/edit writes pairs to chat-pairs.jsonl" in notes
    assert not any(note.startswith(("/base", "/aligned", "/compare")) for note in notes)


def test_help_lists_the_commands_of_two_models_only_with_an_adapter(model, adapter):
    notes = pipe(model, "/help\n", "--adapter", adapter).stderr.splitlines()
    assert [n.split()[0] for n in notes if n.startswith(("/base", "/aligned", "/compare"))] == [
        "/base", "/aligned", "/compare"]  # fmt: skip
    assert "/edit and /compare write pairs to chat-pairs.jsonl" in notes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--whole", "--conversation"), "`--conversation` has no effect together with `--whole`"),
    ],
)
def test_flags_of_a_pipe_without_effect_are_refused(model, flags, message):
    result = pipe(model, "hi\n", *flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr


def test_the_list_of_commands_has_those_of_an_adapter_only_where_there_is_one(model, adapter):
    plain, aligned = (
        pipe(model, "/help\n").stderr,
        pipe(model, "/help\n", "--adapter", adapter).stderr,
    )
    for command in ("/base", "/aligned", "/compare"):
        assert f"\n{command} " in aligned and f"\n{command} " not in plain


def test_a_line_that_is_not_utf_8_ends_a_pipe_with_a_one_line_error(model):
    result = pipe(model, b"cat\n\xff\n")
    assert result.exit_code == 1
    assert result.stdout == answers(model, ["cat"])[0] + "\n"
    assert result.stderr.splitlines()[-1] == (
        "Error: stdin:2: the line is not UTF-8; convert the text"
    )


def test_a_full_context_ends_a_pipe_with_a_one_line_error(model):
    result = pipe(model, "word " * 600 + "\nnever asked\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "leave no room for an answer" in result.stderr.splitlines()[-1]


def test_a_note_says_that_a_model_without_a_template_continues_text(model, tmp_path):
    folder = make_checkpoint(tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    result = pipe(str(folder), "The cat\n")
    assert "continued as plain text" in result.stderr
    chat = ChatSession(*mlx_lm.load(model), Sampling(max_tokens=6), raw=True)
    assert result.stdout == "".join(p.text for p in chat.reply("The cat")) + "\n"


def test_a_run_or_a_model_must_be_named():
    result = CliRunner().invoke(cli, ["chat"])
    assert result.exit_code == 1
    assert result.stderr == "Error: missing RUN (a run folder) or --model\n"


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sessions = []

    def open_session(*arguments, **env):
        env = {"MLX_DPO_CACHE": str(tmp_path / "cache")} | env
        sessions.append(TerminalSession("chat", *arguments, **env))
        return sessions[-1]

    yield open_session
    for each in sessions:
        each.close()


def test_a_session_at_a_terminal(endless, session):
    """An answer streams, Ctrl-C stops it, the next question is answered, Ctrl-D leaves."""
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
    output = chat.output.replace("^C", "").replace("^D", "")
    assert not re.search(r"[\x00-\x07\x0b-\x0c\x0e-\x1f\x7f-\x9f]", output)


def test_ctrl_c_at_the_prompt_leaves_only_if_pressed_twice(model, session):
    chat = session("--model", model, "--max-tokens", "4", *GREEDY)
    chat.until("> ")
    chat.type_line("hi", r"\(4 tokens, \d+ per second; context: \d+ of 512\)\n> ")
    for _ in range(2):
        time.sleep(0.5)  # Python draws the prompt just before it listens for signals
        chat.type("\x03")
        chat.until("Press Ctrl-C once more.+\n> ")
        chat.type_line("/undo", "Removed: hi\n> |there is no answer yet.+\n> ")
    for pattern in ("once more to leave.+\n> ", "Goodbye\n"):
        time.sleep(0.5)
        chat.type("\x03")
        chat.until(pattern)
    assert chat.exit_code() == 0


def test_a_message_of_several_lines_is_one_question(model, session):
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
        ("/save chat.json", "Saved as chat.json\\.\n> "),
    ):
        chat.type_line(line, pattern)
    contents = [m["content"] for m in json.loads(Path("chat.json").read_text())["messages"]]
    assert contents[::2] == ["the cat \nand the hat", "/help is no command here\nno"]
    assert contents[3] == "One\nTwo"


def test_lines_of_an_earlier_chat_are_in_the_history(model, session):
    first = session("--model", model, "--max-tokens", "4", *GREEDY)
    first.until("leaves\\.\n> ")
    first.type_line("/help")
    first.type_line("/exit", "Goodbye\n")
    assert first.exit_code() == 0
    assert (Path("cache") / "chat-history").stat().st_mode & 0o777 == 0o600
    second = session("--model", model, *GREEDY)
    second.until("leaves\\.\n> ")
    second.type("\x10")  # Ctrl-P: the previous line
    second.until("/exit")


def rows(name):
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return [{"role": "assistant", "content": text}]


def test_answers_are_compared_labeled_and_edited_at_a_terminal(model, adapter, session):
    """The files hold the picked answers, and the conversation continues with them."""
    [base] = answers(model, ["cat"])
    [aligned] = answers(model, ["cat"], adapter=adapter)
    chat = session("--model", model, "--adapter", adapter, "--max-tokens", "6", *GREEDY)
    header = chat.until("leaves\\.\naligned> ")
    assert header.count("\n") <= 4  # notes of the model, the two models, context, help
    for line, pattern in (
        ("cat", r"of 512\)\naligned> "),
        ("/good", "Written to chat-judged.jsonl: good\\.\naligned> "),
        ("/compare", r"Answer of the base model:\n(.|\n)+neither\)\? "),
        ("2", "Written to chat-pairs.jsonl\\.\naligned> "),
        ("/bad", "bad\\.\naligned> "),
        ("/base", "switches back\\.\nbase> "),
        ("/aligned", "from here on\\.\naligned> "),
        ("/edit On the mat.", "Written to chat-pairs.jsonl\\.\naligned> "),
        ("/edit", "Better answer: On the mat\\."),
        (" There.", "Written to chat-pairs.jsonl\\.\naligned> "),
        ("/nonsense", "Unknown command `/nonsense`; /help lists them\naligned> "),
        ("/good now", "Error: `/good` takes no text.+\naligned> "),
        ("/quit", "Goodbye\n"),
    ):
        chat.type_line(line, pattern)
    labeled, pairs = rows("chat-judged.jsonl"), rows("chat-pairs.jsonl")
    assert [(r["completion"], r["label"]) for r in labeled] == [
        (assistant(aligned), True), (assistant(base), False)]  # fmt: skip
    assert [(r["chosen"], r["rejected"]) for r in pairs] == [
        (assistant(base), assistant(aligned)),
        (assistant("On the mat."), assistant(base)),
        (assistant("On the mat. There."), assistant("On the mat.")),
    ]
    assert all(row["prompt"] == [user("cat")] for row in labeled + pairs)
    sources = [(r["provenance"]["chosen"], r["provenance"]["rejected"]) for r in pairs]
    authors = [[facts.get("side", facts.get("author")) for facts in pair] for pair in sources]
    assert authors == [["base", "aligned"], ["person", "base"], ["person", "person"]]
    assert {r["provenance"]["judge"] for r in labeled + pairs} == {"person"}
    assert labeled[0]["provenance"]["adapter_digest"] == adapter_digest(Path(adapter))
    assert "adapter_digest" not in labeled[1]["provenance"]


def test_train_reads_the_rows_of_a_chat(model, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = "cat\n/good\n/edit On the mat.\n/bad\nhat\n/bad\n/edit No.\n"
    assert pipe(model, script, "--adapter", adapter).exit_code == 0
    for rules, file, count in (
        ({"loss_type": "kto"}, "chat-judged.jsonl", 3),
        ({}, "chat-pairs.jsonl", 2),
    ):
        flags = {"model": model, "pairs": file, "output": "run", "valid_fraction": 0.0}
        config = DPOConfig.from_dict(flags | rules)
        assert len(load_inputs(config).train) == count


def test_a_second_judgement_of_an_answer_replaces_the_first(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [answer] = answers(model, ["cat"])
    result = pipe(model, f"hat\n/bad\n/reset\ncat\n/good\n/bad\n/edit Meow.\n/edit {answer}\n")
    assert result.exit_code == 0
    notes = result.stderr.splitlines()
    assert [n for n in notes if n.startswith("Written")] == [
        "Written to chat-judged.jsonl: bad.",
        "Written to chat-judged.jsonl: good.",
        "Written to chat-judged.jsonl: bad. This replaces the earlier label of the answer (good).",
        "Written to chat-pairs.jsonl.",
        "Written to chat-pairs.jsonl. This replaces the earlier pair of these answers.",
    ]
    assert [(r["prompt"], r["label"]) for r in rows("chat-judged.jsonl")] == [
        ([user("hat")], False), ([user("cat")], False)]  # fmt: skip
    [pair] = rows("chat-pairs.jsonl")
    assert (pair["chosen"], pair["rejected"]) == (assistant(answer), assistant("Meow."))
    # In a later chat, too; rows that no chat wrote are left alone.
    own = json.dumps(rows("chat-judged.jsonl")[1] | {"provenance": {"by": "me"}})
    with open("chat-judged.jsonl", "a") as file:
        file.write(f"{own}\n")
    assert "(bad)" in pipe(model, "cat\n/good\n").stderr
    assert [r["label"] for r in rows("chat-judged.jsonl")] == [False, False, True]


def test_compare_through_a_pipe_asks_no_question_and_names_the_model(model, adapter, tmp_path):
    expected = answers(model, ["cat"], adapter=adapter) + answers(model, ["cat"])
    result = pipe(model, "/compare cat\n", "--adapter", adapter)
    assert result.stdout == "".join(f"{answer}\n" for answer in expected)
    assert "Answer of the base model:" in result.stderr.splitlines()


def test_with_the_reference_flag_the_base_answers_first(model, adapter):
    result = pipe(model, "cat\n/aligned\n/reset\ncat\n", "--adapter", adapter, "--base")
    expected = answers(model, ["cat"]) + answers(model, ["cat"], adapter=adapter)
    assert result.stdout == "".join(f"{answer}\n" for answer in expected)


def test_all_of_stdin_can_be_one_question(model):
    text = "the cat\n/help\nand the hat\n"
    assert pipe(model, text, "--whole").stdout == answers(model, [text[:-1]])[0] + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "/base",
            "no adapter is loaded, so there is no other model; name a run, or a --model "
            "with an --adapter",
        ),
        ("/undo", "there is no answer yet; ask something first"),
        ("/retry", "with `temperature` 0 the answer is always the same; set one above 0"),
        ("/good", "there is no answer yet; ask something first"),
        ("hi\n/edit", "`/edit` needs a text, the better answer"),
    ],
)
def test_a_command_that_cannot_be_run_ends_a_pipe_with_a_one_line_error(model, line, message):
    result = pipe(model, line + "\nnever asked\n")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"Error: {message}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", "513"], "the model's context length is 512 tokens; use --context 512"),
        (["--hide-thinking"], "`hide_thinking` has no effect; the model has no thinking mode"),
        (["--pairs", "rows.json"], "rows.json: rows are written as JSON lines"),
    ],
)
def test_a_flag_without_effect_gives_a_one_line_error(model, flags, message):
    result = pipe(model, "hi\n", *flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr.splitlines()[-1]


def test_save_never_overwrites_a_file(model, tmp_path):
    path = tmp_path / "there.json"
    path.write_text("mine")
    result = pipe(model, f"hi\n/save {path}\n")
    assert result.stderr.splitlines()[-1] == f"Error: {path}: already exists; choose another name"
    assert path.read_text() == "mine"


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("env", "dim"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, 0)],
)
def test_notes_are_dim_and_wrapped_between_words(monkeypatch, env, dim):
    """A file name is never broken, and a second line of /help begins below the first."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((40, 24)))
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    commands.print_note("/good and /bad write labelled answers to folder/of-a-long-name/chat.jsonl")
    commands.print_note("/good  label the last answer as good, for training", indent=7)
    assert ("\x1b[2m" in screen.getvalue()) is bool(dim)
    assert re.sub(r"\x1b\[\d+m", "", screen.getvalue()).splitlines() == [
        "/good and /bad write labelled answers",
        "to folder/of-a-long-name/chat.jsonl",
        "/good  label the last answer as good,",
        "       for training",
    ]


def test_what_a_person_types_is_colored_at_a_terminal(model, session, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    chat = session("--model", model, "--max-tokens", "4", *GREEDY, TERM="xterm")
    chat.until("\x1b\\[36m.*> ")
    chat.type("/exit\n")
    assert "\x1b[0m" in chat.until("Goodbye")
