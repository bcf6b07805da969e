"""Pages of docs/ that are made by scripts, and the site that is built from docs/."""

import json
import re
import runpy
from pathlib import Path

import pytest

import mlx_dpo
from mlx_dpo.config.dpo_config import get_settings

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "scripts" / "tools" / "docs"


@pytest.mark.parametrize(
    "script",
    [
        "settings_page.py",
        "metrics_page.py",
        "losses_page.py",
        "which_model_page.py",
        "benchmarks_page.py",
        "evidence_page.py",
    ],
)
def test_a_generated_page_is_up_to_date(script):
    made = runpy.run_path(str(TOOLS / script))
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), f"run {script}"


def test_the_settings_page_has_every_setting_once():
    rows = re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "settings.md").read_text("utf-8"), re.M)
    assert sorted(rows) == sorted(get_settings())


def test_the_metrics_page_has_every_column_of_a_run(trained):
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    lines = (trained / "run" / "metrics.jsonl").read_text().splitlines()
    columns = {name.replace("/base_", "/") for line in lines for name in json.loads(line)}
    documented = set(re.findall(r"^\| `([\w/]+)`", page, re.M))
    assert {c for c in columns if c not in documented | {f"eval_{d}" for d in documented}} == set()


def test_the_api_page_has_every_public_name():
    entries = re.findall(r"^::: mlx_dpo\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(entries) == sorted(mlx_dpo.__all__)


def test_a_link_out_of_docs_leads_to_a_page_of_the_site():
    """GitHub shows ../models/README.md; the site has it as tiny-chat.md."""
    site = runpy.run_path(str(TOOLS / "site_links.py"))

    def on_site(markdown, page):
        return site["point_links"](markdown, page)

    assert on_site("[a](../models/README.md#build)", "data.md") == "[a](tiny-chat.md#build)"
    assert on_site("[a](../examples/x.py)", "data.md") == "[a](source/examples/x.py.md)"
    assert on_site("[a](data.md) [b](https://x.org/../y)", "x.md") == (
        "[a](data.md) [b](https://x.org/../y)"
    )
    assert site["page_text"]("README.md").count("(../docs/") == 0
