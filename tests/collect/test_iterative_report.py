from mlx_dpo.collect.iterative.report import (
    HEADINGS,
    round_cells,
    round_page,
    round_warnings,
    summary_lines,
    summary_page,
)

COMPARISON = {
    "win_rate": 0.75,
    "interval_95": [0.5, 0.9],
    "length_controlled_win_rate": 0.625,
    "doubts": {"the two orders disagree": 3},
}
BASE = {
    "round": 0,
    "mean_characters": 30.4,
    "mean_reward": 0.6351,
    "answers": [{"prompt": [{"role": "user", "content": "hi"}], "now": "ho"}],
}
TURNS = [
    {"role": "user", "content": "a | b"},
    {"role": "assistant", "content": "*x*"},
    {"role": "user", "content": "<script>"},
]
FIRST = {
    "round": 1,
    "mean_characters": 41.0,
    "mean_reward": 1.5,
    "collected": {"pairs": 1200, "tie": 30, "skipped": 4},
    "held_out_pairs": {"eval_rewards/accuracies": 0.9},
    "against_base": COMPARISON,
    "against_before": COMPARISON | {"win_rate": 0.5},
    "answers": [{"prompt": TURNS, "base": "no\nyes", "before": "`c`", "now": " "}],
}


def test_the_cells_of_a_round_are_in_the_order_of_the_headings():
    assert dict(zip(HEADINGS, round_cells(FIRST), strict=True)) == {
        "round": "1",
        "pairs": "1,200",
        "no pair": "34",
        "held-out reward": "1.500",
        "win rate against base (95 %)": "75.0% (50.0% to 90.0%)",
        "length-controlled": "62.5%",
        "win rate against previous round": "50.0%",
        "characters": "41",
        "KL from base (nats per token)": "",
        "4-gram repetition": "",
        "answers cut": "",
    }


HEALTH = {
    "completions/mean_length": 60.0,
    "completions/clipped_ratio": 0.75,
    "completions/repetition": 0.625,
    "completions/kl": 1.25,
}


def test_a_round_that_exploits_its_reward_is_seen_in_table_and_pages():
    collapsed = FIRST | {
        "health": HEALTH,
        "collapse": "answers repeat themselves (4-gram repetition 62%, base model 3%)",
        "training": "the policy is worse than the base model: it prefers the rejected completions",
    }
    assert round_cells(collapsed)[-3:] == ["1.250", "62.5%", "75.0%"]
    collapse, training = round_warnings(collapsed)
    assert collapse.startswith("round 1: answers repeat themselves (4-gram repetition 62%, base")
    assert "bound the reward" in collapse
    for page in (round_page(collapsed), summary_page([BASE, collapsed], "r.py:f")):
        assert collapse in page
        assert training in page
    assert round_warnings(FIRST) == round_warnings(BASE) == []


def test_unknown_figures_of_the_base_are_empty():
    assert round_cells(BASE) == ["base", "", "", "0.635", "", "", "", "30", "", "", ""]
    without_reward = {name: value for name, value in BASE.items() if name != "mean_reward"}
    assert round_cells(without_reward)[3] == ""
    without_length_control = FIRST | {
        "against_base": COMPARISON | {"length_controlled_win_rate": None}
    }
    assert round_cells(without_length_control)[5] == ""


def test_the_summary_page_has_a_line_per_round():
    lines = summary_page([BASE, FIRST], "r.py:f").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert "Judged by r.py:f." in lines
    assert len(table) == 4
    assert {line.count("|") for line in table} == {len(HEADINGS) + 1}


def test_the_page_of_a_round_escapes_markup_in_answers():
    page = round_page(FIRST)
    assert "* no pair, tie: 30" in page
    assert "* accuracy on the round's own held-out pairs: 90.0%" in page
    assert "* held-out prompts, the two orders disagree: 3" in page
    *_, row = page.strip().splitlines()
    assert row == r"| a \| b / \*x\* / \<script\> | no yes | \`c\` | (nothing) |"
    assert round_page(BASE).splitlines()[0] == "# The base"


def test_the_results_of_all_rounds_are_aligned_text():
    """A figure that no round has is left out; nothing is Markdown."""
    assert summary_lines([BASE, FIRST]) == [
        "round                             base               1",
        "pairs                                            1,200",
        "no pair                                             34",
        "held-out reward                  0.635           1.500",
        "win rate against base                            75.0%",
        "  95 % interval                         50.0% to 90.0%",
        "length-controlled                                62.5%",
        "win rate against previous round                  50.0%",
        "characters                          30              41",
    ]
