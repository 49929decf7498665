"""A reward that counts: how many different happy words a story has.

One quarter for each different word of the list, up to four of them, so that the reward is between 0 and 1, and
writing one word again and again earns nothing. `metrics` show what the reward does not pay for: the share of
different words falls when a policy starts to repeat itself.
"""

import re

HAPPY = {
    *("happy", "glad", "proud", "excited", "joy", "fun", "kind", "friend", "friends"),
    *("smile", "smiled", "laugh", "laughed", "hug", "hugged", "love", "loved"),
}
ENOUGH = 4


def score(samples):
    return [score_text(sample["response"]) for sample in samples]


def score_text(text):
    words = re.findall(r"[a-z]+", text.lower())
    happy = HAPPY.intersection(words)
    return {
        "score": min(len(happy), ENOUGH) / ENOUGH,
        "metrics": {
            "happy_words": float(len(happy)),
            "words": float(len(words)),
            "different_words": len(set(words)) / len(words) if words else 0.0,
        },
    }
