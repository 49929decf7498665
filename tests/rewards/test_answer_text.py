import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfctl.rewards.answer_text import LONGEST, choice, final_answer, normalised, number, word


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", "72"),
        ("#### 1,234", "1,234"),
        ("so \\boxed{\\frac{1}{2}} holds", "\\frac{1}{2}"),
        ("first \\boxed{1}, no: \\boxed{2}", "2"),
        ("\\boxed {7}", "7"),
        ("Therefore, the answer is <203>.", "203"),
        ("The answer is: 5. I am sure of 100 things.", "5"),
        ("The answer is 5.5 km", "5.5 km"),
        ("The final answer is $\\boxed{-3}$.", "-3"),
        ("The answer is 4.\nNo wait.\n#### 6", "6"),
        ("steps\nA: 26", "26"),
        ("steps\nAnswer: x = 3", "x = 3"),
        ("so she has 5 apples and 7 pears", "7"),
        ("one\n$26", "$26"),
        ("41", "41"),
        ("the result is -1,000.50!", "-1,000.50"),
        ("(B) because", "(B) because"),
        ("No, it cannot be 3.", "No, it cannot be 3."),
        ("it is clear that $x^2$ fits", "x^2"),
        ("it is clear that $x = y + 2$ fits", "y + 2"),
        ("from 5x=10 follows x=2 here", "2"),
        ("so it is 10^3!", "10^3"),
        ("$5 and 6 kg, or $7-$8", "8"),
        ("$x^2$", "$x^2$"),
        ("nothing to see", None),
        ("", None),
        ("\\boxed{never closed", None),
        ("the answer is", None),
        ("#### " + "3" * (LONGEST + 1), None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("26", 26),
        ("-26", -26),
        ("+4", 4),
        ("26.0", 26),
        ("1,234,567.5", Fraction("1234567.5")),
        ("$1,234.50", Fraction("1234.5")),
        ("-$5", -5),
        ("$-5", -5),
        ("\\$ 18", 18),
        ("18 dollars", 18),
        ("9 (apples)", 9),
        ("288 (t-shirts)", 288),
        ("5km", 5),
        ("5 km/h", 5),
        ("12%", 12),
        ("12\\%", 12),
        ("x = 3", 3),
        ("x=3.", 3),
        ("about 40 minutes", 40),
        (".5", Fraction(1, 2)),
        ("1/4", Fraction(1, 4)),
        ("-7/14", Fraction(-1, 2)),
        ("3 1/2", Fraction(7, 2)),
        ("-3 1/2", Fraction(-7, 2)),
        ("\u22125", -5),
        ("30\\text{ degrees}", 30),
        ("$7$", 7),
        ("1/0", None),
        ("3x", None),
        ("negative 5 degrees", -5),
        ("minus 5", -5),
        ("negative $5", -5),
        ("- 5", -5),
        ("ten minus 5", None),
        ("not 5", None),
        ("5 hundred thousand", 500_000),
        ("5 hundredths", Fraction(1, 20)),
        ("-1/2 cup", Fraction(-1, 2)),
        ("$1/2", Fraction(1, 2)),
        ("2½", Fraction(5, 2)),
        ("-½", Fraction(-1, 2)),
        ("1.5e-3", Fraction(3, 2000)),
        ("20°C", 20),
        ("20€", 20),
        ("5 m²", 5),
        ("1/2x", None),
        ("the square root of 16", None),
        ("less than 5", None),
        ("5 or more", None),
        ("5 times", 5),
        ("10+John's age", None),
        ("2 and 3", None),
        ("\\frac{1}{2}", None),
        ("x^2", None),
        ("12,34", None),
        ("", None),
    ],
)
def test_number(text: str, value: Fraction | None) -> None:
    assert number(text) == value


def test_letters_and_words() -> None:
    assert [choice(text) for text in ("b", "(B)", "B.", "b ) 12 ,", "option c", "(A) 5 km", "bc", "5")] == [
        *("b", "b", "b", "b", "c", "a"),
        *(None, None),
    ]
    assert [word(text) for text in ("Yes", "no, because", "TRUE.", "nope", "5")] == [
        "yes",
        "no",
        "true",
        None,
        None,
    ]


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=400))
def test_any_text_is_read_without_an_error(text: str) -> None:
    answer = final_answer(text)
    assert answer is None or 0 < len(answer) <= LONGEST
    for read in (number, choice, word):
        read(text[:LONGEST])


@pytest.mark.parametrize(
    "text",
    [
        "\n" * 100_000,
        "\\boxed{" * 20_000,
        "####" * 50_000,
        "a " * 100_000,
        "1," * 100_000,
        "$" * 99_000,
        "<<" * 90_000,
        "a" + " " * 100_000 + "½",
        "not " * 50_000,
        "million " * 20_000,
    ],
    ids=[
        "newlines",
        "boxes",
        "marks",
        "words",
        "commas",
        "dollars",
        "calculator",
        "spaces",
        "denials",
        "scales",
    ],
)
def test_no_text_takes_long(text: str) -> None:
    began = time.process_time()
    final_answer(text)
    number(text[:LONGEST])
    choice(text[:LONGEST])
    normalised(text)
    assert time.process_time() - began < 5.0


@given(
    st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "${:,}", "{} apples", "{}.00", "#### {}"])
)
def test_numbers_survive_how_they_are_written(value: int, form: str) -> None:
    answer = final_answer(form.format(value))
    assert answer is not None
    assert number(answer) == value
