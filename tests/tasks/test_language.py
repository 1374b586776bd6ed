"""Shares of languages."""

import pytest

from fathom.tasks.language import share


@pytest.mark.parametrize(
    ("text", "english", "chinese"),
    [
        ("", None, None),
        ("12 + 3.5 = x², y_1 → π 🙂 \\frac{1}{2} sin(x)", None, None),
        ("the sum", 1.0, 0.0),
        ("和是", 0.0, 1.0),
        ("the sum 是 ten", 3 / 4, 1 / 4),
        ("答案是the sum没错", 2 / 7, 5 / 7),
        ("don't", 1.0, 0.0),
        ("ТОР тор", 0.0, 0.0),
        ("sоon", 0.0, 0.0),
        ("в доме", 0.0, 0.0),
        ("한국어 English", 1 / 2, 0.0),
        ("ไทย ok", 1 / 4, 0.0),
        ("a" * 40 + " 是", 2 / 3, 1 / 3),
        ("a" * 41 + " 是", 3 / 4, 1 / 4),
        ("\\therefore \\because 是", 1 / 2, 1 / 2),
        ("\\ton 是", 1 / 2, 1 / 2),
        ("max min 是", 0.0, 1.0),
        ("𝐭𝐡𝐞 ｓｕｍ", 1.0, 0.0),
    ],
)
def test_words_are_counted_by_script(text: str, english: float | None, chinese: float | None) -> None:
    """Han characters and runs of A to Z are words of their languages, other letters of others, figures of none."""
    assert share(text, "en") == english
    assert share(text, "zh") == chinese
