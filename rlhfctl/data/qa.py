"""The columns of a question with its reference answer and, where there is one, its worked solution."""

from typing import Any

from rlhfctl.data.bad_row import BadRow

Row = dict[str, Any]

# question column -> columns that may hold its reference answer, columns that may hold the worked solution
QA_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "question": (("answer_value", "answer", "correct", "target"), ("answer_cot", "solution", "rationale")),
    "problem": (("answer", "correct", "solution"), ("solution", "rationale")),
    "input": (("target",), ("solution",)),
}


def question_parts(rest: Row) -> tuple[str, Any, Any]:
    """(question, reference answer, worked solution or else the reference answer), taken out of the row."""
    question_column = next((column for column in QA_COLUMNS if isinstance(rest.get(column), str)), None)
    if question_column is None:
        raise BadRow(f"has none of the columns {', '.join(QA_COLUMNS)}")
    answers, solutions = QA_COLUMNS[question_column]
    question = rest.pop(question_column)
    if not question.strip():
        raise BadRow(f"{question_column} is empty")
    if isinstance(rest.get("body"), str):  # asdiv: the story is apart from its question
        question = f"{rest.pop('body')} {question}"
    if options := rest.get("options"):  # a letter means nothing without them; they stay in metadata as well
        question += "\n" + _listed(options)
    answer_column = next((column for column in answers if rest.get(column) not in (None, "")), None)
    if answer_column is None:
        raise BadRow(f"has no answer (looked for {', '.join(answers)})")
    label = rest.pop(answer_column)
    solution_column = next((column for column in solutions if rest.get(column)), None)
    return question, label, rest.pop(solution_column) if solution_column else label


def _listed(options: Any) -> str:
    """One option a line: a text or a list as it stands, {"A": "x", "B": "y"} and [{"key": "A", "value": "x"}] as
    "A) x", "B) y"."""
    if isinstance(options, dict):
        named = sorted(options.items(), key=lambda item: (len(str(item[0])), str(item[0])))
        return "\n".join(f"{name}) {text}" for name, text in named if text is not None)
    if not isinstance(options, list):
        return str(options)
    pairs = [
        (each["key"], each["value"])
        for each in options
        if isinstance(each, dict) and {*each} == {"key", "value"}
    ]
    texts = [f"{name}) {text}" for name, text in pairs] if len(pairs) == len(options) else options
    return "\n".join(map(str, texts))
