"""Published sets that judge reward models, as rows of `preference`: (prompt, chosen, rejected).

rm_bench  three styles of a right and of a wrong answer: nine pairs a row
auto_j    two responses and which is better; ties are left out
panda_lm  the same with three annotators: the majority decides, ties are left out
"""

from typing import Any

from rlhfctl.data.bad_row import BadRow

Row = dict[str, Any]
STYLES = ("concise", "detailed", "markdown")  # RM-Bench's order, from plain to dressed up
TWO = ("response 1", "response 2")
VOTES = ("annotator1", "annotator2", "annotator3")


def is_rm_bench(row: Row) -> bool:
    sides = [row.get("chosen"), row.get("rejected")]
    return "prompt" in row and all(
        isinstance(side, list) and len(side) == len(STYLES) and all(isinstance(text, str) for text in side)
        for side in sides
    )


def is_auto_j(row: Row) -> bool:
    return all(column in row for column in ("prompt", "label", *TWO))


def is_panda_lm(row: Row) -> bool:
    return all(column in row for column in ("instruction", "response1", "response2", *VOTES))


def rm_bench(row: Row) -> list[Row]:
    """level: easy where the right answer is the more dressed up, hard where the wrong one is, else normal."""
    if not is_rm_bench(row):
        raise BadRow(f"has no prompt, or not {len(STYLES)} texts in chosen and in rejected")
    shared = {key: value for key, value in row.items() if key not in ("chosen", "rejected", "id")}
    found = []
    for better, right in enumerate(STYLES):
        for worse, wrong in enumerate(STYLES):
            level = "normal" if better == worse else "easy" if better > worse else "hard"
            pair = {
                **shared,
                "chosen": row["chosen"][better],
                "rejected": row["rejected"][worse],
                "level": level,
            }
            found.append(named(row, pair, f"{right}-{wrong}"))
    return found


def auto_j(row: Row) -> list[Row]:
    if not is_auto_j(row) or row["label"] not in (0, 1, 2):
        raise BadRow("label says which response is better: 0 the first, 1 the second, 2 neither")
    shared = {key: value for key, value in row.items() if key not in ("label", *TWO)}
    return [{**shared, **sides(row, TWO, row["label"])}] if row["label"] < 2 else []


def panda_lm(row: Row) -> list[Row]:
    """Annotators say 1, 2, or 0 for a tie. instruction and input are the prompt, as in alpaca."""
    votes = [row.get(name) for name in VOTES]
    if not is_panda_lm(row) or any(vote not in (0, 1, 2) for vote in votes):
        raise BadRow(f"{', '.join(VOTES)} say which response is better: 1, 2, or 0 for neither")
    winner = next((vote for vote in (1, 2) if votes.count(vote) >= 2), None)
    if winner is None:
        return []
    columns = ("response1", "response2")
    dropped = ("idx", "id", "instruction", "input", *columns, *VOTES)
    shared = {key: value for key, value in row.items() if key not in dropped}
    prompt = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    given = row.get("id", row.get("idx"))
    identity = {"id": str(given)} if given is not None else {}
    return [{**identity, **shared, "prompt": prompt, **sides(row, columns, winner - 1)}]


def sides(row: Row, columns: tuple[str, str], better: int) -> Row:
    return {"chosen": row[columns[better]], "rejected": row[columns[1 - better]]}


def named(row: Row, pair: Row, part: str) -> Row:
    given = row.get("id")
    return {**({"id": f"{given}/{part}"} if given is not None else {}), **pair}
