"""The areas of mutated inputs: which files are damaged, and which commands read them."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from huggingface_hub import constants

from tests.fake_hub import using_fake_hub
from tests.fuzz.case import Case, FailedInputError, parse
from tests.fuzz.mutations import STRANGE_TEXTS, dump, mutate_value
from tests.fuzz.pairs_files import (
    FORMATS,
    check_accounts,
    check_rows_unchanged,
    is_list,
    write_rows,
)

DATA = Path(__file__).parents[1] / "data"
EXAMPLES = sorted([*(DATA / "examples").rglob("*.jsonl")])
TEMPLATES = sorted((DATA / "templates").glob("*.jinja"))
SNIPPETS = (
    "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception('\x1b[31mno\nno') }}",
    "{{ messages }}",
    "{% if %}",
    "{{",
    "{{ none.x.y }}",
    "{{ messages[99].content }}",
    "{{ 1 / 0 }}",
    "{% include 'x' %}",
    "{{ strftime_now('%Y') }}",
    "{{ strftime_now(5) }}",
    "{{ tools | tojson }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ '%s' | format }}",
    "{% set ns = namespace(a=1) %}{{ ns.b.c }}",
    "{{ 'x'.encode('utf-8') }}",
    "{{ 'a'|center(10**9) }}",
    "{{ [1] | batch(0) | list }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages.pop() }}",
    "{% break %}",
    "{{ messages | map(attribute='content') | join | int / 2 }}",
    "{% generation %}",
    "\ufeff",
    "\x00",
    "{% for m in messages %}{% set _ = messages.append(m) %}{% endfor %}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ dict(a=1)|items|list }}",
)


class Area(NamedTuple):
    """An area: how many inputs the slow suite tries, and the function that tries one."""

    count: int
    run: Callable[[Case], None]


def pairs_checked(case: Case) -> None:
    """Check a mutated pairs file of any format and schema."""
    name = _damaged_pairs(case)
    result = case.invoke("data", "check", name, "--json")
    if result.exit_code == 0:
        check_accounts(name, parse(result))
    if name.endswith(".jsonl") and not is_list(name) and case.index % 3 == 0:
        if case.invoke("data", "clean", name, "--output", "out.jsonl").exit_code == 0:
            check_rows_unchanged(name)
        elif Path("out.jsonl").exists() or Path("out.report.json").exists():
            raise FailedInputError("a failed command left a file")


def _damaged_pairs(case: Case) -> str:
    rows = [json.loads(line) for line in case.draw.choice(EXAMPLES).open()]
    rows = (rows * 3)[: case.draw.choice((1, 3, 5))]
    suffix = case.draw.choice(FORMATS)
    if case.draw.random() < 0.55:
        number = case.draw.randrange(len(rows))
        name, changed = mutate_value(rows[number], case.draw)
        if path := write_rows(rows, suffix, changed=(number, changed)):
            case.record(f"{path} row {number}: {name}")
            return path
    path = write_rows(rows, suffix) or write_rows(rows, "rows.jsonl")
    assert path is not None
    case.damage(Path(path))
    return path


def pairs_tokenized(case: Case) -> None:
    """Check, show, split or tokenize a mutated pairs file with a model's tokenizer."""
    case.copy("base")
    name = _damaged_pairs(case)
    command = case.draw.choice(("check", "check", "show", "split", "clean"))
    words = ["data", command, name]
    words += ["--model", "base"] if command != "split" else []
    words += {"split": ["--output", "out"], "clean": ["--output", "out.jsonl"]}.get(command, [])
    result = case.invoke(*words)
    left = [path for path in ("out", "out.jsonl", "out.report.json") if Path(path).exists()]
    if result.exit_code and left:
        raise FailedInputError(f"a failed command left {left}")


def settings(case: Case) -> None:
    """Read mutated YAML settings."""
    case.copy("base", "pairs.jsonl", "settings.yaml")
    path = Path("settings.yaml")
    if case.draw.random() < 0.6:
        name, value = mutate_value(yaml.safe_load(path.read_text()), case.draw)
        case.record(name)
        path.write_bytes(dump(value) if case.draw.random() < 0.5 else _as_yaml(value))
    else:
        case.damage(path)
    case.invoke("data", "check", "--config", "settings.yaml", "pairs.jsonl")


def _as_yaml(value: Any) -> bytes:
    if not isinstance(value, dict):
        return dump(value)
    lines = [f"{key}: ".encode("utf-8", "surrogatepass") + dump(v) for key, v in value.items()]
    return b"\n".join(line.replace(b"@duplicate@", b"") for line in lines) + b"\n"


TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)


def models(case: Case) -> None:
    """Generate with a model of mutated files."""
    source = case.draw.choice(("base", "sharded"))
    case.copy(source)
    names = [*TOKENIZER, "config.json", "config.json"]
    names += [path.name for path in sorted(Path(source).glob("model*"))]
    case.damage(Path(source, case.draw.choice(names)))
    case.invoke("generate", "--model", source, "Hi", "--max-tokens", "2", text=True)


def templates(case: Case) -> None:
    """Tokenize with mutated chat templates."""
    case.copy("base", "pairs.jsonl")
    text = case.draw.choice(TEMPLATES).read_text()
    path = Path("base/chat_template.jinja")
    if case.draw.random() < 0.6:
        at = case.draw.randrange(len(text) + 1)
        snippet = case.draw.choice(SNIPPETS)
        case.record(f"{snippet!r} at {at}")
        path.write_text(text[:at] + snippet + text[at:], encoding="utf-8")
    else:
        path.write_text(text, encoding="utf-8")
        case.damage(path)
    case.invoke("data", "check", "pairs.jsonl", "--model", "base", "--json")


RUN_COMMANDS: tuple[tuple[str, ...], ...] = (
    ("generate", "RUN", "Hi", "--max-tokens", "2"),
    ("eval", "RUN", "--json"),
    ("eval", "RUN", "--json"),
    ("export", "RUN", "--base-model", "base"),
    ("push", "RUN", "org/name", "--dry-run", "--base-model", "org/base"),
)


def runs(case: Case) -> None:
    """Open a finished or unfinished run with a mutated file."""
    run = case.draw.choice(("run", "unfinished"))
    command = case.draw.choice(RUN_COMMANDS)
    case.copy("base", "pairs.jsonl", run)
    files = [
        p
        for p in sorted(Path(run).rglob("*"))
        if p.suffix in (".json", ".jsonl", ".safetensors", ".md")
    ]
    files += [Path(run, "run.json")] * 3
    case.damage(case.draw.choice(files))
    case.invoke(
        *(run if word == "RUN" else word for word in command), text=command[0] == "generate"
    )


def resumed(case: Case) -> None:
    """Resume a run with a mutated file, and compare the adapters with those of the whole run."""
    case.copy("base", "pairs.jsonl", "unfinished")
    files = [
        p
        for p in sorted(Path("unfinished").rglob("*"))
        if p.suffix in (".json", ".jsonl", ".safetensors")
    ]
    case.damage(case.draw.choice(files))
    result = case.invoke("train", "--resume", "--output", "unfinished")
    if result.exit_code == 0:
        final = Path("unfinished/adapters.safetensors").read_bytes()
        if final != (case.material / "run/adapters.safetensors").read_bytes():
            raise FailedInputError("the resumed run ends at other weights")


def caches(case: Case) -> None:
    """List, use and clear caches with a mutated file."""
    case.copy("base", "pairs.jsonl", "cache")
    files = [path for path in sorted(Path("cache").rglob("*")) if path.is_file()]
    path = case.draw.choice(files)
    if renamed := case.draw.random() < 0.1:
        path = path.rename(path.with_name(case.draw.choice(CACHE_NAMES)))
    case.damage(path)
    case.invoke("cache")
    case.invoke("cache", "--json")
    if case.draw.random() < 0.12:
        case.invoke(*CACHED_TRAIN)
        final = Path("new/adapters.safetensors").read_bytes()
        if final != (case.material / "run/adapters.safetensors").read_bytes():
            raise FailedInputError("a damaged cache changed the weights")
    if case.invoke("cache", "clear", "--yes").exit_code:
        raise FailedInputError("the cache cannot be cleared")
    left = [path for path in Path("cache").rglob("*") if path.is_file()]
    if left and not renamed:
        raise FailedInputError(f"`cache clear` left {left}")


CACHE_NAMES = (
    ".mlx-dpo-99999999999999999999-0123abcd-x.safetensors",
    ".x-99999999999999999999.safetensors",
    ".mlx-dpo-999999999-0123abcd-x.pairs",
    "\x1b[31m.safetensors",
    "a\nb.pairs",
    "x" * 200 + ".safetensors",
)
CACHED_TRAIN = (
    "train",
    "pairs.jsonl",
    "--model",
    "base",
    "--output",
    "new",
    "--valid-fraction",
    "0.25",
    "--batch-size",
    "3",
    "--learning-rate",
    "1e-3",
    "--epochs",
    "3",
    "--lora-r",
    "2",
    "--save-steps",
    "2",
    "--system",
    "Be brief.",
    "--max-length",
    "128",
)


def adapters(case: Case) -> None:
    """Generate with mutated adapters, ours and PEFT's."""
    case.copy("base", "run", "peft")
    folder = case.draw.choice(("peft", "run/checkpoints/" + LAST))
    path = case.draw.choice(
        sorted(p for p in Path(folder).iterdir() if p.name.startswith("adapter"))
    )
    case.damage(path)
    case.invoke(
        "generate", "--model", "base", "--adapter", folder, "Hi", "--max-tokens", "2", text=True
    )


LAST = "step-000009"


def prompts(case: Case) -> None:
    """Collect with a mutated prompts file."""
    case.copy("base", "prompts.txt", "rewards.py", "pairs.jsonl")
    name = case.draw.choice(("prompts.txt", "prompts.txt", "pairs.jsonl"))
    case.damage(Path(name))
    case.invoke(*_collect(name))


def picks(case: Case) -> None:
    """Go on with a mutated collection, which must lose no line that it can read."""
    case.copy("base", "prompts.txt", "rewards.py", "picks.jsonl")
    path = Path("picks.jsonl")
    case.damage(path)
    before = path.read_bytes()
    result = case.invoke(*_collect("prompts.txt"))
    whole = before[: before.rfind(b"\n") + 1]
    if not path.read_bytes().startswith(whole):
        raise FailedInputError(f"lines of the collection are gone after status {result.exit_code}")


def _collect(name: str) -> tuple[str, ...]:
    return (
        "collect",
        "--model",
        "base",
        "--prompts",
        name,
        "--output",
        "picks.jsonl",
        "--reward",
        "rewards.py:vowels",
        "--max-tokens",
        "4",
        "--seed",
        "1",
    )


def chats(case: Case) -> None:
    """Answer strange lines and commands in a chat."""
    case.copy("base")
    lines = []
    for _ in range(case.draw.randrange(1, 6)):
        word = case.draw.choice(CHAT_COMMANDS)
        argument = (
            case.draw.choice(STRANGE_TEXTS)
            .replace("x" * 20_000, "x" * 200)
            .replace("[" * 3000, "[[[")
        )
        lines.append(f"{word} {argument}".encode("utf-8", "replace").decode())
    case.record(repr(lines))
    case.invoke("chat", "--model", "base", "--max-tokens", "2", text=True, stdin="\n".join(lines))


CHAT_COMMANDS = (
    "",
    "",
    "/help",
    "/good",
    "/bad",
    "/edit",
    "/retry",
    "/undo",
    "/system",
    "/set",
    "/temperature",
    "/save",
    "/load",
    "/base",
    "/aligned",
    "/compare",
    "/reset",
    "/unknown",
    "/",
)


PULLED = ("adapter_config.json", "adapters.safetensors", "adapter_model.safetensors")


def pulls(case: Case) -> None:
    """Pull an adapter of which the Hub has a mutated file, and answer with it."""
    case.copy("base", "run", "peft")
    folder = Path(case.draw.choice(("run", "peft")))
    names = [name for name in PULLED if (folder / name).is_file()]
    card = "---\nbase_model: org/base\ntags: [a]\n---\n# A card\n"
    (folder / "README.md").write_text(card)
    case.damage(folder / case.draw.choice([*names, "README.md"]))
    files = {name: (folder / name).read_bytes() for name in [*names, "README.md"]}
    with pytest.MonkeyPatch.context() as patch, using_fake_hub(patch, Path("hub").resolve()) as hub:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.repos["org/name"] = {"private": True, "commits": [("m", files)]}
        result = case.invoke("pull", "org/name", "--output", "pulled")
    if result.exit_code == 0:
        words = ("--adapter", "pulled", "Hi", "--max-tokens", "2")
        case.invoke("generate", "--model", "base", *words, text=True)
    elif Path("pulled").exists():
        raise FailedInputError("a failed pull left a folder")


def loops(case: Case) -> None:
    """Resume a loop with a mutated file."""
    case.copy("base", "pairs.jsonl", "prompts.txt", "rewards.py", "loop")
    files = [p for p in sorted(Path("loop").rglob("*")) if p.suffix in RUN_SUFFIXES]
    near = [p for p in files if len(p.parts) < 4]
    case.damage(case.draw.choice([*files, *near, *near]))
    more = ("--rounds", "2") if case.draw.random() < 0.2 else ()
    case.invoke("loop", "--resume", "--output", "loop", *more)


RUN_SUFFIXES = (".json", ".jsonl", ".safetensors")


def _hangs(case: Case) -> None:
    case.record("none")
    while case.index:
        pass


def _waits(case: Case) -> None:
    time.sleep(1000)


def _dies(case: Case) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _fails(case: Case) -> None:
    case.invoke("--no-such-flag")


AREAS = {
    "pairs": Area(4500, pairs_checked),
    "tokenized": Area(1200, pairs_tokenized),
    "settings": Area(1500, settings),
    "models": Area(1400, models),
    "templates": Area(900, templates),
    "runs": Area(450, runs),
    "resumed": Area(120, resumed),
    "caches": Area(300, caches),
    "adapters": Area(500, adapters),
    "prompts": Area(150, prompts),
    "picks": Area(200, picks),
    "chats": Area(200, chats),
    "pulls": Area(250, pulls),
    "loops": Area(150, loops),
    # What the watchdog itself is tried with.
    "hangs": Area(0, _hangs),
    "waits": Area(0, _waits),
    "dies": Area(0, _dies),
    "fails": Area(0, _fails),
}
