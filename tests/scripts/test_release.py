"""A release needs one version in tag, project and changelog; CI files are well formed."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import mlx_dpo
from scripts.tools.release_notes import release_notes

ROOT = Path(__file__).parents[2]
PROJECT = '[project]\nversion = "1.2.0"\n'
CHANGELOG = """# Changelog

## [Unreleased]

- later

## [1.2.0] - 2026-12-01

### Added

- this

## [1.1.0] - 2026-11-01

- that
"""


def test_the_notes_of_a_version_are_its_section():
    assert release_notes("v1.2.0", PROJECT, CHANGELOG) == "### Added\n\n- this"


def test_the_oldest_version_ends_with_the_file():
    project = PROJECT.replace("1.2.0", "1.1.0")
    assert release_notes("v1.1.0", project, CHANGELOG) == "- that"


@pytest.mark.parametrize(
    ("tag", "changelog", "reason"),
    [
        ("v1.3.0", CHANGELOG, "the tag is v1.3.0, but pyproject.toml has version 1.2.0"),
        ("1.2.0", CHANGELOG, "the tag is 1.2.0"),
        ("v1.2.0", CHANGELOG.replace("[1.2.0]", "[1x2.0]"), "has no section `## [1.2.0]"),
        ("v1.2.0", CHANGELOG.replace(" - 2026-12-01", ""), "has no section"),
        ("v1.2.0", CHANGELOG.replace("### Added\n\n- this\n", ""), "is empty"),
    ],
)
def test_what_disagrees_is_named(tag, changelog, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        release_notes(tag, PROJECT, changelog)


def test_the_version_stands_in_the_project_file_and_the_changelog():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert mlx_dpo.__version__ == version("mlx-dpo") == project
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{project}] - " in changelog or f"To become {project}." in changelog


def test_every_file_of_github_is_yaml():
    files = [p for p in (ROOT / ".github").rglob("*.yml")]
    assert len(files) >= 6
    for file in [*files, ROOT / ".pre-commit-config.yaml"]:
        assert isinstance(yaml.safe_load(file.read_text()), dict)


def test_continuous_integration_tries_every_python_that_is_declared():
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    declared = {c.rpartition(" ")[2] for c in classifiers if "Python :: 3." in c}
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    tried = jobs["gate"]["strategy"]["matrix"]["include"]
    for system in ("macos", "ubuntu"):
        assert {job["python"] for job in tried if job["os"].startswith(system)} == declared


def test_a_bug_report_asks_for_the_doctor():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text())
    [doctor] = [field for field in form["body"] if field.get("id") == "doctor"]
    assert "mlx-dpo doctor --json" in doctor["attributes"]["label"]
    assert doctor["validations"]["required"] is True
