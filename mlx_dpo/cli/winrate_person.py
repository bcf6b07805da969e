"""`mlx-dpo winrate --person`: people judge the answers without seeing which model wrote them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_dpo.cli.command import FILE
from mlx_dpo.cli.judge_flags import web_flags
from mlx_dpo.cli.output import echo_json
from mlx_dpo.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from mlx_dpo.collect.blind_comparison import ComparisonFiles, StoredAnswers
    from mlx_dpo.config.sampling import Sampling
    from mlx_dpo.data.prompts import Prompt
    from mlx_dpo.evaluation.agreement import Agreement
    from mlx_dpo.evaluation.person import RaterResult
    from mlx_dpo.evaluation.winrate import AnswersOfBoth

Command = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class PersonFlags:
    """The flags of `winrate --person`."""

    person: bool
    decisions: str | None
    rater: str | None
    web: bool
    port: int | None
    no_open: bool

    def check(self, judges: Mapping[str, Any], prompts: str | None) -> None:
        """Check the flags.

        Args:
            judges: the flags that choose or instruct another judge, by name.
            prompts: the file of prompts.

        Raises:
            ConfigError: a flag has no effect, contradicts another, or is missing.
        """
        if not self.person:
            self._check_unused(("decisions", "rater", "web", "port", "no_open"), "without --person")
            return
        for name, value in judges.items():
            if value is not None:
                raise ConfigError(f"`{name}` has no effect with --person; leave out one of them")
        if prompts == "-":
            raise ConfigError("`-` has no effect: keys are read from stdin; give prompts in a file")
        if self.decisions is None:
            raise ConfigError("missing --decisions: the file for the decisions of the person")
        if not self.web:
            self._check_unused(("port", "no_open"), "without --web")

    def _check_unused(self, names: Sequence[str], when: str) -> None:
        """Raise `ConfigError` if one of the flags is given."""
        for name in names:
            if getattr(self, name) not in (None, False):
                raise ConfigError(f"`{name}` has no effect {when}")


def person_flags(command: Command) -> Command:
    """Add the flags of `PersonFlags` to a command."""
    for decorate in (
        web_flags("Judge in a browser on this machine."),
        click.option(
            "--rater",
            metavar="NAME",
            help="Name of the person, so that several people can judge the same answers.",
        ),
        click.option(
            "--decisions",
            type=FILE,
            metavar="FILE",
            help="File for the decisions of --person; an existing one is continued.",
        ),
        click.option(
            "--person",
            is_flag=True,
            help="Judge the answers yourself, without seeing which model wrote them.",
        ),
    ):
        command = decorate(command)
    return command


def judge_by_person(
    flags: PersonFlags,
    run: str,
    against: str | None,
    prompts: str | None,
    sampling: "Sampling",
    answer: "Callable[[], AnswersOfBoth]",
    *,
    as_json: bool,
) -> None:
    """Let a person judge the answers, and print the win rate of everyone who has judged them.

    Args:
        answer: generates the answers, if they are not stored yet.
    """
    from mlx_dpo.collect.blind_comparison import ComparisonFiles, open_answers, read_raters
    from mlx_dpo.evaluation.person import rater_agreement
    from mlx_dpo.reporting.terminal.console import make_console

    assert flags.decisions is not None
    files = ComparisonFiles(Path(flags.decisions).expanduser(), flags.rater)
    settings = {
        "run": _adapter_digest(run), "opponent": against, "sampling": asdict(sampling),
    }  # fmt: skip
    stored = open_answers(files, settings, _read_named_prompts(run, prompts), answer)
    _ask(flags, files, stored)
    raters = read_raters(files, stored)
    if not any(rater.rate for rater in raters):
        raise ConfigError(f"{files.own}: no decision yet; run the same command to judge")
    agreement = rater_agreement(raters)
    if as_json:
        fields = None if agreement is None else asdict(agreement)
        echo_json(
            {"run": run, "against": against, "by": "person", "prompts": len(stored.prompts)}
            | {"raters": [rater.to_dict() for rater in raters], "agreement": fields}
        )
        return
    make_console().print(_table(raters, len(stored.prompts), against or "its reference"))


def _adapter_digest(run: str) -> str:
    """Return the digest of the run's adapters, on which its answers depend."""
    from mlx_dpo.adapters.adapter_files import adapter_digest
    from mlx_dpo.saved_runs.open import open_run

    return adapter_digest(open_run(run).adapter)


def _read_named_prompts(run: str, prompts: str | None) -> "Sequence[Prompt] | None":
    from mlx_dpo.data.prompts import add_system_prompt, read_prompts
    from mlx_dpo.saved_runs.open import open_run

    if prompts is None:
        return None
    return add_system_prompt(read_prompts(prompts), open_run(run).config.system)


def _ask(flags: PersonFlags, files: "ComparisonFiles", stored: "StoredAnswers") -> None:
    """Let the person decide the prompts that have no decision of theirs."""
    from mlx_dpo.cli.collect.results import open_pairs_file, print_resumed
    from mlx_dpo.cli.collect.terminal import rank_at_terminal, rank_in_browser
    from mlx_dpo.collect.blind_comparison import ComparisonTasks

    tasks = ComparisonTasks(stored, open_pairs_file(str(files.own)), files.rater)
    print_resumed(tasks)
    if not tasks.remaining:
        return
    if flags.web:
        rank_in_browser(tasks, flags.port or 0, open_browser=not flags.no_open)
    else:
        rank_at_terminal(tasks, read_prompt=None)


def _table(raters: "Sequence[RaterResult]", prompts: int, against: str) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    from mlx_dpo.evaluation.person import rater_agreement

    table = Table(
        title=f"{prompts:,} prompts, against {against}, judged by people",
        title_justify="left",
        box=SIMPLE,
    )
    table.add_column("")
    for rater in raters:
        table.add_column(rater.name, justify="right")
    for name, cells in _rows(raters):
        table.add_row(name, *cells)
    if (agreement := rater_agreement(raters)) is not None:
        table.caption, table.caption_justify = _describe_agreement(agreement), "left"
    return table


def _describe_agreement(agreement: "Agreement") -> str:
    counts = sorted(agreement.counts)
    common = " to ".join(f"{count:,}" for count in sorted({counts[0], counts[-1]}))
    prompts = f"{common} prompt{'s' * (counts[-1] != 1)}"
    of_pairs = ", mean over pairs of raters" * (len(counts) > 1)
    kappa = "-" if agreement.kappa is None else f"{agreement.kappa:.2f}"
    return f"agreement on {prompts}{of_pairs}: {agreement.raw:.1%}; Cohen's kappa {kappa}"


def _rows(raters: "Sequence[RaterResult]") -> list[tuple[str, list[str]]]:
    rows = {
        name: [""] * len(raters)
        for name in (
            "win rate", "95 % interval (Wilson)", "length-controlled", "won, tied, lost",
            "first answer won", "95 % interval of that", "skipped", "not decided yet",
        )
    }  # fmt: skip
    for column, rater in enumerate(raters):
        rate, position = rater.rate, rater.position
        if rate is not None:
            rows["win rate"][column] = f"{rate.rate:.1%}"
            rows["95 % interval (Wilson)"][column] = f"{rate.low:.1%} to {rate.high:.1%}"
            controlled = rate.length_controlled
            rows["length-controlled"][column] = "-" if controlled is None else f"{controlled:.1%}"
            rows["won, tied, lost"][column] = f"{rate.wins:,}, {rate.ties:,}, {rate.losses:,}"
        if position is not None:
            low, high = position.interval
            rows["first answer won"][column] = f"{position.share:.1%} of {position.count:,}"
            rows["95 % interval of that"][column] = f"{low:.1%} to {high:.1%}"
        rows["skipped"][column] = f"{rater.skipped:,}"
        rows["not decided yet"][column] = f"{rater.undecided:,}"
    return list(rows.items())
