"""Reading one number out of an answer."""

from fractions import Fraction

import pytest

from fathom.tasks.numerals import LONGEST, read_number, write_number
from tests.tasks.hostile import HOSTILE


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        (" 42.\n", 42),
        ("42。", 42),
        ("-7", -7),
        ("−7", -7),
        ("+7", 7),
        ("007", 7),
        ("-0", 0),
        ("3.50", Fraction(7, 2)),
        (".5", Fraction(1, 2)),
        ("1,234", 1234),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("3/4", Fraction(3, 4)),
        ("-6 / 4", Fraction(-3, 2)),
        ("1.5e3", 1500),
        ("2e-2", Fraction(1, 50)),
        ("$42", 42),
        ("-$42", -42),
        ("$-42", -42),
        ("¥42", 42),
        ("４２", 42),
        ("－１，２３４．５", Fraction(-2469, 2)),
    ],
)
def test_what_a_reader_would_take_for_a_number_is_read_exactly(text: str, number: Fraction) -> None:
    """Signs, groups, decimals, fractions, exponents, currency signs and full-width digits are read without rounding."""
    assert read_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        *HOSTILE,
        "41 or 42",
        "41, 42",
        "41 42",
        "12,34",
        "1,2345",
        "1.234.567",
        "--7",
        "-$-7",
        "- ",
        "6*7",
        "40+2",
        "50%",
        "42 apples",
        "x = 42",
        "42 = x",
        "1e100",
        "1/2/3",
        "1/-2",
        "four",
        "4 2",
        "42?",
        "42..",
        "0" * (LONGEST + 1),
    ],
)
def test_what_is_not_one_number_is_none(text: str) -> None:
    """Two numbers, sums, other scripts' digits, overflow, and unnamed units or letters are no number."""
    assert read_number(text) is None


def test_name_and_unit_are_read_only_where_they_were_asked_for() -> None:
    """`x = 42` and `42 apples` are numbers for a caller who named the letter and the unit, and no others are."""
    assert read_number("X = 42", name="x") == 42
    assert read_number("y = 42", name="x") is None
    assert read_number("x = y = 42", name="x") is None
    assert read_number("42 Apples.", units=("apples",)) == 42
    assert read_number("42 apples or 43 apples", units=("apples",)) is None
    assert read_number("42个苹果", units=("个苹果", "个")) == 42


def test_what_is_written_is_read_back() -> None:
    """`read_number` gives what `write_number` wrote."""
    for number in (Fraction(0), Fraction(-7), Fraction(3, 4), Fraction(-10, 3)):
        assert read_number(write_number(number)) == number
