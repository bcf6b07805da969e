"""Make the pictures in docs/img from the product: train the shipped model, then photograph pages.

python -m scripts.tools.docs.pictures --browser chromium

Trains models/tiny-chat on its pairs as the README does (about a minute on a CPU), writes the
compare page and the report, and takes a picture of each with a headless Chromium.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[3]
PICTURES = ROOT / "docs" / "img"
MAX_BYTES = 200_000  # of a picture
COLORS = 128  # of a palette; text and shading need no more
MODEL, PAIRS = ROOT / "models" / "tiny-chat", ROOT / "models" / "tiny-chat" / "preferences"
SHOTS = (  # page, picture, width and height in CSS pixels
    ("compare.html", "compare.png", (960, 620)),
    ("run/report.html", "report.png", (1100, 1400)),
)


def make_pages(folder: Path, settings: list[str]) -> None:
    """Train a run in the folder and write its compare page and its report."""
    command = [sys.executable, "-c", "from mlx_dpo.cli import main; main()"]
    for words in (
        ["train", str(PAIRS), "--model", str(MODEL), "--output", "run", *settings],
        ["compare", "run", "--html", "compare.html", "--limit", "8"],
        ["report", "run"],
    ):
        subprocess.run([*command, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def photograph(page: Path, picture: Path, size: tuple[int, int], browser: str) -> None:
    """Write a picture of a page with at most `MAX_BYTES`.

    Raises:
        FileNotFoundError: there is no such page, of which a browser would draw its own error page.
        ValueError: the picture is larger even with few colours.
    """
    page.resolve(strict=True)
    width, height = size
    subprocess.run(
        [
            *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri()),
        ],
        check=True,
        capture_output=True,
    )
    with Image.open(picture) as image:
        image.convert("RGB").quantize(COLORS).save(picture, optimize=True)
    if picture.stat().st_size > MAX_BYTES:
        raise ValueError(f"{picture} has {picture.stat().st_size:,} bytes; make it smaller")


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", default="chromium", help="program of a Chromium")
    parser.add_argument("settings", nargs="*", help="flags of `mlx-dpo train`, after `--`")
    arguments = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pages(folder, arguments.settings)
        for page, picture, size in SHOTS:
            photograph(folder / page, PICTURES / picture, size, arguments.browser)


if __name__ == "__main__":
    main()
