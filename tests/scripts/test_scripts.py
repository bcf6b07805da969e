"""The scripts in a copy of the checkout with spaces in its path, and fakes for Python and uv.

The fake `uv` makes real but empty environments and writes down what it was asked.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("scripts/setup", "scripts/demo", "scripts/test", ".ci/run")
EXTRA = "--extra cpu " if platform.system() == "Linux" else ""
RUN, TEST = f"sync --frozen {EXTRA}".strip(), f"sync --frozen {EXTRA}--extra dev"

UV = f"""#!/bin/sh
case "$1" in
--version) exit 0 ;;
venv) exec "{sys.executable}" -m venv --without-pip .venv ;;
esac
echo "$@" >>"$UV_LOG"
echo "Downloading numpy (15.8MiB)"
echo "warning: an odd cache" >&2
[ ! -e fail ] || {{ echo "error: no such wheel" >&2; exit 1; }}
"""

# A Python that runs what it is given on stdin after `{before}`.
PYTHON = """#!/bin/sh
[ "$1" = - ] || exec "{python}" "$@"
exec "{python}" -c 'import sys; {before}; exec(sys.stdin.read())'
"""
OLD = "sys.version_info = (3, 9, 1)"
PYTEST = """import os, sys
print("pytest", *sys.argv[1:])
print("threads", os.environ.get("OPENBLAS_NUM_THREADS"), flush=True)
"""
WITHOUT_VENV = 'sys.modules["ensurepip"] = None'


class Checkout:
    """A copy of the scripts, and what running them does."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout" / "mlx dpo"
        self.bin = folder / "bin"
        self.log = folder / "uv.log"
        self.bin.mkdir()
        for name in (*SCRIPTS, "pyproject.toml", "uv.lock"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)

    def tool(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / script), *args],
            env={"PATH": f"{self.bin}:/usr/bin:/bin", "UV_LOG": str(self.log), **env},
            cwd=self.bin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installs(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def checkout(tmp_path):
    made = Checkout(tmp_path)
    made.tool(made.bin / "uv", UV)
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        made.tool(made.bin / name, PYTHON.format(python=sys.executable, before="pass"))
    return made


def setup(checkout: Checkout, *args: str, **env: str) -> None:
    done = checkout.run("scripts/setup", *args, **env)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_may_be_run_and_parses(script):
    assert os.access(ROOT / script, os.X_OK)
    shell = (ROOT / script).read_text().splitlines()[0].split("/")[-1].split()[-1]
    subprocess.run([shell, "-n", str(ROOT / script)], check=True)


@pytest.mark.parametrize("script", ["scripts/setup", "scripts/test"])
def test_help_installs_nothing(checkout, script):
    done = checkout.run(script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {script} ")
    assert not (checkout.root / ".venv").exists()


def test_an_unknown_argument_is_refused(checkout):
    done = checkout.run("scripts/setup", "--develop")
    assert (done.returncode, checkout.installs()) == (2, [])


def test_a_second_setup_installs_nothing(checkout):
    setup(checkout)
    setup(checkout)
    assert checkout.installs() == [RUN]


def test_what_serves_the_tests_serves_the_demo_but_not_the_reverse(checkout):
    setup(checkout)
    setup(checkout, "--dev")
    setup(checkout)
    setup(checkout, "--dev")
    assert checkout.installs() == [RUN, TEST]


@pytest.mark.parametrize("name", ["pyproject.toml", "uv.lock"])
def test_other_requirements_are_installed_into_the_same_environment(checkout, name):
    setup(checkout)
    marker = checkout.root / ".venv" / "kept"
    marker.touch()
    with (checkout.root / name).open("a") as file:
        file.write("\n")
    setup(checkout)
    assert checkout.installs() == [RUN, RUN]
    assert marker.exists()


def test_setup_shows_downloads_counts_warnings_and_says_what_is_next(checkout):
    done = checkout.run("scripts/setup")
    assert done.stderr.splitlines() == [
        "setup: making .venv (the first time it downloads about 150 MB)",
        "  downloading numpy (15.8MiB)",
        "  1 warning of the installer, in .venv/setup.log",
        "ready: source .venv/bin/activate",
    ]
    assert "warning: an odd cache" in (checkout.root / ".venv/setup.log").read_text()
    assert checkout.run("scripts/setup").stderr == ""  # nothing was done


def test_a_failed_installation_shows_the_error(checkout):
    (checkout.root / "fail").touch()
    done = checkout.run("scripts/setup")
    assert done.returncode == 1
    assert "error: no such wheel\n" in done.stderr
    assert "ready" not in done.stderr


def test_an_interrupted_setup_is_begun_afresh(checkout):
    (checkout.root / "fail").touch()
    assert checkout.run("scripts/setup").returncode != 0
    half = checkout.root / ".venv" / "half"
    half.touch()
    (checkout.root / "fail").unlink()
    setup(checkout)
    assert not half.exists()
    setup(checkout)
    assert checkout.installs() == [RUN, RUN]


def test_a_failed_update_does_not_count_as_the_previous_environment(checkout):
    setup(checkout)
    original = (checkout.root / "uv.lock").read_text()
    (checkout.root / "uv.lock").write_text(original + "\n")
    (checkout.root / "fail").touch()
    assert checkout.run("scripts/setup").returncode != 0
    (checkout.root / "uv.lock").write_text(original)
    (checkout.root / "fail").unlink()
    setup(checkout)
    assert len(checkout.installs()) == 3


def test_a_moved_checkout_gets_a_new_environment(checkout):
    """Scripts in an environment begin with its path."""
    setup(checkout)
    (checkout.root / ".venv" / "kept").touch()
    checkout.root = checkout.root.rename(checkout.root.with_name("elsewhere"))
    setup(checkout)
    assert not (checkout.root / ".venv" / "kept").exists()


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (OLD, "`{python}` is Python 3.9"),
        (WITHOUT_VENV, "`{python}` has no `venv` (Debian, Ubuntu: apt install python3-venv)"),
        ("sys.exit(1)", "`{python}` does not run"),
        (None, "`{python}` not found"),
    ],
)
def test_an_unsupported_python_gives_a_one_line_error_and_writes_nothing(checkout, before, message):
    python = checkout.bin / "my python"
    if before:
        checkout.tool(python, PYTHON.format(python=sys.executable, before=before))
    done = checkout.run("scripts/demo", PYTHON=str(python))
    assert done.returncode == 1
    assert done.stderr == (
        f"setup: no fitting Python ({message.format(python=python)}); "
        "install Python 3.11 or newer, or set `PYTHON`\n"
    )
    assert not (checkout.root / ".venv").exists()


def test_an_unsupported_python_is_skipped_for_a_supported_python(checkout):
    (checkout.bin / "uv").unlink()
    checkout.tool(checkout.bin / "python3.13", "#!/bin/sh\nexit 127\n")
    checkout.tool(checkout.bin / "python3.12", PYTHON.format(python=sys.executable, before=OLD))
    asked = checkout.bin.parent / "asked"
    checkout.tool(
        checkout.bin / "python3.11",
        PYTHON.format(python=sys.executable, before="pass").replace(
            "#!/bin/sh\n", f'#!/bin/sh\necho "$@" >>"{asked}"\ncase $2 in venv) exit 1 ;; esac\n'
        ),
    )
    assert checkout.run("scripts/setup").returncode == 1
    assert asked.read_text().splitlines()[-1] == "-m venv .venv"


def test_an_unknown_mlx_package_is_refused(checkout):
    if platform.system() != "Linux":
        pytest.skip("MLX_DPO_EXTRA chooses among MLX's packages for Linux")
    done = checkout.run("scripts/setup", MLX_DPO_EXTRA="rocm")
    assert done.returncode == 1
    assert done.stderr == (
        "setup: `MLX_DPO_EXTRA` is unknown (`rocm`); use cpu, cuda12 or cuda13\n"
    )


def test_demo_hands_its_arguments_on(checkout):
    setup(checkout)
    checkout.tool(checkout.root / ".venv/bin/mlx-dpo", "#!/bin/sh\nprintf '<%s>' \"$@\"\nexit 3\n")
    done = checkout.run("scripts/demo", "--output", "a run")
    assert (done.returncode, done.stdout) == (3, "<demo><--output><a run>")


@pytest.fixture
def gate(checkout):
    """A checkout whose tools say their name and arguments."""
    setup(checkout, "--dev")
    tools = checkout.root / ".venv/bin"
    for name in ("ruff", "mypy", "lint-imports", "mkdocs"):
        checkout.tool(tools / name, f'#!/bin/sh\necho "{name}" "$@"\n')
    [site] = checkout.root.glob(".venv/lib/python*/site-packages")
    (site / "pytest.py").write_text(PYTEST)
    return checkout


def test_the_gate_is_six_named_steps(gate):
    done = gate.run(".ci/run")
    assert done.returncode == 0
    assert done.stdout.split("\n") == [
        *("", "== ruff format", "ruff format --check ."),
        *("", "== ruff check", "ruff check ."),
        *("", "== mypy", "mypy"),
        *("", "== lint-imports", "lint-imports"),
        *("", "== docs", "mkdocs build --strict --quiet"),
        *("", "== pytest", "pytest -n 2 --dist loadfile", "threads 1", ""),
    ]


def test_the_fast_half_is_the_gate_without_whole_runs(gate):
    whole, fast = gate.run("scripts/test"), gate.run("scripts/test", "--fast")
    assert fast.returncode == 0
    assert fast.stdout == whole.stdout.replace(
        "--dist loadfile", "--dist loadfile -m not slow and not integration"
    )


def test_the_fast_half_takes_no_arguments(gate):
    done = gate.run("scripts/test", "--fast", "-x")
    assert (done.returncode, done.stdout) == (2, "")


def test_the_gate_uses_the_given_number_of_blas_threads(gate):
    done = gate.run("scripts/test", OPENBLAS_NUM_THREADS="4")
    assert done.stdout.endswith("threads 4\n")


def test_the_gate_stops_at_the_first_failure(gate):
    gate.tool(gate.root / ".venv/bin/mypy", "#!/bin/sh\nexit 2\n")
    done = gate.run("scripts/test")
    assert done.returncode == 1
    assert done.stderr == "\n== mypy failed\n"
    assert "lint-imports" not in done.stdout


def test_a_failing_pytest_fails_the_gate(gate):
    [module] = gate.root.glob(".venv/lib/python*/site-packages/pytest.py")
    module.write_text("raise SystemExit(1)\n")
    assert gate.run(".ci/run").returncode == 1
    assert gate.run("scripts/test", "-x").returncode == 1


def test_arguments_run_pytest_alone(gate):
    done = gate.run("scripts/test", "-k", "logps or losses")
    assert done.stdout == "pytest -k logps or losses\nthreads None\n"
