from mlx_dpo.collect.iterative_report import HEADINGS, round_cells, round_page, summary_page

CONTEST = {
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
    "against_base": CONTEST,
    "against_before": CONTEST | {"win_rate": 0.5},
    "answers": [{"prompt": TURNS, "base": "no\nyes", "before": "`c`", "now": " "}],
}


def test_a_round_has_its_figures_under_their_headings():
    assert dict(zip(HEADINGS, round_cells(FIRST), strict=True)) == {
        "round": "1",
        "pairs": "1,200",
        "no pair": "34",
        "held-out reward": "1.500",
        "won against the base (95 %)": "75.0% (50.0% to 90.0%)",
        "at equal length": "62.5%",
        "won against the round before": "50.0%",
        "characters": "41",
    }


def test_what_is_not_known_of_the_base_is_left_empty():
    assert round_cells(BASE) == ["base", "", "", "0.635", "", "", "", "30"]
    unrewarded = {name: value for name, value in BASE.items() if name != "mean_reward"}
    assert round_cells(unrewarded)[3] == ""
    unmeasured = FIRST | {"against_base": CONTEST | {"length_controlled_win_rate": None}}
    assert round_cells(unmeasured)[5] == ""


def test_the_page_of_a_loop_has_a_line_for_each_round():
    lines = summary_page([BASE, FIRST], "r.py:f").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert "Judged by r.py:f." in lines
    assert len(table) == 4
    assert {line.count("|") for line in table} == {len(HEADINGS) + 1}


def test_the_page_of_a_round_shows_answers_as_text_in_their_cells():
    page = round_page(FIRST)
    assert "* passed over, tie: 30" in page
    assert "* accuracy on the round's own held-out pairs: 90.0%" in page
    assert "* held-out prompts, the two orders disagree: 3" in page
    *_, row = page.strip().splitlines()
    assert row == r"| a \| b / \*x\* / \<script\> | no yes | \`c\` | (nothing) |"
    assert round_page(BASE).splitlines()[0] == "# The base"
