"""The real `huggingface_hub` against a Hub on loopback: whole uploads, or nothing."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from mlx_dpo.adapters.files import read_adapter
from mlx_dpo.adapters.hf_checkpoint import hub_checkpoint, local_checkpoint
from mlx_dpo.errors import ConfigError, ModelError, RunError
from mlx_dpo.hub import push as hub
from mlx_dpo.hub.push import pack, pull_adapter
from mlx_dpo.hub.run_card import card_of_run, write_card
from tests.hub.test_secret_scan import png

NAME = "org/adapter"
SENT = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapters.safetensors",
    "curves.png",
]
SECRET = "hf_" + "A1b2C3d4" * 5


@pytest.fixture
def carded(workplace):
    made, _ = card_of_run("run", NAME, base="org/base")
    write_card(Path("run"), made, overwrite=False)
    return workplace


def send(also=(), **options):
    parcel = pack("run", also)
    options = {"message": parcel.message, "public": False, "overwrite": False} | options
    return hub.push(parcel.files, NAME, **options)


def test_what_is_sent_is_there_byte_for_byte_in_one_commit_of_a_private_repository(
    carded, fake_hub
):
    done = send()
    assert done.is_new
    assert done.address == f"{fake_hub.address}/{NAME}"
    assert fake_hub.repos[NAME]["private"] is True
    [(message, files)] = fake_hub.repos[NAME]["commits"]
    assert sorted(files) == sorted(SENT)
    for name, data in files.items():
        assert data == (carded / "run" / name).read_bytes()
    from mlx_dpo.adapters.files import adapter_digest

    assert adapter_digest(carded / "run")[:12] in message


def test_pairs_records_checkpoints_and_logs_stay_here(carded, fake_hub):
    shutil.copyfile("pairs.jsonl", "run/pairs.jsonl")
    (carded / "run" / "notes.md").write_text("something private, 4711")
    send()
    assert sorted(fake_hub.files(NAME)) == sorted(SENT)
    for private in (b"What is 3?", b"4711", b'"provenance"'):
        assert private not in fake_hub.received


def test_a_file_that_is_named_goes_along(carded, fake_hub):
    send(also=("metrics.jsonl",))
    assert fake_hub.files(NAME)["metrics.jsonl"] == (carded / "run/metrics.jsonl").read_bytes()
    for other in ("../pairs.jsonl", "no-such.txt", "checkpoints"):
        with pytest.raises(ConfigError, match="no file of the run folder"):
            pack("run", (other,))


def test_a_picture_of_the_curves_goes_along_if_there_is_one(carded, fake_hub):
    picture = png({})
    (carded / "run" / "curves.png").write_bytes(picture)
    send()
    assert fake_hub.files(NAME)["curves.png"] == picture


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("README.md", f"\nmy token is {SECRET}\n"),
        ("README.md", "\ntrained in /home/" + "someone/project\n"),
        ("notes.txt", SECRET),
    ],
)
def test_a_planted_secret_or_path_stops_everything_before_the_first_request(
    carded, fake_hub, file, text
):
    with (carded / "run" / file).open("a") as stream:
        stream.write(text)
    with pytest.raises(ConfigError, match=rf"nothing was sent: {file}:\d+ has a"):
        send(also=() if file == "README.md" else (file,))
    assert not fake_hub.seen
    with pytest.raises(ConfigError, match="nothing was sent"):  # for a dry run, too
        pack("run", () if file == "README.md" else (file,))
    parcel = {"x": carded / "run" / file}
    with pytest.raises(ConfigError, match="nothing was sent"):  # however it is called
        hub.push(parcel, NAME, message="m", public=False, overwrite=False)
    assert not fake_hub.seen


@pytest.mark.parametrize("kind", ["object", "commit", "batch", "preupload"])
def test_after_a_failure_in_the_middle_nothing_is_there_and_a_second_try_completes(
    carded, fake_hub, kind
):
    fake_hub.breaking = {kind}
    with pytest.raises(
        ModelError, match=r"org/adapter: the Hub cannot be reached .*try again"
    ) as error:
        send()
    assert "\n" not in str(error.value)
    assert fake_hub.repos[NAME]["commits"] == []
    fake_hub.breaking = set()
    before = fake_hub.seen["object"]
    send()
    assert sorted(fake_hub.files(NAME)) == sorted(SENT)
    objects = 3  # the weights in both layouts and the picture
    arrived = objects if kind == "commit" else 0  # what had arrived is not sent again
    assert fake_hub.seen["object"] - before == objects - arrived


def test_a_wrong_token_and_none_are_told_from_a_missing_repository(carded, fake_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(
        ModelError, match=r"the Hub refuses \(401: Invalid .*\); log in with `hf auth"
    ):
        send()
    assert fake_hub.repos == {}


def test_a_repository_that_has_such_files_is_left_alone_unless_asked(carded, fake_hub):
    send()
    (carded / "run/README.md").write_text((carded / "run/README.md").read_text() + "\nMore.\n")
    with pytest.raises(ConfigError, match=r"org/adapter: has another `README.md`; add --overwrite"):
        send()
    assert len(fake_hub.repos[NAME]["commits"]) == 1
    done = send(overwrite=True)
    assert not done.is_new and not done.is_same
    assert fake_hub.files(NAME)["README.md"].endswith(b"More.\n")


def test_a_public_repository_is_written_to_only_if_that_is_said(carded, fake_hub):
    HfApi().create_repo(NAME, private=False)
    with pytest.raises(ConfigError, match="is public already; add --public"):
        send()
    assert fake_hub.repos[NAME]["commits"] == []
    send(public=True)
    assert sorted(fake_hub.files(NAME)) == sorted(SENT)


def test_a_private_repository_does_not_pass_for_a_public_one(carded, fake_hub):
    send()
    with pytest.raises(ConfigError, match="is private, and `--public` makes new ones only"):
        send(public=True)


def test_a_card_that_the_hub_refuses_is_said_before_anything_is_sent(carded, fake_hub):
    page = (carded / "run/README.md").read_text()
    (carded / "run/README.md").write_text(
        page.replace("base_model: org/base", "base_model: ../base")
    )
    with pytest.raises(
        ModelError, match=r'the Hub refuses the card .*"base_model" is not a Hub id'
    ):
        send()
    assert not fake_hub.objects and fake_hub.repos[NAME]["commits"] == []


def test_a_name_that_is_none_is_refused(carded, fake_hub):
    for name, error in (("a/b/c", ConfigError), ("adapter", ConfigError), ("a/b c", ModelError)):
        with pytest.raises(error, match="no name of a repository; it is `ORG/NAME`"):
            hub.push(pack("run").files, name, message="m", public=False, overwrite=False)
    assert not fake_hub.seen


def test_an_unfinished_run_and_one_without_a_card_are_not_packed(workplace):
    with pytest.raises(ConfigError, match=r"no `README.md`; make it with `mlx-dpo card run`"):
        pack("run")
    record = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps(record | {"state": "unfinished"}))
    with pytest.raises(RunError, match="the run is unfinished"):
        pack("run")


def test_the_steps_of_an_adapter_are_those_that_it_was_trained_for(carded):
    """Not those that the run made after its best evaluation, or that it did not make."""
    record = json.loads(Path("run/run.json").read_text())
    kept = {"stopped_early_at": 8, "best_checkpoint": {"step": 6, "eval_loss": 0.1}}
    for changes, steps, on_the_card in (
        ({}, record["steps"], f"{record['steps']} steps, with"),
        ({"stopped_early_at": 8}, 8, "8 steps, with"),
        (kept, 6, "6 of 8 steps, kept for their `eval_loss` on the pairs held out, with"),
    ):
        Path("run/run.json").write_text(json.dumps(record | changes))
        assert pack("run").message.endswith(f"trained for {steps} steps")
        made, _ = card_of_run("run", NAME, samples=0)
        assert f"\n* {on_the_card} mlx-dpo" in made.text


def test_what_was_pushed_is_pulled_whole_and_can_be_used(carded, fake_hub):
    send()
    fake_hub.repos[NAME]["commits"][-1][1]["evil.py"] = b"print('hello')"
    fake_hub.repos[NAME]["commits"][-1][1]["model.safetensors"] = b"large"
    pulled = pull_adapter(NAME, Path("pulled"))
    assert pulled.base_model == "org/base"
    assert sorted(path.name for path in Path("pulled").iterdir()) == sorted(SENT)
    for name in SENT:
        assert Path("pulled", name).read_bytes() == (carded / "run" / name).read_bytes()
    assert read_adapter(Path("pulled")).fine_tune_type == "lora"
    assert fake_hub.given == set(SENT)


@pytest.mark.parametrize(
    "page",
    [b"no card", b"", b"\xff\xfe", b"---\nbase_model: [\n---\n", b"---\n- a\n---\n",
     b"---\nbase_model: {a: b}\n---\n", b"---\nbase_model: a\ntags: 5\n---\n"],
)  # fmt: skip
def test_a_page_that_is_no_card_does_not_keep_an_adapter_from_being_pulled(carded, fake_hub, page):
    send()
    files = fake_hub.repos[NAME]["commits"][-1][1]
    entries = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": "org/other"}
    fake_hub.repos[NAME]["commits"].append(
        ("m", files | {"README.md": page, "adapter_config.json": json.dumps(entries).encode()})
    )
    assert pull_adapter(NAME, Path("pulled")).base_model == "org/other"


def test_what_cannot_be_pulled_is_said_and_leaves_nothing(carded, fake_hub, monkeypatch):
    with pytest.raises(ModelError, match="the Hub has no such repository for you"):
        pull_adapter(NAME, Path("pulled"))
    send()
    commits = fake_hub.repos[NAME]["commits"]
    commits.append(("m", commits[0][1] | {"adapters.safetensors": b"not safetensors"}))
    with pytest.raises(ModelError, match=r"^org/adapter/adapters\.safetensors: .*cannot be read"):
        pull_adapter(NAME, Path("pulled"))
    commits.append(("n", {"config.json": b"{}"}))
    with pytest.raises(ModelError, match="org/adapter: no adapter"):
        pull_adapter(NAME, Path("pulled"))
    Path("taken").mkdir()
    Path("taken/file").touch()
    with pytest.raises(ModelError, match="taken: is not empty"):
        pull_adapter(NAME, Path("taken"))
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ModelError, match=r"the Hub refuses \(401: "):
        pull_adapter(NAME, Path("pulled"))
    assert not Path("pulled").exists() and not list(carded.glob(".pulled*"))


def test_the_names_of_a_checkpoint_on_the_hub_are_read_from_its_headers_alone(workplace, fake_hub):
    HfApi().create_repo("org/base", private=True)
    data = (workplace / "base/model.safetensors").read_bytes()
    fake_hub.repos["org/base"]["commits"].append(("m", {"model.safetensors": data}))
    found = hub_checkpoint("org/base")
    assert found.shapes == local_checkpoint(workplace / "base", "base").shapes
    assert found.folder is None
    with pytest.raises(ModelError, match="org/none: the names of its tensors cannot be read"):
        hub_checkpoint("org/none")
