import json

from mlx_dpo.data.load import load_pairs
from mlx_dpo.data.tokenization.formatting import TokenRules

SHARED = "\n\nHuman: a\n\nAssistant:"


def test_a_plain_file_needs_two_lines(write, chat):
    turns = {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "yo"}],
        "rejected": [{"role": "assistant", "content": "no!"}],
    }
    path = write(turns)
    assert load_pairs(path, chat(), TokenRules(vocab_size=262)).report.lines() == [
        "pairs.jsonl: 1 pair (schema messages)",
        "tokens: 5 prompt, 3 chosen, 4 rejected; longest row 9",
    ]


def test_the_report_has_a_line_for_every_change(write, plain):
    good = {"prompt": "hi</s>\n", "chosen": "yo", "rejected": "\nno", "score": 3}
    empty = [good | {"chosen": ""}] * 4
    same = good | {"chosen": "\nno"}
    dialogue = {"chosen": SHARED + " b</s>", "rejected": SHARED + " c", "source": "x"}
    report = load_pairs(
        write(good, *empty, same, dialogue),
        plain,
        TokenRules(vocab_size=262, max_length=24),
        bad_pairs="drop",
    ).report
    # `good`: BOS hi</s> | \n y o EOS | \n\n n o EOS. `dialogue`: BOS and 20 | 3 | 3.
    assert report.lines() == [
        "pairs.jsonl: 2 pairs (schemas strings: 6, dialogues: 1)",
        "tokens: 28 prompt, 7 chosen, 7 rejected; longest row 24",
        "1 pair with special tokens in a text (`</s>`), encoded as plain text; with "
        "--chat-template text they take effect",
        "1 pair with a token that spans prompt and completion; it counts as completion",
        "stop token added to 3 of 4 completions",
        "fields not used: score, source",
        "left out 4 pairs: a completion is empty (:2, :3, :4, …)",
        "left out 1 pair: chosen and rejected are the same text (:6)",
    ]
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["dropped"]["a completion is empty"] == [f"pairs.jsonl:{n}" for n in (2, 3, 4, 5)]
    assert values["schemas"] == {"strings": 6, "dialogues": 1}
    assert values["unused_fields"] == {"score": 6, "source": 1}


def test_chat_templates_and_truncation_are_reported(write, chat):
    path = write({"prompt": "hi", "chosen": "yo", "rejected": "no!"})
    report = load_pairs(path, chat(), TokenRules(vocab_size=262, max_length=8)).report
    assert report.lines() == [
        "pairs.jsonl: 1 pair (schema strings)",
        "tokens: 5 prompt, 3 chosen, 3 rejected; longest row 8",
        "1 pair of plain strings put into the model's chat template, as one user and one "
        "assistant turn",
        "1 pair cut to 8 tokens: 0 prompts at the start, 1 completion at the end, whose stop token "
        "is not scored",
    ]


def test_cut_prompts_and_completions_are_counted(write, plain):
    path = write(
        {"prompt": "hi", "chosen": "c" * 9, "rejected": "r" * 9},
        {"prompt": "a" * 20, "chosen": "yo", "rejected": "no!"},
    )
    rules = TokenRules(vocab_size=262, max_length=10, truncation="keep_end")
    report = load_pairs(path, plain, rules).report
    assert (report.truncated, report.prompts_cut, report.completions_cut) == (2, 2, 2)
    assert report.lines()[2] == (
        "2 pairs cut to 10 tokens: 2 prompts at the start, 2 completions at the end, whose stop "
        "token is not scored"
    )
