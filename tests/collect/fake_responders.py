"""Responders for tests of collecting, which answer by a function of the conversation.

from tests.collect.fake_responders import ScriptedResponder
"""

from mlx_dpo.generation.batch import GeneratedText, GeneratedTokens


class ScriptedResponder:
    """Answers each conversation by `script(messages)`, and records conversations and samplings.

    A conversation of more than `room` messages leaves no room in the context.
    """

    system = None
    notes = ()

    def __init__(self, script, *, room=99, model="m"):
        self.script, self.room = script, room
        self.provenance = {"model": model, "model_digest": f"digest of {model}"}
        self.conversations, self.samplings = [], []

    def reply(self, prompts, sampling):
        self.samplings.append(sampling)
        self.conversations.extend([dict(turn) for turn in prompt.messages] for prompt in prompts)
        texts = [self.script([dict(turn) for turn in prompt.messages]) for prompt in prompts]
        return [GeneratedText(t, GeneratedTokens([1], None if "CUT" in t else 0)) for t in texts]

    def answer(self, conversations, sampling, *, name):
        self.conversations.extend([dict(turn) for turn in turns] for turns in conversations)
        return [self.script([dict(turn) for turn in turns]) for turns in conversations]

    def clip_note(self, prompts, max_tokens):
        return "no room" if any(len(p.messages) > self.room for p in prompts) else None

    def strip_thinking(self, conversation, reply):
        return reply.rpartition("</think>")[2]
