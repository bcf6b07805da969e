"""ROUGE-L and exact match of an answer and a reference answer.

rouge-score, the usual library, drops all letters but a to z, so a text in another script has no
words; it also brings absl-py and nltk, of which ROUGE-L needs nothing. For English its numbers
(without stemming) are the same; a test compares them.
"""

import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache

# Chinese and Japanese are written without spaces: each of their characters counts as a word, as in
# the usual evaluation of Chinese.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


@cache
def _word_pattern() -> re.Pattern[str]:
    """Return the pattern of a word of letters, digits and marks.

    Python's `\\w` has no marks, which are the vowels of Hindi, Tamil, Thai and other scripts.
    """
    codes = range(sys.maxunicode + 1)
    marks = "".join(chr(code) for code in codes if unicodedata.category(chr(code)).startswith("M"))
    return re.compile(rf"[{UNSPACED}][{marks}]*|(?:(?![{UNSPACED}_])[\w{marks}])+")


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _word_pattern().findall(unicodedata.normalize("NFC", text).lower())


def rouge_l(answer: str, reference: str) -> float:
    """Return the ROUGE-L F1 score of an answer, in [0, 1].

        P = LCS / (words of the answer),  R = LCS / (words of the reference),  F1 = 2 P R / (P + R)

    LCS is the length of the longest common subsequence of words. Two texts without words have the
    score 1 if they are the same, else 0.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1, with
    beta = 1 as in rouge-score.
    """
    words, wanted = split_words(answer), split_words(reference)
    if not words or not wanted:
        return float(is_exact_match(answer, reference))
    return 2 * longest_common_subsequence(words, wanted) / (len(words) + len(wanted))


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two sequences.

    One row of the table of lengths is kept in memory, of the length of `second`.
    """
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = lengths[column]
            best = max(above, lengths[column - 1])
            lengths[column] = diagonal + 1 if word == other else best
            diagonal = above
    return lengths[-1]


def is_exact_match(answer: str, reference: str) -> bool:
    """Return whether two texts are the same, apart from case and white space."""
    return _normalized(answer) == _normalized(reference)


def _normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
