"""Print the changelog section of a version, if its tag, pyproject.toml and CHANGELOG.md agree.

python scripts/tools/release_notes.py v0.1.0
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def release_notes(tag: str, project: str, changelog: str) -> str:
    """Return the text under the heading `## [VERSION] - DATE` of the changelog.

    Args:
        tag: a Git tag such as `v0.1.0`.
        project: the text of pyproject.toml.
        changelog: the text of CHANGELOG.md.

    Raises:
        ValueError: the tag is not the version of pyproject.toml, or the changelog has no dated
            section of that version with text in it.
    """
    version = tomllib.loads(project)["project"]["version"]
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag}, but pyproject.toml has version {version}")
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
    section = re.search(rf"{heading}\n(.*?)(?=^## \[|\Z)", changelog, re.M | re.S)
    if section is None:
        raise ValueError(f"CHANGELOG.md has no section `## [{version}] - YYYY-MM-DD`")
    if not (notes := section[1].strip()):
        raise ValueError(f"the section {version} of CHANGELOG.md is empty")
    return notes


def main() -> None:
    """Print the notes, or the reason why this version cannot be released."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(
            release_notes(
                sys.argv[1],
                (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
                (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
            )
        )
    except ValueError as error:
        sys.exit(f"release_notes: {error}")


if __name__ == "__main__":
    main()
