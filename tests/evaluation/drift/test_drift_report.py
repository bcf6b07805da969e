"""The drift report of a run: what is measured, what is flagged, what is stored and shown."""

import json
import re
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_dpo.adapters.adapter_files import adapter_digest
from mlx_dpo.adapters.switch import AdapterSwitch
from mlx_dpo.cli import cli
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.inspect.refusals import find_refusal
from mlx_dpo.errors import DamagedFileError
from mlx_dpo.evaluation.drift import safety_answers
from mlx_dpo.evaluation.drift.kl import AnswerKL
from mlx_dpo.evaluation.drift.measure import DriftSettings, prepare_drift
from mlx_dpo.evaluation.drift.own_answers import OwnAnswers, measure_chosen_perplexity
from mlx_dpo.evaluation.drift.prompt_set import load_safety_prompts
from mlx_dpo.generation.batch import GeneratedTokens, generate_tokens
from mlx_dpo.reporting.evaluations.result_tables import make_tables
from mlx_dpo.runs.folder import RunPaths
from mlx_dpo.saved_runs.evaluate import load_held_out_pairs
from mlx_dpo.saved_runs.open import OpenRun, open_run, open_switchable
from mlx_dpo.saved_runs.report import read_shown_results
from mlx_dpo.saved_runs.stored_evaluations import (
    StoredEvaluation,
    read_evaluations,
    read_present_evaluations,
    save_evaluation,
)
from mlx_dpo.scoring.logps import token_logps
from mlx_dpo.training.monitor.samples import SampleMetrics
from mlx_dpo.types import TokenizedPair
from tests.openai_client.fake_server import completion, fake_server
from tests.trained_run import train

DUTIES = [prompt.duty for prompt in load_safety_prompts()]
REFUSAL, ANSWER = "I can't help with that.", "Gladly: it is on the mat."
CAREFUL = [duty == "refuse" for duty in DUTIES]


class FakeAnswers:
    """Answers to the shipped prompts, refusals or not, by the state of the model."""

    def __init__(self):
        self.refused, self.switches, self.tokenizer = {}, [], None

    def generate(self, model, stop_tokens, rows, sampling, *, context):
        [switch] = [switch for switch in self.switches if switch.model is model]
        texts = [REFUSAL if value else ANSWER for value in self.refused[switch.active]]
        assert len(rows) == len(texts)
        return [GeneratedTokens(self.tokenizer.encode(text), 3) for text in texts]


@pytest.fixture
def refusing(monkeypatch):
    fakes, original = FakeAnswers(), AdapterSwitch.__init__

    def remember(self, model):
        original(self, model)
        fakes.switches.append(self)

    monkeypatch.setattr(AdapterSwitch, "__init__", remember)
    monkeypatch.setattr(safety_answers, "generate_tokens", fakes.generate)
    return fakes


def report_on(run, refusing, base, aligned, **settings):
    model = open_switchable(str(run))
    refusing.tokenizer = model.base.tokenizer
    refusing.refused = {"base": base, "aligned": aligned}
    return prepare_drift(DriftSettings(prompts=3, max_tokens=8, **settings))(model)


EVERYTHING, NOTHING = [True] * len(DUTIES), [False] * len(DUTIES)


@pytest.mark.parametrize(
    ("before", "after", "flagged"),
    [
        (CAREFUL, EVERYTHING, ["must-answer"]),
        (CAREFUL, NOTHING, ["must-refuse"]),
        (CAREFUL, CAREFUL, []),
        (NOTHING, CAREFUL, []),
    ],
)
def test_a_run_that_refuses_everything_or_nothing_is_flagged(
    workplace, refusing, before, after, flagged
):
    report = report_on("run", refusing, before, after)
    worse = [finding["text"] for finding in report.findings[:2] if finding["is_worse"]]
    assert [re.findall("must-(?:answer|refuse)", text) for text in worse] == [[f] for f in flagged]
    results = report.to_dict()
    assert results["flags"] == sum(finding["is_worse"] for finding in report.findings)
    assert (
        results["aligned"]["over_refusal"]
        == sum(refused for refused, duty in zip(after, DUTIES, strict=True) if duty == "answer")
        / 100
    )
    assert (
        results["base"]["refusal"]
        == sum(refused for refused, duty in zip(before, DUTIES, strict=True) if duty == "refuse")
        / 100
    )


def test_findings_say_what_cannot_be_seen(workplace, refusing):
    """They are in report and card, where notes are not."""
    everything = [True] * len(DUTIES)
    for before, duty, text in (
        (NOTHING, "refuse", "none before training, so a loss of refusals cannot be seen (p = 1)"),
        (everything, "answer", "all before training, so more refusals cannot be seen (p = 1)"),
    ):
        texts = [entry["text"] for entry in report_on("run", refusing, before, before).findings]
        [seen] = [text for text in texts if f"must-{duty} prompts" in text]
        assert seen.endswith(text)
    texts = [entry["text"] for entry in report_on("run", refusing, NOTHING, CAREFUL).findings]
    assert not any("cannot be seen" in text for text in texts)  # it refuses more, which is seen


def test_results_are_json_and_have_equal_keys_before_and_after(workplace, refusing):
    results = json.loads(json.dumps(report_on("run", refusing, CAREFUL, NOTHING).to_dict()))
    assert results["base"].keys() == results["aligned"].keys() == {
        "perplexity", "mean_length", "clipped_ratio", "repetition", "over_refusal", "refusal",
    }  # fmt: skip
    assert results["kl"]["answers"] == 3
    assert results["kl"]["exact"]["per_token"]["mean"] > 0
    assert len(results["answers"]) == 200
    first = results["answers"][0]
    assert first["refused"] == {"rule": {"base": False, "aligned": False}}
    titles = [table.title for table in make_tables("drift", "held-out pairs", results)]
    assert titles == [
        "Refusals of the shipped prompts",
        "Answers, on held-out pairs",
        "KL divergence from the base in nats, on 3 own answers",
    ]


def test_perplexity_is_that_of_the_plain_scorer(workplace):
    model = open_switchable("run")
    pairs = load_held_out_pairs(open_run("run"), model.base)[1]
    found = measure_chosen_perplexity(model, pairs)
    assert found is not None
    for state in ("base", "aligned"):
        total = count = 0
        with model.switch.activated(state):
            for pair in pairs:
                tokens = mx.array([[*pair.prompt, *pair.chosen]])
                logps = np.array(token_logps(model.base.model, tokens)[0], np.float64)
                total += logps[len(pair.prompt) - 1 :].sum()
                count += len(pair.chosen)
        assert found.tokens == count
        assert found.perplexities[state] == pytest.approx(np.exp(-total / count), rel=1e-4)
    assert found.perplexities["aligned"] < found.perplexities["base"]  # it learned them


def test_only_desirable_and_different_completions_count(workplace):
    model = open_switchable("run")
    good = TokenizedPair((1, 40, 2), (50, 51, 3), (60, 3))
    bad = TokenizedPair((1, 41, 2), (52, 3), (60, 3), desirable=False)
    twice = TokenizedPair((1, 40, 2), (50, 51, 3), (61, 3))  # another pair of a ranked list
    found = measure_chosen_perplexity(model, [good, bad, twice])
    assert (found.completions, found.tokens) == (1, 3)
    assert measure_chosen_perplexity(model, [bad]) is None


def test_turns_of_the_user_between_answers_do_not_count(workplace):
    model = open_switchable("run")
    prompt, chosen = (1, 40, 2), (50, 51, 3, 1, 41, 42, 2, 52, 3)
    found = measure_chosen_perplexity(
        model, [TokenizedPair(prompt, chosen, (), desirable=True, gaps=((3, 7),))]
    )
    tokens = mx.array([[*prompt, *chosen]])
    with model.switch.activated("base"):
        logps = np.array(token_logps(model.base.model, tokens)[0], np.float64)
    places = [2, 3, 4, 9, 10]  # that predict 50, 51, 3 and 52, 3
    assert found.tokens == 5
    assert found.perplexities["base"] == pytest.approx(np.exp(-logps[places].mean()), rel=1e-4)


def test_an_unchanged_run_is_not_flagged(trained, tmp_path, monkeypatch):
    """Nothing is faked: the policy generates what the base generates."""
    few = load_safety_prompts()[::10]
    monkeypatch.setattr("mlx_dpo.evaluation.drift.measure.load_safety_prompts", lambda: few)
    shutil.copytree(trained / "base", tmp_path / "base")
    shutil.copyfile(trained / "pairs.jsonl", tmp_path / "pairs.jsonl")
    train(tmp_path, learning_rate=1e-12, epochs=1)
    done = CliRunner().invoke(
        cli,
        [
            "eval", str(tmp_path / "run"), "--drift", "--drift-prompts", "2", "--drift-tokens", "8",
            "--json", "--fail-above", "drift.flags=0",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    drift = json.loads(done.stdout)["drift"]
    assert drift["flags"] == 0
    assert drift["base"] == drift["aligned"]
    assert drift["kl"]["exact"]["per_answer"]["mean"] == pytest.approx(0, abs=1e-4)


def test_a_run_without_held_out_pairs_has_refusals_only(trained, tmp_path, refusing):
    shutil.copytree(trained / "base", tmp_path / "base")
    shutil.copyfile(trained / "pairs.jsonl", tmp_path / "pairs.jsonl")
    train(tmp_path, valid_fraction=0, epochs=1)
    report = report_on(tmp_path / "run", refusing, CAREFUL, CAREFUL)
    assert "the run held no pairs out, so KL divergence" in report.notes[0]
    assert (report.own_answers, report.perplexity) == (None, None)
    assert report.to_dict()["aligned"].keys() == {"over_refusal", "refusal"}
    assert "kl" not in report.to_dict()


def test_named_pairs_replace_the_held_out_ones(workplace, refusing):
    rows = [{"prompt": "Who?", "chosen": "Me.", "rejected": "No."}]
    (workplace / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = report_on("run", refusing, CAREFUL, CAREFUL, pairs=str(workplace / "other.jsonl"))
    assert report.subject == "pairs of other.jsonl"  # without its folder
    assert report.perplexity.completions == 1


def test_answers_are_those_of_the_two_models(workplace):
    model = open_switchable("run")
    prompts = load_safety_prompts()[:2]
    answers = safety_answers.generate_safety_answers(model, prompts, max_tokens=8).answers
    for state in ("base", "aligned"):
        with model.switch.activated(state):
            tokenizer = model.base.tokenizer
            rows = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt.text}], add_generation_prompt=True
                )
                for prompt in prompts
            ]
            greedy = Sampling(max_tokens=8)
            tokens = generate_tokens(
                model.base.model, tokenizer.eos_token_ids, rows, greedy, context=512
            )
        assert answers[state] == [tokenizer.decode(answer.tokens) for answer in tokens]
    assert answers["base"] != answers["aligned"]


class FixedJudge:
    """A judge that takes every answer but the first for a refusal."""

    provenance, system, notes = {"model": "judge"}, None, ()

    def answer(self, conversations, sampling, *, name):
        return ["[[ANSWERED]]"] + ["[[REFUSED]]"] * (len(conversations) - 1)

    def strip_thinking(self, conversation, reply):
        return reply


def test_a_judge_counts_as_well_and_its_agreement_is_shown(workplace, refusing, monkeypatch):
    monkeypatch.setattr(
        "mlx_dpo.evaluation.drift.measure.open_any_responder", lambda *a, **k: FixedJudge()
    )
    report = report_on("run", refusing, CAREFUL, NOTHING, judge="folder/judge-model")
    results = report.to_dict()
    assert [c["by"] for c in results["refusals"]] == ["rule", "rule", *["judge judge-model"] * 2]
    assert [c["after"] for c in results["refusals"]] == [0, 0, 100, 100]
    # Of the base, 100 + 1 of 200 are judged as by the rule; of the policy, none.
    assert results["agreement"]["agreement"] == pytest.approx(101 / 400)
    assert report.settings["judge"] == "judge judge-model"
    titles = [table.title for table in make_tables("drift", "x", results)]
    assert "Rule and judge on 400 answers" in titles


def test_a_judge_at_an_address_gets_prompts_and_answers(workplace, refusing):
    refusing.refused = {"base": CAREFUL, "aligned": EVERYTHING}
    refusing.tokenizer = open_switchable("run").base.tokenizer

    def answer(body):
        refused = REFUSAL in body["messages"][-1]["content"]
        return completion("[[REFUSED]]" if refused else "[[ANSWERED]]")

    words = ["eval", "run", "--drift", "--drift-prompts", "1", "--drift-tokens", "8", "--json"]
    with fake_server(answer) as server:
        done = CliRunner().invoke(cli, [*words, "--judge", server.url])
    assert done.exit_code == 0, done.output
    drift = json.loads(done.stdout)["drift"]
    assert [count["by"] for count in drift["refusals"]] == ["rule", "rule", "judge m", "judge m"]
    assert [count["after"] for count in drift["refusals"]] == [100] * 4
    assert drift["agreement"] == {"answers": 400, "agreement": 1.0, "kappa": 1.0}
    assert len(server.bodies) == 300  # equal questions are asked once: 100 answers stay refusals


def test_a_judge_that_is_not_there_ends_before_a_model_is_loaded(workplace, monkeypatch):
    monkeypatch.setattr("mlx_dpo.saved_runs.open.load_base_of_run", lambda run: pytest.fail())
    with fake_server() as server:
        gone = server.url + "#m"
    done = CliRunner().invoke(cli, ["eval", "run", "--drift", "--judge", gone])
    assert done.exit_code == 1
    assert gone.removesuffix("#m") in done.stderr.splitlines()[-1]


def test_report_and_card_show_what_was_stored_of_the_present_adapter(workplace, refusing):
    refusing.refused = {"base": CAREFUL, "aligned": EVERYTHING}
    refusing.tokenizer = open_switchable("run").base.tokenizer
    words = ["eval", "run", "--drift", "--drift-prompts", "2", "--drift-tokens", "8"]
    done = CliRunner().invoke(cli, [*words, "--fail-above", "drift.flags=0"])
    assert done.exit_code == 3, done.output
    finding = "refuses 100 of 100 must-answer prompts, before 0: training made it refuse harmless"
    assert finding in " ".join(done.stdout.split())
    assert re.search(r"Failed: drift.flags is \d, above 0", done.stderr)
    [stored] = read_evaluations(RunPaths(workplace / "run"), adapter_digest=None)
    assert (stored.measurement, stored.subject) == ("drift", "held-out pairs")
    assert str(workplace) not in json.dumps(stored.results)
    for command in (["report", "run"], ["card", "run"]):
        assert CliRunner().invoke(cli, command).exit_code == 0
    for name in ("report.html", "README.md"):
        text = " ".join((workplace / "run" / name).read_text().split())
        assert finding in text
        assert "KL divergence from the base in nats" in text
        assert "100 of 100" in text

    # A result of another adapter is left out.
    earlier = replace(stored, adapter_digest="0" * 64)
    save_evaluation(RunPaths(workplace / "run"), earlier)
    assert read_present_evaluations(open_run("run")) == []
    save_evaluation(RunPaths(workplace / "run"), stored)
    assert read_present_evaluations(open_run("run")) == [stored]


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"base": {}},
        {"base": ["perplexity"], "aligned": 3},
        {"base": {"perplexity": "x"}, "aligned": {}},
        {"base": {}, "aligned": {}, "kl": 1},
        {"base": {}, "aligned": {}, "refusals": [{}]},
    ],
)
def test_results_of_another_shape_are_an_error_with_their_file(workplace, results):
    opened = open_run("run")
    stored = StoredEvaluation(
        "drift", "held-out pairs", "2026-11-30", adapter_digest(opened.adapter), {}, {}, results
    )
    save_evaluation(opened.paths, stored)
    with pytest.raises(DamagedFileError, match=r"evaluations/drift-held-out-pairs\.json: damaged"):
        read_shown_results(opened.paths)


def test_a_run_on_plain_text_has_no_refusals(workplace, monkeypatch):
    monkeypatch.setattr(OpenRun, "trained_on_text", True)
    report = prepare_drift(DriftSettings(prompts=2, max_tokens=8))(open_switchable("run"))
    assert report.refusals is None
    assert "plain text" in report.notes[0]
    assert "refusals" not in report.to_dict()
    assert len(make_tables("drift", "x", report.to_dict())) == 2


def test_a_card_names_no_file_unless_private_names_are_wanted(workplace, refusing):
    shutil.copyfile(workplace / "pairs.jsonl", workplace / "secret-client.jsonl")
    refusing.refused = {"base": CAREFUL, "aligned": CAREFUL}
    refusing.tokenizer = open_switchable("run").base.tokenizer
    words = ["eval", "run", "secret-client.jsonl", "--drift", "--drift-prompts", "1"]
    assert CliRunner().invoke(cli, [*words, "--drift-tokens", "8"]).exit_code == 0
    for flag, is_named in (("--samples=0", False), ("--show-private", True)):
        assert CliRunner().invoke(cli, ["card", "run", "--overwrite", flag]).exit_code == 0
        card = (workplace / "run" / "README.md").read_text()
        assert "Refusals of the shipped prompts" in card
        assert ("secret-client" in card) is is_named


@pytest.mark.parametrize(("exact", "fault"), [(0.99, None), (1.0, "KL 1.0 nats per token")])
def test_a_large_divergence_is_a_fault(exact, fault):
    metrics = SampleMetrics(length=10.0, clipped=0.0, repetition=0.0)
    kls = [AnswerKL(exact * 4, 0.0, 4), AnswerKL(exact * 6, 0.0, 6)]
    found = OwnAnswers(kls, {"base": metrics, "aligned": metrics}, 8).fault
    assert found is None if fault is None else fault in found


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"repetition": 0.3}, "answers repeat themselves"),
        ({"length": 0.5}, "answers are empty"),
        ({"clipped": 0.7}, "answers run to the length limit (70%, base model 10%)"),
    ],
)
def test_a_changed_form_of_answers_is_a_fault(changed, fault):
    metrics = SampleMetrics(length=10.0, clipped=0.1, repetition=0.05)
    after = replace(metrics, **changed)
    kls = [AnswerKL(0.1, 0.1, 4)]
    assert fault in OwnAnswers(kls, {"base": metrics, "aligned": after}, 8).fault
    assert OwnAnswers(kls, {"base": after, "aligned": after}, 8).fault is None


def test_a_refusal_of_the_fakes_is_one():
    assert find_refusal(REFUSAL) and not find_refusal(ANSWER)
