"""Run by a Python that has torch, transformers and peft: a JSON list a line in, JSON a line out.

["adapter", BASE, ADAPTER, TOKENS]   logits of what PEFT makes of an adapter
["model", FOLDER, TOKENS]            logits of what transformers makes of a model
["make", ENTRIES, FOLDER]            a model of these settings with random weights, saved
["run", PROGRAM]                     what a program of a card prints
"""

import contextlib
import io
import json
import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM


def logits(folder, tokens, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        with warnings.catch_warnings(record=True) as caught_warnings:
            model = PeftModel.from_pretrained(model, adapter)
        # PEFT only warns of arrays that it did not find.
        assert not any(
            "missing adapter keys" in str(warning.message) for warning in caught_warnings
        ), caught_warnings
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([tokens])).logits[0].tolist()


def make(entries, folder):
    entries = {**entries, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    model.save_pretrained(folder)


def answer(what, *arguments):
    if what == "run":
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(arguments[0], "card", "exec"), {})
        return printed.getvalue()
    if what == "make":
        return make(*arguments)
    return logits(arguments[0], arguments[-1], *arguments[1:-1])


for line in sys.stdin:
    try:
        answered = answer(*json.loads(line))
    except Exception as error:  # of any of the libraries; the asking test is to say it
        answered = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answered), flush=True)
