"""A run, or a model with an adapter, opened as two policies that share their weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_dpo.errors import ConfigError
from mlx_dpo.policy.adapter_files import content_digest, load_adapter
from mlx_dpo.policy.load import Base, fingerprint, load_base
from mlx_dpo.policy.sides import Side, Sides
from mlx_dpo.runs.policies import Opened, base_of, open_run, put_policy, put_reference, unfinished


@dataclass(frozen=True)
class TwoSided:
    """A model that answers as the base or as what was trained on it; aligned to begin with."""

    base: Base
    sides: Sides
    run: Opened | None  # where it is one
    adapter: Path | None  # the folder of the aligned side's adapter
    notes: tuple[str, ...]

    def facts(self, side: Side) -> dict[str, Any]:
        """Where the answers of a side come from: model, adapter, by name and content."""
        start = self.run.config.start_adapter if self.run else None
        folder = self.adapter if side == "aligned" else start
        found: dict[str, Any] = {"model": self.base.source, "side": side}
        found["model_digest"] = self._model_digest
        if self.run is not None:
            found["run"] = str(self.run.paths.folder)
        if folder is not None:
            found["adapter_digest"] = content_digest(Path(folder))
        return found

    @cached_property
    def _model_digest(self) -> str:
        if self.run is None:
            return fingerprint(self.base.path)  # reads all of its weights
        return str(self.run.record["provenance"]["model"])


def open_sides(
    run: str | None,
    *,
    model: str | None = None,
    adapter: str | None = None,
    wanted: Sequence[Side] = ("base", "aligned"),
) -> TwoSided:
    """A run, whose base is what it started from; or a model, with an adapter or without.

    The last of the `wanted` sides that there is, is on.

    Raises:
        RunError: the model is no longer the one that was trained on.
        ConfigError: neither or both of `run` and `model` are given, or something has no effect.
        ModelError: the model or the adapter cannot be read.
    """
    if (run is None) == (model is None):
        raise ConfigError("name a run folder or a --model, and only one of them")
    if run is not None:
        if adapter is not None:
            raise ConfigError("`--adapter` has no effect with a run, which has its own")
        return _of_run(open_run(run), wanted)
    assert model is not None
    if adapter is None and "aligned" not in wanted:
        raise ConfigError("`--reference` has no effect with `--model`: there are no adapters")
    folder = None if adapter is None else Path(adapter).expanduser()
    return _of_model(load_base(model), folder, wanted)


def _of_model(base: Base, adapter: Path | None, wanted: Sequence[Side]) -> TwoSided:
    sides = Sides(base.model)
    if adapter is None or "base" in wanted:
        sides.keep("base")
    if adapter is not None and "aligned" in wanted:
        load_adapter(base.model, adapter)
        sides.keep("aligned")
    return TwoSided(base, sides, None, adapter, (*base.notes, *_twice(sides)))


def _of_run(opened: Opened, wanted: Sequence[Side]) -> TwoSided:
    base = base_of(opened)
    sides = Sides(base.model)
    put_reference(opened, base)
    if "base" in wanted:
        sides.keep("base")
    notes = [*base.notes]
    if "aligned" in wanted:
        put_policy(opened, base)
        sides.keep("aligned")
        notes += [] if opened.finished else [unfinished(opened)]
    return TwoSided(base, sides, opened, opened.adapter, (*notes, *_twice(sides)))


def _twice(sides: Sides) -> list[str]:
    if not (size := sides.held_twice()):
        return []
    return [
        "weights of the model itself were trained: they are held twice, as the base has them and "
        f"as they are now ({size / 1e9:.1f} GB more)"
    ]
