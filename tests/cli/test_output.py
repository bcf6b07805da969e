"""Text from outside reaches a terminal only with visible control characters."""

import ast
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli, output
from tests.checkpoints import make_checkpoint
from tests.cli.terminal import TerminalSession

PACKAGE = Path(__file__).parents[2] / "mlx_dpo"
WRITERS = {  # the only modules that may write to stdout and stderr
    "cli/output.py": {"click.echo", "print", "sys.stdout.write", "sys.stderr.write"},
    "reporting/terminal/console.py": {"super().__init__"},
    "chat/response_generator.py": {"print", "sys.stderr.write"},  # a server has no command line
    "cli/cache.py": {"click.confirm"},  # its text is a literal
    "cli/chat/prompt.py": {"input"},
    "cli/collect/__init__.py": {"input"},
    # Programs of the standard library alone, which run on another host.
    "distributed/hosts/remote/facts.py": {"sys.stdout.write"},  # JSON
    "distributed/hosts/remote/run_rank.py": {"sys.stderr.write"},
}
FORBIDDEN = re.compile(
    r"(?:rich\.)?print|pprint|input|click\.(?:echo|secho|echo_via_pager|confirm|prompt|progressbar)"
    r"|sys\.(?:__)?std(?:out|err)(?:__)?(?:\.buffer)?\.write(?:lines)?|os\.write"
    r"|(?:rich\.console\.)?Console|traceback\.print_\w+|\w+\.print_exception"
)
HOSTILE = "\x1b]0;t\x07\x9b2J\u202e[bold]:train:"
SHOWN = r"\x1b]0;t\x07\x9b2J\u202e[bold]:train:"
UNSAFE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")
ROW = {"prompt": "Where is the cat?", "chosen": "On the mat.", "rejected": "No."}


def raw_writes(source):
    calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    return {name for name in calls if FORBIDDEN.fullmatch(name)}


def test_only_the_modules_for_output_write_to_the_terminal():
    for file in PACKAGE.rglob("*.py"):
        name = str(file.relative_to(PACKAGE))
        assert raw_writes(file.read_text()) <= WRITERS.get(name, set()), name


@pytest.mark.parametrize(
    "call",
    ["print(x)", "click.secho(x)", "sys.stderr.write(x)", "Console()", "traceback.print_exc()"],
)
def test_a_raw_write_is_found(call):
    assert raw_writes(f"def f(x):\n    {call}\n")


def test_texts_are_rendered_without_markup():
    """A `TextColumn` has its own default, which reads markup whatever the console says."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            call = ast.unparse(node) if isinstance(node, ast.Call) else ""
            assert "from_markup" not in call and "from_ansi" not in call
            assert not call.startswith("TextColumn(") or call.endswith("markup=False)"), call


def run(*arguments):
    """Run a command as at a terminal, where escape sequences are not stripped by click."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], color=True)


def shows(done, text=SHOWN):
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert not UNSAFE.search(done.output), done.output
    assert text in done.output


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("command", ["check", "train"])
def test_names_of_columns(tmp_path, model, command):
    rows = write_rows(tmp_path / "rows.jsonl", {HOSTILE: "a", "b": "c"})
    training = ("train", rows, "--model", model, "--output", tmp_path / "out")
    shows(run(*(training if command == "train" else ("data", "check", rows))))


def test_names_of_files(tmp_path):
    rows = write_rows(tmp_path / f"{HOSTILE}.jsonl", {"a": "b"})
    shows(run("data", "check", rows))
    shows(run("data", "check", tmp_path / f"{HOSTILE}.gone"))


def test_names_of_models_runs_and_datasets(tmp_path):
    shows(run("chat", tmp_path / HOSTILE))
    shows(run("generate", "--model", tmp_path / HOSTILE, "Hi"))


def test_an_error_is_one_line_whatever_its_parts_hold(tmp_path):
    done = run("chat", tmp_path / "a\nb\rError: c")
    shows(done, r"a\nb\rError: c")
    assert done.output.count("\n") == 1


def test_arguments_and_options():
    shows(run(f"--{HOSTILE}"))
    shows(run(HOSTILE))
    shows(run("train", f"--{HOSTILE}"))
    shows(run("data", HOSTILE))
    shows(run("cache", HOSTILE))


def test_the_type_of_a_model(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": HOSTILE}))
    shows(run("generate", "--model", folder, "Hi"))


def test_the_kind_of_an_adapter(tmp_path, model):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    entries = {"fine_tune_type": HOSTILE, "num_layers": 2, "lora_parameters": {"rank": 4}}
    (adapter / "adapter_config.json").write_text(json.dumps(entries))
    (adapter / "adapters.safetensors").write_bytes(b"")
    shows(run("generate", "--model", model, "--adapter", adapter, "Hi"))


def test_the_exception_of_a_template(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    template = "{{ raise_exception(" + json.dumps(HOSTILE, ensure_ascii=False) + ") }}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for file in folder.glob("*.jinja"):
        file.unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    rows = write_rows(tmp_path / "rows.jsonl", *[ROW | {"prompt": f"q{n}"} for n in range(4)])
    shows(run("train", rows, "--model", folder, "--output", tmp_path / "out"))
    shows(run("generate", "--model", folder, "Hi"))


def test_text_of_a_row(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ROW | {"prompt": HOSTILE, "source": "x"})
    done = run("data", "show", rows, "--model", make_checkpoint(tmp_path / "model"))
    shows(done, "2J")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("text", ["\x1b[31mred\x07\x9b2J\x00\x7f\r", "ä\n\t日本 🐶"])
def test_the_text_of_a_model_is_exact_in_a_pipe_and_escaped_on_a_terminal(monkeypatch, text):
    terminal, pipe = Terminal(), io.StringIO()
    for stdout in (terminal, pipe):
        monkeypatch.setattr(sys, "stdout", stdout)
        output.write_text(text)
    assert pipe.getvalue() == text
    shown = r"\x1b[31mred\x07\x9b2J\x00\x7f\r"
    assert terminal.getvalue() == (shown if text[0] == "\x1b" else text)


def test_json_has_the_same_value_and_no_control_characters(capsys):
    record = {"a\x7f": HOSTILE, "b": "日本\n", "half": "\ud83d"}
    output.echo_json(record)
    printed = capsys.readouterr().out
    assert json.loads(printed) == record
    assert not UNSAFE.search(printed) and "日本" in printed


def test_styles_are_ours_and_the_text_is_not(monkeypatch, capsys):
    monkeypatch.setattr("click._compat.should_strip_ansi", lambda *_: False)
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda *_: False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    output.echo("\x1b[31m", bold=True)
    assert capsys.readouterr().out == "\x1b[1m\\x1b[31m\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    output.echo("\x1b[31m", bold=True)
    assert capsys.readouterr().out == "\\x1b[31m\n"


def test_a_warning_and_a_traceback_are_escaped(capsys):
    output.print_warning(HOSTILE)
    output.print_traceback(ValueError, ValueError(HOSTILE), None)
    warning, traceback = capsys.readouterr().err.splitlines()
    assert (warning, traceback) == (f"Warning: {SHOWN}", f"ValueError: {SHOWN}")


def test_an_error_at_a_real_terminal(tmp_path):
    session = TerminalSession("data", "check", str(tmp_path / f"{HOSTILE}.jsonl"), TERM="xterm")
    try:
        assert session.exit_code() == 1
        assert f"{SHOWN}.jsonl: no such file" in session.output
        assert not re.search(r"\x1b\]|[\x07\x9b\u202e]", session.output)
    finally:
        session.close()


def test_messages_of_libraries_are_escaped():
    """transformers, for one, warns of an unknown type of RoPE with the text of `config.json`."""
    program = (
        "import logging, sys, warnings\n"
        "from mlx_dpo.cli.output import escape_messages_of_libraries\n"
        "escape_messages_of_libraries()\n"
        "logging.getLogger('library').warning('a %s', sys.argv[1])\n"
        "warnings.warn(sys.argv[1])\n"
        "raise ValueError(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, HOSTILE], capture_output=True, text=True)
    assert done.stderr.count(SHOWN) == 3
    assert not UNSAFE.search(done.stderr)
