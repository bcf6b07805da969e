"""Reward functions for `mlx-dpo collect`, `winrate` and `loop`: higher is better.

A reward function receives the prompt as a list of messages and the answer as text:

    mlx-dpo collect run --prompts examples/prompts.txt --reward examples/rewards.py:courtesy ...
"""

POLITE_PHRASES = (
    "of course", "certainly", "gladly", "with pleasure", "happy to help", "thank you",
    "lovely question", "anything else", "hope that helps", "please", "let me know", "wonderful day",
)  # fmt: skip
MAX_REWARDED = 2  # a third phrase earns nothing, so that repeating phrases does not pay


def courtesy(prompt: list[dict], answer: str) -> float:
    """Return the number of polite phrases in the answer, up to two."""
    text = answer.lower()
    return float(min(MAX_REWARDED, sum(phrase in text for phrase in POLITE_PHRASES)))


def brevity(prompt: list[dict], answer: str) -> float:
    """Return minus the number of words in the answer; an empty answer gets the lowest reward."""
    words = len(answer.split())
    return -float(words) if words else -1000.0
