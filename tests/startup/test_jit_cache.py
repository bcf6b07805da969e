"""The folder of compiled kernels: private, and never the one that all users share."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dpo.models.device import device_kind
from mlx_dpo.startup import jit_cache

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users to tell apart")
needs_compiler = pytest.mark.skipif(
    device_kind() != "cpu" or shutil.which("g++") is None, reason="only the CPU backend compiles"
)

KERNEL = """
import mlx.core as mx
x = mx.compile(lambda x: mx.exp(x) * 2 + mx.abs(x))(mx.arange(3.0) - 1)
mx.eval(x)
print(x.tolist())
"""
EXPECTED = "[1.7357"  # 2 exp(-1) + 1
LIBRARIES = """
for line in open("/proc/self/maps"):
    if "/mlx/" in line and "/cpu/" in line:
        print("loaded", line.split()[-1])
"""
TEMPORARY = "\nimport os, tempfile\nprint(os.environ['TMPDIR'], tempfile.gettempdir())"


def run(program, shared, cache):
    environment = os.environ | {"TMPDIR": str(shared), "MLX_DPO_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A shared folder in which MLX's kernel is replaced by a file that cannot be loaded."""
    shared = tmp_path_factory.mktemp("shared")
    assert run(KERNEL, shared, shared).returncode == 0
    [kernel] = shared.glob("mlx/*/cpu/*.so")
    kernel.write_text("planted")
    return shared


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_kernel_is_loaded_from_the_shared_folder(planted, tmp_path):
    alone = run(KERNEL, planted, tmp_path / "cache")
    assert "Could not load" in alone.stderr  # MLX alone loads what was planted

    program = "import mlx.core, mlx_dpo\n" + KERNEL + LIBRARIES  # even if MLX is imported first
    done = run(program, planted, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(EXPECTED)
    private = f"loaded {tmp_path / 'cache' / 'jit' / 'mlx'}/"
    loaded = done.stdout.splitlines()[1:]
    assert loaded and all(line.startswith(private) for line in loaded)


@needs_compiler
def test_without_any_private_folder_nothing_is_compiled_or_loaded(planted, tmp_path):
    """The cache is a file, and the folder of temporary files belongs to anyone."""
    (tmp_path / "cache").write_text("in the way")
    planted.chmod(0o777)
    done = run("import mlx_dpo\n" + KERNEL, planted, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(EXPECTED)


def test_python_and_its_children_keep_the_users_folder(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    done = run("import mlx_dpo" + TEMPORARY, shared, tmp_path / "cache")
    assert done.stdout.split() == [str(shared), str(shared)]


def test_workers_compile_in_the_private_folder_too(tmp_path):
    program = (
        "import subprocess, sys\nfrom mlx_dpo.startup.jit_cache import user_environment\n"
        "child = 'import os, mlx_dpo, ctypes; g = ctypes.CDLL(None).getenv; "
        'g.restype = ctypes.c_char_p; print(os.environ["TMPDIR"], g(b"TMPDIR").decode())\'\n'
        "subprocess.run([sys.executable, '-c', child], env=user_environment())"
    )
    shared = tmp_path / "shared"
    shared.mkdir()
    done = run("import mlx_dpo\n" + program, shared, tmp_path / "cache")
    assert done.stdout.split() == [str(shared), str(tmp_path / "cache" / "jit")]


# The folder itself


@pytest.fixture
def fresh(monkeypatch):
    """No folder is chosen yet, and MLX of this process goes on with the one that it has."""
    before = jit_cache._folder
    monkeypatch.setattr(jit_cache, "_folder", None)
    yield
    jit_cache._folder = before
    jit_cache.use_private_jit_cache(None)


def test_the_folder_is_private_whatever_the_umask(tmp_path, fresh):
    before = os.umask(0)
    try:
        folder = jit_cache.use_private_jit_cache(tmp_path / "new" / "cache")
    finally:
        os.umask(before)
        (tmp_path / "new").chmod(0o755)
    assert folder is None or stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert jit_cache.is_private(folder)


def is_temporary(folder: Path) -> bool:
    return folder.name.startswith("mlx-dpo-jit-")


def test_a_symbolic_link_is_not_followed(tmp_path, fresh):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "jit").symlink_to(tmp_path / "elsewhere")
    assert is_temporary(jit_cache.use_private_jit_cache(tmp_path))


def test_a_folder_that_others_can_replace_is_not_used(tmp_path, fresh):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert is_temporary(jit_cache.use_private_jit_cache(tmp_path / "open"))


def test_below_a_sticky_folder_it_is_used(tmp_path, fresh):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)
    folder = jit_cache.use_private_jit_cache(tmp_path / "open")
    assert folder == tmp_path / "open" / "jit"


def test_what_others_could_write_is_thrown_away(tmp_path, fresh):
    (tmp_path / "jit").mkdir()
    (tmp_path / "jit").chmod(0o777)
    (tmp_path / "jit" / "planted.so").write_text("")
    folder = jit_cache.use_private_jit_cache(tmp_path)
    assert folder == tmp_path / "jit"
    assert list(folder.iterdir()) == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_of_another_user_is_not_used(tmp_path, fresh, monkeypatch):
    (tmp_path / "jit").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / "jit").stat().st_uid + 1)
    assert not jit_cache.is_private(tmp_path / "jit")


def test_no_home_folder_gives_a_temporary_one(fresh):
    assert is_temporary(jit_cache.use_private_jit_cache(None))
    assert mx.exp(mx.array(0.0)).item() == 1
