"""The click command behind every command: spellings of flags, errors, help texts, completion."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

import click
from click.shell_completion import CompletionItem

MAX_CHOICES_WIDTH = 36  # characters of a flag and its choices; longer ones go into the help text
Record = tuple[str, str]  # of an option: its flags and value, its help text


class PathName(click.ParamType[str]):
    """Type of a parameter that names a file or folder: a text that a shell completes.

    Args:
        kind: "file" or "dir", the word of click's completion scripts.
    """

    name = "path"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Leave the completion to the shell, which knows files and folders."""
        return [CompletionItem(incomplete, type=self.kind)]


FILE, FOLDER = PathName("file"), PathName("dir")
HELP_FLAGS = ("-h", "--help")


class Command(click.Command):
    """A command that reports all mistakes at once and shows examples in its help text.

    Long flags may be written with `_` instead of `-`.

    Args:
        examples: Command lines, each followed by two spaces and a remark if it needs one.
        aliases: Flags that are not shown, by name, and the flags that they stand for; "" if the
            value of the flag is the argument of the command.
        renamed: Flags that this command does not have, and the advice for each.
    """

    def __init__(
        self,
        *args: Any,
        examples: Sequence[str] = (),
        aliases: Mapping[str, str] | None = None,
        renamed: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        # click makes the help option once, with the names of the first context that asks for it.
        given = more.get("context_settings") or {}
        more["context_settings"] = {"help_option_names": HELP_FLAGS} | given
        super().__init__(*args, **more)
        self.examples = examples
        self.aliases = dict(aliases or {})
        self.renamed = dict(renamed or {})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; report all unknown flags, or all missing parameters, at once."""
        args, unknown = self._read_flags(ctx, args)
        if unknown and not ctx.resilient_parsing:
            raise click.UsageError(self._unknown_message(unknown), ctx)
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter:
            raise click.UsageError(missing_message(self.missing(ctx, given)), ctx) from None

    def _read_flags(self, ctx: click.Context, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the arguments with the declared spelling of each flag, and the unknown flags."""
        takes_value = self._flags(ctx)
        read: list[str] = []
        unknown: list[str] = []
        arguments: list[str] = []  # values of flags that stand for an argument; they come last
        rest = iter(args)
        for arg in rest:
            is_flag = arg.startswith("-") and arg not in ("-", "--")
            if arg == "--" or not (is_flag or self.allow_interspersed_args):
                return [*read, arg, *rest, *arguments], unknown
            if not is_flag:
                read.append(arg)
                continue
            flag, equals, value = self._spelling(arg)
            if not flag:
                arguments.extend([value] if equals else islice(rest, 1))
                continue
            read.append(flag + equals + value)
            if flag not in takes_value:
                unknown.append(arg.partition("=")[0])
            elif takes_value[flag] and not (equals or value):
                read.extend(islice(rest, 1))
        return [*read, *arguments], unknown

    def _flags(self, ctx: click.Context) -> dict[str, bool]:
        """Return all flags of the command, and whether each takes a value."""
        return {
            flag: not (parameter.is_flag or parameter.count)
            for parameter in self.get_params(ctx)
            if isinstance(parameter, click.Option)
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }

    def _spelling(self, arg: str) -> tuple[str, str, str]:
        """Split an argument into the flag as it is declared, an equals sign or "", and its value.

        The value of `-n3` is `3`; a value in an argument of its own is not looked at.
        """
        if not arg.startswith("--"):
            return arg[:2], "", arg[2:]
        flag, equals, value = arg.partition("=")
        flag = flag.replace("_", "-")
        return self.aliases.get(flag, flag), equals, value

    def _unknown_message(self, unknown: Sequence[str]) -> str:
        advice = {flag: self._advise(flag) for flag in unknown}
        if len(advice) == 1:
            [(flag, hint)] = advice.items()
            return f"No such option '{flag}'" + (f"; {hint}" if hint else "")
        listed = (f"'{flag}'" + (f" ({hint})" if hint else "") for flag, hint in advice.items())
        return f"No such options: {', '.join(listed)}"

    def _advise(self, flag: str) -> str:
        """Return what to do instead of an unknown flag; "" if nothing is known."""
        name = flag.lstrip("-").replace("-", "_")
        if (advice := self.renamed.get("--" + name.replace("_", "-"))) is not None:
            return advice
        if hint := self._equivalent(name):
            return hint
        flags = [flag for p in self.params for flag in p.opts if flag.startswith("--")]
        known = {flag[2:]: flag for flag in flags}
        known |= {alias[2:]: flag or alias for alias, flag in self.aliases.items()}
        near = get_close_matches(name.replace("_", "-"), known, n=1)
        return f"did you mean '{known[near[0]]}'?" if near else ""

    def _equivalent(self, name: str) -> str:
        """Return advice that names this command's equivalent of another trainer's flag, or ""."""
        from mlx_dpo.config.other_trainers import EQUIVALENTS  # `--help` starts faster without it

        text = EQUIVALENTS.get(name, "")
        own = {parameter.name for parameter in self.params}
        if not set(re.findall(r"`(\w+)`", text)) <= own:
            return ""
        text = text.replace(
            "`pairs` (the argument PAIRS on the command line)", "the argument PAIRS"
        )
        return re.sub(r"`(\w+)`", lambda match: "--" + match[1].replace("_", "-"), text)

    def missing(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Return the names of all required parameters that `args` do not give."""
        values, _, _ = self.make_parser(ctx).parse_args(args)
        return [
            parameter.make_metavar(ctx).rstrip(".")
            if isinstance(parameter, click.Argument)
            else max(parameter.opts, key=len)
            for parameter in self.get_params(ctx)
            if parameter.required and not _is_given(values.get(str(parameter.name)))
        ]

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description of the command to the help text, and its examples."""
        super().format_help_text(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options to the help text, and the subcommands of a group."""
        if records := list(self.records(ctx)):
            with formatter.section("Options"):
                formatter.write_dl([record for _, record in records])
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    def records(self, ctx: click.Context) -> Iterator[tuple[click.Option, Record]]:
        """Yield each option that help texts show, with its record."""
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and not parameter.hidden:
                yield parameter, make_record(ctx, parameter)


class Group(Command, click.Group):
    """A command with subcommands; an unknown one is answered with the nearest.

    Args:
        other_names: Names that are no subcommands, and the advice for each.
    """

    def __init__(
        self, *args: Any, other_names: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self.other_names = dict(other_names or {})

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand that the first argument names; advise on an unknown one."""
        name = args[0]
        if not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            hint = self._advise_on_command(ctx, name)
            raise click.UsageError(f"No such command '{name}'" + (f"; {hint}" if hint else ""), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the subcommands to the help text, without shortening their descriptions."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, c.get_short_help_str(limit=200)) for name, c in commands.items() if c]
            )

    def _advise_on_command(self, ctx: click.Context, name: str) -> str:
        word = name.lower().replace("_", "-")
        if word in self.other_names:
            return self.other_names[word]
        known = [*self.list_commands(ctx), *self.other_names]
        near = get_close_matches(word, known, n=1)
        if not near:
            return ""
        return self.other_names.get(near[0]) or f"did you mean `{ctx.command_path} {near[0]}`?"


def _is_given(value: object) -> bool:
    """Return whether the parser found a value: a text, or several; click has a mark for others."""
    return isinstance(value, str) or (isinstance(value, tuple) and bool(value))


def missing_message(names: Sequence[str]) -> str:
    """Return the message of a usage error about parameters that are missing."""
    *first, last = names
    return "missing " + (f"{', '.join(first)} and {last}" if first else last)


def make_record(ctx: click.Context, option: click.Option) -> Record:
    """Return the flags of an option with the name of its value, and its help text."""
    names = sorted(option.opts, key=lambda name: len(name) - len(name.lstrip("-")))
    if option.is_flag and option.secondary_opts and option.default is not False:
        names += option.secondary_opts
        flags = " / ".join(names)
    else:
        flags = ", ".join(names)
    value, choices = _shown_value(option, len(flags))
    help = " ".join(
        part for part in (option.help or "", choices, _shown_default(ctx, option)) if part
    )
    return f"{flags} {value}".rstrip(), help


def _shown_value(option: click.Option, width: int) -> tuple[str, str]:
    """Return the name of an option's value, and a sentence that lists choices which are too long.

    Args:
        option: an option.
        width: the characters that its flags take.
    """
    if option.is_flag or option.count:
        return "", ""
    if isinstance(option.type, click.Choice):
        choices = [str(choice) for choice in option.type.choices]
        if width + len(shown := f" [{'|'.join(choices)}]") <= MAX_CHOICES_WIDTH:
            return shown.strip(), ""
        return option.metavar or "NAME", f"One of {', '.join(choices)}."
    if option.metavar is not None:
        return option.metavar, ""
    return {"int": "N", "flo": "X"}.get(option.type.name[:3], option.type.name.upper()), ""


def _shown_default(ctx: click.Context, option: click.Option) -> str:
    if option.required:
        return "[required]"
    if isinstance(option.show_default, str):
        return f"[default: {option.show_default}]"
    if option.is_flag:
        return "[default: on]" if option.default is True else ""
    default = option.get_help_extra(ctx).get("default", "").removesuffix(".0")
    return f"[default: {default}]" if default else ""
