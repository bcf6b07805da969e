"""Find the modules of a model that the names in `lora_target_modules` match.

As in mlx-lm's `keys`, a module inside the transformer blocks is named relative to its block
(`self_attn.q_proj`), and a module outside of the blocks by its full path in the model.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.adapters.layers import EMBEDDING_TYPES, EXPERT_TYPES, LINEAR_TYPES
from mlx_dpo.errors import ConfigError


@dataclass(frozen=True)
class TargetModule:
    """A module that `lora_target_modules` can select, for LoRA or for full fine-tuning."""

    path: str  # from the model
    name: str  # from its block; outside of the blocks, the path
    in_block: bool
    selected_by_default: bool  # otherwise only if a target names it

    def matches(self, target: str) -> bool:
        """Return whether `target` is the module's path, its name, or the last parts of its name."""
        return target in (self.path, self.name) or self.name.endswith("." + target)


def block_paths(model: nn.Module) -> list[str]:
    """Return the path of each transformer block, in order.

    A block that the model uses several times is listed once.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    return list(dict.fromkeys(paths[id(block)] for block in model.layers))


def adaptable_modules(model: nn.Module) -> list[TargetModule]:
    """Return the modules that an adapter can be added to.

    By default, these are the linear layers inside the blocks. Left out are those whose weight the
    model's code reads: with an adapter, a layer can only be called.
    """
    read = _layers_with_read_weight(model)

    def selected_by_default(module: nn.Module) -> bool | None:
        if isinstance(module, LINEAR_TYPES):
            return id(module) not in read
        return False if isinstance(module, EXPERT_TYPES + EMBEDDING_TYPES) else None

    return list(_find_modules(model, selected_by_default))


def _layers_with_read_weight(model: nn.Module) -> set[int]:
    """Return the ids of the layers whose weight the code of the model reads, such as `gate.weight`.

    An example is `altup.prediction_coefs` of gemma3n.
    """
    read = set()
    for module in model.modules():
        names = {n for kind in type(module).__mro__ for n in _read_weights(kind)}
        if names:
            read |= {
                id(layer)
                for path, layer in module.named_modules()
                if path.rpartition(".")[2] in names
            }
    return read


def _read_weights(kind: type) -> frozenset[str]:
    """Return the names of the layers whose weight is read by the methods of the class `kind`."""
    if kind.__module__.startswith("mlx.") or kind.__module__ == "builtins":
        return frozenset()
    return _read_weights_by_class(kind.__module__).get(kind.__name__, frozenset())


@cache
def _read_weights_by_class(module: str) -> dict[str, frozenset[str]]:
    """Return the names of the layers whose weight is read, for each class of a Python module.

    `__init__` and `sanitize` are left out, which run before there are adapters.
    """
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError):  # no source, as in a notebook
        return {}
    return {
        node.name: frozenset(
            read.value.attr
            for method in node.body
            if isinstance(method, ast.FunctionDef) and method.name not in ("__init__", "sanitize")
            for read in ast.walk(method)
            if isinstance(read, ast.Attribute) and read.attr == "weight"
            if isinstance(read.value, ast.Attribute)
        )
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of the linear layers inside the blocks, without repeats.

    The names are relative to the layer's block, such as `self_attn.q_proj`.
    """
    modules = adaptable_modules(model)
    return list(dict.fromkeys(module.name for module in modules if module.selected_by_default))


def trainable_modules(model: nn.Module) -> list[TargetModule]:
    """Return the modules that full fine-tuning can train.

    Without `lora_target_modules`, all transformer blocks are selected.
    """

    def selected_by_default(module: nn.Module) -> bool | None:
        return False if any(isinstance(value, mx.array) for value in module.values()) else None

    paths = block_paths(model)
    blocks = [TargetModule(path, path, in_block=True, selected_by_default=True) for path in paths]
    parts = [  # `mlp` has no weights of its own, but names all layers inside
        TargetModule(f"{path}.{name}", name, in_block=True, selected_by_default=False)
        for path, block in zip(paths, _blocks(model), strict=True)
        for name, module in block.named_modules()
        if name and any(True for _ in _arrays(module))
    ]
    outside = [
        module for module in _find_modules(model, selected_by_default) if not module.in_block
    ]
    return blocks + parts + outside


def has_tied_embeddings(model: nn.Module) -> bool:
    """Return whether the LM head shares its weight with the token embedding.

    The weight counts as shared if the model has no linear layer outside of the blocks.
    """
    prefixes = tuple(f"{path}." for path in block_paths(model))
    return not any(
        isinstance(module, LINEAR_TYPES) and not path.startswith(prefixes)
        for path, module in model.named_modules()
    )


def _arrays(module: nn.Module) -> Iterator[mx.array]:
    for part in module.modules():
        yield from (value for value in part.values() if isinstance(value, mx.array))


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list({id(block): block for block in model.layers}.values())


def _find_modules(
    model: nn.Module, selected_by_default: Callable[[nn.Module], bool | None]
) -> Iterator[TargetModule]:
    """Yield the modules that can be selected, first those inside the transformer blocks.

    Args:
        selected_by_default: Takes a module. Returns None if the module cannot be selected,
            otherwise whether it is selected when no target is named. Modules outside of the blocks
            are never selected by default.
    """
    paths = block_paths(model)
    for path, block in zip(paths, _blocks(model), strict=True):
        for name, module in block.named_modules():
            if (flag := selected_by_default(module)) is not None:
                yield TargetModule(f"{path}.{name}", name, in_block=True, selected_by_default=flag)
    prefixes = tuple(f"{path}." for path in paths)
    for path, module in model.named_modules():
        is_outside = not path.startswith(prefixes) and path not in paths
        if is_outside and selected_by_default(module) is not None:
            yield TargetModule(path, path, in_block=False, selected_by_default=False)


def select_modules(
    model: nn.Module,
    modules: Sequence[TargetModule],
    targets: Sequence[str],
    num_layers: int | None,
) -> list[str]:
    """Return the paths of the modules that match `targets`, or of the modules selected by default.

    Modules inside the blocks are selected only in the last `num_layers` blocks.

    Raises:
        ConfigError: a target matches nothing, or `num_layers` has no effect or exceeds the number
            of blocks.
    """
    blocks = block_paths(model)
    if num_layers is not None and num_layers > len(blocks):
        raise ConfigError(f"`num_layers` is {num_layers}, but the model has {len(blocks)} layers")
    frozen = tuple(f"{path}." for path in blocks[: len(blocks) - (num_layers or len(blocks))])
    reached = [module for module in modules if not f"{module.path}.".startswith(frozen)]
    matches = {target: [m for m in reached if m.matches(target)] for target in targets}
    for target, matched in matches.items():
        if not matched:
            raise ConfigError(_no_match_message(target, modules, num_layers))
    if not targets:
        return [module.path for module in reached if module.selected_by_default]
    selected = [m for m in reached if any(m in matches[target] for target in targets)]
    if num_layers is not None and not any(module.in_block for module in selected):
        raise ConfigError("`num_layers` has no effect: no target module is inside the layers")
    return [module.path for module in selected]


def _no_match_message(target: str, modules: Sequence[TargetModule], num_layers: int | None) -> str:
    def listed(names: Iterable[str]) -> str:
        return ", ".join(sorted(set(names)))

    where = f"the last {num_layers} blocks of this model" if num_layers else "this model"
    inside = listed(m.name for m in modules if m.in_block and m.name != m.path)
    outside = listed(m.name for m in modules if not m.in_block)
    return (
        f"`lora_target_modules`: `{target}` matches no trainable module of {where}; it "
        f"has {inside}" + (f"; outside the layers {outside}" if outside else "")
    )


def mlx_lm_keys(model: nn.Module, paths: Sequence[str]) -> tuple[int, list[str]]:
    """Return mlx-lm's settings `num_layers` and `keys` that select exactly the layers at `paths`.

    The keys are names relative to a block (such as `self_attn.q_proj`) if `paths` contains every
    layer with such a name in the last `num_layers` blocks. Otherwise they are full paths.
    """
    blocks = block_paths(model)
    owners = {path: block for path in paths for block in blocks if path.startswith(block + ".")}
    if not owners:
        return len(blocks), list(paths)
    names = list(dict.fromkeys(path.removeprefix(block + ".") for path, block in owners.items()))
    last = blocks[min(blocks.index(block) for block in owners.values()) :]
    existing = {path for path, _ in model.named_modules()}
    same_names = {f"{block}.{name}" for block in last for name in names} & existing
    if same_names != owners.keys():
        return len(blocks), list(paths)
    return len(last), names + [path for path in paths if path not in owners]
