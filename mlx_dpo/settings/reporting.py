"""Which other programs are told of a run, and under which names."""

from dataclasses import dataclass

from mlx_dpo.errors import ConfigError
from mlx_dpo.options import option

REPORTING = "Reporting"
NOBODY = "none"
NAMELESS = "tensorboard"  # knows runs by their folders alone
PROJECT = "mlx-dpo"  # where neither a setting nor the program's own says another


@dataclass(frozen=True, kw_only=True)
class ReportingSettings:
    """Which other programs are told of a run, and under which names."""

    report_to: tuple[str, ...] = option(
        (), "Send metrics to this program too; may be repeated. `none`: to no program any more.",
        str, REPORTING, many=True, changes_result=False,
        choices=(NAMELESS, "wandb", "trackio", "swanlab", NOBODY),
    )  # fmt: skip
    run_name: str | None = option(
        None, "Name of the run there. [default: that of the output folder]",
        str, REPORTING, changes_result=False,
    )  # fmt: skip
    project: str | None = option(
        None, f"Project of the run there. [default: the program's own setting, else {PROJECT}]",
        str, REPORTING, changes_result=False,
    )  # fmt: skip

    @property
    def reports_to(self) -> tuple[str, ...]:
        """The programs that are told."""
        return tuple(name for name in self.report_to if name != NOBODY)

    @property
    def named_there(self) -> bool:
        """Whether a program is told that knows names."""
        return bool(set(self.reports_to) - {NAMELESS})

    def refuse_idle_reporting_settings(self) -> None:
        """Programs named twice, and names that nobody is told.

        Raises:
            ConfigError: names the first setting without effect, and why it has none.
        """
        for name in self.report_to:
            if self.report_to.count(name) > 1:
                raise ConfigError(f"`report_to` names {name} twice")
        if NOBODY in self.report_to and self.reports_to:
            raise ConfigError(f"`report_to` {NOBODY} contradicts {self.reports_to[0]}")
        for setting in ("run_name", "project"):
            if (name := getattr(self, setting)) is not None:
                self._refuse_idle_name(setting, name)

    def _refuse_idle_name(self, setting: str, name: str) -> None:
        if not name.strip():
            raise ConfigError(f"`{setting}` is empty; give a name, or leave it out")
        if not self.report_to:  # beside `none`, the names of a run that is resumed are kept
            raise ConfigError(f"`{setting}` has no effect without `report_to`")
        if self.report_to == (NAMELESS,):
            raise ConfigError(
                f"`{setting}` has no effect with report_to {NAMELESS} alone, which knows runs by "
                "their folders"
            )
