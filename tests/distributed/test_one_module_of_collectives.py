"""MLX's collective operations are used in one module, and never inside a graph."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mlx_dpo"
MODULE = PACKAGE / "distributed" / "ranks.py"


def test_one_module_says_mx_distributed():
    found = [
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if "mx.distributed" in (text := file.read_text()) or "mlx.core.distributed" in text
    ]
    assert found == ["distributed/ranks.py"]


# Functions of MLX that communicate, most of them inside a graph.
COMMUNICATING = {
    "distributed", "average_gradients", "fully_shard", "fsdp_apply_gradients", "sum_gradients",
    "shard_linear", "shard_inplace",
}  # fmt: skip


def used_names(file):
    """Yield the names that a file imports from `mlx`, and the attributes of `mx` and `nn`."""
    text = file.read_text()
    if not any(name in text for name in COMMUNICATING):  # parsing takes longer
        return
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Attribute(value=ast.Name(id="mx" | "nn"), attr=name):
                yield name
            case ast.ImportFrom(module=str(module), names=names) if module.startswith("mlx."):
                yield from (alias.name for alias in names)


def test_no_other_module_uses_functions_of_mlx_that_communicate():
    found = {
        str(file.relative_to(PACKAGE)): sorted(names)
        for file in PACKAGE.rglob("*.py")
        if (names := COMMUNICATING & set(used_names(file)))
    }
    # `attach.py` names the types of MLX's tensor-parallel layers, to refuse them.
    assert found == {"distributed/ranks.py": ["distributed"], "adapters/attach.py": ["distributed"]}


def test_each_collective_operation_is_evaluated_before_the_function_returns():
    """Metal ends a command that waits for the network; the order of two in a graph is open."""
    functions = [
        node
        for node in ast.walk(ast.parse(MODULE.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("mx.distributed.all_" in ast.unparse(part) for part in ast.walk(node))
    ]
    assert functions, "no collective operation is in the module that has all of them"
    for function in functions:
        calls = [ast.unparse(n) for n in ast.walk(function) if isinstance(n, ast.Call)]
        collectives = [c for c in calls if c.startswith("mx.distributed.all_")]
        assert len(collectives) == 1, f"{function.name} has {len(collectives)} operations"
        text = ast.unparse(function)
        at = text.index(collectives[0])
        assert text.find("mx.eval(mine)") in range(at), f"{function.name}: payload not evaluated"
        assert "mx.eval(rows)" in text[at:], f"{function.name}: result not evaluated"
