"""Uploads with the real `huggingface_hub` to a fake Hub: complete ones, or none."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from mlx_dpo.errors import ConfigError, ModelError, RunError
from mlx_dpo.hub import push as hub
from mlx_dpo.hub.push import prepare_upload
from mlx_dpo.hub.run_card import make_run_card, write_card
from tests.edited_files import edit, read_entries, write_edited
from tests.hub.test_secret_scan import png

NAME = "org/adapter"
UPLOADED = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapters.safetensors",
    "curves.png",
]
SECRET = "hf_" + "A1b2C3d4" * 5


@pytest.fixture
def run_with_card(workplace):
    card, _ = make_run_card("run", NAME, base="org/base")
    write_card(Path("run"), card, overwrite=False)
    return workplace


def push_run(also=(), **options):
    upload = prepare_upload("run", also)
    options = {"message": upload.message, "public": False, "overwrite": False} | options
    return hub.push(upload.files, NAME, **options)


def test_the_files_arrive_unchanged_in_one_commit_of_a_private_repository(run_with_card, fake_hub):
    result = push_run()
    assert result.is_new
    assert result.url == f"{fake_hub.address}/{NAME}"
    assert fake_hub.repos[NAME]["private"] is True
    [(message, files)] = fake_hub.repos[NAME]["commits"]
    assert sorted(files) == sorted(UPLOADED)
    for name, data in files.items():
        assert data == (run_with_card / "run" / name).read_bytes()
    from mlx_dpo.adapters.adapter_files import adapter_digest

    assert adapter_digest(run_with_card / "run")[:12] in message


def test_pairs_records_checkpoints_and_logs_are_not_sent(run_with_card, fake_hub):
    shutil.copyfile("pairs.jsonl", "run/pairs.jsonl")
    (run_with_card / "run" / "notes.md").write_text("something private, 4711")
    push_run()
    assert sorted(fake_hub.files(NAME)) == sorted(UPLOADED)
    for private in (b"What is 3?", b"4711", b'"provenance"'):
        assert private not in fake_hub.received


def test_a_file_named_in_also_is_sent(run_with_card, fake_hub):
    push_run(also=("metrics.jsonl",))
    assert (
        fake_hub.files(NAME)["metrics.jsonl"] == (run_with_card / "run/metrics.jsonl").read_bytes()
    )
    for other in ("../pairs.jsonl", "no-such.txt", "checkpoints"):
        with pytest.raises(ConfigError, match="not a file of the run folder"):
            prepare_upload("run", (other,))


def test_the_picture_of_the_curves_is_sent_if_there_is_one(run_with_card, fake_hub):
    picture = png({})
    (run_with_card / "run" / "curves.png").write_bytes(picture)
    push_run()
    assert fake_hub.files(NAME)["curves.png"] == picture


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("README.md", f"\nmy token is {SECRET}\n"),
        ("README.md", "\ntrained in /home/" + "someone/project\n"),
        ("notes.txt", SECRET),
    ],
)
def test_a_secret_or_personal_path_is_an_error_before_the_first_request(
    run_with_card, fake_hub, file, text
):
    with (run_with_card / "run" / file).open("a") as stream:
        stream.write(text)
    with pytest.raises(ConfigError, match=rf"nothing was uploaded: {file}:\d+ has a"):
        push_run(also=() if file == "README.md" else (file,))
    assert not fake_hub.requests
    with pytest.raises(ConfigError, match="nothing was uploaded"):  # in a dry run as well
        prepare_upload("run", () if file == "README.md" else (file,))
    files = {"x": run_with_card / "run" / file}
    with pytest.raises(
        ConfigError, match="nothing was uploaded"
    ):  # under any name in the repository
        hub.push(files, NAME, message="m", public=False, overwrite=False)
    assert not fake_hub.requests


@pytest.mark.parametrize("kind", ["object", "commit", "batch", "preupload"])
def test_a_failed_upload_publishes_nothing_and_a_retry_completes(run_with_card, fake_hub, kind):
    fake_hub.cut_before = {kind}
    with pytest.raises(
        ModelError, match=r"org/adapter: the Hub cannot be reached .*try again"
    ) as error:
        push_run()
    assert "\n" not in str(error.value)
    assert fake_hub.repos[NAME]["commits"] == []
    fake_hub.cut_before = set()
    before = fake_hub.requests["object"]
    push_run()
    assert sorted(fake_hub.files(NAME)) == sorted(UPLOADED)
    objects = 3  # weights in both layouts, and the picture
    arrived = objects if kind == "commit" else 0  # objects that arrived are not sent again
    assert fake_hub.requests["object"] - before == objects - arrived


def test_a_wrong_token_is_reported_as_such(run_with_card, fake_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(
        ModelError, match=r"the Hub refuses \(401: Invalid .*\); log in with `hf auth"
    ):
        push_run()
    assert fake_hub.repos == {}


def test_existing_files_are_replaced_only_with_overwrite(run_with_card, fake_hub):
    push_run()
    (run_with_card / "run/README.md").write_text(
        (run_with_card / "run/README.md").read_text() + "\nMore.\n"
    )
    with pytest.raises(ConfigError, match=r"org/adapter: has another `README.md`; add --overwrite"):
        push_run()
    assert len(fake_hub.repos[NAME]["commits"]) == 1
    result = push_run(overwrite=True)
    assert not result.is_new and not result.is_unchanged
    assert fake_hub.files(NAME)["README.md"].endswith(b"More.\n")


def test_a_public_repository_is_written_to_only_with_public(run_with_card, fake_hub):
    HfApi().create_repo(NAME, private=False)
    with pytest.raises(ConfigError, match="is already public; add --public"):
        push_run()
    assert fake_hub.repos[NAME]["commits"] == []
    push_run(public=True)
    assert sorted(fake_hub.files(NAME)) == sorted(UPLOADED)


def test_public_does_not_apply_to_an_existing_private_repository(run_with_card, fake_hub):
    push_run()
    with pytest.raises(
        ConfigError, match="is private, and `--public` applies to new repositories only"
    ):
        push_run(public=True)


def test_a_card_that_the_hub_rejects_is_an_error_before_anything_is_sent(run_with_card, fake_hub):
    page = (run_with_card / "run/README.md").read_text()
    (run_with_card / "run/README.md").write_text(
        page.replace("base_model: org/base", "base_model: ../base")
    )
    with pytest.raises(
        ModelError, match=r'the Hub rejects the model card .*"base_model" is not a Hub id'
    ):
        push_run()
    assert not fake_hub.objects and fake_hub.repos[NAME]["commits"] == []


def test_an_invalid_name_is_an_error(run_with_card, fake_hub):
    for name in ("a/b/c", "adapter", "a/b c"):
        with pytest.raises(ConfigError, match="not the name of a repository; names are `ORG/NAME`"):
            hub.push(prepare_upload("run").files, name, message="m", public=False, overwrite=False)
    assert not fake_hub.requests


def test_an_unfinished_run_and_one_without_a_card_are_not_uploaded(workplace):
    with pytest.raises(ConfigError, match=r"no `README.md`; make it with `mlx-dpo card run`"):
        prepare_upload("run")
    edit("run/run.json", state="unfinished")
    with pytest.raises(RunError, match="the run is unfinished"):
        prepare_upload("run")


def test_the_steps_of_an_adapter_are_those_it_was_trained_for(run_with_card):
    """Steps after the best evaluation, and steps that were not taken, do not count."""
    record = read_entries("run/run.json")
    best = {"stopped_early_at": 8, "best_checkpoint": {"step": 6, "eval_loss": 0.1}}
    for changes, steps, on_card in (
        ({}, record["steps"], f"{record['steps']} steps, with"),
        ({"stopped_early_at": 8}, 8, "8 steps, with"),
        (best, 6, "6 of 8 steps, selected by the best `eval_loss` on held-out data, with"),
    ):
        write_edited("run/run.json", record | changes)
        assert prepare_upload("run").message.endswith(f"trained for {steps} steps")
        card, _ = make_run_card("run", NAME, samples=0)
        assert f"\n* {on_card} mlx-dpo" in card.text
