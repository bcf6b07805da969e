"""Datasets on the Hub: a fake at the boundary of `datasets`, and the library itself on a folder."""

from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from mlx_dpo.data.hf_datasets import HubDataset, parse_hub_name
from mlx_dpo.data.sources import find_sources, resolve_held_out_source
from mlx_dpo.errors import DataError

ROWS = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)]


@pytest.fixture
def hub(monkeypatch):
    """A fake Hub with one dataset, which records its calls."""
    calls = []

    def dataset_info(self, path, **more):
        calls.append(("info", path))

    def names(path, config_name=None, *, revision=None):
        calls.append(("names", path, config_name, revision))
        if path != "org/name":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist")
        return ["train", "train_prefs", "test", "test_prefs"]

    def load(path, name=None, *, split, revision=None):
        calls.append(("load", path, name, split, revision))
        rows = [row | {"chosen": split} for row in ROWS]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name:en", ("org/name", "en", None)),
        ("org/name@v1.0", ("org/name", None, "v1.0")),
        ("org/na-me.x:en-US@refs/pr/1", ("org/na-me.x", "en-US", "refs/pr/1")),
        ("name", None),
        ("a/b/c", None),
        ("org/name:", None),
    ],
)
def test_a_hub_name_is_parsed(name, parts):
    assert parse_hub_name(name) == (parts and HubDataset(*parts))


def test_rows_of_the_given_split_have_their_locations(hub):
    sources = find_sources("org/name:en@v1")
    assert [row.location for row in sources.train[0].rows()] == [
        f"org/name:en:train[{i}]" for i in range(3)
    ]
    assert hub[-1] == ("load", "org/name", "en", "train", "v1")
    assert {row.record["chosen"] for row in sources.valid[0].rows()} == {"test"}
    sources = find_sources("org/name", split="train_prefs")
    assert {row.record["chosen"] for row in sources.train[0].rows()} == {"train_prefs"}
    assert {row.record["chosen"] for row in sources.valid[0].rows()} == {"test_prefs"}
    assert resolve_held_out_source("org/name").name == "org/name:test"


def test_an_existing_path_is_preferred_to_a_dataset(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "train.jsonl").write_text("{}\n")
    assert find_sources("org/name").train[0].dataset is None
    (tmp_path / "org" / "file").write_text("{}\n")
    with pytest.raises(DataError, match="org/file: unsupported file type"):
        find_sources("org/file")
    assert not hub


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        (
            "org/other",
            None,
            r"^org/other: cannot be loaded from the Hub \(Dataset 'org/other' doesn't exist\)",
        ),
        ("org/name", "train_x", r"^org/name: no split `train_x` \(found `train`, `train_prefs`, "),
    ],
)
def test_a_missing_dataset_or_split_is_an_error_of_one_line(hub, name, split, message):
    with pytest.raises(DataError, match=message) as error:
        find_sources(name, split=split)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error", [ConnectionError("no net"), ValueError("Config name is missing"), OSError("disk")]
)
def test_an_error_of_the_datasets_library_is_an_error_of_one_line(hub, monkeypatch, error):
    def fails(*args, **more):
        raise error

    [source] = find_sources("org/name").train
    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match=str(error)):
        list(source.rows())


def answer(kind, status):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("the Hub's own words\nover two lines", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(hub_errors.GatedRepoError, 403), "gated; accept its terms on https://hugging"),
        (answer(hub_errors.RepositoryNotFoundError, 404), "no such dataset on the Hub; check"),
        (answer(hub_errors.RevisionNotFoundError, 404), "the Hub has no revision `v9`"),
    ],
)
def test_a_dataset_that_the_hub_does_not_give_is_an_error_before_any_download(
    hub, monkeypatch, error, message
):
    def fails(*args, **more):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fails)
    with pytest.raises(DataError, match=f"^org/name: .*{message}") as raised:
        find_sources("org/name@v9")
    assert "\n" not in str(raised.value)
    assert not hub


@pytest.mark.parametrize(
    "error", [hub_errors.HTTPError("no route"), TimeoutError("10 s"), ConnectionError("offline")]
)
def test_without_a_network_the_cache_is_read_once_and_nothing_is_tried_again(
    hub, monkeypatch, error
):
    """By itself, `datasets` tries six times within half a minute, and prints each."""

    def fails(*args, **more):
        raise error

    def cached_names(path, config_name=None, *, revision=None):
        assert constants.HF_HUB_OFFLINE
        if path != "org/cached":
            raise ConnectionError("Couldn't reach it")
        return ["train"]

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fails)
    monkeypatch.setattr(datasets, "get_dataset_split_names", cached_names)
    assert find_sources("org/cached").train[0].name == "org/cached:train"
    with pytest.raises(DataError) as raised:
        find_sources("org/other")
    assert str(raised.value) == (
        "org/other: no such file or folder, the dataset is not in the Hub's cache, and the Hub "
        "cannot be reached; check the name and the network"
    )
    assert not constants.HF_HUB_OFFLINE


def test_the_datasets_library_reads_a_folder_of_tables(tmp_path, monkeypatch):
    """Images are not decoded, so no library for images is needed."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "org" / "set"
    (place / "data").mkdir(parents=True)
    table = pyarrow.Table.from_pylist([row | {"images": []} for row in ROWS])
    for split in ("train", "test"):
        path = place / "data" / f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(table, path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    dataset = HubDataset("org/set")  # relative, as the library takes a folder
    assert dataset.splits() == ["train", "test"]
    rows = list(dataset.rows("train"))
    assert [row.record["prompt"] for row in rows] == ["q0", "q1", "q2"]
    assert rows[2].location == "org/set:train[2]"
    # The same files are a source by themselves.
    assert [row.record for row in find_sources("org/set").train[0].rows()] == [
        row.record for row in rows
    ]
