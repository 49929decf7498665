"""How much of a story is spoken: the share of its words that stand between quotation marks.

`score` is a python reward; the recipe against-rm gives it weight 0, so that it is measured and never paid for.
"""

import re

QUOTED = re.compile(r'["\u201c]([^"\u201c\u201d]*)(?:["\u201d]|$)')
WORD = re.compile(r"[A-Za-z']+")


def score(samples):
    return [{"score": share(text := sample["response"]), "metrics": metrics(text)} for sample in samples]


def share(text):
    words = len(WORD.findall(text))
    return spoken(text) / words if words else 0.0


def spoken(text):
    return sum(len(WORD.findall(quote)) for quote in QUOTED.findall(text))


def metrics(text):
    words = WORD.findall(text.lower())
    return {
        "spoken": share(text),
        "words": float(len(words)),
        "different_words": len(set(words)) / len(words) if words else 0.0,
    }
