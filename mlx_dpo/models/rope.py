"""Translate RoPE settings: transformers 5 writes `rope_parameters`, mlx-lm reads the older names.

Most architectures of mlx-lm ignore `rope_parameters` and use their own defaults, so that the model
silently computes something else.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mlx_lm import utils as mlx_lm

from mlx_dpo.errors import ModelError

Config = Mapping[str, Any]
ROPE_PARAMETERS = "rope_parameters"
MLX_LM_NAMES = {  # names of a setting in mlx-lm's architectures
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct", "rope_pct"),
    "rope_scaling": ("rope_scaling",),
    "rope_local_base_freq": ("rope_local_base_freq",),
}
DEFAULTS = {"partial_rotary_factor": 1.0}  # of an architecture that has no such setting
BY_LAYER = ("rope_theta", "rope_scaling")
FULL_ATTENTION, SLIDING_ATTENTION = (
    "full_attention",
    "sliding_attention",
)  # types of layers that may differ


def rope_overrides(entries: Config, source: str) -> dict[str, Any]:
    """Return the RoPE settings in a `config.json` that mlx-lm would ignore, under mlx-lm's names.

    Args:
        entries: Content of the `config.json`.

    Raises:
        ModelError: mlx-lm's architecture does not support a setting.
    """
    if "model_file" in entries:
        return {}  # the model brings its own code
    overrides = _overrides(entries, source)
    part = entries.get("text_config")
    if isinstance(part, dict) and "model_type" in part and (more := _overrides(part, source)):
        overrides["text_config"] = part | more
    return overrides


def rope_notes(entries: Config, source: str) -> tuple[str, ...]:
    """Return a note for the user on the RoPE settings that mlx-lm would ignore, if any."""
    overrides = rope_overrides(entries, source)
    part = overrides.pop("text_config", {})
    own = {name: part[name] for names in MLX_LM_NAMES.values() for name in names if name in part}
    settings = ", ".join(f"`{name}` {value}" for name, value in (overrides | own).items())
    if not settings:
        return ()
    return (
        f"{settings}: from `{ROPE_PARAMETERS}`, which mlx-lm alone would ignore for this model; "
        "`mlx-dpo convert` writes it where it does",
    )


def _overrides(entries: Config, source: str) -> dict[str, Any]:
    rope = entries.get(ROPE_PARAMETERS)
    if not isinstance(rope, dict) or not rope:
        return {}
    try:
        _, settings = mlx_lm._get_classes(dict(entries))
    except ValueError:
        return {}  # part of another model, which reads its own settings
    known = {field.name for field in fields(settings)}
    if ROPE_PARAMETERS in known:
        return {}
    wanted = _legacy_settings(rope, known, f"{source}/config.json")
    overrides = {}
    for name, value in wanted.items():
        if own := next((own for own in MLX_LM_NAMES[name] if own in known), None):
            if entries.get(own) != value:
                overrides[own] = value
        # DBRX has the settings in `attn_config`.
        elif value != (entries.get("attn_config") or DEFAULTS).get(name):
            raise ModelError(
                f"{source}/config.json: mlx-lm's `{entries.get('model_type')}` knows no `{name}` "
                f"(`{ROPE_PARAMETERS}` has {value}), so that the model would be a different one; "
                "use another model"
            )
    return overrides


def _legacy_settings(rope: Config, known: set[str], where: str) -> dict[str, Any]:
    """Return the settings in `rope_parameters` under the names that transformers 4 used.

    Raises:
        ModelError: layers differ in a setting that mlx-lm has for the whole model only.
    """
    if not any(isinstance(part, dict) for part in rope.values()):
        return _layer_settings(rope)
    whole, local = (
        _layer_settings(rope.get(FULL_ATTENTION) or {}),
        _layer_settings(rope.get(SLIDING_ATTENTION) or {}),
    )
    if rope.keys() == {FULL_ATTENTION}:
        return whole
    # Sliding-window layers have at most their own base, and only the other layers are scaled.
    base, has_own = local.pop("rope_theta", None), "rope_local_base_freq" in known
    is_same = local == {name: value for name, value in whole.items() if name not in BY_LAYER}
    if (
        rope.keys() != {FULL_ATTENTION, SLIDING_ATTENTION}
        or not is_same
        or not (has_own or base == whole.get("rope_theta"))
    ):
        raise ModelError(
            f"{where}: `{ROPE_PARAMETERS}` differ from layer to layer ({', '.join(rope)}) in a "
            "way that mlx-lm cannot represent, so that the model would be a different one; use "
            "another model"
        )
    return whole | ({"rope_local_base_freq": base} if has_own else {})


def _layer_settings(rope: Config) -> dict[str, Any]:
    settings = {
        name: rope[name]
        for name in ("rope_theta", "partial_rotary_factor")
        if rope.get(name) is not None
    }
    if rope.get("rope_type", "default") != "default":
        settings["rope_scaling"] = {k: v for k, v in rope.items() if k not in settings}
    return settings
