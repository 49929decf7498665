"""Words that change the number they stand beside: signs, scales, "not", and what makes it another number or none."""

import re
from fractions import Fraction

SCALES = {
    **{"tenth": Fraction(1, 10), "hundredth": Fraction(1, 100), "thousandth": Fraction(1, 1000)},
    **{"dozen": Fraction(12), "hundred": Fraction(100), "thousand": Fraction(1000)},
    **{"million": Fraction(10**6), "billion": Fraction(10**9), "bn": Fraction(10**9)},
    **{"trillion": Fraction(10**12)},
}
SCALE = rf"\b({'|'.join(SCALES)})s?\b"
SCALED = re.compile(SCALE, re.I)

QUANTITY = r"(?=[$£€¥₹\d.\\(]|[a-z]\b)"  # what a sign stands before
NEGATIVE = re.compile(rf"\bnegative\s+{QUANTITY}", re.I)
MINUS = re.compile(  # "ten minus 5" is no sign
    rf"(^|\b(?:is|are|was|be|have|get|gives|equals|to)\s+|[=:]\s*)minus\s+{QUANTITY}", re.I
)

NOT = r"(?:\b(?:not|never|cannot)\b|n['\u2019]t\b|≠|\\neq?\b|\\not\b)"
NOT_FIRST = re.compile(rf"\s*(?:\w+ly\s+)?{NOT}", re.I)
NOT_BESIDE = re.compile(
    rf"{NOT}(?:\s+(?:equals?|to|be|the|exactly|really|just))*\s*=?\s*[-+$£€¥₹]*(?:\.?\d|\\[dt]?frac)", re.I
)

OTHER_BEFORE = re.compile(
    r"""\b(?:than|at\s+least|at\s+most|over|under|above|below|twice|double|triple|half|plus|minus|times|log|sqrt|root
    |divisible\s+by|(?:half|third|quarter|root|square|cube|power|multiple|factor|percent)\s+of)\s*$""",
    re.I | re.VERBOSE,
)
ONES = "(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)"
OTHER_AFTER = re.compile(
    rf"""\s*(?:squared|cubed|factorial|or\s+(?:more|less|fewer)
    |(?:plus|minus|times|over|point|or|to|divided\s+by)\s+{ONES}
    |and\s+(?:an?\s+|{ONES}[\s-]+)?(?:half|halves|(?:third|quarter|fourth|fifth)s?))\b""",
    re.I | re.VERBOSE,
)


def signed(text: str) -> str:
    """With "negative" and "minus" before a quantity written as a sign."""
    return MINUS.sub(r"\1-", NEGATIVE.sub("-", text))


def denied(text: str) -> bool:
    """Whether an answer says "not" of what it names, at its start or right before a number."""
    return bool(NOT_FIRST.match(text)) or denied_beside(text)


def denied_beside(text: str) -> bool:
    return bool(NOT_BESIDE.search(text))


def scaled(text: str) -> bool:
    """Whether a word such as million or dozen stands in it."""
    return bool(SCALED.search(text))


def without_scales(text: str, question: str) -> str:
    """Without the scale words that the question has too: where it asks how many dozen, "8 dozen" may be 8."""
    asked = {word.group(1).lower() for word in SCALED.finditer(question)}
    return SCALED.sub(lambda word: "" if word.group(1).lower() in asked else word.group(), text)


def factor(before: str, unit: str) -> Fraction | None:
    """What the words around a number multiply it by ("5 hundred thousand eggs"); None where it is another number, or
    none ("half of 5", "at least 5", "5 squared", "5 or six")."""
    product = Fraction(1)
    while scale := SCALED.match(unit.lstrip()):
        product *= SCALES[scale.group(1).lower()]
        unit = unit.lstrip()[scale.end() :]
    return None if OTHER_BEFORE.search(before) or OTHER_AFTER.match(unit) else product
