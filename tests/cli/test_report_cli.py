"""`mlx-dpo report`: what a person sees of one run, of several, and of one that is going on."""

import json
import re
import shutil

import pytest
from click.testing import CliRunner

from mlx_dpo import DPOConfig
from mlx_dpo.cli import cli
from mlx_dpo.reporting.metrics_log import read_metrics
from mlx_dpo.saved_runs.report import shortest_names
from tests.checkpoints import make_checkpoint
from tests.edited_files import edit, read_entries, write_edited
from tests.runs.train_helper import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs of eight steps, `a/run` and `b/run`, and `going/on`, which was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"Is {i}?", "chosen": f"It is {i}.", "rejected": "no"} for i in range(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = make_checkpoint(folder / "base")
    for name, rate, stop in (("a/run", 1e-3, None), ("b/run", 3e-3, None), ("going/on", 1e-3, 3)):
        config = DPOConfig(
            model=str(base), pairs=(str(folder / "pairs.jsonl"),), output=str(folder / name),
            valid_fraction=0.25, batch_size=3, epochs=2, eval_steps=2, learning_rate=rate,
        )  # fmt: skip
        train(config, stop_after=stop)
    return folder


@pytest.fixture
def folder(runs, monkeypatch):
    monkeypatch.chdir(runs)
    return runs


def call(*words):
    return CliRunner().invoke(cli, ["report", *words])


def test_the_figures_of_a_run_are_printed_and_its_page_and_picture_lie_in_it(folder):
    done = call("a/run")
    assert done.exit_code == 0, done.output
    last = [row for row in read_metrics(folder / "a/run/metrics.jsonl") if "eval_loss" in row][-1]
    figures = dict(re.findall(r"^  (\w[\w -]*?)  +(\S+)  $", done.stdout, re.MULTILINE))
    assert figures["step"] == "8" and figures["loss"] == f"{last['eval_loss']:.4f}"
    assert figures["log-prob of rejected"] == f"{last['eval_logps/rejected']:.4f}"
    assert done.stderr == "Written to a/run/report.html\nWritten to a/run/report.png\n"
    page = (folder / "a/run/report.html").read_text()
    assert "8 of 8" in page and "12 trained on, 4 held out" in page
    settings = page[page.index("Changed or chosen settings") :]
    assert "<code>learning_rate</code></th><td>0.001 <small>default: " in settings
    assert "base · pairs.jsonl · sigmoid, beta 0.1" in page and str(folder) not in page
    loss = f'<span class="after">{last["eval_loss"]:.3f}</span> <span class="before">from 0.693<'
    assert loss in page and re.search(r'class="card \w+"><strong>Result</strong> the ', page)
    assert (folder / "a/run/report.png").read_bytes().startswith(b"\x89PNG")
    assert not list((folder / "a/run").glob(".mlx-dpo-*"))


def test_several_runs_are_laid_over_each_other_with_the_settings_in_which_they_differ(folder):
    done = call("a/run", "b/run", "--output", "both")
    assert done.exit_code == 0, done.output
    table = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert table[1] == [
        "learning_rate",
        "step",
        "eval",
        "step",
        "loss",
        "accuracy",
        "margin",
    ]
    assert table[3][:4] == ["a/run", "0.001", "8", "8"]
    assert table[4][:4] == ["b/run", "0.003", "8", "8"]
    page = (folder / "both/report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data["names"] == ["a/run", "b/run"]
    assert {line["run"] for line in data["lines"] if line["chart"] == "Loss"} == {0, 1}


def test_a_run_that_is_going_on_is_drawn_as_far_as_it_is(folder):
    done = call("going/on", "--x", "tokens", "--output", "part")
    assert done.exit_code == 0, done.output
    assert re.search(r"step +3 ", done.stdout) and re.search(r"eval step +2 ", done.stdout)
    assert "3 of 8, not finished" in (folder / "part/report.html").read_text()


def test_figures_are_of_the_saved_adapters_and_warnings_are_repeated(folder):
    shutil.copytree(folder / "a/run", folder / "kept")
    record = read_entries(folder / "kept/run.json")
    changed = {
        "best_checkpoint": {"step": 4, "eval_loss": 0.125},
        "evaluation": {"step": 4, "eval_loss": 0.125},
        "warnings": ["it <fell>"],
    }
    edit(folder / "kept/run.json", **changed)
    done = call("kept")
    assert re.search(r"step +8 ", done.stdout) and re.search(r"eval step +4 ", done.stdout)
    assert re.search(r"loss +0\.1250 ", done.stdout)
    page = (folder / "kept/report.html").read_text()
    assert (
        "8 of 8; the final adapters are those of step 4 (eval_loss 0.1250)" in page
        and "it &lt;fell&gt;" in page
    )
    settings = record["settings"] | {"system": "Be brief"}
    again = {"stopped_early_at": 6, "settings": settings}
    write_edited(folder / "kept/run.json", record | again)
    call("kept")
    page = (folder / "kept/report.html").read_text()
    assert "6 of 8, then stopped early" in page
    assert "<code>system</code></th><td>(not shown)" in page and "Be brief" not in page


def test_what_cannot_be_drawn_gives_a_one_line_error_and_writes_nothing(folder):
    (folder / "new").mkdir()
    record = read_entries(folder / "a/run/run.json")
    write_edited(folder / "new/run.json", record | {"state": "unfinished"})
    for words, message in (
        (["new", "--output", "x"], "new: no step has been taken yet, so there is nothing to plot"),
        (
            ["a/run", "base", "--output", "x"],
            "base: a model, not a run folder; train it with `mlx-dpo train --model`",
        ),
        (["a/run", "b/run"], "`--output` is missing: the folder for a report of several runs"),
        (["a/run", "b/../a/run", "--output", "x"], "a/run: is named twice"),
        (["a/run", "--output", "pairs.jsonl"], "pairs.jsonl/report.html: cannot be written"),
    ):
        done = call(*words)
        assert done.exit_code == 1 and done.output.startswith(f"Error: {message}"), done.output
        assert done.output.count("\n") == 1 and not (folder / "x").exists()


def copies(folder, changes):
    """Copies of a run under names, with other settings."""
    record = read_entries(folder / "a/run/run.json")
    for name, changed in changes.items():
        shutil.copytree(folder / "a/run", folder / name)
        settings = record["settings"] | changed
        edit(folder / name / "run.json", settings=settings)


def test_names_are_shown_as_they_are_unless_they_cannot_be_printed(folder):
    """rich takes square brackets for markup, terminals what follows an escape for orders."""
    changes = {"b[b]c": {}, "$a$_^{": {}, "new\nline": {}, "\x1b[31m": {}, "\udcff": {}}
    copies(folder, changes)
    shown = ["b[b]c", "$a$_^{", r"new\nline", r"\x1b[31m", r"\udcff"]
    assert shortest_names([folder / name for name in changes]) == shown
    done = call(*changes, "--output", "odd")
    assert done.exit_code == 0, done.output
    table = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert table[3:] == shown
    page = (folder / "odd/report.html").read_text()
    assert all(f"</svg>{name}</th>" in page for name in shown)
    assert "b[b]c" in call("b[b]c").stdout


def test_settings_too_wide_for_the_table_are_only_on_the_page(folder):
    copies(folder, {
        "one": {"loss_type": ["sigmoid", "sft"], "lora_target_modules": ["self_attn.q_proj"]},
        "two": {"model": str(folder / "elsewhere"), "beta": 0.3},
    })  # fmt: skip
    done = call("one", "two", "--output", "wide")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    figures = ["step", "eval", "step", "loss", "accuracy", "margin"]
    assert lines[2].split() == ["model", "beta", *figures]
    assert max(map(len, lines)) <= 80 and "│" not in done.stdout
    assert [line.split()[1] for line in lines[4:6]] == ["base", "elsewhere"]
    assert done.stderr.startswith("On the page: loss_type, lora_target_modules\nWritten to ")
    page = (folder / "wide/report.html").read_text()
    assert "<td>sigmoid sft</td>" in page and "<td>all linear modules of the layers</td>" in page
    assert str(folder) not in page


def test_names_are_as_short_as_tells_them_apart(tmp_path):
    def named(*places):
        return shortest_names([tmp_path / place for place in places])

    assert named("x/run") == ["run"]
    assert named("x/a", "y/b") == ["a", "b"]
    assert named("x/run", "y/run", "y/z") == ["x/run", "y/run", "y/z"]
