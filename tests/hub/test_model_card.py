"""Model cards: metadata in the Hub's format, correct facts, and code examples that run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mlx_dpo.errors import ConfigError
from mlx_dpo.hub.model_card import (
    CardContent,
    Sample,
    make_fused_model_card,
    make_model_card,
)
from mlx_dpo.hub.run_card import make_run_card, write_card
from mlx_dpo.hub.secret_scan import scan_for_secrets
from tests.edited_files import edit, read_entries, write_edited
from tests.fake_hub import TOKEN
from tests.trained_run import train

CONTENT = CardContent(
    name="org/adapter",
    base_model="org/base",
    license={"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
    language=["en"],
    datasets=["org/pairs"],
    pairs="90 preference pairs",
    loss="sigmoid, beta 0.1",
    losses=("sigmoid",),
    rewarded="log-ratio",
    labelled=False,
    supervised=False,
    reference="the base",
    adapter="LoRA, rank 8, scale 2",
    steps="10 steps",
    evaluation={"eval_loss": 0.5, "eval_rewards/accuracies": 0.75},
    held_out=10,
    settings={"learning_rate": 1e-5},
    versions={"mlx": "1"},
    digest="0123456789abcdef",
    fine_tune_type="lora",
    peft_problem=None,
    peft_base=None,
    bits=None,
)


def test_metadata_has_the_hubs_format():
    assert make_model_card(CONTENT).data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "llama3",
        "license_link": "LICENSE",
        "language": ["en"],
        "datasets": ["org/pairs"],
        "tags": ["mlx-dpo", "mlx", "lora", "preference-optimization", "dpo"],
    }


def test_metrics_are_described_according_to_the_loss():
    """SimPO has no reference, does not start at log 2, and has a source of its own."""
    changed = {"losses": ("simpo",), "rewarded": "average log-probability", "loss": "simpo, beta 2"}
    evaluation = {"eval_loss": 0.5, "eval_rewards/chosen": 1.0}
    card = make_model_card(replace(CONTENT, evaluation=evaluation, **changed))
    assert "| 0.5000 | the loss |" in card.text and "log 2" in make_model_card(CONTENT).text
    assert "beta × average log-probability per token of the completion" in card.text
    assert "* Loss: simpo, beta 2 (SimPO: Meng et al. 2024, arXiv:2405.14734, Eq. 6)" in card.text
    assert card.data["tags"][-1] == "simpo" and "dpo" not in card.data["tags"]
    ranked = make_model_card(replace(CONTENT, settings={"margin_column": "lead"})).text
    assert "log 2" not in ranked
    labelled = make_model_card(replace(CONTENT, losses=("kto",), labelled=True)).text
    assert "share of completions whose reward is on the labelled side" in labelled
    assert "trained to prefer the desirable of 90" in labelled
    assert (
        "share of pairs with a higher reward for the chosen completion"
        in make_model_card(CONTENT).text
    )


def test_a_base_without_a_hub_id_is_left_out_of_the_metadata():
    card = make_model_card(
        replace(CONTENT, base_model=None, license={}, datasets=[], language=None)
    )
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert "`BASE` stands for the base model" in card.text
    assert "was unknown when this card was written" in card.text


def test_for_an_adapter_that_peft_cannot_load_the_reason_replaces_the_code():
    card = make_model_card(replace(CONTENT, peft_problem="`x` stacks the experts"))
    assert card.data["library_name"] == "mlx"
    assert "PEFT cannot load this adapter: `x` stacks the experts." in card.text
    assert "PeftModel" not in card.text
    assert "PeftModel" in make_model_card(CONTENT).text


def test_metrics_samples_and_curves_are_optional():
    text = make_model_card(CONTENT).text
    assert "| `eval_rewards/accuracies` | 0.7500 |" in text
    assert "![" not in text and "Before and after" not in text
    sample = Sample("Hi?\nThere?", "no", "yes\n\n> quoted")
    text = make_model_card(replace(CONTENT, samples=[sample], curves=True, evaluation={})).text
    assert (
        "**prompt:**\n\n```text\nHi?\nThere?\n```\n\n**before:**\n\n```text\nno\n```\n\n"
        "**after:**\n\n```text\nyes\n\n> quoted\n```\n" in text
    )
    assert "](curves.png)" in text
    assert "so the adapter was not evaluated" in text


def test_the_card_tells_how_to_make_a_base_that_was_quantized_on_load():
    text = make_model_card(replace(CONTENT, bits=4)).text
    assert "mlx-dpo convert org/base --bits 4 --output base" in text
    assert 'load("base", adapter_path="adapter")' in text
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in text


def test_the_code_for_peft_uses_the_original_checkpoint():
    text = make_model_card(
        replace(CONTENT, base_model="mlx-community/base-4bit", peft_base="org/base")
    ).text
    assert 'load("mlx-community/base-4bit", adapter_path="adapter")' in text
    assert 'AutoTokenizer.from_pretrained("org/base")' in text
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in text


def test_the_card_of_a_fused_model_describes_a_model():
    inherited = {"license": "gemma", "language": ["de"]}
    card = make_fused_model_card("org/base", to="hf", bits=None, inherited=inherited)
    assert card.data.to_dict() == {
        **inherited,
        "base_model": "org/base", "base_model_relation": "finetune",
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["mlx-dpo", "preference-optimization"],
    }  # fmt: skip
    card = make_fused_model_card(None, to="mlx", bits=8, inherited={})
    assert card.data["library_name"] == "mlx" and card.data["base_model"] is None
    assert "quantized to 8 bits" in card.text


def test_the_card_of_a_run_shows_the_facts_of_its_record(workplace):
    card, notes = make_run_card("run", "org/adapter", base="org/base")
    record = json.loads(Path("run/run.json").read_text())
    assert "9 preference pairs, which are not named on this card" in card.text
    assert f"| `eval_loss` | {record['evaluation']['eval_loss']:.4f} |" in card.text
    assert "Means over 3." in card.text
    assert "| `lora_r` | `4` |" in card.text and "`learning_rate` | `0.001`" in card.text
    assert card.data["library_name"] == "peft"
    assert [note.partition(":")[0] for note in notes] == [
        "not on the card",
        "the license of the base is unknown",
    ]


def test_no_path_of_this_machine_is_in_the_card(workplace, trained):
    """The run was given absolute paths of its base, pairs and start adapter."""
    train(
        workplace,
        output=str(workplace / "next"),
        start_adapter=str(workplace / "run"),
        lora_r=None,
        system="Be brief",
        valid=str(workplace / "pairs.jsonl"),
        valid_fraction=None,
    )
    card, _ = make_run_card("next", "org/adapter")
    path = write_card(Path("next"), card, overwrite=False)
    text = path.read_text()
    assert "| `system` | `not shown` |" in text and "Be brief" not in text
    assert list(scan_for_secrets(path, "README.md")) == []
    for name in (str(workplace), workplace.name, "pairs.jsonl", "start_adapter"):
        assert name not in text


def test_prompts_are_shown_only_on_request(workplace):
    card, notes = make_run_card("run", "org/adapter")
    assert "What is" not in card.text
    assert any("prompts and answers; `mlx-dpo card --samples N` shows" in note for note in notes)
    card, _ = make_run_card("run", "org/adapter", samples=2)
    assert card.text.count("**prompt:**\n\n```text\nWhat is") == 2
    Path("asked.txt").write_text("Who are you?\n")
    card, _ = make_run_card("run", "org/adapter", prompts="asked.txt")
    assert card.text.count("**prompt:**") == card.text.count("```text\nWho are you?") == 1
    with pytest.raises(ConfigError, match="`--prompts` has no effect"):
        make_run_card("run", "org/adapter", prompts="asked.txt", samples=0)


def read_from_the_hub(*names):
    """Change the record of the run: its pairs are from these datasets of the Hub."""
    record = read_entries("run/run.json")
    record["settings"]["pairs"] = list(names)
    [report] = record["pairs"]
    record["pairs"] = [report | {"source": f"{name}:train"} for name in names]
    write_edited("run/run.json", record)


def test_only_datasets_that_the_hub_calls_public_are_named(workplace, fake_hub):
    fake_hub.datasets = {"org/open": "public", "org/gated": "gated", "org/private": "private"}
    read_from_the_hub("org/open", "org/gated", "org/private", "org/gone")
    card, notes = make_run_card("run", "org/adapter", online=True)
    assert card.data["datasets"] == ["org/open"]
    assert "9 preference pairs of [org/open](https://huggingface.co/datasets/org/open)" in card.text
    assert "and of data that this card does not name" in card.text
    assert not re.search(r"org/(gated|private|gone)|What is", str(card))
    [note] = [note for note in notes if "training data" in note]
    assert "(org/gated, org/private, org/gone)" in note and "--show-private` names it" in note
    card, notes = make_run_card("run", "org/adapter", online=True, show_private=True)
    assert card.data["datasets"] == ["org/open", "org/gated", "org/private", "org/gone"]
    assert "not named" not in card.text and not any("training data" in note for note in notes)


def test_a_login_makes_no_private_dataset_public(workplace, fake_hub, monkeypatch):
    fake_hub.datasets = {"org/private": "private"}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    read_from_the_hub("org/private")
    assert "org/private" not in str(make_run_card("run", "org/adapter", online=True)[0])


@pytest.mark.parametrize("online", [True, False])
def test_without_the_hub_a_dataset_is_private(workplace, fake_hub, online):
    fake_hub.datasets = {"org/open": "public"}
    fake_hub.cut_before = {"dataset"}
    read_from_the_hub("org/open")
    card, notes = make_run_card("run", "org/adapter", online=online)
    assert "org/open" not in str(card) and "which are not named on this card" in card.text
    [note] = [note for note in notes if "training data" in note]
    assert ("`mlx-dpo card --online` asks the Hub" in note) == (not online)
    assert fake_hub.requests["dataset"] == online


HOSTILE = "a\n---\n# b\n<script>x()</script> ![i](https://x.example/i) ``` [l](u) \x1b[2J\u202e|"


def test_text_from_outside_is_no_markup_on_the_card():
    """Samples are code; license, warnings and settings are lines of plain text."""
    content = replace(
        CONTENT,
        license={"license": "other", "license_name": HOSTILE},
        warnings=[HOSTILE],
        settings={"column": HOSTILE},
        samples=[Sample(HOSTILE, HOSTILE, HOSTILE)],
        peft_problem=HOSTILE,
    )
    card = make_model_card(content)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert card.data["license_name"] == HOSTILE
    blocks = re.findall(r"^````text\n(.*?)^````$", card.text, re.DOTALL | re.MULTILINE)
    shown = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert blocks == [shown + "\n"] * 3
    rest = re.sub(r"^````text\n.*?^````$", "", card.text, flags=re.DOTALL | re.MULTILINE)
    assert rest.count("x()") == 4  # license, warning, setting and the reason of PEFT
    [row] = [line for line in rest.splitlines() if line.startswith("| `column`")]
    assert row.startswith("| `column` | ````a\\n---") and row.endswith("\\|```` |")
    rest = rest.replace(row, "")
    assert not re.search(r"(?<!\\)<script|(?<!\\)!\[i|^# b|^---", rest, re.MULTILINE)
    assert not re.search("[\x1b\u202e]", card.text)


@pytest.mark.parametrize("name", ["a/b\n# c", "a/b](x)", "a b/c", "a", "a/b/c", "<a>/b", ""])
def test_a_name_that_is_no_repository_is_refused(workplace, name):
    with pytest.raises(ConfigError, match="not the name of a repository"):
        make_run_card("run", name)
    with pytest.raises(ConfigError, match="not the name of a repository"):
        make_run_card("run", "org/adapter", base=name)


def test_the_license_is_that_of_the_base(workplace):
    text = (
        "---\nlicense: gemma\nlicense_link: https://example.org\nlanguage: de\ntags: [x]\n---\nHi"
    )
    Path("base/README.md").write_text(text)
    card, notes = make_run_card("run", "org/adapter")
    data = card.data.to_dict()
    assert (data["license"], data["license_link"], data["language"]) == (
        "gemma",
        "https://example.org",
        "de",
    )
    assert "x" not in data["tags"]
    assert not any("license" in note for note in notes)


def test_a_license_file_is_linked_in_the_repository_of_the_base(workplace):
    Path("base/README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    data = make_run_card("run", "org/adapter", base="org/base")[0].data
    assert data["license_link"] == "https://huggingface.co/org/base/blob/main/LICENSE"
    data = make_run_card("run", "org/adapter")[0].data
    assert data["license"] == "other" and "license_link" not in data.to_dict()


def test_advice_for_the_runs_owner_is_not_on_the_card(workplace):
    adapter = "loads in mlx-lm; not in PEFT: its base was packed; name another with `--base-model`"
    edit("run/run.json", adapter=adapter)
    entries = read_entries("run/adapter_config.json")
    del entries["peft_type"]
    write_edited("run/adapter_config.json", entries)
    card, _ = make_run_card("run", "org/adapter")
    assert "PEFT cannot load this adapter: its base was packed.\n" in card.text
    assert "--base-model" not in card.text


def test_a_card_without_settings_has_no_empty_table():
    text = make_model_card(replace(CONTENT, settings={})).text
    assert "All settings have mlx-dpo's default." in text and "| setting |" not in text


def test_online_is_suggested_only_if_it_was_not_given(workplace):
    for online, text in ((False, "or let `mlx-dpo card --online` ask"), (True, "to the card")):
        notes = make_run_card("run", "org/adapter", online=online)[1]
        [note] = [note for note in notes if "license" in note]
        assert text in note and ("--online" in note) == (not online)


def test_the_card_of_fully_fine_tuned_weights_names_no_adapter():
    card = make_model_card(replace(CONTENT, fine_tune_type="full"))
    assert card.data["base_model_relation"] == "finetune"
    assert card.text.count("An adapter") == 0 and "\nWeights for [org/base]" in card.text


def test_an_existing_card_is_replaced_only_with_overwrite(workplace):
    card, _ = make_run_card("run", "org/adapter")
    path = write_card(Path("run"), card, overwrite=False)
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"README\.md: already exists; add --overwrite"):
        write_card(Path("run"), card, overwrite=False)
    assert path.read_text() == "mine"
    write_card(Path("run"), card, overwrite=True)
    assert ModelCard.load(path).data["library_name"] == "peft"


def test_the_code_for_mlx_lm_runs(workplace, capsys):
    card, _ = make_run_card("run", "org/adapter", base="org/base")
    [program] = re.findall(r"```python\n(from mlx_lm.*?)```", card.text, re.DOTALL)
    program = program.replace("org/base", "base").replace("max_tokens=100", "max_tokens=3")
    Path("adapter").symlink_to("run")
    exec(compile(program, "card", "exec"), {})
    assert capsys.readouterr().out.strip()
