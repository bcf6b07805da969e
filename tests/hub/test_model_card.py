"""The card: metadata that the Hub takes, facts that are true, and programs that run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mlx_dpo.errors import ConfigError
from mlx_dpo.hub.model_card import CardFacts, Sample, card, fused_card
from mlx_dpo.hub.run_card import card_of_run, write_card
from mlx_dpo.hub.secret_scan import leaks_in
from tests.trained_run import train

FACTS = CardFacts(
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
    reference="the base",
    adapter="LoRA, rank 8, scale 2",
    steps="10 steps",
    evaluation={"eval_loss": 0.5, "eval_rewards/accuracies": 0.75},
    held_out=10,
    settings={"learning_rate": 1e-5},
    versions={"mlx": "1"},
    digest="0123456789abcdef",
    way="lora",
    not_in_peft=None,
    peft_base=None,
    bits=None,
)


def test_metadata_is_what_the_hub_reads():
    assert card(FACTS).data.to_dict() == {
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


def test_the_figures_of_other_losses_are_called_what_they_are():
    """SimPO has no reference to gain over, does not start at log 2, and has a paper of its own."""
    changed = {"losses": ("simpo",), "rewarded": "average log-probability", "loss": "simpo, beta 2"}
    evaluation = {"eval_loss": 0.5, "eval_rewards/chosen": 1.0}
    made = card(replace(FACTS, evaluation=evaluation, **changed))
    assert "| 0.5000 | the loss |" in made.text and "log 2" in card(FACTS).text
    assert "beta × the average log-probability of a token of the answer" in made.text
    assert "* Loss: simpo, beta 2 (SimPO: Meng et al. 2024, arXiv:2405.14734, Eq. 6)" in made.text
    assert made.data.tags[-1] == "simpo" and "dpo" not in made.data.tags
    led = card(replace(FACTS, settings={"margin_column": "lead"})).text
    assert "log 2" not in led
    judged = card(replace(FACTS, losses=("kto",), labelled=True)).text
    assert "share of answers whose reward lies on the side" in judged
    assert "trained to answer as the good of 90" in judged
    assert "share of pairs whose chosen answer has the larger reward" in card(FACTS).text


def test_a_base_without_a_hub_id_is_left_out_of_the_metadata():
    made = card(replace(FACTS, base_model=None, license={}, datasets=[], language=None))
    assert made.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert "`BASE` is the model that it was trained on" in made.text
    assert "could not be read here" in made.text


def test_an_adapter_that_peft_cannot_load_says_why_and_shows_no_program_for_it():
    made = card(replace(FACTS, not_in_peft="`x` stacks the experts"))
    assert made.data.library_name == "mlx"
    assert "It does not load there: `x` stacks the experts." in made.text
    assert "PeftModel" not in made.text
    assert "PeftModel" in card(FACTS).text


def test_figures_samples_and_curves_are_shown_where_there_are_any():
    text = card(FACTS).text
    assert "| `eval_rewards/accuracies` | 0.7500 |" in text
    assert "![" not in text and "Before and after" not in text
    sample = Sample("Hi?\nThere?", "no", "yes\n\n> quoted")
    text = card(replace(FACTS, samples=[sample], curves=True, evaluation={})).text
    assert (
        "> **prompt:** Hi?\n> There?\n>\n> **before:** no\n>\n> **after:** yes\n> \n> > quoted"
        in text
    )
    assert "](curves.png)" in text
    assert "nothing is known of unseen pairs" in text


def test_an_adapter_of_a_base_that_was_packed_on_load_tells_how_to_make_that():
    text = card(replace(FACTS, bits=4)).text
    assert "mlx-dpo convert org/base --bits 4 --output base" in text
    assert 'load("base", adapter_path="adapter")' in text
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in text


def test_peft_is_given_the_checkpoint_that_names_were_proved_on():
    text = card(replace(FACTS, base_model="mlx-community/base-4bit", peft_base="org/base")).text
    assert 'load("mlx-community/base-4bit", adapter_path="adapter")' in text
    assert 'AutoTokenizer.from_pretrained("org/base")' in text
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in text


def test_a_fused_models_card_is_of_a_model():
    licence = {"license": "gemma", "language": ["de"]}
    assert fused_card("org/base", to="hf", bits=None, inherited=licence).data.to_dict() == {
        **licence,
        "base_model": "org/base", "base_model_relation": "finetune",
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["mlx-dpo", "preference-optimization"],
    }  # fmt: skip
    made = fused_card(None, to="mlx", bits=8, inherited={})
    assert made.data.library_name == "mlx" and made.data.base_model is None
    assert "quantised to 8 bits" in made.text


def test_the_card_of_a_run_says_what_its_record_says(workplace):
    made, notes = card_of_run("run", "org/adapter", base="org/base")
    record = json.loads(Path("run/run.json").read_text())
    assert "9 preference pairs, which are not public" in made.text
    assert f"| `eval_loss` | {record['evaluation']['eval_loss']:.4f} |" in made.text
    assert "Means over 3." in made.text
    assert "| `lora_r` | `4` |" in made.text and "`learning_rate` | `0.001`" in made.text
    assert made.data.library_name == "peft"
    assert [note.partition(":")[0] for note in notes] == [
        "no samples",
        "the base's licence is not known here",
    ]


def test_no_path_of_this_machine_is_in_the_card(workplace, trained):
    """Of a run that was given absolute paths of base, pairs and start adapter."""
    train(
        workplace,
        output=str(workplace / "next"),
        start_adapter=str(workplace / "run"),
        lora_r=None,
        system="Be brief",
        valid=str(workplace / "pairs.jsonl"),
        valid_fraction=None,
    )
    made, _ = card_of_run("next", "org/adapter")
    path = write_card(Path("next"), made, overwrite=False)
    text = path.read_text()
    assert "| `system` | `not shown` |" in text and "Be brief" not in text
    assert list(leaks_in(path, "README.md")) == []
    for name in (str(workplace), workplace.name, "pairs.jsonl", "start_adapter"):
        assert name not in text


def test_prompts_of_private_pairs_are_shown_only_if_asked_for(workplace):
    made, notes = card_of_run("run", "org/adapter")
    assert "What is" not in made.text
    assert any("the pairs are yours" in note for note in notes)
    made, _ = card_of_run("run", "org/adapter", samples=2)
    assert made.text.count("> **prompt:** What is") == 2
    Path("asked.txt").write_text("Who are you?\n")
    made, _ = card_of_run("run", "org/adapter", prompts="asked.txt")
    assert made.text.count("**prompt:**") == made.text.count("**prompt:** Who are you?") == 1
    with pytest.raises(ConfigError, match="`--prompts` has no effect"):
        card_of_run("run", "org/adapter", prompts="asked.txt", samples=0)


def test_the_licence_is_the_bases(workplace):
    page = (
        "---\nlicense: gemma\nlicense_link: https://example.org\nlanguage: de\ntags: [x]\n---\nHi"
    )
    Path("base/README.md").write_text(page)
    made, notes = card_of_run("run", "org/adapter")
    data = made.data.to_dict()
    assert (data["license"], data["license_link"], data["language"]) == (
        "gemma",
        "https://example.org",
        "de",
    )
    assert "x" not in data["tags"]
    assert not any("licence" in note for note in notes)


def test_a_licence_beside_the_base_is_linked_where_the_base_is(workplace):
    Path("base/README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    data = card_of_run("run", "org/adapter", base="org/base")[0].data
    assert data.license_link == "https://huggingface.co/org/base/blob/main/LICENSE"
    data = card_of_run("run", "org/adapter")[0].data
    assert data.license == "other" and "license_link" not in data.to_dict()


def test_advice_for_the_owner_is_not_on_the_card(workplace):
    record = json.loads(Path("run/run.json").read_text())
    said = "loads in mlx-lm; not in PEFT: its base was packed; name another with `--base`"
    Path("run/run.json").write_text(json.dumps(record | {"adapter": said}))
    entries = json.loads(Path("run/adapter_config.json").read_text())
    del entries["peft_type"]
    Path("run/adapter_config.json").write_text(json.dumps(entries))
    made, _ = card_of_run("run", "org/adapter")
    assert "It does not load there: its base was packed.\n" in made.text
    assert "--base" not in made.text


def test_a_card_without_settings_has_no_empty_table():
    text = card(replace(FACTS, settings={})).text
    assert "All of them have mlx-dpo's default." in text and "| setting |" not in text


def test_the_hub_is_not_advised_to_who_asked_it(workplace):
    for online, said in ((False, "or let `mlx-dpo card --online` ask"), (True, "to the card")):
        notes = card_of_run("run", "org/adapter", online=online)[1]
        [note] = [note for note in notes if "licence" in note]
        assert said in note and ("--online" in note) == (not online)


def test_weights_that_were_trained_themselves_are_no_adapter():
    made = card(replace(FACTS, way="full"))
    assert made.data.base_model_relation == "finetune"
    assert made.text.count("An adapter") == 0 and "\nWeights for [org/base]" in made.text


def test_a_card_that_somebody_wrote_on_is_not_replaced_unasked(workplace):
    made, _ = card_of_run("run", "org/adapter")
    path = write_card(Path("run"), made, overwrite=False)
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"README\.md: is there already; add --overwrite"):
        write_card(Path("run"), made, overwrite=False)
    assert path.read_text() == "mine"
    write_card(Path("run"), made, overwrite=True)
    assert ModelCard.load(path).data.library_name == "peft"


def test_the_program_for_mlx_lm_runs(workplace, capsys):
    made, _ = card_of_run("run", "org/adapter", base="org/base")
    [program] = re.findall(r"```python\n(from mlx_lm.*?)```", made.text, re.DOTALL)
    program = program.replace("org/base", "base").replace("max_tokens=100", "max_tokens=3")
    Path("adapter").symlink_to("run")
    exec(compile(program, "card", "exec"), {})
    assert capsys.readouterr().out.strip()
