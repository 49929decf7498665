"""Where the final answer stands in a worked solution, and what number it is. Pure functions of text.

The last of these marks counts: `\\boxed{...}`, `#### ...`, "the answer is ...", and "Answer: ..." or "A: ..." at the
start of a line. Without a mark the last line is read: the whole of it where it is an answer, else its last number.
"""

import re
from fractions import Fraction

LONGEST = 300  # characters of an answer; what is longer is no final answer
MARKS_TRIED = 20  # from the end; a response of nothing but marks must not cost more than another

NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?\.\d+"
MARKS = re.compile(
    r"\\boxed[ \t]*(?={)|####|(?:^|\n)[ \t]*(?:A|Answer|Final answer)[ \t]*:"
    r"|\banswer[ \t]+is\b[ \t]*:?|\banswer[ \t]*:",
    re.IGNORECASE,
)
CALCULATOR = re.compile(r"<<[^<>\n]*>>")  # GSM8K's <<48/2=24>>

# One number with words, a variable or a currency before it and a unit after it: "$1,234.50", "x = 3", "26 apples",
# "9 (apples)", "12%", "5 km/h". A unit needs two letters or a space-free known short form: "3x" is no number.
SHORT_UNITS = r"(?:km|cm|mm|kg|mg|ml|mi|ft|in|lb|lbs|oz|hr|hrs|am|pm|st|nd|rd|th|m|g|h|s|l)"
VALUE = re.compile(
    rf"""(?:[A-Za-z]\s*=|(?:[A-Za-z]{{2,}}\s)*(?:=|:)?)\s*
    (?P<minus>-\s*(?=[$£€]))?[$£€]?\s*
    (?P<number>{NUMBER})
    (?:\s*%|\s*{SHORT_UNITS}\b[A-Za-z/. ]*|\s+[A-Za-z]{{2,}}[A-Za-z%'/ .,-]*|\s*\([^\d()]*\))?""",
    re.VERBOSE,
)
FRACTION = re.compile(r"(?:(?P<whole>[-+]?\d+)\s+)?(?P<top>[-+]?\d+)\s*/\s*(?P<bottom>\d+)")

CHOICE = re.compile(r"(?:(?:option|choice)\s+)?\(?([A-Za-z])(?:\s*\)(?:\s.*)?|[.:](?:\s.*)?)?", re.I | re.S)
WORDS = ("yes", "no", "true", "false")

LATEX_NOISE = re.compile(r"\\[,;!: ]|\\(?:left|right|displaystyle|mathrm|mathbf)\b|\\\(|\\\)|\\\[|\\\]|~")
LATEX_TEXT = re.compile(r"\\(?:text|mbox|textbf)\s*{([^{}]*)}")


def final_answer(text: str) -> str | None:
    """The answer part of a solution, or None where nothing in it could be one."""
    text = CALCULATOR.sub("", text).strip()
    for mark in reversed(list(MARKS.finditer(text))[-MARKS_TRIED:]):
        rest = text[mark.end() : mark.end() + 4 * LONGEST]
        answer = _braced(rest) if "boxed" in mark.group() else _sentence(rest)
        if answer:
            return answer if len(answer) <= LONGEST else None
    return _unmarked(text.rpartition("\n")[2].strip()[-LONGEST:])


def _braced(text: str) -> str | None:
    """The content of the group that `text` starts with; None where its brace is never closed."""
    depth = 0
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[1:index].strip()
    return None


def _sentence(text: str) -> str:
    """Up to the end of the line or of the sentence ("5. I am sure" is 5, "5.5 km" stays whole)."""
    line = text.strip().partition("\n")[0]
    line = re.split(r"[.!?](?:\s|$)", line, maxsplit=1)[0].strip()
    if line.startswith("<") and line.endswith(">"):
        line = line[1:-1]
    return line.strip().removeprefix("=").strip()


def _unmarked(line: str) -> str | None:
    if number(line) is not None or choice(line) or word(line) or re.fullmatch(r"\$[^$]+\$\.?", line):
        return line
    numbers = re.findall(NUMBER, plain(line))
    return numbers[-1] if numbers else None


def number(text: str) -> Fraction | None:
    """The one number that the text is, unit and currency aside; None where it is anything else."""
    text = plain(text).rstrip(".")
    if found := FRACTION.fullmatch(text):
        top, bottom, whole = int(found["top"]), int(found["bottom"]), found["whole"] or "0"
        if bottom == 0 or (found["whole"] and top < 0):
            return None
        part = Fraction(top, bottom)
        return int(whole) - part if whole.startswith("-") else int(whole) + part
    if found := VALUE.fullmatch(text):
        value = Fraction(found["number"].replace(",", ""))
        return -value if found["minus"] else value
    return None


def choice(text: str) -> str | None:
    """The letter of a multiple-choice answer in lower case: "b", "(B)", "B) 12", "option b"; else None."""
    found = CHOICE.fullmatch(plain(text))
    return found.group(1).lower() if found else None


def word(text: str) -> str | None:
    """yes, no, true or false, where the text starts with it ("No, because ..."); else None."""
    found = re.match(r"[A-Za-z]+", plain(text))
    return found.group().lower() if found and found.group().lower() in WORDS else None


def normalised(text: str) -> str:
    """For comparison as text: case, spaces, LaTeX spacing and a final period do not count."""
    return re.sub(r"\s+", "", plain(text)).rstrip(".").lower()


def plain(text: str) -> str:
    """LaTeX spacing, text commands, dollar signs around it and typographic minus signs taken away."""
    text = LATEX_TEXT.sub(r" \1 ", text).replace("{,}", ",").replace("\\%", "%").replace("\\$", "")
    text = LATEX_NOISE.sub(" ", text).replace("\u2212", "-").replace("\u2013", "-").strip()
    if len(text) > 2 and text.startswith("$") and text.rstrip(".").endswith("$"):
        text = text.rstrip(".")[1:-1]
    return text.strip()
