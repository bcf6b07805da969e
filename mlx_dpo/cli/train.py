"""`mlx-dpo train`: train on pairs and write a run folder."""

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.output import echo
from mlx_dpo.config.dpo_config import DPOConfig, check_setting_names, get_settings
from mlx_dpo.config.other_trainers import EQUIVALENTS
from mlx_dpo.config.setting import Setting, parse_value
from mlx_dpo.config.yaml_file import read_yaml
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from mlx_dpo.training.monitor.verdict import Verdict

Command = Callable[..., Any]


class SettingsCommand(click.Command):
    """A command that takes settings as flags and groups them by section in its help text.

    If the user gives a flag of another trainer, the error message names mlx-dpo's equivalent.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; if one is another trainer's flag, report mlx-dpo's equivalent."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            hint = self._equivalent(error.option_name)
            if hint is None:
                raise
            message = f"No such option '{error.option_name}'; {hint}"
            raise click.UsageError(message, ctx) from None

    def _equivalent(self, flag: str) -> str | None:
        """Return a hint that names mlx-dpo's equivalent of another trainer's flag.

        The result is None if this command has no equivalent.
        """
        text = EQUIVALENTS.get(flag.lstrip("-").replace("-", "_"), "")
        meant = {_flag_name(name) for name in re.findall(r"`(\w+)`", text)}
        known = {name for parameter in self.params for name in parameter.opts}
        hint = re.sub(r"`(\w+)`", lambda match: _flag_name(match[1]), text)
        return hint if hint and meant <= known else None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options to the help text, grouped by section.

        Options that are not training settings come first.
        """
        known = get_settings()
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                setting = known.get(str(parameter.name))
                title = setting.section if setting else "Options"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def setting_flags(wanted: Callable[[Setting], bool]) -> Callable[[Command], Command]:
    """Return a decorator that adds a flag to a command for every setting that `wanted` accepts."""

    def add_flags(command: Command) -> Command:
        for name, spec in reversed(get_settings().items()):
            if name != "pairs" and wanted(spec):
                command = _flag(name, spec)(command)
        return command

    return add_flags


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flag(name: str, spec: Setting) -> Callable[..., Any]:
    """Return the click decorator that adds the flag of a setting to a command."""
    flag = _flag_name(name)
    default = spec.default
    show = default not in (None, (), "")
    help = f"{spec.help} [default: {spec.default_text}]" if spec.default_text else spec.help
    if spec.type is bool:
        flag = f"{flag}/--no-{flag[2:]}"
        return click.option(flag, name, default=default, help=help, show_default=show)
    kind: Any = spec.type
    if spec.choices:
        kind = click.Choice([str(choice) for choice in spec.choices])
    return click.option(
        flag,
        name,
        type=kind,
        default=default,
        multiple=spec.is_list,
        help=help,
        show_default=show,
        metavar=None if spec.choices else spec.shown_metavar,
    )


def read_settings(path: str) -> dict[str, Any]:
    """Read settings from a YAML file.

    Raises:
        ConfigError: the file cannot be read, does not map names to values, has unknown names, or
            has a value that does not fit its setting.
    """
    values = read_yaml(path)
    try:
        check_setting_names(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    known = get_settings()
    for name, value in values.items():
        try:
            parse_value(name, value, known[name])
        except ConfigError as error:
            raise ConfigError(f"{path}:{values.lines[name]}: {error}") from error
    return dict(values)


def resolve(
    ctx: click.Context, config_file: str | None, resume: bool, flags: dict[str, Any]
) -> DPOConfig:
    """Combine defaults, settings of the resumed run, YAML file and flags into a configuration.

    Later sources override earlier ones.

    Raises:
        ConfigError: a setting is not valid, or a required setting is missing.
    """
    values = (read_settings(config_file) if config_file else {}) | typed_settings(ctx, flags)
    if resume:
        values = _recorded_settings(values) | values
    for name, what in (("pairs", "PAIRS"), ("model", "--model"), ("output", "--output")):
        if name in flags and not values.get(name):
            raise ConfigError(f"{what} is missing; see `mlx-dpo {ctx.command.name} --help`")
    return DPOConfig.from_dict(values)


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
        ConfigError: there is no `output`.
        RunError: there is neither a run to resume nor pairs for a new one.
    """
    from mlx_dpo.runs.folder import RunPaths, find_run, read_record

    output = str(values.get("output") or "")
    if not output:
        raise ConfigError("--output is missing: the folder of the run to resume")
    if values.get("pairs"):
        record = read_record(RunPaths(Path(output).expanduser()))
    else:
        record = find_run(output)[1]
    return dict(record["settings"]) if record else {}


@click.command(cls=SettingsCommand)
@click.argument("pairs", nargs=-1)
@click.option("--config", "config_file", metavar="FILE", help="YAML file of settings.")
@click.option("--resume", is_flag=True, help="Resume the run in --output from its last checkpoint.")
@click.option("--force", is_flag=True, help="Start even if memory is estimated not to suffice.")
@click.option(
    "-v", "--verbose", is_flag=True, help="Print scorer, micro-batches, memory and other details."
)
@setting_flags(lambda spec: True)
@click.pass_context
def train(
    ctx: click.Context,
    /,
    config_file: str | None,
    resume: bool,
    force: bool,
    verbose: bool,
    **flags: Any,
) -> None:
    """Train adapters on PAIRS by Direct Preference Optimization.

    PAIRS is a file (JSONL, JSON, Parquet or CSV, also compressed), a folder with train and valid
    files, a dataset on the Hub (`org/name[:config][@revision]`) or - for standard input; several
    are joined. The schema of the rows is detected. Flags override the settings in --config. Ctrl-C
    saves a checkpoint and stops; --resume with the same --output continues the run and ends with
    the same weights bit for bit.
    """
    config = resolve(ctx, config_file, resume, flags)

    from mlx_dpo import DPOTrainer
    from mlx_dpo.cli import program
    from mlx_dpo.cli.progress import run_with_progress

    with DPOTrainer(config, resume=resume, force=force) as run:
        run_with_progress(run, verbose=verbose)
    if run.evaluation is None:
        echo("No pairs were held out, so nothing was measured on unseen pairs")
    echo(_closing_line(config.output, run.verdict, program()))


def _closing_line(output: str, verdict: "Verdict | None", command: str) -> str:
    """Return the last line of a run: where the adapters are, and what to do with them."""
    if verdict is not None and verdict.is_worse:
        return (
            f"Adapters in {output}, but they are worse than the base model (see above); to see "
            f"their answers: {command} compare {shlex.quote(output)}"
        )
    if verdict is not None and verdict.is_noise:
        return (
            f"Adapters in {output}, but nothing shows that they are better than the base model "
            f"(see above); to see their answers: {command} compare {shlex.quote(output)}"
        )
    return f"Adapters in {output}; talk to them with: {command} chat {shlex.quote(output)}"
