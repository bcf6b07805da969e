"""Who answers what, under which seed."""

import pytest

from mlx_dpo.collect.pairs_file import PairsFile
from mlx_dpo.collect.sample import SamplingPlan, count_truncated, make_answer_sampler
from mlx_dpo.collect.session import RankingTask, make_pair
from mlx_dpo.config.sampling import Sampling
from mlx_dpo.data.prompts import make_prompt
from mlx_dpo.errors import ConfigError
from mlx_dpo.generation.generate import GeneratedText
from mlx_dpo.saved_runs.respond import derive_seed

PROMPTS = [make_prompt(text) for text in ("p", "q", "r")]


class Speaker:
    """Says its name, the prompt, and which of the prompts it was asked in this call."""

    def __init__(self, name):
        self.facts = {"model": name}
        self.asked = []

    def reply(self, prompts, sampling):
        self.asked.append(sampling)
        seen = {}
        texts = []
        for prompt in prompts:
            text = prompt.messages[0]["content"]
            seen[text] = seen.get(text, 0) + 1
            said = f"{self.facts['model']} {sampling.temperature:g} {text} {seen[text]}"
            texts.append(GeneratedText(said, is_cut=seen[text] == 2))
        return texts


def said(speakers, asking, chunk=0):
    return [
        [answer.text for answer in of_one]
        for of_one in make_answer_sampler(speakers, asking)(PROMPTS, chunk)
    ]


def warm(*temperatures):
    return tuple(Sampling(temperature=t, seed=7) for t in temperatures)


def test_every_prompt_gets_its_own_answers():
    answers = said([Speaker("a")], SamplingPlan(answers=3, samplings=warm(1)))
    assert answers == [[f"a 1 {text} {n}" for n in (1, 2, 3)] for text in "pqr"]


def test_voices_and_temperatures_answer_in_turn():
    speakers = [Speaker("a"), Speaker("b")]
    answers = said(speakers, SamplingPlan(answers=2, samplings=warm(0.5, 2)))
    assert answers == [[f"a 0.5 {t} 1", f"b 2 {t} 1"] for t in "pqr"]
    # No run always answers at the same temperature: that would be what is judged.
    answers = said(speakers, SamplingPlan(answers=4, samplings=warm(0.5, 2)))
    assert answers == [[f"a 0.5 {t} 1", f"b 2 {t} 1", f"a 2 {t} 1", f"b 0.5 {t} 1"] for t in "pqr"]
    answers = said(speakers, SamplingPlan(answers=3, samplings=warm(0.5, 1, 2)))
    assert answers == [[f"a 0.5 {t} 1", f"b 1 {t} 1", f"a 2 {t} 1"] for t in "pqr"]


@pytest.mark.parametrize(("voices", "temperatures"), [(1, 3), (2, 2), (2, 3), (4, 2), (4, 6)])
def test_each_voice_meets_each_temperature_before_one_comes_again(voices, temperatures):
    every = voices * temperatures
    asking = SamplingPlan(answers=every, samplings=warm(*range(1, temperatures + 1)))
    assert len(asking.places(voices)) == every
    few = max(voices, temperatures)
    seen = SamplingPlan(answers=few, samplings=asking.samplings).places(voices)
    assert len({voice for voice, _ in seen}) == voices
    assert len({sampling for _, sampling in seen}) == temperatures


def test_every_chunk_and_every_voice_has_a_seed_of_its_own():
    speakers = [Speaker("a"), Speaker("b")]
    asking = SamplingPlan(answers=2, samplings=warm(1))
    for chunk in (0, 1, 0):
        said(speakers, asking, chunk)
    seeds = [[sampling.seed for sampling in speaker.asked] for speaker in speakers]
    assert seeds == [[derive_seed(7, c, place) for c in (0, 1, 0)] for place in (0, 1)]
    assert len({seed for row in seeds for seed in row}) == 4


def test_an_answer_says_where_it_came_from():
    [first, *_] = make_answer_sampler([Speaker("a")], SamplingPlan(samplings=warm(1.5)))(PROMPTS, 2)
    assert first[0].source["model"] == "a"
    told = first[0].source["sampling"]
    assert (told["temperature"], told["seed"]) == (1.5, derive_seed(7, 2, 0))


@pytest.mark.parametrize(
    ("asking", "voices", "message"),
    [
        (
            SamplingPlan(answers=2),
            3,
            "leaves some of the 3 runs without an answer; use --answers 3",
        ),
        (SamplingPlan(answers=2, samplings=warm(1, 2, 3)), 1, "some of the 3 temperatures without"),
        (SamplingPlan(answers=1), 1, "`answers` must be at least 2, got 1"),
        (
            SamplingPlan(answers=3, samplings=(Sampling(),)),
            2,
            "`temperature` 0 gives the same answer",
        ),
    ],
)
def test_answers_that_could_not_differ_are_refused(asking, voices, message):
    with pytest.raises(ConfigError, match=message):
        asking.check(voices)


def test_greedy_answers_of_two_voices_may_differ():
    SamplingPlan(answers=2, samplings=(Sampling(),)).check(2)


def test_what_was_cut_is_kept_with_the_pair_and_counted(tmp_path):
    """Of each prompt the second answer was cut: chosen once, rejected once."""
    [first, second, _] = make_answer_sampler([Speaker("a")], SamplingPlan(samplings=warm(1)))(
        PROMPTS, 0
    )
    picks = PairsFile(tmp_path / "pairs.jsonl")
    for prompt, answers, best in ((PROMPTS[0], first, 1), (PROMPTS[1], second, 0)):
        picks.add(make_pair(RankingTask(prompt, tuple(answers)), best, 1 - best, {}))
    rows = [kept.row["provenance"] for kept in picks.order]
    assert [(r["chosen_from"].get("cut"), r["rejected_from"].get("cut")) for r in rows] == [
        (True, None), (None, True),
    ]  # fmt: skip
    assert count_truncated(picks) == 1
