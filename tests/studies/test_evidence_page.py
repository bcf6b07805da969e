"""The page of the studies: claims, verdicts, runs, mutations and pictures, from rows alone."""

import re

import pytest
from click import ClickException
from click.testing import CliRunner

from scripts.studies import NAMES
from scripts.studies.reporting import csv_rows
from scripts.studies.reporting.study import Claim, Finding, Picture, Study, Table
from scripts.tools.docs import evidence_page
from scripts.tools.docs.site_links import split_pictures

RUN = {
    "study": "toy", "form": "full", "seeds": "0 1", "date": "2026-01-02 03:04",
    "commit": "0123456", "machine": "M5", "cores": 10, "load": 0.1, "versions": "mlx 1",
    "seconds": 125, "cpu_seconds": 99, "peak_mb": 321,
}  # fmt: skip


def draw(figure, rows, theme):
    figure.add_subplot().plot([row["y"] for row in rows], color=theme.ink)


STUDY = Study(
    name="toy",
    title="A toy",
    result="It is.",
    question="Is it?",
    setup="So.",
    run=lambda scale: (),
    claims=(
        Claim(
            name="small",
            text="y of π(y|x)",
            source="Eq. 1",
            measure=lambda rows: float(rows[0]["y"]),
            below=3,
            unit="nats",
        ),
        Claim(
            name="sum",
            text="all of y",
            source="Eq. 2",
            measure=lambda rows: sum(row["y"] for row in rows),
            above=5,
            pooled=True,
        ),
    ),
    pictures=(Picture(name="p", caption='Left: "y" of `a` against π\\*. n = 2.', draw=draw),),
    tables=(Table(name="t", caption="Means.", compute=lambda rows: [{"a": "x|y", "n": 0.5}]),),
    deviations=("Less.",),
    sources=("[A](https://arxiv.org/abs/1)",),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Rows of one study that is listed, next to another one without rows."""
    monkeypatch.setattr(evidence_page, "NAMES", ("toy", "missing"))
    monkeypatch.setattr(evidence_page, "load_study", {"toy": STUDY}.__getitem__)
    csv_rows.write_rows(tmp_path / "toy.csv", [{"seed": 0, "y": 1}, {"seed": 1, "y": 2}])
    csv_rows.record_run(tmp_path / "runs.csv", RUN)
    return tmp_path


def test_claims_have_mean_range_and_verdict(folder):
    text = evidence_page.page(folder)
    assert (
        "| `small` y of π(y\\|x) | Eq. 1 | <\u00a03 nats | 1.5 [1, 2] nats | holds |\n"
        "| `sum` all of y | Eq. 2 | >\u00a05 | 3 | **DOES NOT HOLD** |\n"
    ) in text
    assert "| [A toy](#toy) | It is. | **1 of 2** | 2 min 5 s |\n" in text


def test_the_run_and_all_texts_of_the_study_are_on_the_page(folder):
    text = evidence_page.page(folder)
    for part in (
        '<a id="toy"></a>\n\n## A toy\n\nIs it?\n\n**Result.** It is.\n\n**Setup.** So.\n',
        "python -m scripts.studies.toy\n```",
        "2 min 5 s on M5 with 10 cores (load 0.1 before the start; 99 s of processor time)",
        "321 MB of memory at the peak. Commit 0123456, 2026-01-02 03:04 UTC, mlx 1. "
        "Seeds 0, 1 (n = 2). [Rows](evidence/toy.csv): 2.",
        "**Table.** Means.\n\n| a | n |\n| --- | --: |\n| x\\|y | 0.5 |\n",
        "- Less.\n",
        "- [A](https://arxiv.org/abs/1)\n",
        "These studies have no rows yet: `missing`.",
    ):
        assert part in text


def test_rows_of_the_quick_form_are_marked(folder):
    csv_rows.record_run(folder / "runs.csv", RUN | {"form": "quick"})
    assert "python -m scripts.studies.toy --quick\n" in evidence_page.page(folder)


def test_mutations_are_found_by_claims_not_by_errors(folder):
    rows = [("none", "", ""), ("no_beta", "sum", ""), ("no_end", "", "boom"), ("no_log", "", "")]
    csv_rows.write_rows(
        folder / "mutations.csv",
        [
            {"mutation": name, "study": "toy", "failed": failed, "error": error}
            for name, failed, error in rows
        ],
    )
    lines = evidence_page.page(folder).splitlines()[-6:-2]
    assert [line.split(" | ")[-1] for line in lines] == [
        "none |",
        "[toy](#toy): `sum` |",
        "**NOT FOUND**<br>[toy](#toy): no result (boom) |",
        "**NOT FOUND** |",
    ]


def test_a_page_without_mutations_says_so(folder):
    """The introduction links to the section."""
    text = evidence_page.page(folder)
    assert "](#mutations)" in text and '<a id="mutations">' in text
    assert text.endswith("They have not been run yet.\n")


def test_pictures_are_drawn_for_both_palettes_and_old_ones_go_away(folder, tmp_path):
    docs = tmp_path / "docs"
    old = docs / "img" / "evidence" / "gone-p-dark.svg"
    old.parent.mkdir(parents=True)
    old.write_text("")
    done = CliRunner().invoke(evidence_page.main, ["--rows", str(folder), "--docs", str(docs)])
    assert (done.exit_code, done.output) == (0, "")
    text = (docs / "evidence.md").read_text(encoding="utf-8")
    links = set(re.findall(r"img/evidence/[\w-]+\.svg", text))
    assert links == {f"img/evidence/toy-p-{theme}.svg" for theme in ("light", "dark")}
    files = {path.relative_to(docs).as_posix(): path for path in docs.rglob("*.svg")}
    assert files.keys() == links
    stamp = evidence_page.rows_stamp(folder / "toy.csv")
    assert all(path.read_bytes().endswith(b"</svg>\n" + stamp) for path in files.values())


def test_the_alternative_text_is_plain(folder):
    alt = evidence_page.alt_text(STUDY, STUDY.pictures[0])
    assert alt == "A toy. Left: &quot;y&quot; of a against π*"


def test_without_rows_there_is_one_line(tmp_path):
    done = CliRunner().invoke(evidence_page.main, ["--rows", str(tmp_path)])
    assert done.exit_code == 1
    assert done.output.count("\n") == 1 and "no study has rows" in done.output


def test_rows_without_a_run_are_refused(folder):
    (folder / "runs.csv").unlink()
    with pytest.raises(ClickException, match="no run of toy"):
        evidence_page.page(folder)


def test_the_site_shows_a_picture_in_the_palette_that_the_reader_chose():
    picture = evidence_page._picture(STUDY, STUDY.pictures[0])
    assert split_pictures(f"a\n{picture}").splitlines()[2:4] == [
        f"![A toy. Left: &quot;y&quot; of a against π\\*](img/evidence/toy-p-{theme}.svg"
        f"#only-{theme})"
        for theme in ("light", "dark")
    ]


def test_an_infinite_number_is_shown():
    claim = Claim(name="c", text="t", source="s", measure=max, below=1)
    assert "| NaN | **DOES NOT HOLD** |" in evidence_page._claim(Finding(claim, (float("nan"),)))


def test_committed_pictures_show_the_committed_rows():
    drawn = {
        (evidence_page.DOCS / evidence_page.picture_path(result.study, picture, theme)): result
        for result in evidence_page.read_results()
        for picture in result.study.pictures
        for theme in evidence_page.THEMES
    }
    assert set((evidence_page.DOCS / evidence_page.PICTURES).glob("*.svg")) == set(drawn)
    for path, result in drawn.items():
        stamp = evidence_page.rows_stamp(csv_rows.FOLDER / f"{result.study.name}.csv")
        assert path.read_bytes().endswith(stamp), path.name


def test_every_study_is_listed_once():
    assert len(set(NAMES)) == len(NAMES)
