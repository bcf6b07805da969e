"""What a run writes and says; nothing here changes its result."""

from dataclasses import dataclass

from mlx_dpo.options import option

RUN = "Run"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run writes and says; nothing here changes its result."""

    output: str = option("", "Run folder to write.", str, RUN, changes_result=False, path=True)
    save_steps: int = option(
        50, "Steps between checkpoints.", int, RUN, low=1, changes_result=False
    )
    save_total_limit: int = option(2, "Checkpoints to keep.", int, RUN, low=1, changes_result=False)
    logging_steps: int = option(
        1, "Steps between lines, where there is no live bar.", int, RUN, low=1, changes_result=False
    )
    caffeinate: bool = option(
        True, "Keep a Mac awake while it trains.", bool, RUN, changes_result=False
    )
