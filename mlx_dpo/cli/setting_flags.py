"""Flags of the training settings, which `train`, `plan`, `loop` and `data` share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from mlx_dpo.cli.command import FILE, FOLDER, Command, Record, missing_message
from mlx_dpo.cli.default_output import choose_run_folder, find_unfinished_run
from mlx_dpo.cli.output import echo
from mlx_dpo.config.dpo_config import DPOConfig, check_setting_names, get_settings
from mlx_dpo.config.other_trainers import EQUIVALENTS, FLAG_ALIASES
from mlx_dpo.config.setting import Setting, parse_value
from mlx_dpo.config.yaml_file import read_yaml
from mlx_dpo.errors import ConfigError

STAGE_KEYS = ("stages", "sft")  # keys of a YAML file of `train` that are no settings
FILE_SETTINGS = "mlx_dpo.file_settings"  # key of a context's notes
CommandFunction = Callable[..., Any]
SHORT_FLAGS = {"model": ("-m",), "output": ("-o",), "learning_rate": ("--lr",)}
SHOWS_ALL = "mlx_dpo.help_all"  # key of `ctx.meta`


class SettingOption(click.Option):
    """The flag of a setting."""

    def __init__(self, *args: Any, setting: Setting, **more: Any) -> None:
        super().__init__(*args, **more)
        self.setting = setting


class SettingsCommand(Command):
    """A command that takes settings as flags; its help text groups them by section.

    If the command has the flag `--help-all`, `--help` shows the essential settings alone.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        names = {parameter.name for parameter in self.params}
        for name in names & FLAG_ALIASES.keys():
            self.aliases |= {_flag_name(alias): _flag_name(name) for alias in FLAG_ALIASES[name]}
        self.has_short_help = "help_all" in names

    def missing(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Return the names of all missing parameters; pairs can come from --config as well."""
        values, _, _ = self.make_parser(ctx).parse_args(list(args))
        names = super().missing(ctx, args)
        has_pairs = any(isinstance(values.get(n), str | tuple) for n in ("pairs", "config_file"))
        return names if has_pairs or "pairs" not in values else ["PAIRS", *names]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options to the help text: the essential ones, or all of them by section."""
        is_short = self.has_short_help and SHOWS_ALL not in ctx.meta
        sections = {"Options": self._short_list(ctx)} if is_short else self._sections(ctx)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)
        if is_short:
            formatter.write_paragraph()
            formatter.write_text(f"`{ctx.command_path} --help-all` lists all flags, by section.")

    def _short_list(self, ctx: click.Context) -> list[Record]:
        """Return the records of the essential settings and of the options that are no settings."""

        first = list(SHORT_FLAGS)

        def rank(option: click.Option) -> int:
            if not isinstance(option, SettingOption):
                return len(first) + 1
            return first.index(option.name) if option.name in first else len(first)

        shown = [
            (rank(option), record)
            for option, record in self.records(ctx)
            if not isinstance(option, SettingOption) or option.setting.essential
        ]
        return [record for _, record in sorted(shown, key=lambda item: item[0])]

    def _sections(self, ctx: click.Context) -> dict[str, list[Record]]:
        """Return the records of all options by section; options that are no settings come first."""
        sections: dict[str, list[Record]] = {"Options": []}
        for option, record in self.records(ctx):
            title = option.setting.section if isinstance(option, SettingOption) else "Options"
            sections.setdefault(title, []).append(record)
        return sections


def _print_full_help(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[SHOWS_ALL] = True
        echo(ctx.get_help())
        ctx.exit()


def config_flag(command: CommandFunction) -> CommandFunction:
    """Add the flag `--config` to a command."""
    return click.option(
        "--config",
        "config_file",
        type=FILE,
        metavar="FILE",
        help="YAML file of settings; flags override it.",
    )(command)


def help_all_flag(command: CommandFunction) -> CommandFunction:
    """Add the flag `--help-all` to a command, whose `--help` then shows the essential settings."""
    return click.option(
        "--help-all",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_full_help,
        help="Show all flags by section, and exit.",
    )(command)


def pairs_argument(command: CommandFunction) -> CommandFunction:
    """Add the argument PAIRS to a command."""
    return click.argument("pairs", nargs=-1, metavar="PAIRS...", type=FILE)(command)


def setting_flags(
    wanted: Callable[[Setting], bool],
    *,
    shows_required: bool = True,
    also_required: tuple[str, ...] = (),
) -> Callable[[CommandFunction], CommandFunction]:
    """Return a decorator that adds a flag to a command for every setting that `wanted` accepts.

    Args:
        wanted: tells which settings get a flag.
        shows_required: whether the command cannot do without the required settings.
        also_required: names of settings whose default this command does not use.
    """

    def add_flags(command: CommandFunction) -> CommandFunction:
        for name, spec in reversed(get_settings().items()):
            if name != "pairs" and wanted(spec):
                is_required = (shows_required and spec.required) or name in also_required
                command = _flag(name, spec, is_required=is_required)(command)
        return command

    return add_flags


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flag(name: str, spec: Setting, *, is_required: bool) -> Callable[..., Any]:
    """Return the click decorator that adds the flag of a setting to a command."""
    flag = _flag_name(name)
    shown = False if is_required else spec.shown_default or False
    if spec.type is bool:
        names = (f"{flag}/--no-{flag[2:]}",)
        return click.option(
            *names,
            name,
            cls=SettingOption,
            setting=spec,
            default=spec.default,
            help=spec.help,
            show_default=shown,
        )
    return click.option(
        flag,
        *SHORT_FLAGS.get(name, ()),
        name,
        cls=SettingOption,
        setting=spec,
        type=_type_of(spec),
        default=spec.default,
        multiple=spec.is_list,
        help=f"{spec.help} [required]" if is_required else spec.help,
        show_default=shown,
        metavar=spec.shown_metavar,
        shell_complete=_complete_losses if name == "loss_type" else None,
    )


def _complete_losses(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of the losses that begin with `incomplete`."""
    from mlx_dpo.losses.catalogue import LOSSES

    return [name for name in LOSSES if name.startswith(incomplete)]


def _type_of(spec: Setting) -> Any:
    if spec.choices:
        return click.Choice([str(choice) for choice in spec.choices])
    if spec.is_path:
        return FILE if "FILE" in spec.metavar else FOLDER
    return spec.type


def read_settings(path: str, others: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read settings from a YAML file.

    Args:
        path: the file.
        others: names that are no settings, and that the caller reads.

    Raises:
        ConfigError: the file cannot be read, does not map names to values, has unknown names, or
            has a value that does not fit its setting.
    """
    values = read_yaml(path)
    given = {name: values.pop(name) for name in others if name in values}
    try:
        check_setting_names(values)
    except ConfigError as error:
        foreign = EQUIVALENTS.keys() & values.keys()
        hint = f"translate it with `mlx-dpo config from {path}`; " if len(foreign) > 1 else ""
        raise ConfigError(f"{path}: {hint}{error}") from error
    known = get_settings()
    for name, value in values.items():
        try:
            parse_value(name, value, known[name])
        except ConfigError as error:
            raise ConfigError(f"{path}:{values.lines[name]}: {error}") from error
    return dict(values) | given


def file_settings(ctx: click.Context, config_file: str | None) -> dict[str, Any]:
    """Return the settings in the YAML file of a command, which may be a pipe and is read once.

    Those of `train` may have the names in `STAGE_KEYS`.

    Raises:
        ConfigError: as `read_settings`.
    """
    if config_file is None:
        return {}
    known: dict[str, Any] = ctx.meta.setdefault(FILE_SETTINGS, {})
    if config_file not in known:
        has_stages = any(parameter.name == STAGE_KEYS[0] for parameter in ctx.command.params)
        known[config_file] = read_settings(config_file, STAGE_KEYS if has_stages else ())
    return dict(known[config_file])


def resolve(
    ctx: click.Context, config_file: str | None, resume: bool, flags: dict[str, Any]
) -> DPOConfig:
    """Combine defaults, settings of the resumed run, YAML file and flags into a configuration.

    Later sources override earlier ones.

    Raises:
        ConfigError: a setting is not valid.
        click.UsageError: required settings are missing.
    """
    values = file_settings(ctx, config_file) | typed_settings(ctx, flags)
    if resume:
        values = _recorded_settings(values) | values
    check_none_missing(ctx, values, flags)
    if "output" in flags and not values.get("output"):
        if ctx.params.get("overwrite"):
            raise ConfigError("`--overwrite` has no effect without --output: a new folder is used")
        values["output"] = choose_run_folder(str(values["model"]))
        echo(f"Run folder: {values['output']}", err=True)
    return DPOConfig.from_dict(values)


def find_local_inputs(
    ctx: click.Context, config_file: str | None, flags: dict[str, Any]
) -> list[str]:
    """Return the files and folders of this machine that the settings name, but for the output."""
    values = file_settings(ctx, config_file) | typed_settings(ctx, flags)
    if values.get("output") and ctx.params.get("resume"):
        values = _recorded_settings(values) | values
    inputs: list[str] = []
    for name, spec in get_settings().items():
        if spec.is_path and name != "output" and values.get(name):
            value = values[name]
            inputs += map(str, value if isinstance(value, list | tuple) else [value])
    return [path for path in dict.fromkeys(inputs) if Path(path).expanduser().exists()]


def check_none_missing(
    ctx: click.Context, values: Mapping[str, Any], names: Mapping[str, Any] | tuple[str, ...]
) -> None:
    """Raise a usage error that names all required settings among `names` that have no value."""
    missing = [
        "PAIRS" if name == "pairs" else _flag_name(name)
        for name, spec in sorted(get_settings().items(), key=lambda item: item[0] != "pairs")
        if spec.required and name in names and not values.get(name)
    ]
    if missing:
        raise click.UsageError(missing_message(missing), ctx)


def typed_settings(ctx: click.Context, flags: dict[str, Any]) -> dict[str, Any]:
    """Return the settings whose flags were given on the command line, by name."""
    return {
        name: _convert_choice(name, value)
        for name, value in flags.items()
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }


def _convert_choice(name: str, value: Any) -> Any:
    spec = get_settings()[name]
    if not spec.choices or value is None:
        return value
    return tuple(map(spec.type, value)) if spec.is_list else spec.type(value)


def _recorded_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the run to be resumed has recorded.

    The result is empty if there is no such run yet and `values` contains pairs for a new run.

    Raises:
        ConfigError: there is no `output`, and not one unfinished run in `runs/`.
        RunError: there is neither a run to resume nor pairs for a new one.
    """
    from mlx_dpo.runs.folder import RunPaths, read_record
    from mlx_dpo.runs.stages.find import find_run

    output = str(values.get("output") or "")
    if not output:
        output = find_unfinished_run()
        echo(f"Resuming {output}", err=True)
    if values.get("pairs"):
        record = read_record(RunPaths(Path(output).expanduser()))
    else:
        record = find_run(output)[1]
    return record["settings"] | {"output": output} if record else {}
