import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_dpo.io.atomic import (
    abandoned_paths,
    atomic_file,
    atomic_folder,
    is_temporary,
    other_writer,
    remove_abandoned,
    write_file,
)
from tests.temporary_files import ended_process, temporary_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "a.txt"
    write_file(path, "tschüß\n")
    assert path.read_bytes() == "tschüß\n".encode()
    write_file(path, b"\x00new", durable=True)
    assert path.read_bytes() == b"\x00new"
    assert names(tmp_path) == {"a.txt"}


def test_a_file_gets_the_permissions_of_any_new_file(tmp_path):
    write_file(tmp_path / "atomic", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_temporary_file_keeps_the_suffix(tmp_path):
    """MLX adds `.safetensors` to any other name."""
    with atomic_file(tmp_path / "a.safetensors") as temporary:
        assert temporary.suffix == ".safetensors"
        temporary.write_bytes(b"")


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 120 + ".html"])
def test_a_target_with_the_longest_name_can_be_written(tmp_path, name):
    write_file(tmp_path / name, "x")
    assert names(tmp_path) == {name}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_before_the_rename_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_file(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


@pytest.mark.parametrize("step", ["os.replace", "mlx_dpo.io.atomic.flush"])
def test_a_failure_at_the_end_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path, monkeypatch, step
):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="No space"):
        write_file(path, "new", durable=True)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_the_content_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    order = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr("os.replace", lambda *args: (order.append("replace"), replace(*args)))
    monkeypatch.setattr("os.fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    write_file(tmp_path / "a.txt", "new", durable=True)
    assert order == ["fsync", "replace"]
    order.clear()
    with atomic_folder(tmp_path / "folder", durable=True) as folder:
        (folder / "one").write_text("1")
        (folder / "two").write_text("2")
    assert order == ["fsync", "fsync", "replace", "fsync"]  # two files, the rename itself


def test_a_killed_writer_leaves_the_old_file_and_its_leftover_is_removed_by_the_next(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from mlx_dpo.io.atomic import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('ne')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert path.read_text() == "old"
    [leftover] = names(tmp_path) - {"a.txt"}
    assert is_temporary(tmp_path / leftover)
    write_file(tmp_path / "b.txt", "another target")
    assert leftover in names(tmp_path)
    write_file(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == {"a.txt", "b.txt"}


def test_a_users_files_with_similar_names_are_never_removed(tmp_path):
    """Names that writers used at one time, and others that begin like today's."""
    own = {
        "partial-a.txt",
        ".a.txt.partial",
        ".a.txt.partial-1",
        ".a-1.txt",
        ".mlx-dpo",
        ".mlx-dpo-notes",
        f".mlx-dpo-{ended_process()}-a.txt",
        "mlx-dpo-1-0123abcd-a.txt",
    }
    for name in own:
        (tmp_path / name).write_text("mine")
    (tmp_path / "partial-folder").mkdir()
    (tmp_path / "partial-folder" / "x").write_text("mine")
    write_file(tmp_path / "a.txt", "new")
    with atomic_folder(tmp_path / "folder"):
        pass
    remove_abandoned(tmp_path)
    assert names(tmp_path) == own | {"a.txt", "partial-folder", "folder"}
    assert (tmp_path / "partial-folder" / "x").read_text() == "mine"


def test_a_file_that_a_running_process_writes_is_not_removed(tmp_path):
    path = tmp_path / "a.txt"
    running = temporary_path(path, os.getppid())
    running.write_text("half")
    ended = temporary_path(path, ended_process())
    ended.write_text("half")
    assert abandoned_paths(tmp_path) == [ended]
    assert other_writer(path) == os.getppid()
    assert other_writer(tmp_path / "b.txt") is None
    write_file(path, "new")
    assert names(tmp_path) == {"a.txt", running.name}


def test_two_writers_of_one_file_in_one_process_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_file(path) as first:
        first.write_text("first")
        with atomic_file(path) as second:
            second.write_text("second")
        assert other_writer(path) is None
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert names(tmp_path) == {"a.txt"}


def test_a_leftover_of_an_earlier_process_with_the_same_id_is_abandoned(tmp_path):
    """In a container every start has the same process id."""
    leftover = temporary_path(tmp_path / "a.txt", os.getpid())
    leftover.write_text("half")
    assert abandoned_paths(tmp_path) == [leftover]


def test_a_process_of_another_user_is_running(tmp_path, monkeypatch):
    def refused(process, signal):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.kill", refused)
    temporary_path(tmp_path / "a.txt", 1).write_text("half")
    assert abandoned_paths(tmp_path) == []


def test_a_folder_is_there_when_it_is_complete_and_not_before(tmp_path):
    path = tmp_path / "new" / "folder"
    with atomic_folder(path) as folder:
        (folder / "x").write_text("1")
        assert not path.exists()
    assert (path / "x").read_text() == "1"
    assert names(path.parent) == {"folder"}


def test_a_folder_that_fails_keeps_the_old_one_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(path, overwrite=True) as folder:
        (folder / "x").write_text("ne")
        raise KeyboardInterrupt
    assert (path / "x").read_text() == "old"
    assert names(tmp_path) == {"folder"}


def test_a_folder_takes_the_place_of_another_only_if_that_is_asked_for(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(OSError, match="not empty"), atomic_folder(path) as folder:
        (folder / "new").write_text("new")
    assert names(path) == {"old"} and names(tmp_path) == {"folder"}
    with atomic_folder(path, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert names(path) == {"new"} and names(tmp_path) == {"folder"}


def test_a_missing_folder_is_named_by_the_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "none" / "a.txt", "x")
    assert abandoned_paths(tmp_path / "none") == []
