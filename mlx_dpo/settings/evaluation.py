"""When held-out pairs are asked about, and what follows: the best is kept, or training ends."""

from dataclasses import dataclass
from typing import NoReturn

from mlx_dpo.errors import ConfigError
from mlx_dpo.options import option

EVALUATION = "Evaluation"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """When held-out pairs are asked about, and what follows from it."""

    eval_steps: int | None = option(
        None,
        "Steps between evaluations on held-out pairs. [default: at the end]",
        int,
        EVALUATION,
        low=1,
        changes_result=False,
    )
    metric_for_best_model: str | None = option(
        None, "Metric on held-out pairs to go by (`loss`, `rewards/margins`).", str, EVALUATION
    )
    load_best_model_at_end: bool = option(
        False, "Finish with the adapters of the best evaluation, not the last.", bool, EVALUATION
    )
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without an improvement.", int, EVALUATION, low=1
    )
    early_stopping_threshold: float | None = option(
        None, "What is more than this is an improvement. [default: 0]", float, EVALUATION, low=0
    )

    def refuse_idle_evaluation_settings(self) -> None:
        """Settings that nothing follows from.

        Raises:
            ConfigError: names the first of them, and what it lacks.
        """
        stops, metric = self.early_stopping_patience is not None, self.metric_for_best_model
        if self.early_stopping_threshold is not None and not stops:
            _lacks("early_stopping_threshold", "`early_stopping_patience`")
        keeps = self.load_best_model_at_end
        wanted = {"early_stopping_patience": stops, "load_best_model_at_end": keeps}
        acting = [name for name, acts in wanted.items() if acts]
        if metric is not None and not acting:
            _lacks("metric_for_best_model", " or ".join(f"`{name}`" for name in wanted))
        for name in acting:
            if metric is None:
                _lacks(name, "`metric_for_best_model`")
            if self.eval_steps is None:
                _lacks(name, "`eval_steps`")

    @property
    def decided_by(self) -> set[str]:
        """Settings that change the result only because something is watched."""
        return {"eval_steps"} if self.metric_for_best_model is not None else set()


def _lacks(name: str, what: str) -> NoReturn:
    raise ConfigError(f"`{name}` has no effect without {what}")
