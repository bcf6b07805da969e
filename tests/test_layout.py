"""Rules of the package's layout: layers, sizes, import circles, help, and what is shipped."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from mlx_dpo.cli import COMMANDS
from mlx_dpo.trackers import TRACKERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_dpo"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
FILES = sorted(PACKAGE.rglob("*.py"))


def test_no_file_is_longer_than_450_lines():
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in FILES}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_no_package_but_the_command_line_has_more_than_ten_files():
    sizes = Counter(
        str(f.parent.relative_to(ROOT))
        for f in FILES
        if f.name != "__init__.py" and f.parent != PACKAGE / "cli"
    )
    assert {package: size for package, size in sizes.items() if size > 10} == {}


def test_no_two_test_modules_have_the_same_name():
    """pytest refuses to collect the second one, and with it the whole suite."""
    counts = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in counts.items() if count > 1] == []


def test_the_import_contract_covers_every_package():
    [contract] = PROJECT["tool"]["importlinter"]["contracts"]
    covered = {name for layer in contract["layers"] for name in layer.split(" | ")}
    packages = {f.relative_to(PACKAGE).parts[0].removesuffix(".py") for f in FILES}
    assert covered == packages - {"__init__"}
    assert contract["exhaustive"] is True


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(file: Path, modules: set[str]) -> set[str]:
    """Return all modules of the package that a file imports, anywhere in it and for any reason."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in modules else node.module)
    return (names & modules) - {"mlx_dpo"}  # its public names are imported when first used


def test_no_modules_import_each_other_in_a_circle():
    """Imports for type checkers and imports inside functions count as well."""
    modules = {module_name(f) for f in FILES}
    sorter = TopologicalSorter({module_name(f): imported_modules(f, modules) for f in FILES})
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nothing_is_named_for_what_it_is_not():
    names = {f.stem for f in FILES} | {f.parent.name for f in FILES}
    assert names & {"utils", "util", "helpers", "common", "misc"} == set()


def test_every_library_that_is_imported_is_declared():
    """What only another library asks for may be gone with its next release."""
    imported = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    declared = {Requirement(line).name.lower() for line in PROJECT["project"]["dependencies"]}
    modules = {"pyyaml": "yaml", "markdown-it-py": "markdown_it"}
    names = {modules.get(name, name.replace("-", "_")) for name in declared} | {"mlx_dpo"}
    optional = {tracker.library for tracker in TRACKERS.values()} | {"lm_eval"}
    assert imported - sys.stdlib_module_names == names | optional


def test_the_architecture_page_names_every_package():
    page = (ROOT / "docs" / "architecture.md").read_text()
    packages = {f.relative_to(PACKAGE).parts[0] for f in FILES} - {"__init__.py"}
    named = {name.rstrip("/") for name in re.findall(r"`([a-z]\w*(?:\.py|/))`", page)}
    assert packages - named == set()


def test_help_loads_no_model_library():
    """They cost seconds; whoever asks for help should not pay them."""
    program = """
import sys
from mlx_dpo.cli import COMMANDS, cli
for words in ([], *([name] for name in COMMANDS)):
    cli.main([*words, "--help"], standalone_mode=False)
sys.exit(", ".join({"mlx_lm", "transformers", "huggingface_hub"} & sys.modules.keys()) or None)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: ") == 1 + len(COMMANDS)


def test_every_backend_has_its_extra_and_they_exclude_each_other():
    extras = PROJECT["project"]["optional-dependencies"]
    backends = {"cpu", "cuda12", "cuda13"}
    assert extras.keys() == backends | {"dev", "tasks"} | TRACKERS.keys()
    [conflict] = PROJECT["tool"]["uv"]["conflicts"]
    assert {entry["extra"] for entry in conflict} == backends


@pytest.mark.parametrize("name", TRACKERS)
def test_every_tracker_has_its_extra(name):
    wanted = PROJECT["project"]["optional-dependencies"][name]
    assert TRACKERS[name].library in {Requirement(line).name for line in wanted}


def requirement(name: str, specifier: str, extra: str) -> tuple[str, str, str]:
    return re.sub(r"[-_.]+", "-", name).lower(), specifier, extra


def test_the_lock_was_made_from_these_requirements():
    project = PROJECT["project"]
    declared = {"": project["dependencies"], **project["optional-dependencies"]}
    wanted = {
        requirement(r.name, str(r.specifier), extra)
        for extra, lines in declared.items()
        for r in map(Requirement, lines)
    }
    [own] = [package for package in LOCK["package"] if package["name"] == "mlx-dpo"]
    locked = set()
    for entry in own["metadata"]["requires-dist"]:
        found = re.search(r"extra == '(\w+)'", entry.get("marker", ""))
        extra = found.group(1) if found else ""
        locked.add(requirement(entry["name"], entry.get("specifier", ""), extra))
    assert locked == wanted
    assert own["version"] == project["version"]


def test_the_lock_names_the_public_index_only():
    indexes = {package["source"].get("registry", "") for package in LOCK["package"]}
    assert indexes == {"https://pypi.org/simple", ""}  # the project itself has none


def package_files():
    """Return every file of the package, templates and other data included."""
    return {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_and_the_model_that_ships(tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    assert "mlx_dpo/reporting/templates/base.html" in package_files()
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert package_files() <= names
    folder = ROOT / "models" / "tiny-chat"
    model = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= model
    assert {f"mlx_dpo/shipped/tiny-chat/{name}" for name in model} <= names
    assert "mlx_dpo/shipped/examples/pairs.jsonl" in names


def test_the_source_distribution_holds_the_package(tmp_path):
    from hatchling.builders.sdist import SdistBuilder

    [sdist] = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() <= names
