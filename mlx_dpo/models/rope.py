"""How positions are turned: `rope_parameters`, as transformers writes it since version 5, under
the names that mlx-lm reads.

Most architectures of mlx-lm pass over `rope_parameters` and take their own default instead: a
model that is wrong, and says nothing. Knows configurations; nothing of weights.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any
from mlx_lm import utils as mlx_lm
from mlx_dpo.errors import ModelError


Config = Mapping[str, Any]
ROPE_PARAMETERS = "rope_parameters"
MLX_LM_NAMES = {  # those that mlx-lm's architectures have for it
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct", "rope_pct"),
    "rope_scaling": ("rope_scaling",),
    "rope_local_base_freq": ("rope_local_base_freq",),
}
DEFAULTS = {"partial_rotary_factor": 1.0}  # as of an architecture that has no name for it
BY_LAYER = ("rope_theta", "rope_scaling")
FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"  # kinds of layers that may differ


def rope_overrides(entries: Config, source: str) -> dict[str, Any]:
    """What mlx-lm would overlook in these `entries` of `config.json`, as it wants it: entries to
    be put beside them.

    Raises:
        ModelError: its architecture has no name for it.
    """
    if "model_file" in entries:
        return {}  # an architecture of the model's own
    found = _overrides(entries, source)
    part = entries.get("text_config")
    if isinstance(part, dict) and "model_type" in part and (more := _overrides(part, source)):
        found["text_config"] = part | more
    return found


def rope_notes(entries: Config, source: str) -> tuple[str, ...]:
    """A line for a person, if mlx-lm would overlook something."""
    found = rope_overrides(entries, source)
    part = found.pop("text_config", {})
    own = {name: part[name] for names in MLX_LM_NAMES.values() for name in names if name in part}
    said = ", ".join(f"`{name}` {value}" for name, value in (found | own).items())
    if not said:
        return ()
    return (
        f"{said}: from `{ROPE_PARAMETERS}`, which mlx-lm by itself would not read in this model; "
        "`mlx-dpo convert` writes it where it does",
    )


def _overrides(entries: Config, source: str) -> dict[str, Any]:
    rope = entries.get(ROPE_PARAMETERS)
    if not isinstance(rope, dict) or not rope:
        return {}
    try:
        _, settings = mlx_lm._get_classes(dict(entries))
    except ValueError:
        return {}  # a part of another model, which reads it as it likes
    known = {field.name for field in fields(settings)}
    if ROPE_PARAMETERS in known:
        return {}
    wanted = _legacy_settings(rope, known, f"{source}/config.json")
    found = {}
    for name, value in wanted.items():
        if own := next((own for own in MLX_LM_NAMES[name] if own in known), None):
            if entries.get(own) != value:
                found[own] = value
        elif value != (entries.get("attn_config") or DEFAULTS).get(name):  # DBRX has its own place
            raise ModelError(
                f"{source}/config.json: mlx-lm's `{entries.get('model_type')}` knows no `{name}` "
                f"(`{ROPE_PARAMETERS}` has {value}), so that it would be another model; take another one"
            )
    return found


def _legacy_settings(rope: Config, known: set[str], where: str) -> dict[str, Any]:
    """By the names of earlier versions of transformers."""
    if not any(isinstance(part, dict) for part in rope.values()):
        return _layer_settings(rope)
    whole, local = _layer_settings(rope.get(FULL_ATTENTION) or {}), _layer_settings(rope.get(SLIDING_ATTENTION) or {})
    if rope.keys() == {FULL_ATTENTION}:
        return whole
    # Layers that see little have at most a base of their own, and the others alone are scaled.
    base, has_own = local.pop("rope_theta", None), "rope_local_base_freq" in known
    alike = local == {name: value for name, value in whole.items() if name not in BY_LAYER}
    if rope.keys() != {FULL_ATTENTION, SLIDING_ATTENTION} or not alike or not (has_own or base == whole.get("rope_theta")):
        raise ModelError(
            f"{where}: `{ROPE_PARAMETERS}` differ from layer to layer ({', '.join(rope)}) in a way for which "
            "mlx-lm has no room, so that it would be another model; take another one"
        )
    return whole | ({"rope_local_base_freq": base} if has_own else {})


def _layer_settings(rope: Config) -> dict[str, Any]:
    found = {
        name: rope[name]
        for name in ("rope_theta", "partial_rotary_factor")
        if rope.get(name) is not None
    }
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {k: v for k, v in rope.items() if k not in found}
    return found
