"""`POST /v1/feedback` of a running server, with OpenAI's client, and training on what it wrote."""

import json
from pathlib import Path

import openai
import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from tests.checkpoints import make_adapter, make_checkpoint
from tests.served import send, served


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("feedback") / "base"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("rows") / "judged.jsonl"


@pytest.fixture(scope="module")
def address(model, file, tmp_path_factory):
    adapter = str(make_adapter(tmp_path_factory.mktemp("adapter"), model))
    flags = ("--model", model, "--adapter", adapter, "--feedback", str(file))
    with served(*flags, MLX_DISABLE_COMPILE="1") as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def ask(client, question, **settings):
    return client.chat.completions.create(
        model="aligned", messages=[{"role": "user", "content": question}], max_tokens=6,
        temperature=0, **settings,
    )  # fmt: skip


def judge(client, **body):
    return client.post("/feedback", body=body, cast_to=dict[str, object])


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_are_judged_by_id_and_the_rows_train(client, file, model, tmp_path):
    whole = ask(client, "Where is the cat?")
    assert judge(client, id=whole.id, rating="bad")["replaced"] is False
    assert judge(client, id=whole.id, rating="good", comment="yes")["replaced"] is True
    [row] = rows(file)
    assert row["prompt"] == [{"role": "user", "content": "Where is the cat?"}]
    assert row["completion"][0]["content"] == whole.choices[0].message.content
    assert (row["label"], row["provenance"]["comment"]) == (True, "yes")
    assert row["provenance"]["side"] == "aligned"
    assert row["provenance"]["sampling"]["max_tokens"] == 6

    chunks = list(ask(client, "Who sat?", stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert judge(client, id=chunks[0].id, edited="The cat sat.")["rating"] == "edited"
    assert [(row["completion"][0]["content"], row["label"]) for row in rows(file)[1:]] == [
        (text, False), ("The cat sat.", True),
    ]  # fmt: skip

    command = ["train", str(file), "--model", model, "--loss-type", "kto", "--max-steps", "1"]
    command += ["--batch-size", "3", "--valid-fraction", "0", "--output", str(tmp_path / "run")]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    [report] = json.loads((tmp_path / "run" / "run.json").read_text())["pairs"]
    assert (report["kept"], report["desirable"]) == (3, 2)


def test_an_unknown_answer_is_404_and_a_continued_text_is_not_remembered(client, address):
    with pytest.raises(openai.NotFoundError, match="no such answer"):
        judge(client, id="chatcmpl-none", rating="good")
    text = client.completions.create(model="base", prompt="The cat", max_tokens=3)
    with pytest.raises(openai.NotFoundError, match="no such answer"):
        judge(client, id=text.id, rating="good")
    assert send(address, "feedback", method="GET")[0] == 405
    body = b'{"id": "x", "rating": "good"}'
    assert send(address, "feedback", body, Origin="http://evil.example")[0] == 403
    assert send(address, "feedback", body, Host="evil.example")[0] == 403
    status, text = send(address, "feedback", b'{"id": "x", "ratng": "good"}')
    assert status == 400
    assert json.loads(text)["error"]["param"] == "ratng"


def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path):
    done = CliRunner().invoke(cli, ["serve", "--model", "none", "--feedback", "rows.txt"])
    assert done.exit_code == 1
    assert "give a name that ends in `.jsonl`" in done.output
    Path(tmp_path / "old.jsonl").write_text('{"n": 1}\n{"n"')
    done = CliRunner().invoke(
        cli, ["serve", "--model", "none", "--feedback", str(tmp_path / "old.jsonl")]
    )
    assert "the last line was incomplete and has been removed" in done.output
