"""Help texts of all commands, and the answers to unknown commands."""

import re
import shlex

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from mlx_dpo.cli import COMMANDS, GROUPS, OTHER_NAMES, cli
from mlx_dpo.cli.command import Command
from mlx_dpo.config.dpo_config import get_settings

TYPE_NAMES = {"TEXT", "INTEGER", "FLOAT", "PATH", "DIR", "BOOLEAN", "STRING", "NUMBER", "RANGE"}


def list_pages(command=cli, path=()):
    """Yield the path of a command and of all its subcommands."""
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from list_pages(command.get_command(context, name), (*path, name))


PAGES = tuple(list_pages())
WITH_ALL = [*PAGES, *((name, "--help-all") for name in ("train", "plan", "loop"))]
page_names = [" ".join(path) or "mlx-dpo" for path in WITH_ALL]


def run(*words, **settings):
    return CliRunner().invoke(cli, list(words), prog_name="mlx-dpo", **settings)


def page_text(path, width=80):
    words = path if path[-1:] == ("--help-all",) else (*path, "--help")
    done = run(*words, terminal_width=width)
    assert done.exit_code == 0, done.output
    return done.output


def find_command(path):
    command, context = cli, click.Context(cli)
    for name in path:
        command = command.get_command(context, name)
        context = click.Context(command)
    return command


def list_examples(text):
    """Return the command lines under `Examples:`, with continued lines joined."""
    part = re.search(r"^Examples:\n((?:  .*\n)+)", text, re.M)
    lines = [] if part is None else part[1].replace("\\\n", " ").splitlines()
    return [re.split(r"(?<=\S)  +(?=[a-z])", line.strip())[0] for line in lines]


@pytest.mark.parametrize("path", WITH_ALL, ids=page_names)
def test_a_page_is_as_wide_as_the_terminal(path):
    for width in (80, 100):
        assert max(map(len, page_text(path, width).splitlines())) <= width


@pytest.mark.parametrize("path", PAGES, ids=page_names[: len(PAGES)])
def test_a_page_has_examples_that_can_be_parsed(path):
    shown = []
    for line in list_examples(page_text(path)):
        program, *words = shlex.split(line.partition(" < ")[0].partition(" > ")[0])
        assert program == "mlx-dpo"
        parse(cli, words)
        shown.append(tuple(words[: len(path)]))
    assert path in shown


def parse(command, words):
    """Parse a command line as far as its command reads it."""
    if isinstance(command, click.Group) and words:
        parse(command.get_command(click.Context(command), words[0]), words[1:])
    else:
        command.make_context("mlx-dpo", list(words))


def test_an_example_that_cannot_be_parsed_is_found():
    with pytest.raises(click.UsageError):
        parse(cli, ["train", "pairs.jsonl", "--learning-rates", "1"])


@pytest.mark.parametrize("path", PAGES, ids=page_names[: len(PAGES)])
def test_every_option_has_help_and_a_value_with_a_meaning(path):
    command = find_command(path)
    assert command.help
    for option, (flags, help) in command.records(click.Context(command)):
        assert re.match(r"[A-Z`αf/]", help), (flags, help)
        assert re.search(r"[.\])]$", help), (flags, help)
        assert "  " not in help, (flags, help)
        assert not TYPE_NAMES & set(re.findall(r"\w+", flags)), flags
        if option.secondary_opts:  # a switch that is off needs no flag that turns it off
            assert ("--no-" in flags) == (option.default is not False), flags


def test_defaults_and_required_flags_have_one_form():
    for path in WITH_ALL:
        text = " ".join(page_text(path).split())
        for note in re.findall(r"\[(default|required)([^\]]*)\]", text):
            assert note[0] == "required" or note[1].startswith(": "), (path, note)
        assert not re.search(r"\(default|; required|x>|\(required", text), path


def test_the_first_page_lists_every_command_on_a_line_of_its_group():
    assert sorted(COMMANDS) == sorted(set(COMMANDS))
    lines = page_text(()).splitlines()
    for title, commands in GROUPS.items():
        start = lines.index(f"{title}:") + 1
        for line, (name, text) in zip(lines[start:], commands.items(), strict=False):
            assert line.split(maxsplit=1) == [name, text]
    for name in COMMANDS:
        assert isinstance(cli.get_command(click.Context(cli), name), click.Command)


def test_short_help_has_the_settings_that_matter_and_names_the_rest():
    essential = {name for name, spec in get_settings().items() if spec.essential}
    assert len(essential) == 10
    shown, everything = page_text(("train",)), page_text(("train", "--help-all"))
    for name in get_settings().keys() - {"pairs"}:
        flag = rf"^  (-\w, )?--{name.replace('_', '-')}\b"
        assert bool(re.search(flag, shown, re.M)) == (name in essential), name
        assert re.search(flag, everything, re.M), name
    assert shown.splitlines()[-1] == "`mlx-dpo train --help-all` lists all flags, by section."
    options = shown.partition("\nOptions:\n")[2]
    assert options.index("--model") < options.index("--output") < options.index("--beta")
    assert "Run folder to write. [required]" in " ".join(page_text(("loop",)).split())


DIFFERENT_VALUES = {  # flags whose value differs between commands, and why
    "--output": {"FOLDER", "FILE"},  # what a command writes
    "-o": {"FOLDER", "FILE"},
    "--base-model": {"MODEL", "FOLDER", "ORG/NAME"},  # where its checkpoint has to be
    "--pairs": {"PAIRS", "FILE"},  # read by fuse, written by chat
}


def test_a_flag_has_the_same_value_in_all_commands():
    values = {}
    for path in PAGES:
        command = find_command(path)
        for option, (flags, _) in command.records(click.Context(command)):
            for flag in option.opts:
                values.setdefault(flag, set()).add("" if option.is_flag else flags.split()[-1])
    assert {f: v for f, v in values.items() if len(v) > 1} == DIFFERENT_VALUES


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("trian", "did you mean `mlx-dpo train`?"),
        ("resume", "use `mlx-dpo train --resume --output RUN`"),
        ("finetune", "use `mlx-dpo train`"),
        ("fine_tune", "use `mlx-dpo train`"),
        ("SFT", "use `mlx-dpo train`"),
        ("merge", "use `mlx-dpo fuse`"),
        ("uplod", "use `mlx-dpo push`"),
    ],
)
def test_an_unknown_command_is_answered_with_one_of_ours(typed, hint):
    done = run(typed, "x")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == f"Error: No such command '{typed}'; {hint}"


def test_an_unknown_command_like_no_other_gets_no_hint():
    assert run("qqqq").stderr.splitlines()[-1] == "Error: No such command 'qqqq'"
    assert run("data", "shwo").stderr.endswith("did you mean `mlx-dpo data show`?\n")


def test_advice_on_commands_names_commands():
    assert not OTHER_NAMES.keys() & set(COMMANDS)
    for advice in OTHER_NAMES.values():
        for words in re.findall(r"`mlx-dpo ([^`]*)`", advice):
            assert words.split()[0] in (*COMMANDS, "--help"), advice


def test_flags_of_mlx_lm_convert_are_taken():
    def parse_convert(*words):
        return find_command(("convert",)).make_context("convert", list(words)).params

    ours = parse_convert("m", "--bits", "8", "--group-size", "32", "--output", "o")
    theirs = ("--q-bits", "8", "--q_group_size", "32", "--mlx-path", "o", "--hf-path", "m")
    assert parse_convert(*theirs) == ours
    assert parse_convert("--hf-path=m", *theirs[:-2]) == ours
    assert parse_convert("-q", "m", "-o", "o")["quantize"] is True
    done = run("convert")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (
        2,
        "Error: missing SOURCE and --output",
    )


def test_prompts_are_an_argument_or_a_flag():
    for name, words in (("compare", ("a", "b")), ("winrate", ("a",)), ("loop", ())):
        command = find_command((name,))
        as_flag = command.make_context(name, ["--prompts", "p.txt", *words]).params
        assert as_flag == command.make_context(name, [*words, "p.txt"]).params


def test_a_shell_completes_flags_choices_files_and_folders():
    shell = ShellComplete(cli, {}, "mlx-dpo", "_MLX_DPO_COMPLETE")

    def complete(args, incomplete):
        return [(item.type, item.value) for item in shell.get_completions(args, incomplete)]

    assert complete(["train", "--optim"], "ada") == [
        ("plain", name) for name in get_settings()["optim"].choices if name.startswith("ada")
    ]
    assert complete(["train", "--loss-type"], "apo") == [
        ("plain", "apo_zero"),
        ("plain", "apo_down"),
    ]
    assert ("plain", "--learning-rate") in complete(["train"], "--l")
    assert complete([], "tr") == [("plain", "train")]
    assert complete(["chat"], "ru") == [("dir", "ru")]
    assert complete(["train", "--config"], "s") == [("file", "s")]


def test_a_command_has_its_short_help_flag_whoever_asks_first():
    command = Command("one", params=[])
    for names in (["--help"], ["-h", "--help"]):
        group = click.Group("all", {"one": command}, context_settings={"help_option_names": names})
        assert CliRunner().invoke(group, ["one", "-h"]).exit_code == 0
