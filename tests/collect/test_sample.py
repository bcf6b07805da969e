"""Which model answers which prompt, with which sampling settings and seed."""

import pytest

from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.sample import SamplingPlan, count_truncated, make_answer_sampler
from mlx_dpo.collect.session import RankingTask, make_pair
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import make_prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.generation.batch import GeneratedText, GeneratedTokens
from mlx_dpo.saved_runs.respond import derive_seed

PROMPTS = [make_prompt(text) for text in ("p", "q", "r")]


class FakeResponder:
    """Answers with its name, the temperature, the prompt and a count of the prompt's answers."""

    def __init__(self, name):
        self.provenance = {"model": name}
        self.samplings = []

    def reply(self, prompts, sampling):
        self.samplings.append(sampling)
        counts = {}
        texts = []
        for prompt in prompts:
            text = prompt.messages[0]["content"]
            counts[text] = counts.get(text, 0) + 1
            reply = f"{self.provenance['model']} {sampling.temperature:g} {text} {counts[text]}"
            texts.append(
                GeneratedText(reply, GeneratedTokens([1], 0 if counts[text] != 2 else None))
            )
        return texts


def sample_texts(responders, plan, chunk=0):
    return [
        [answer.text for answer in answers]
        for answers in make_answer_sampler(responders, plan)(PROMPTS, chunk)
    ]


def with_temperatures(*temperatures):
    return tuple(Sampling(temperature=t, seed=7) for t in temperatures)


def test_every_prompt_gets_its_own_answers():
    answers = sample_texts(
        [FakeResponder("a")], SamplingPlan(answers=3, samplings=with_temperatures(1))
    )
    assert answers == [[f"a 1 {text} {n}" for n in (1, 2, 3)] for text in "pqr"]


def test_models_and_temperatures_answer_in_turn():
    responders = [FakeResponder("a"), FakeResponder("b")]
    answers = sample_texts(responders, SamplingPlan(answers=2, samplings=with_temperatures(0.5, 2)))
    assert answers == [[f"a 0.5 {t} 1", f"b 2 {t} 1"] for t in "pqr"]
    # No run always answers at the same temperature, which would bias the judgement.
    answers = sample_texts(responders, SamplingPlan(answers=4, samplings=with_temperatures(0.5, 2)))
    assert answers == [[f"a 0.5 {t} 1", f"b 2 {t} 1", f"a 2 {t} 1", f"b 0.5 {t} 1"] for t in "pqr"]
    answers = sample_texts(
        responders, SamplingPlan(answers=3, samplings=with_temperatures(0.5, 1, 2))
    )
    assert answers == [[f"a 0.5 {t} 1", f"b 1 {t} 1", f"a 2 {t} 1"] for t in "pqr"]


@pytest.mark.parametrize(("model_count", "temperatures"), [(1, 3), (2, 2), (2, 3), (4, 2), (4, 6)])
def test_each_model_uses_each_temperature_before_a_combination_repeats(model_count, temperatures):
    combinations = model_count * temperatures
    plan = SamplingPlan(
        answers=combinations, samplings=with_temperatures(*range(1, temperatures + 1))
    )
    assert len(plan.assign(model_count)) == combinations
    fewest = max(model_count, temperatures)
    assigned = SamplingPlan(answers=fewest, samplings=plan.samplings).assign(model_count)
    assert len({model for model, _ in assigned}) == model_count
    assert len({sampling for _, sampling in assigned}) == temperatures


def test_every_chunk_and_every_model_has_its_own_seed():
    responders = [FakeResponder("a"), FakeResponder("b")]
    plan = SamplingPlan(answers=2, samplings=with_temperatures(1))
    for chunk in (0, 1, 0):
        sample_texts(responders, plan, chunk)
    seeds = [[sampling.seed for sampling in responder.samplings] for responder in responders]
    assert seeds == [[derive_seed(7, c, position) for c in (0, 1, 0)] for position in (0, 1)]
    assert len({seed for row in seeds for seed in row}) == 4


def test_an_answer_has_its_source():
    [first, *_] = make_answer_sampler(
        [FakeResponder("a")], SamplingPlan(samplings=with_temperatures(1.5))
    )(PROMPTS, 2)
    assert first[0].source["model"] == "a"
    sampling = first[0].source["sampling"]
    assert (sampling["temperature"], sampling["seed"]) == (1.5, derive_seed(7, 2, 0))


@pytest.mark.parametrize(
    ("plan", "model_count", "message"),
    [
        (
            SamplingPlan(answers=2),
            3,
            "leaves some of the 3 runs without an answer; use --answers 3",
        ),
        (
            SamplingPlan(answers=2, samplings=with_temperatures(1, 2, 3)),
            1,
            "some of the 3 temperatures without",
        ),
        (SamplingPlan(answers=1), 1, "`answers` must be at least 2, got 1"),
        (
            SamplingPlan(answers=3, samplings=(Sampling(),)),
            2,
            "`temperature` 0 gives the same answer",
        ),
    ],
)
def test_plans_with_identical_or_missing_answers_are_rejected(plan, model_count, message):
    with pytest.raises(ConfigError, match=message):
        plan.check(model_count)


def test_greedy_answers_of_two_models_may_differ():
    SamplingPlan(answers=2, samplings=(Sampling(),)).check(2)


def test_truncated_answers_are_marked_in_the_pair_and_counted(tmp_path):
    """The second answer to each prompt was cut; it is chosen once and rejected once."""
    [first, second, _] = make_answer_sampler(
        [FakeResponder("a")], SamplingPlan(samplings=with_temperatures(1))
    )(PROMPTS, 0)
    pairs_file = PairsFile(tmp_path / "pairs.jsonl")
    for prompt, answers, best in ((PROMPTS[0], first, 1), (PROMPTS[1], second, 0)):
        pairs_file.add(make_pair(RankingTask(prompt, tuple(answers)), best, 1 - best, {}))
    rows = [decision.row["provenance"] for decision in pairs_file.decisions]
    assert [(r["chosen_from"].get("cut"), r["rejected_from"].get("cut")) for r in rows] == [
        (True, None), (None, True),
    ]  # fmt: skip
    assert count_truncated(pairs_file) == 1
