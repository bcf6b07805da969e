"""Tables of the drift report of `mlx-dpo eval --drift`."""

from collections.abc import Sequence

from mlx_dpo.reporting.evaluations.table import Results, ResultTable

LANGUAGE_NAMES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "zh": "Chinese",
}
FORM = {  # label, key and format of what is measured on base and policy
    "perplexity of chosen completions": ("perplexity", ".3f"),
    "tokens per sampled answer": ("mean_length", ".1f"),
    "sampled answers cut": ("clipped_ratio", ".1%"),
    "4-gram repetition": ("repetition", ".1%"),
}
ESTIMATES = {"exact": "exact per position", "sampled": "log-ratio of the answer"}


def drift_tables(subject: str, results: Results) -> list[ResultTable]:
    """Return tables of refusals, of answers before and after training, and of the KL divergence."""
    tables = []
    if results.get("refusals"):
        tables.append(_refusal_table(results["refusals"]))
    if agreement := results.get("agreement"):
        tables.append(_agreement_table(agreement))
    if rows := list(_form_rows(results)):
        tables.append(ResultTable(f"Answers, on {subject}", ("base", "aligned"), rows))
    if "kl" in results:
        tables.append(_kl_table(results["kl"]))
    return tables


def _refusal_table(counts: Sequence[Results]) -> ResultTable:
    rows: list[tuple[str, ...]] = []
    for count in counts:
        by = "" if count["by"] == "rule" else f" ({count['by']})"
        numbers = (_of(count, "before"), _of(count, "after"), f"{count['p_value']:.2g}")
        rows.append((f"must {count['must']}: refused{by}", *numbers))
        rows += [
            (f"– {LANGUAGE_NAMES.get(name, name)}", _of(part, "before"), _of(part, "after"), "")
            for name, part in count["by_language"].items()
        ]
    return ResultTable("Refusals of the shipped prompts", ("base", "aligned", "p"), rows)


def _of(count: Results, key: str) -> str:
    return f"{count[key]:,} of {count['prompts']:,}"


def _agreement_table(agreement: Results) -> ResultTable:
    kappa = agreement["kappa"]
    rows = [
        ("answers on which rule and judge agree", f"{agreement['agreement']:.1%}"),
        ("Cohen's kappa", "-" if kappa is None else f"{kappa:.2f}"),
    ]
    return ResultTable(f"Rule and judge on {agreement['answers']:,} answers", ("",), rows)


def _form_rows(results: Results) -> Sequence[tuple[str, str, str]]:
    base, aligned = results["base"], results["aligned"]
    return [
        (label, format(base[key], form), format(aligned[key], form))
        for label, (key, form) in FORM.items()
        if key in base
    ]


def _kl_table(kl: Results) -> ResultTable:
    rows = [
        (label, _estimate(kl[name]["per_token"]), _estimate(kl[name]["per_answer"]))
        for name, label in ESTIMATES.items()
    ]
    title = f"KL divergence from the base in nats, on {kl['answers']:,} own answers"
    return ResultTable(title, ("per token", "per answer"), rows)


def _estimate(estimate: Results) -> str:
    stderr = estimate["stderr"]
    return f"{estimate['mean']:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
