"""`mlx-dpo data`: check, show, split and clean, as a person types them."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlx_dpo.cli import cli
from mlx_dpo.cli.data import data as group
from mlx_dpo.config.dpo_config import DPOConfig
from mlx_dpo.curation.clean import clean_pairs
from mlx_dpo.data.examples import parse_rows
from mlx_dpo.data.inspect.findings import CHECKS
from mlx_dpo.data.load import held_out_indices, load_pairs
from mlx_dpo.data.report import PairsReport
from mlx_dpo.data.sources import find_sources, resolve_source
from mlx_dpo.data.tokenization.formatting import TokenRules
from mlx_dpo.errors import DataError
from mlx_dpo.schemas.messages import prompt_digest
from mlx_dpo.schemas.schema import DEFAULT_RULES
from tests.checkpoints import make_checkpoint
from tests.temporary_files import ended_process, temporary_path

ROOT = Path(__file__).parents[2]
GOOD = '{"prompt": "Where is  the cat?", "chosen": "On the mat.", "rejected": "No."}'
ROWS = [
    GOOD,  # 1
    '{"prompt":"Why?","chosen":"","rejected":"x"}',
    '{"rejected": "So.", "prompt": "Why?", "chosen": "Because \\u00e9.", "n": 1.50}',
    GOOD,  # 4
    "{",
    '{"prompt": "Where is  the cat?", "rejected": "On the mat.", "chosen": "No."}',  # 6
    '{"prompt": "How?", "chosen": "I cannot say.", "rejected": "Thus<|end|>."}',
]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "base", max_position_embeddings=300)
    (tmp_path / "base" / "model.safetensors").unlink()  # weights are never read
    write("pairs.jsonl", ROWS)


def write(name, lines):
    Path(name).write_text("".join(line + "\n" for line in lines))


def data(*words, **more):
    return CliRunner().invoke(cli, ["data", *words], **more)


def lines_of(name):
    return Path(name).read_text().splitlines()


def found(*words):
    result = data("check", *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def refused(*words, **more):
    result = data(*words, **more)
    assert result.exit_code == 1, result.output
    [line] = result.output.splitlines()
    return line.removeprefix("Error: ")


def test_a_check_says_what_is_lost_and_where_why_it_matters_and_what_to_do():
    result = data("check", "pairs.jsonl", "--model", "base")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "pairs.jsonl: 5 pairs (schema strings), from 7 rows"
    at = lines.index("error   empty-completion  1 row (14.3%)  :2")
    assert lines[at + 1 : at + 3] == [
        f"        why: {CHECKS['empty-completion'].why}",
        f"        do:  {CHECKS['empty-completion'].advice}",
    ]
    assert "error   duplicate-pair  1 pair (20.0%)  :4 with :1" in lines
    assert "error   contradiction  3 pairs (60.0%)  :1 with :6, :4 with :6, :6 with :1" in lines
    assert "warning special-token  1 pair (20.0%)  :7" in lines
    assert "warning refusal  1 pair (20.0%)  :7" in lines
    assert any(
        line.startswith("skipped checks (they need held-out pairs): leaked") for line in lines
    )
    assert lines[-1] == "4 kinds of errors"


def test_a_check_as_json_has_every_place_and_is_the_same_as_the_lines():
    both = found("pairs.jsonl", "--model", "base")
    assert (both["errors"], both["train"]["rows"], both["train"]["pairs"]) == (4, 7, 5)
    places = {one["name"]: one["places"] for one in both["train"]["findings"]}
    assert places["unreadable"] == [["pairs.jsonl:5"]]
    assert places["duplicate-pair"] == [["pairs.jsonl:4", "pairs.jsonl:1"]]
    assert {one["kind"] for one in both["train"]["findings"]} == {"error", "warning"}
    assert both["train"]["lengths"]["unit"] == "tokens"
    assert sum(one["chosen"] for one in both["train"]["lengths"]["histogram"]) == 5


@pytest.mark.parametrize("form", ["auto", "text"])
def test_pairs_are_those_that_training_would_keep(form):
    write("good.jsonl", [row for row in ROWS if row != "{"])
    from mlx_dpo.models.empty_weights import load_empty_model

    rules = TokenRules(vocab_size=300, chat_template=form, max_length=300)
    kept = load_pairs(
        Path("good.jsonl"), load_empty_model("base").tokenizer, rules, bad_pairs="drop"
    )
    words = ("good.jsonl", "--model", "base", "--chat-template", form)
    [report] = found(*words)["train"]["reports"]
    assert report == kept.report.to_dict()


def test_strict_stops_at_errors_and_not_at_warnings():
    assert data("check", "pairs.jsonl", "--strict").exit_code == 1
    write("odd.jsonl", [ROWS[-1]])
    result = data("check", "odd.jsonl", "--strict", "--model", "base")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "no errors")
    assert "warning refusal" in result.output


def test_without_a_model_lengths_are_characters_and_skipped_checks_are_listed():
    report = found("pairs.jsonl")
    assert report["train"]["lengths"]["unit"] == "characters"
    assert report["train"]["lengths"]["prompt"]["longest"] == len("Where is  the cat?")
    missing = set(report["skipped"]["--model"])
    assert missing == {check.name for check in CHECKS.values() if check.requires == "--model"}
    assert (
        "skipped checks (pass --model to run them): untrainable"
        in data("check", "pairs.jsonl").output
    )


@pytest.mark.parametrize(
    "words", [["--max-length", "9"], ["--system", "Hi."], ["--truncation", "drop"], ["--thinking"]]
)
def test_settings_of_tokens_are_refused_without_a_model(words):
    name = words[0][2:].replace("-", "_")
    assert refused("check", "pairs.jsonl", *words) == f"`{name}` has no effect without --model"


def test_settings_that_do_nothing_are_refused_as_training_refuses_them():
    words = ("check", "pairs.jsonl", "--model", "base")
    assert "`ranked` has no effect" in refused(*words, "--ranked", "all")
    assert "`thinking` has no effect" in refused(*words, "--thinking")


def test_missing_parameters_are_named_at_once(tmp_path):
    for words, names in (
        (("check",), "PAIRS"),
        (("show",), "PAIRS and --model"),
        (("split",), "PAIRS and --output"),
        (("clean", "--output", "new.jsonl"), "PAIRS"),
    ):
        result = data(*words)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1] == f"Error: missing {names}"
    (tmp_path / "s.yaml").write_text("pairs: pairs.jsonl\n")
    assert "missing --output" in data("split", "--config", "s.yaml").stderr
    assert "use --valid-fraction" in data("split", "pairs.jsonl", "--valid", "0.1").stderr


def test_a_file_of_settings_says_what_flags_say():
    Path("run.yaml").write_text("pairs: pairs.jsonl\nmodel: base\nmax_length: 12\nbeta: 0.3\n")
    assert found("--config", "run.yaml") == found(
        "pairs.jsonl", "--model", "base", "--max-length", "12"
    )


def test_held_out_pairs_are_checked_too():
    write("valid.jsonl", [GOOD.replace("mat", "hat")])
    result = data("check", "pairs.jsonl", "--valid", "valid.jsonl")
    assert "error   leaked-prompt  3 pairs (60.0%)  :1 with valid.jsonl:1" in result.output
    assert "held out\nvalid.jsonl: 1 pair (schema strings), from 1 rows" in result.output


def test_rows_may_come_from_standard_input():
    result = data("check", "-", input="\n".join(ROWS))
    assert result.output.startswith("-: 5 pairs (schema strings), from 7 rows")


def test_pairs_are_shown_as_the_model_sees_them():
    result = data("show", "pairs.jsonl", "--model", "base", "--row", "7", "--max-length", "19")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[2].startswith("pairs.jsonl:7 ──")
    assert lines[3] == "encoded as plain text: <|end|>"
    assert "│ ⟦<|user|>⟧How?⟦<|end|>⟧⟦<|assistant|>⟧" in lines
    titles = [line for line in lines if line.startswith("rejected, ")]
    kinds = [title.split(", ", 2)[2] for title in titles]
    assert kinds == ["scored", "cut: not in the model's input"]
    [cut] = [line for line in lines if line.startswith("╳ ")]
    scored = lines[lines.index(titles[0]) + 1]
    assert scored[2:] + cut[2:] == "Thus<|end|>.⟦<|end|>⟧"
    assert "⟦" not in scored


def test_what_is_left_out_or_stops_training_is_shown_with_the_reason():
    shown = data("show", "pairs.jsonl", "--model", "base", "-n", "7").output
    pages = {page.split(" ")[0]: page for page in shown.split("\npairs.jsonl:")[1:]}
    assert list(pages) == ["1", "2", "3", "4", "5", "6", "7"]
    assert "left out: a completion is empty" in pages["2"]
    assert "training stops here: not JSON" in pages["5"]
    assert data("show", "pairs.jsonl", "--model", "base").output.count("pairs.jsonl:") == 3


def test_show_requires_a_model_and_an_existing_row():
    assert "Error: missing --model" in data("show", "pairs.jsonl").stderr
    words = ("show", "pairs.jsonl", "--model", "base", "--row", "17")
    assert refused(*words) == "pairs.jsonl: no row 17"
    assert refused(*words, "-n", "2") == "`-n` has no effect together with --row"


def test_a_split_has_no_prompt_twice_and_rows_as_they_were():
    good = [ROWS[i] for i in (0, 2, 3, 5, 6)]
    write("good.jsonl", good)
    result = data("split", "good.jsonl", "--valid-fraction", "0.4", "--output", "parts")
    assert result.exit_code == 0, result.output
    train, valid = lines_of("parts/train.jsonl"), lines_of("parts/valid.jsonl")
    assert sorted(train + valid) == sorted(good)
    assert len(valid) == 2
    prompts = [{json.loads(line)["prompt"] for line in part} for part in (train, valid)]
    assert not prompts[0] & prompts[1]
    assert result.output == "parts: 3 rows to train on, 2 held out\n"
    assert [one.name for one in find_sources("parts").valid] == ["parts/valid.jsonl"]


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_split_holds_out_what_training_would(seed):
    rows = [
        {"prompt": f"Question {i % 40}?", "chosen": "yes " * i, "rejected": "no"}
        for i in range(1, 60)
    ]
    write("many.jsonl", map(json.dumps, rows))
    words = ("--valid-fraction", "0.2", "--seed", str(seed), "--output", "parts")
    assert data("split", "many.jsonl", *words).exit_code == 0
    from mlx_dpo.models.empty_weights import load_empty_model

    rules = TokenRules(vocab_size=300)
    pairs = load_pairs(Path("many.jsonl"), load_empty_model("base").tokenizer, rules).pairs
    held_out = held_out_indices(pairs, share=0.2, seed=seed)
    train = [pair for index, pair in enumerate(pairs) if index not in held_out]
    valid = [pairs[index] for index in sorted(held_out)]
    for name, part in (("train", train), ("valid", valid)):
        parsed_rows = parse_rows(
            resolve_source(f"parts/{name}.jsonl").rows(), DEFAULT_RULES, PairsReport("", 0)
        )
        assert [prompt_digest(one.example) for one in parsed_rows] == [
            pair.prompt_digest for pair in part
        ]


def test_all_pairs_of_a_row_are_in_the_same_split():
    rows = [
        {"prompt": f"{i}?", "completions": ["a", "b", "c"], "scores": [1, 2, 3]} for i in range(9)
    ]
    write("ranked.jsonl", map(json.dumps, rows))
    words = ("--ranked", "all", "--valid-fraction", "0.34", "--output", "parts")
    assert data("split", "ranked.jsonl", *words).output.endswith("6 rows to train on, 3 held out\n")


def test_a_split_that_cannot_be_made_leaves_nothing_behind():
    before = set(Path().iterdir())
    words = ("--output", "parts")
    assert refused("split", "pairs.jsonl", *words).startswith("pairs.jsonl:2: a completion is emp")
    dropping = ("split", "pairs.jsonl", "--bad-pairs", "drop", *words)
    assert refused(*dropping).startswith("pairs.jsonl:5: not JSON")
    assert "can be read only once" in refused("split", "-", *words, input=GOOD)
    write("one.jsonl", [GOOD])
    assert "contains only one pair" in refused("split", "one.jsonl", *words)
    write("one.jsonl", [GOOD, GOOD])
    assert "all pairs have the same prompt" in refused("split", "one.jsonl", *words)
    assert set(Path().iterdir()) == before | {Path("one.jsonl")}
    Path("parts").mkdir()
    assert refused("split", "pairs.jsonl", *words).startswith("parts: already exists")


def test_files_left_by_a_crash_are_neither_an_obstacle_nor_used():
    leftover = temporary_path(Path("parts"), ended_process())
    leftover.mkdir()
    write(leftover / "old.jsonl", [GOOD])
    write("good.jsonl", [ROWS[0], ROWS[6]])
    assert data("split", "good.jsonl", "--output", "parts").exit_code == 0
    assert {path.name for path in Path("parts").iterdir()} == {"train.jsonl", "valid.jsonl"}
    assert not leftover.exists()


def test_a_users_files_named_as_if_half_written_are_left_alone():
    Path("partial-parts").mkdir()
    for name in ("partial-parts/mine.jsonl", "partial-new.jsonl"):
        write(name, [GOOD])
    write("good.jsonl", [ROWS[0], ROWS[6]])
    assert data("split", "good.jsonl", "--output", "parts").exit_code == 0
    assert data("clean", "good.jsonl", "--output", "new.jsonl").exit_code == 0
    for name in ("partial-parts/mine.jsonl", "partial-new.jsonl"):
        assert Path(name).read_text() == f"{GOOD}\n"


def test_labelled_rows_are_split_and_cleaned_by_themselves():
    rows = [{"prompt": p, "completion": p * 2, "label": label} for p in "ab" for label in (0, 1)]
    write("judged.jsonl", map(json.dumps, rows))
    words = ("judged.jsonl", "--loss-type", "kto", "--output")
    assert data("split", *words, "parts").output == "parts: 2 rows to train on, 2 held out\n"
    assert refused("clean", *words, "new.jsonl").endswith("no row would be left; drop fewer")
    Path("run.yaml").write_text("pairs: judged.jsonl\npair_labelled: true\n")
    for words in (("split", "--output", "other"), ("clean", "--output", "new.jsonl")):
        assert refused(*words, "--config", "run.yaml").startswith("`pair_labelled` has no effect")


def test_a_file_that_changes_while_it_is_read_is_not_written():
    def change(more):
        write("other.jsonl", [*ROWS, GOOD])
        Path("other.jsonl").replace("pairs.jsonl")

    config = DPOConfig(pairs=("pairs.jsonl",))
    with pytest.raises(DataError, match=r"^pairs.jsonl: changed while it was read"):
        clean_pairs(config, drop=[], output=Path("new.jsonl"), progress=change)
    assert {path.name for path in Path().iterdir()} == {"base", "pairs.jsonl"}


def test_cleaning_drops_all_faults_and_keeps_other_lines_as_they_were():
    result = data("clean", "pairs.jsonl", "--output", "clean.jsonl")
    assert result.exit_code == 0, result.output
    assert lines_of("clean.jsonl") == [ROWS[2], ROWS[6]]
    report = json.loads(Path("clean.report.json").read_text())
    assert {one["where"]: one["findings"] for one in report["dropped_rows"]} == {
        "pairs.jsonl:1": ["contradiction"],
        "pairs.jsonl:2": ["empty-completion"],
        "pairs.jsonl:4": ["duplicate-pair", "contradiction"],
        "pairs.jsonl:5": ["unreadable"],
        "pairs.jsonl:6": ["contradiction"],
    }
    assert (report["rows"], report["kept"]) == (7, 2)
    assert report["dropped"]["contradiction"] == 3
    assert "clean.jsonl: 2 of 7 rows; clean.report.json lists the dropped rows" in result.output
    assert "skipped checks (they need --model or held-out pairs): untrainable" in result.output


def test_what_was_cleaned_has_no_faults_left():
    data("clean", "pairs.jsonl", "--model", "base", "--output", "clean.jsonl")
    assert data("check", "clean.jsonl", "--model", "base", "--strict").exit_code == 0


def test_cleaning_drops_what_is_named_and_nothing_else():
    words = ("--drop", "unreadable", "--drop", "duplicate-pair", "--output", "some.jsonl")
    assert data("clean", "pairs.jsonl", *words).exit_code == 0
    assert lines_of("some.jsonl") == [ROWS[i] for i in (0, 1, 2, 5, 6)]


def test_of_leaked_rows_the_training_rows_are_removed():
    write("valid.jsonl", [GOOD.replace("mat", "hat")])
    words = ("--valid", "valid.jsonl", "--drop", "leaked-prompt", "--drop", "unreadable")
    assert data("clean", "pairs.jsonl", *words, "--output", "some.jsonl").exit_code == 0
    assert lines_of("some.jsonl") == [ROWS[i] for i in (1, 2, 6)]
    assert lines_of("valid.jsonl") == [GOOD.replace("mat", "hat")]


def test_a_cleaning_that_cannot_be_done_leaves_nothing_behind():
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    words = ("clean", "pairs.jsonl", "--output", "new.jsonl")
    assert refused(*words, "--drop", "same-token") == (
        "unknown finding `same-token`; did you mean `same-tokens`?"
    )
    assert refused(*words, "--drop", "not-written") == (
        "`drop` not-written is now called `template-drops-content`"
    )
    assert refused(*words, "--drop", "same-tokens") == (
        "`drop` same-tokens has no effect without --model"
    )
    assert refused(*words, "--drop", "leaked-prompt") == (
        "`drop` leaked-prompt has no effect without held-out pairs"
    )
    assert refused(*words, "--drop", "length-bias").startswith("`drop` length-bias has no effect")
    assert refused(*words, "--drop", "refusal").startswith("pairs.jsonl:5: not JSON")
    Path("taken.report.json").touch()
    taken = refused("clean", "pairs.jsonl", "--output", "taken.jsonl")
    assert taken.startswith("taken.report.json: already exists")
    Path("taken.report.json").unlink()
    assert refused(*words, "pairs.jsonl").startswith("pairs.jsonl: is named twice")
    assert "can be read only once" in refused("clean", "-", "--output", "new.jsonl", input=GOOD)
    assert "give a `.jsonl` file" in refused("clean", "pairs.jsonl", "--output", "new.csv")
    assert refused("clean", "pairs.jsonl", "--output", "pairs.jsonl").endswith("or delete it")
    write("bad.jsonl", [ROWS[1]])
    assert refused("clean", "bad.jsonl", "--output", "new.jsonl").startswith(
        "bad.jsonl: no row wou"
    )
    before[Path("bad.jsonl")] = (ROWS[1] + "\n").encode()
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", sorted(group.commands))
def test_every_subcommand_and_option_has_help(name):
    command = group.commands[name]
    assert command.get_short_help_str()
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert all(option.help for option in options)
    if name != "example":  # reads no rows
        assert {"schema", "column", "config_file"} <= {option.name for option in options}


def test_the_page_lists_every_finding_with_its_kind():
    page = (ROOT / "docs" / "data.md").read_text()
    for check in CHECKS.values():
        assert f"| `{check.name}` | {check.severity} |" in page


def test_a_row_is_known_by_its_whole_number():
    write("many.jsonl", [GOOD] * 12)
    shown = data("show", "many.jsonl", "--model", "base", "--row", "2").output
    assert next(line for line in shown.splitlines() if "many.jsonl" in line).startswith(
        "many.jsonl:2 "
    )
    assert shown.count("many.jsonl") == 1


def test_rows_beyond_what_the_model_places_are_found():
    write("long.jsonl", [GOOD, GOOD.replace("Where", "Where, " * 200)])
    findings = found("long.jsonl", "--model", "base", "--max-length", "900")["train"]["findings"]
    places = {one["name"]: one["places"] for one in findings}
    assert places["longer-than-context"] == [["long.jsonl:2"]]


def test_columns_that_json_lacks_are_written_as_text_or_left_out_and_named(tmp_path, monkeypatch):
    import datetime
    import decimal

    import pyarrow
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"Q{n}", "chosen": "good", "rejected": "bad", "day": datetime.date(2024, 1, n),
         "price": decimal.Decimal("1.25"), "thumbnail": {"bytes": b"\xff", "path": None}}
        for n in (1, 2)
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "pairs.parquet")
    note = "column `thumbnail` is left out of 2 rows: it holds bytes, which JSON cannot"
    for command, written in (("split", "out/train.jsonl"), ("clean", "out.jsonl")):
        output = written.partition("/")[0]
        result = CliRunner().invoke(cli, ["data", command, "pairs.parquet", "--output", output])
        assert result.exit_code == 0, result.output
        assert note in result.output
        row = json.loads(Path(written).read_text().splitlines()[0])
        assert row.keys() == {"prompt", "chosen", "rejected", "day", "price"}
        assert row["day"].startswith("2024-01-0")
        assert row["price"] == 1.25


def test_files_of_similar_names_stay(tmp_path):
    """Temporary names cannot be those of somebody's files."""
    names = [
        "partial-new",
        ".partial-new",
        "new.tmp",
        "new~",
        ".mlx-dpo-notes",
        ".mlx-dpo-12-ab-new",
    ]
    for name in names:
        Path(name).mkdir()
        Path(name, "notes.txt").write_text("mine")
        Path(f"{name}.jsonl").write_text("mine")
    assert data("split", "pairs.jsonl", "--output", "new", "--bad-pairs", "drop").exit_code == 1
    write("good.jsonl", [GOOD, ROWS[2]])
    assert data("split", "good.jsonl", "--output", "new").exit_code == 0
    assert data("clean", "good.jsonl", "--output", "new.jsonl").exit_code == 0
    for name in names:
        assert Path(name, "notes.txt").read_text() == "mine"
        assert Path(f"{name}.jsonl").read_text() == "mine"
