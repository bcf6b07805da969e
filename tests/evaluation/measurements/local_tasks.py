"""Tasks of lm-eval on rows in a local file: each kind of request, and tasks that fail."""

import json
from typing import Any

ROWS: list[dict[str, Any]] = [
    {
        "question": f"Where is the cat number {n}?" + " The cat sat on the mat." * (n % 3),
        "choices": [" on the mat", " in the house, friend", " no", f" It is {n}"],
        "label": (7 * n) % 4,
    }
    for n in range(10)
]
NAMES = ("local_choice", "local_rolling", "local_generate")
DATA = """\
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
fewshot_split: test
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TASKS = {
    "local_choice": CHOICE,
    "local_rolling": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
""",
    "local_generate": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n", "sat"], max_gen_toks: 12}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
""",
    "local_zero": CHOICE + "num_fewshot: 0\n",
    "local_unsafe": CHOICE + "unsafe_code: true\n",
    "local_broken": CHOICE + "process_results: !function broken.divide\n",
}
GROUP = """\
group: local_group
task: [local_choice, local_zero]
aggregate_metric_list: [{metric: acc, weight_by_size: false}]
"""


def write_tasks(folder):
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{DATA.format(rows=rows)}{text}")
    (folder / "local_group.yaml").write_text(GROUP)
    gone = DATA.format(rows=folder / "gone.jsonl") + CHOICE
    (folder / "local_gone.yaml").write_text(f"task: local_gone\n{gone}")
    (folder / "broken.py").write_text("def divide(doc, results):\n    return {'acc': 1 / 0}\n")
