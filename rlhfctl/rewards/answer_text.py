"""Where the final answer stands in a worked solution, and what number it is. Pure functions of text.

The last of these marks counts: `\\boxed{...}`, `#### ...`, "the answer is ...", and "Answer: ..." or "A: ..." at the
start of a line. Without a mark the last line is read: the whole of it where it is an answer, else its last number, with
the expression that it is a part of: the 3 of 10^3 is no answer.
"""

import re
from fractions import Fraction
from unicodedata import normalize

from rlhfctl.rewards.number_words import SCALE, denied, denied_beside, factor, signed

LONGEST = 300  # characters of an answer; what is longer is no final answer
MARKS_TRIED = 20  # from the end; a response of nothing but marks must not cost more than another

NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,2}(?!\d))?|[-+]?\.\d+"
MARKS = re.compile(
    r"\\boxed[ \t]*(?={)|####|(?:^|\n)[ \t]*(?:A|Answer|Final answer)[ \t]*:"
    r"|\banswer[ \t]+is\b[ \t]*:?|\banswer[ \t]*:",
    re.IGNORECASE,
)
CALCULATOR = re.compile(r"<<[^<>\n]*>>")  # GSM8K's <<48/2=24>>

# One number with words, a variable or a currency before it and a unit after it: "$1,234.50", "x = 3", "26 apples",
# "9 (apples)", "12%", "1/2 cup", "5 km/h". A unit needs two letters or a space-free known short form: "3x" is none.
CURRENCY = "[$£€¥₹]"
SHORT_UNITS = r"(?:km|cm|mm|kg|mg|ml|mi|ft|in|lb|lbs|oz|hr|hrs|am|pm|st|nd|rd|th|m|g|h|s|l)"
VALUE = re.compile(
    rf"""(?P<before>[A-Za-z]\s*=|(?:[A-Za-z]{{2,}}\s)*(?:=|:)?)\s*
    (?P<minus>-(?=\s*{CURRENCY}|\s+[\d.]))?\s*{CURRENCY}?\s*
    (?:(?:(?P<whole>[-+]?\d+)\s+)?(?P<top>[-+]?\d+)\s*/\s*(?P<bottom>\d+)|(?P<number>{NUMBER}))
    (?P<unit>\s*%|\s*{CURRENCY}|\s*[°º]\s?[CF]?|\s*{SHORT_UNITS}(?:\s?\^\s?{{?[23]}}?|[²³]|\b[A-Za-z/. ]*)
      |\s+[A-Za-z]{{2,}}[A-Za-z%'/ .,-]*|\s*\([^\d()]*\))?""",
    re.VERBOSE,
)
LAST = re.compile(rf"(?:{NUMBER})(?:\s*/\s*\d+)?(?:\s*%|\s*{SCALE})?", re.I)
WHOLE = re.compile(r"\$[^$]+\$\.?|\S*\\[dt]?frac\S*")  # a line that is one formula
# Not the dollars of "$5, and $6" or "$5-$10": no space or stop inside its ends, no digit behind it.
FORMULA = re.compile(r"(?<!\\)\$(?=[^\s,.;:!?)])((?:[^$\\]|\\.)+)(?<!\s)\$(?!\d)")
EQUALS = re.compile(r"=|≈|\\(?:approx|simeq|Rightarrow|implies|rightarrow|to)\b")
ALGEBRA = re.compile(r"[\\^]|[^\W_]_[^\W_{]|[^\W_]_{|\d[xyzn]\b")
DISPLAYED = ("\\]", "$$")
# A last line that closes what the answer stands in.
CLOSED = re.compile(r"\n[ \t]*(\\\]|\$\$|```|</answer>)\s*$")
OPENED = re.compile(r"(?:\\\[|\$\$)[ \t]*\n\s*")
VULGAR = re.compile("[¼-¾⅐-⅞]")  # ½ and the like, which are one character
EMPHASIS = ' \t*`"“”'

CHOICE = re.compile(
    r"(?:(?:option|choice)\s+)?\(?([A-Za-z])(?:\s*\)(?P<rest>\s.*)?|[.:](?:\s.*)?)?", re.I | re.S
)
WORDS = ("yes", "no", "true", "false")
OR = r"\s*(?:\b(?:or|and|OR|AND)\b|/|&)\s*"  # two answers at once are none
SECOND_CHOICE = re.compile(OR + r"(?:(?:option|choice)\s+)?(?:\(?[A-Z]\b|\(?[a-z](?:\)|$))")
SECOND_WORD = re.compile(OR + rf"(?:{'|'.join(WORDS)})\b", re.I)

LATEX_NOISE = re.compile(r"\\[,;!: ]|\\(?:left|right|displaystyle|mathrm|mathbf)\b|\\\(|\\\)|\\\[|\\\]|~")
LATEX_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mbox|math(?:bf|it|rm))\s*{([^{}]*)}")


def final_answer(text: str) -> str | None:
    """The answer part of a solution, or None where nothing in it could be one."""
    text = CALCULATOR.sub("", text).strip()
    for mark in reversed(list(MARKS.finditer(text))[-MARKS_TRIED:]):
        rest = text[mark.end() : mark.end() + 4 * LONGEST]
        answer = _braced(rest) if "boxed" in mark.group() else _sentence(rest)
        if answer:
            return answer if len(answer) <= LONGEST else None
    return _unmarked(_last_line(text))


def _last_line(text: str) -> str:
    """Before what closes a display, a block of code or an <answer>."""
    displayed = False
    for _ in range(3):  # $$ ``` </answer>
        if closed := CLOSED.search(text):
            text, displayed = text[: closed.start()].rstrip(), displayed or closed[1] in DISPLAYED
    line = text.rpartition("\n")[2].strip()[-LONGEST:]
    return f"${line.rstrip('.,')}$" if displayed and "$" not in line else line


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
    text = text.strip()
    opened = OPENED.match(text)
    line = text[opened.end() if opened else 0 :].partition("\n")[0]
    line = re.split(r"[.!?](?:\s|$)", line, maxsplit=1)[0].strip()
    line = line.strip(EMPHASIS)
    if line.startswith("<") and line.endswith(">"):
        line = line[1:-1]
    return line.strip().removeprefix("=").strip()


def _unmarked(line: str) -> str | None:
    line = line.strip(EMPHASIS)
    if number(line) is not None or choice(line) or word(line) or WHOLE.fullmatch(line):
        return line
    line = line.replace("\\(", "$").replace("\\)", "$")
    for formula in list(FORMULA.finditer(line))[-1:]:
        value = EQUALS.split(formula[1])[-1].strip()
        if re.search(r"\d", value) and not re.search(r"\d", line[formula.end() :]):
            return None if denied_beside(plain(line[: formula.end()])) else value
    line = plain(line)
    found = list(LAST.finditer(line))
    if not found or denied_beside(line[: found[-1].end()]):
        return None
    start, end = found[-1].span()
    start -= len(re.search(r"\S*$", line[:start])[0])  # type: ignore[index]
    end += len(re.match(r"\S*", line[end:])[0])  # type: ignore[index]
    around = EQUALS.split(line[start:end])[-1].rstrip(".,;:!?$")
    return around if ALGEBRA.search(around) else found[-1].group()


def number(text: str) -> Fraction | None:
    """The one number that the text is, unit and currency aside; None where it is anything else."""
    text = plain(text).rstrip(".,;")
    found = VALUE.fullmatch(text)
    times = factor(found["before"], found["unit"] or "") if found else None
    if not found or times is None or denied(text):
        return None
    if found["minus"]:
        times = -times
    if found["number"]:
        return times * Fraction(found["number"].replace(",", ""))
    top, bottom, whole = int(found["top"]), int(found["bottom"]), found["whole"] or "0"
    if bottom == 0 or (found["whole"] and top < 0):
        return None
    part = Fraction(top, bottom)
    return times * (int(whole) - part if whole.startswith("-") else int(whole) + part)


def choice(text: str) -> str | None:
    """The letter of a multiple-choice answer in lower case: "b", "(B)", "B) 12", "option b"; else None."""
    found = CHOICE.fullmatch(plain(text))
    if not found or SECOND_CHOICE.match(found["rest"] or ""):
        return None
    return found.group(1).lower()


def word(text: str) -> str | None:
    """yes, no, true or false, where the text starts with it ("No, because ..."); else None."""
    text = plain(text)
    found = re.match(r"[A-Za-z]+", text)
    if not found or found.group().lower() not in WORDS or SECOND_WORD.match(text, found.end()):
        return None
    return found.group().lower()


def normalised(text: str) -> str:
    """For comparison as text: case, LaTeX spacing, a final period and spaces do not count, but for the space that makes
    "3 1/2" another number than "31/2"."""
    text = " ".join(plain(text).split())
    return re.sub(r"(?<!\d) | (?!\d)|(?<=\d) (?=\d{3}(?!\d))", "", text).rstrip(".").lower()


def plain(text: str) -> str:
    """LaTeX spacing, text commands and dollar signs around it taken away; signs and fractions in plain characters."""
    text = LATEX_TEXT.sub(r" \1 ", text).replace("{,}", ",").replace("\\%", "%").replace("\\$", "")
    text = LATEX_NOISE.sub(" ", text).replace("\u2212", "-").replace("\u2013", "-").strip()
    text = FORMULA.sub(r" \1 ", text.replace("$$", "$")).strip()
    if len(text) > 2 and text.startswith("$") and text.rstrip(".").endswith("$"):
        text = text.rstrip(".")[1:-1]
    text = VULGAR.sub(lambda found: " " + normalize("NFKC", found[0]).replace("\u2044", "/"), text)
    return signed(text.strip())
