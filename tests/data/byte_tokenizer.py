"""A tokenizer over bytes with real Jinja templates, small enough to check by eye."""

import re

import jinja2

BOS, EOS, USER, ASSISTANT, SYSTEM, TWO_LINES = range(256, 262)
SPECIAL_TOKENS = {
    "<s>": BOS,
    "</s>": EOS,
    "<U>": USER,
    "<A>": ASSISTANT,
    "<S>": SYSTEM,
    "\n\n": TWO_LINES,
}
SPECIAL_TOKEN_OF_ROLE = {"user": "<U>", "assistant": "<A>", "system": "<S>"}

CHAT = (
    "{% for m in messages %}{{ mark[m.role] }}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)


class ByteTokenizer:
    """One id per byte and per special token, and one for two newlines, which merge as in BPE."""

    bos_token, bos_token_id = "<s>", BOS
    eos_token, eos_token_id = "</s>", EOS
    vocab_size = 262

    def __init__(self, chat_template=None, adds_bos=False):
        self.chat_template = chat_template
        self.adds_bos = adds_bos

    @property
    def all_special_tokens(self):
        return [name for name in SPECIAL_TOKENS if name != "\n\n"]

    def convert_tokens_to_ids(self, token):
        return SPECIAL_TOKENS[token]

    def convert_ids_to_tokens(self, number):
        return self.decode([number])

    def encode(self, text, add_special_tokens=True, split_special_tokens=False):
        ids = [BOS] if self.adds_bos and add_special_tokens else []
        names = ["\n\n"] if split_special_tokens else SPECIAL_TOKENS
        for piece in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
            ids += [SPECIAL_TOKENS[piece]] if piece in names else piece.encode()
        return ids

    def decode(self, ids):
        names = {number: name for name, number in SPECIAL_TOKENS.items()}
        return "".join(names.get(i) or chr(i) for i in ids)

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=True, **more):
        if more.pop("continue_final_message", False):
            last = messages[-1]["content"]
            whole = self.apply_chat_template(messages, tokenize=False, **more)
            text = whole[: whole.rindex(last) + len(last)]
            return self.encode(text, add_special_tokens=False) if tokenize else text
        text = jinja2.Template(self.chat_template, undefined=jinja2.StrictUndefined).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            mark=SPECIAL_TOKEN_OF_ROLE,
            **more,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text
