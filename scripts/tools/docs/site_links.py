"""MkDocs hook: make links to files outside of docs/ work on the site as they do on GitHub.

Pages such as CONTRIBUTING.md become pages of the site. A source file that a page links becomes a
page with its text, so that the site needs no repository host. A `<picture>` with a light and a dark
image becomes two images, of which the theme shows the one of the palette that the reader chose.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[3]
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")
PICTURE = re.compile(
    r'<picture><source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">'
    r'<img alt="(?P<alt>[^"]*)" src="(?P<light>[^"]+)"></picture>'
)
PAGES = {  # file of the repository -> page of the site
    "README.md": "README.md",  # docs/README.md is the site's first page
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "models/README.md": "tiny-chat.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".jsonl": "json", ".sh": "sh"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from files outside of docs/."""
    outside = {name: page for name, page in PAGES.items() if page != name}
    for name, page in outside.items():
        files.append(File.generated(config, page, content=page_text(name)))
    sources = {name for file in files.documentation_pages() for name in _linked_sources(file)}
    for name in sorted(sources):
        files.append(File.generated(config, f"source/{name}.md", content=_source_text(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that lead out of docs/ to the pages made for them."""
    return split_pictures(point_links(markdown, page.file.src_uri))


def split_pictures(markdown: str) -> str:
    """Return the text of a page with an image for each palette instead of a `<picture>`.

    GitHub follows the system's palette, and the site has a switch of its own. The theme hides an
    image whose address ends in `#only-dark` or `#only-light` in the other palette.
    """

    def split(match: re.Match[str]) -> str:
        alt = re.sub(r"([\\`*_\[\]])", r"\\\1", match["alt"])
        return "\n".join(f"![{alt}]({match[name]}#only-{name})" for name in ("light", "dark"))

    return PICTURE.sub(split, markdown)


def point_links(markdown: str, page: str) -> str:
    """Return the text of a page with its links out of docs/ led to pages of the site."""

    def point(match: re.Match[str]) -> str:
        name = _outside(match[1], page)
        if name is None:
            return match[1]
        target = PAGES.get(name, f"source/{name}.md")
        return posixpath.relpath(target, posixpath.dirname(page) or ".")

    return LINK.sub(point, markdown)


def page_text(name: str) -> str:
    """Return the text of a page of the repository, its links written as from within docs/."""
    folder = posixpath.dirname(name)

    def point(match: re.Match[str]) -> str:
        return posixpath.relpath(posixpath.join(folder, match[1]), "docs")

    return LINK.sub(point, (ROOT / name).read_text(encoding="utf-8"))


def _source_text(name: str) -> str:
    path = ROOT / name
    if path.is_dir():
        entries = "\n".join(f"* `{entry.name}`" for entry in sorted(path.iterdir()))
        return f"# {name}\n\n{entries}\n"
    text, language = path.read_text(encoding="utf-8"), LANGUAGES.get(path.suffix, "text")
    return f"# {name}\n\n`````{language}\n{text}\n`````\n"


def _linked_sources(file: File) -> set[str]:
    """Return the files outside of docs/ that a page links and that are no pages themselves."""
    names = {_outside(target, file.src_uri) for target in LINK.findall(file.content_string)}
    return {name for name in names if name and name not in PAGES and (ROOT / name).exists()}


def _outside(target: str, page: str) -> str | None:
    """Return the path in the repository of a link out of docs/, or None for a link within it."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path
