import json
from datetime import datetime, timedelta

import pytest

from mlx_dpo.chat.feedback import JsonlFile, pair_row, unpaired_row, utc_timestamp
from mlx_dpo.data.sources import read_rows
from mlx_dpo.errors import DataError

ASKED = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})


def said(text):
    return [{"role": "assistant", "content": text}]


def test_rows_of_a_conversation_are_messages_and_those_of_a_text_are_text():
    told = {"judge": "person"}
    assert pair_row(ASKED, chosen="a", rejected="b", provenance=told) == {
        "prompt": list(ASKED), "chosen": said("a"), "rejected": said("b"), "provenance": told,
    }  # fmt: skip
    assert unpaired_row("Once", " upon", good=False, provenance=told) == {
        "prompt": "Once", "completion": " upon", "label": False, "provenance": told,
    }  # fmt: skip


def test_the_time_of_a_row_is_now_and_says_its_zone():
    assert abs(datetime.fromisoformat(utc_timestamp()) - datetime.now().astimezone()) < timedelta(
        minutes=1
    )


def test_rows_are_appended_to_what_is_there(tmp_path):
    journal = JsonlFile(tmp_path / "new" / "rows.jsonl")
    assert journal.mend() is None
    assert not journal.path.parent.exists()
    journal.append({"n": 1})
    JsonlFile(journal.path).append({"n": "naïve 日本"})
    assert [row.record for row in read_rows(journal.path)] == [{"n": 1}, {"n": "naïve 日本"}]


def test_a_line_that_was_never_finished_is_taken_off_and_said(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n{"n": 2, "te')
    assert JsonlFile(path).mend() == f"{path}: the last line was never finished; it is taken off"
    assert path.read_text() == '{"n": 1}\n'
    path.write_text('{"n": 1}\n{"n": 2, "te')
    JsonlFile(path).append({"n": 3})
    assert path.read_text() == '{"n": 1}\n{"n": 3}\n'


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}')
    assert JsonlFile(path).mend() is None
    JsonlFile(path).append({"n": 2})
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("name", ["rows.json", "rows"])
def test_other_endings_are_refused_before_anything_is_asked(tmp_path, name):
    with pytest.raises(DataError, match=r"rows are written one a line; give a name in `\.jsonl`"):
        JsonlFile(tmp_path / name)


def test_a_folder_and_a_place_that_cannot_be_written_are_one_line(tmp_path):
    folder = tmp_path / "rows.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match="is a folder; give the name of a file"):
        JsonlFile(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written \(.+\); choose another file"):
        JsonlFile(tmp_path / "file" / "rows.jsonl").append({})
