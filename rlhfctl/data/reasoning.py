"""Questions with worked answers in the two forms of ReFT: prose (`ncot`) and programs (`pcot`).

The prompt is "Question:\\n...\\nAnswer reasoning:\\n"; for programs it goes on with the head of the function, whose
docstring is the question. A row without a worked answer of that form is a prompt without a response.
"""

import math
import re
from typing import Any

from rlhfctl.data.qa import Row, question_parts
from rlhfctl.data.samples import Message

MARK = "Therefore, the answer is: "  # what the verifier ncot_answer looks for, at the start of a line

CALCULATOR = re.compile(r"<<([^<>=]*)=([^<>]*)>>")  # GSM8K: <<48/2=24>>
SAID = re.compile(r"\s*(?:Therefore, )?[Tt]he answer is:? <?([^<>\n]*?)>?\.?\s*$")
ARITHMETIC = re.compile(r"[\d.+\-*/() ]+")


def ncot(rest: Row) -> tuple[list[Message], str | None, Any]:
    question, given, worked = question_parts(rest)
    label = short(given)
    return [_asked(_start(question))], prose(str(worked), label), label


def pcot(rest: Row) -> tuple[list[Message], str | None, Any]:
    question, label, worked = question_parts(rest)
    head = f'def solution():\n    """{question}"""\n'
    return [_asked(_start(question) + head)], body(str(worked)), short(label)


def _start(question: str) -> str:
    return f"Question:\n{question}\nAnswer reasoning:\n"


def _asked(content: str) -> Message:
    return {"role": "user", "content": content}


def short(label: Any) -> Any:
    """The answer alone, where the label is GSM8K's worked solution; no currency or percent sign, as in `prose`."""
    return bare(label.rpartition("\n#### ")[2]) if isinstance(label, str) else label


def bare(answer: str) -> str:
    """Without a currency or percent sign around it, unless it is nothing else."""
    return answer.strip().strip("$£€%").strip() or answer.strip()


def prose(worked: str, label: Any) -> str | None:
    """The reasoning, and its answer as the verifier reads it: no currency, percent sign or thousands commas.

    None where the text ends in no answer, or in one that the verifier cannot read or that is not the label's word or
    letter: the policy would be taught what it is then punished for."""
    text, mark, answer = worked.rpartition("\n#### ")
    if not mark:
        said = SAID.search(worked)
        if said is None:
            return None
        text, answer = worked[: said.start()], said.group(1)
    text = CALCULATOR.sub("", text).strip()
    answer = bare(answer)
    if _number(answer) is not None:
        answer = answer.replace(",", "")
    numeric = _number(str(label)) is not None
    if _number(answer) is None if numeric else _word(answer) != _word(str(label)):
        return None
    return f"{text}\n{MARK}{answer}"


def body(worked: str) -> str | None:
    """The function's body: of a program as it stands behind its docstring, or the calculator marks of GSM8K line by
    line. None where the text has neither, or where the last mark is not the answer."""
    if "def solution():\n" in worked:
        code = worked.partition("def solution():\n")[2]
        return re.sub(r'\A\s*""".*?"""\n', "", code, count=1, flags=re.S).rstrip("\n")
    marks = CALCULATOR.findall(worked)
    if not marks or not all(ARITHMETIC.fullmatch(expression) for expression, _ in marks):
        return None
    if _number(marks[-1][1]) is None or _number(marks[-1][1]) != _number(str(short(worked))):
        return None
    lines = [
        f"    step_{place} = {_without_zeros(expression)}" for place, (expression, _) in enumerate(marks, 1)
    ]
    return "\n".join([*lines, f"    return step_{len(marks)}"])


def _without_zeros(expression: str) -> str:
    """Python refuses 05."""
    return re.sub(r"(?<![\d.])0+(?=\d)", "", expression)


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _word(text: str) -> str:
    return text.strip().strip("'\"").strip().lower()
