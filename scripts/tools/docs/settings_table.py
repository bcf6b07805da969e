"""Write the table of settings into README.md, from the one place where they are declared.

python scripts/tools/docs/settings_table.py
"""

from pathlib import Path

from mlx_dpo.config.dpo_config import options

README = Path(__file__).parents[3] / "README.md"
BEGIN = "<!-- settings: made by scripts/tools/docs/settings_table.py -->\n"
END = "<!-- end of settings -->\n"


def table() -> str:
    """Every setting, by section, as Markdown."""
    lines = ["| setting | default | what |", "|---|---|---|"]
    section = ""
    for name, (default, spec) in sorted(options().items(), key=lambda item: item[1][1].section):
        if spec.section != section:
            section = spec.section
            lines.append(f"| **{section}** | | |")
        plain = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        shown = "" if plain in (None, "") else f"`{plain}`".lower()
        if spec.choices:
            choices = ", ".join(f"`{choice}`" for choice in spec.choices)
            lines.append(f"| `{name}` | {shown} | {spec.help} One of {choices}. |")
        else:
            lines.append(f"| `{name}` | {shown} | {spec.help} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The README with the table as it has to be."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
