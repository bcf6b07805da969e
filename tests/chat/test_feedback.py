import json
from datetime import datetime, timedelta

import pytest

from mlx_dpo.chat.feedback import JsonlFile, pair_row, unpaired_row, utc_timestamp
from mlx_dpo.data.sources import read_rows
from mlx_dpo.errors import DataError
from mlx_dpo.io.locks import lock_file

PROMPT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})


def assistant(text):
    return [{"role": "assistant", "content": text}]


def test_rows_hold_messages_for_a_conversation_and_text_for_a_plain_text_prompt():
    provenance = {"judge": "person"}
    assert pair_row(PROMPT, chosen="a", rejected="b", provenance=provenance) == {
        "prompt": list(PROMPT),
        "chosen": assistant("a"),
        "rejected": assistant("b"),
        "provenance": provenance,
    }
    assert unpaired_row("Once", " upon", good=False, provenance=provenance) == {
        "prompt": "Once", "completion": " upon", "label": False, "provenance": provenance,
    }  # fmt: skip


def test_the_timestamp_is_the_current_time_with_its_time_zone():
    written = datetime.fromisoformat(utc_timestamp())
    assert abs(written - datetime.now().astimezone()) < timedelta(minutes=1)


def test_rows_are_appended_to_an_existing_file(tmp_path):
    file = JsonlFile(tmp_path / "new" / "rows.jsonl")
    assert file.repair() is None
    assert not file.path.parent.exists()
    file.append({"n": 1})
    JsonlFile(file.path).append({"n": "naïve 日本"})
    assert [row.record for row in read_rows(file.path)] == [{"n": 1}, {"n": "naïve 日本"}]


def test_an_incomplete_last_line_is_removed_and_reported(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": 2, "te')
    assert JsonlFile(path).repair() == f"{path}: the last line was incomplete and has been removed"
    assert path.read_text() == '{"n": 1}\n'
    path.write_text('{"n": 1}\n{"n": 2, "te')
    JsonlFile(path).append({"n": 3})
    assert path.read_text() == '{"n": 1}\n{"n": 3}\n'


@pytest.mark.parametrize("line", ["my notes", "[1, 2", '"a'])
def test_a_last_line_that_was_never_a_row_stays(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n' + line)
    for work in (JsonlFile(path).repair, lambda: JsonlFile(path).append({"n": 2})):
        with pytest.raises(DataError, match=r"rows\.jsonl: the last line is not a JSON object"):
            work()
    assert path.read_text() == '{"n": 1}\n' + line


def test_zeros_at_the_end_are_what_did_not_reach_the_disk(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n\0\0\0')
    assert JsonlFile(path).repair() is not None
    assert path.read_bytes() == b'{"n": 1}\n'


def test_a_complete_last_line_without_a_newline_is_not_removed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}')
    assert JsonlFile(path).repair() is None
    JsonlFile(path).append({"n": 2})
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("name", ["rows.json", "rows"])
def test_file_names_without_the_jsonl_suffix_are_rejected(tmp_path, name):
    with pytest.raises(DataError, match=r"written as JSON lines; give a name that ends in `\.json"):
        JsonlFile(tmp_path / name)


def test_a_folder_and_an_unwritable_path_give_a_one_line_error(tmp_path):
    folder = tmp_path / "rows.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match="is a folder; give the name of a file"):
        JsonlFile(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written \(.+\); choose another file"):
        JsonlFile(tmp_path / "file" / "rows.jsonl").append({})


def test_a_row_replaces_those_that_are_outdated_and_no_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\nnot JSON\n{"n": 2}\n[3]\n{"n": 1, "m": 2}\n')
    path.chmod(0o600)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    removed = JsonlFile(link).replace({"n": 4}, lambda row: row["n"] == 1)
    assert removed == [{"n": 1}, {"n": 1, "m": 2}]
    assert path.read_text() == 'not JSON\n{"n": 2}\n[3]\n{"n": 4}\n'
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    assert JsonlFile(path).replace({"n": 5}, lambda row: False) == []
    assert path.read_text().endswith('{"n": 4}\n{"n": 5}\n')


def test_a_crash_while_a_row_is_replaced_loses_none(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n')

    def crash(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(DataError, match="No space left"):
        JsonlFile(path).replace({"n": 3}, lambda row: True)
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rows_are_not_written_to_a_file_that_was_replaced_meanwhile(tmp_path, monkeypatch):
    """A process waits for the lock of a file that another process then replaces."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n')
    lock, replaced = lock_file, []

    def replace_then_lock(file, **options):
        if not replaced:
            replaced.append(path.write_text('{"n": 1}\n'))
            (tmp_path / "other").write_text('{"n": 2}\n')
            (tmp_path / "other").replace(path)
        return lock(file, **options)

    monkeypatch.setattr("mlx_dpo.chat.feedback.lock_file", replace_then_lock)
    JsonlFile(path).append({"n": 3})
    assert path.read_text() == '{"n": 2}\n{"n": 3}\n'


def test_a_file_that_cannot_be_read_while_a_row_is_replaced_is_a_data_error(tmp_path, monkeypatch):
    file = JsonlFile(tmp_path / "rows.jsonl")
    file.append({"a": 1})

    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(JsonlFile, "_repair", fail)
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be written \(Input/output error"):
        file.replace({"a": 2}, lambda row: True)
