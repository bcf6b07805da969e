"""Which parts of a model a name means: inside the blocks, or outside by their whole path.

As in mlx-lm's `keys`: a name inside the blocks is relative to its block, one outside is the
path from the model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters.layers import EMBEDDING_TYPES, EXPERT_TYPES, LINEAR_TYPES
from mlx_dpo.errors import ConfigError


@dataclass(frozen=True)
class TargetModule:
    """A part of the model that may be trained."""

    path: str  # from the model
    name: str  # from its block; outside of the blocks, the path
    inside: bool
    asked: bool  # only if it is named

    def is_meant(self, target: str) -> bool:
        """Whether `target` is its path, its name, or the name's last parts."""
        return target in (self.path, self.name) or self.name.endswith("." + target)


def block_paths(model: nn.Module) -> list[str]:
    """The path of each block, in order, each once."""
    paths = {id(module): path for path, module in model.named_modules()}
    return list(dict.fromkeys(paths[id(block)] for block in model.layers))


def adaptable_modules(model: nn.Module) -> list[TargetModule]:
    """The layers that adapters are known for, or that count as linear."""

    def asked(module: nn.Module) -> bool | None:
        if isinstance(module, LINEAR_TYPES):
            return False
        return True if isinstance(module, EXPERT_TYPES + EMBEDDING_TYPES) else None

    return list(_find_modules(model, asked))


def linear_names(model: nn.Module) -> list[str]:
    """Paths of the linear layers inside the blocks, relative to their block, without repeats."""
    return list(dict.fromkeys(place.name for place in adaptable_modules(model) if not place.asked))


def trainable_modules(model: nn.Module) -> list[TargetModule]:
    """Every part of the model that holds weights; the blocks' whole ones are not asked for."""

    def asked(module: nn.Module) -> bool | None:
        return True if any(isinstance(value, mx.array) for value in module.values()) else None

    paths = block_paths(model)
    blocks = [TargetModule(path, path, inside=True, asked=False) for path in paths]
    parts = [  # `mlp` has no weights of its own, but is a name for all of its layers'
        TargetModule(f"{path}.{name}", name, inside=True, asked=True)
        for path, block in zip(paths, _blocks(model), strict=True)
        for name, module in block.named_modules()
        if name and any(True for _ in _arrays(module))
    ]
    return blocks + parts + [place for place in _find_modules(model, asked) if not place.inside]


def has_tied_embeddings(model: nn.Module) -> bool:
    """Whether the head is the table of embeddings: no other product lies outside of the blocks."""
    inside = tuple(f"{path}." for path in block_paths(model))
    modules = model.named_modules()
    return not any(
        isinstance(m, LINEAR_TYPES) and not path.startswith(inside) for path, m in modules
    )


def _arrays(module: nn.Module) -> Iterator[mx.array]:
    for part in module.modules():
        yield from (value for value in part.values() if isinstance(value, mx.array))


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list({id(block): block for block in model.layers}.values())


def _find_modules(
    model: nn.Module, asked: Callable[[nn.Module], bool | None]
) -> Iterator[TargetModule]:
    """The modules for which `asked` is not None, inside the blocks first."""
    paths = block_paths(model)
    for path, block in zip(paths, _blocks(model), strict=True):
        for name, module in block.named_modules():
            if (only := asked(module)) is not None:
                yield TargetModule(f"{path}.{name}", name, inside=True, asked=only)
    within = tuple(f"{path}." for path in paths)
    for path, module in model.named_modules():
        if not path.startswith(within) and path not in paths and asked(module) is not None:
            yield TargetModule(path, path, inside=False, asked=True)


def select_modules(
    model: nn.Module, places: Sequence[TargetModule], targets: Sequence[str], num_layers: int | None
) -> list[str]:
    """Paths of what `targets` mean within the last `num_layers` blocks and outside of the blocks;
    without targets, of what needs no naming.

    Raises:
        ConfigError: a target means nothing, or `num_layers` is more than there are or idle.
    """
    blocks = block_paths(model)
    if num_layers is not None and num_layers > len(blocks):
        raise ConfigError(f"`num_layers` is {num_layers}, but the model has {len(blocks)} layers")
    left = tuple(f"{path}." for path in blocks[: len(blocks) - (num_layers or len(blocks))])
    reached = [place for place in places if not f"{place.path}.".startswith(left)]
    found = {target: [p for p in reached if p.is_meant(target)] for target in targets}
    for target, meant in found.items():
        if not meant:
            raise ConfigError(_no_match_message(target, places, num_layers))
    if not targets:
        return [place.path for place in reached if not place.asked]
    meant = [place for place in reached if any(place in found[target] for target in targets)]
    if num_layers is not None and not any(place.inside for place in meant):
        raise ConfigError("`num_layers` has no effect: no target is inside the blocks")
    return [place.path for place in meant]


def _no_match_message(target: str, places: Sequence[TargetModule], num_layers: int | None) -> str:
    def listed(names: Iterable[str]) -> str:
        return ", ".join(sorted(set(names)))

    where = f"the last {num_layers} blocks of this model" if num_layers else "this model"
    outside = listed(place.name for place in places if not place.inside)
    return (
        f"`lora_target_modules`: `{target}` matches nothing that can be trained in {where}; it "
        f"has {listed(p.name for p in places if p.inside and p.name != p.path)}"
        + (f"; outside of the blocks {outside}" if outside else "")
    )


def mlx_lm_keys(model: nn.Module, paths: Sequence[str]) -> tuple[int, list[str]]:
    """mlx-lm's `num_layers` and `keys` under which it adapts exactly these paths.

    Names relative to the blocks where the last blocks have them all, else the paths.
    """
    blocks = block_paths(model)
    owner = {path: block for path in paths for block in blocks if path.startswith(block + ".")}
    if not owner:
        return len(blocks), list(paths)
    names = list(dict.fromkeys(path.removeprefix(block + ".") for path, block in owner.items()))
    last = blocks[min(blocks.index(block) for block in owner.values()) :]
    present = {path for path, _ in model.named_modules()}
    alike = {f"{block}.{name}" for block in last for name in names} & present
    if alike != owner.keys():
        return len(blocks), list(paths)
    return len(last), names + [path for path in paths if path not in owner]
