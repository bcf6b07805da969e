"""Write the table of settings into README.md, from their declarations in `mlx_dpo.config`.

python scripts/tools/docs/settings_table.py
"""

from pathlib import Path

from mlx_dpo.config.dpo_config import get_settings

README = Path(__file__).parents[3] / "README.md"
BEGIN = "<!-- settings: made by scripts/tools/docs/settings_table.py -->\n"
END = "<!-- end of settings -->\n"


def table() -> str:
    """Return all settings by section, as a Markdown table."""
    lines = ["| setting | default | what |", "|---|---|---|"]
    section = ""
    for name, spec in sorted(get_settings().items(), key=lambda item: item[1].section):
        if spec.section != section:
            section = spec.section
            lines.append(f"| **{section}** | | |")
        default = spec.default
        text = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        shown = "" if text in (None, "") else f"`{text}`".lower()
        if spec.choices:
            choices = ", ".join(f"`{choice}`" for choice in spec.choices)
            lines.append(f"| `{name}` | {shown} | {spec.help} One of {choices}. |")
        else:
            lines.append(f"| `{name}` | {shown} | {spec.help} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """Return the README with an up-to-date table."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
