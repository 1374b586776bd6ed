"""What counts as the same answer."""

import pytest

from fathom.tasks.equality import equal
from fathom.tasks.isolation import Failed, Overrun

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("right", "answers", "wrong"),
    [
        # Names, dates, ranges, ratios and bases are no sums and no products.
        ("2024-01-05", ["2024-01-05", "$2024-01-05$"], ["2018", "2024-05-01", "2024 - 6"]),
        ("1945-1950", ["1945-1950."], ["-5", "1950-1945"]),
        ("05/01/2024", ["05/01/2024"], ["5/2024", "01/05/2024"]),
        ("555-1234", ["555-1234"], ["-679"]),
        ("3-2", ["3-2"], ["1", "2-3"]),
        ("12:30", ["12:30"], ["0.4", "12"]),
        ("192.168.1.1", ["192.168.1.1"], ["192.168.1", "192.168"]),
        ("H2O", ["H2O", "h2o"], ["2HO", "OH2", "H^2 O"]),
        ("H_2O", ["H_2O", "$H_{2}O$"], ["OH_2", "H_2 \\cdot O"]),
        ("A1", ["A1", "a1"], ["1A", "A"]),
        ("1011_2", ["1011_2", "1011_{2}"], ["1011", "1011_3"]),
        ("C++", ["C++", "c++"], ["C", "2C"]),
        ("A+", ["A+"], ["A", "A-"]),
        # Units.
        (
            "5 km",
            ["5.0 km", "5km", "5\\text{ km}", "$5\\,\\mathrm{km}$", "5 KM."],
            ["5", "5 m", "5 mk", "6 km", "5000 m"],
        ),
        ("5 MW", ["5.0 MW", "5MW"], ["5 mW", "5 Mw", "5"]),
        ("€5", ["5", "€5.00", "5.0"], ["$5", "£5"]),
        ("-5", ["–5", "−5", "-5.0"], ["5", "–6"]),
        ("90°", ["90 degrees", "90^\\circ"], ["90", "90 days"]),
        ("3:4", ["3 : 4"], ["4:3", "3/4"]),
        ("60 km/h", ["60.0 km/h"], ["60 mk/h", "60", "60 km"]),
        ("3 pm", ["3 pm", "3 PM"], ["3 am", "3", "3 mp"]),
        ("7 days", ["7 days"], ["7 years", "7", "7 dsay"]),
        ("\\frac{1}{2} cup", ["1/2 cup", "0.5 cup"], ["1/2", "2 cup"]),
        ("50%", ["50\\%", "50.0 %"], ["50", "0.5", "1/2"]),
        ("45^\\circ", ["45°", "45^{\\circ}", "$45^\\circ$"], ["45", "46^\\circ"]),
        ("5 公里", ["5公里"], ["5", "5 米"]),
        ("$5 million", ["\\$5 million", "$5.0 million"], ["5", "$5", "5 million", "€5 million"]),
        # Lists keep their brackets and their order.
        (
            "(1,2)",
            ["(1, 2)", "$\\left(1, 2\\right)$", "（1，2）", "(1, \\frac{4}{2})"],
            ["{1,2}", "\\{1,2\\}", "[1,2]", "(2,1)", "1,2"],
        ),
        ("[1, 2)", ["[1,2)"], ["(1,2]", "[1,2]", "(1,2)"]),
        ("\\{1, 2, 3\\}", ["{3, 2, 1}"], ["(1,2,3)", "1, 2, 3", "\\{1, 2\\}", "\\{1, 1, 2\\}"]),
        ("(2,1)", ["(2,1)"], ["(3,1)", "(1,2)", "(5,0)"]),
        ("1, 2, 3", ["1,2,3", "1.0, 2, 3"], ["3, 1, 2", "(1, 2, 3)", "1, 2", "1, 2, 3, 4", "1 2 3"]),
        ("(-\\infty, 2) \\cup (3, 4]", ["(3,4] ∪ (-∞,2)"], ["(-\\infty, 2)", "(-\\infty, 2) \\cup (3, 4)"]),
        ("\\{(1,2), (3,4)\\}", ["\\{(3,4),(1,2)\\}"], ["\\{(2,1),(3,4)\\}", "\\{\\{1,2\\},\\{3,4\\}\\}"]),
        ("[[1, 2], [3, 4]]", ["[[1,2],[3,4]]"], ["[1, 2, 3, 4]", "[[1, 3], [2, 4]]"]),
        ("[5]", ["[5]", "[5.0]"], ["5", "\\{5\\}"]),
        ("\\{x+1\\}", ["\\{1+x\\}"], ["x+1"]),
        (
            "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
            ["\\begin{bmatrix} 1 & 2 \\\\ 3 & 4/1 \\end{bmatrix}"],
            [
                "\\begin{pmatrix} 1 & 3 \\\\ 2 & 4 \\end{pmatrix}",
                "\\begin{pmatrix} 1 & 2 & 3 & 4 \\end{pmatrix}",
                "1, 2, 3, 4",
            ],
        ),
        # Equations.
        ("x = 3", ["3", "x=3", "$x = 3.0$"], ["y = 3", "x = 4", "x = 3, y = 4", "5 = 3"]),
        ("3", ["x = 3", "x=3"], ["x = 4", "2 = 3", "x = 3 = 4", "4 = x = 3"]),
        ("x = 1, y = 2", ["y=2, x=1", "1, 2"], ["x = 1", "x = 2, y = 1", "2, 1"]),
        ("y = 2x + 1", ["2x+1", "y = 1 + 2x"], ["y = 2x", "z = 2x + 1", "5 = y = 2x + 1"]),
        (
            "x + y = 5",
            ["y + x = 5", "2x + 2y = 10", "5 - x - y = 0"],
            ["5", "x + y = 6", "x + y = 6 = 5", "1 = 2", "x = 5"],
        ),
        ("x^2 + 1 = 0", ["1 + x^2 = 0"], ["1 = 2", "x = x + 1", "0"]),
        ("x > 3", ["3 < x"], ["3", "x = 3", "x >= 3"]),
        ("x \\in (1, 2)", ["(1,2)", "x \\in (1, 2)"], ["x \\in [1, 2]", "y \\in (1, 2)"]),
        # Values.
        (
            "\\frac{\\sqrt{3}}{2}",
            ["\\sqrt{3}/2", "√3/2", "\\dfrac{\\sqrt3}{2}", "0.866025", "sqrt(3)/2"],
            ["\\sqrt{3}", "\\frac{\\sqrt{2}}{2}"],
        ),
        (
            "2\\sqrt{3}",
            ["\\sqrt{12}", "2√3", "2*sqrt(3)"],
            ["2", "\\sqrt{3}", "5 = 2\\sqrt{3}", "2\\sqrt{3} km", "(1)(1)\\sqrt{3}"],
        ),
        ("x^2+2x+1", ["(x+1)^2", "(1+x)(x+1)", "x**2+2*x+1"], ["x^2+2x", "X^2+2X+1", "x^2+2x+1 or x", "(x+1)^2 = 0"]),
        ("A = a^2", ["A = a*a", "a^2"], ["a = a^2", "A = A^2", "A"]),
        ("2xy + 6xyz", ["6zyx + 2yx"], ["2xy", "2xy + 6"]),
        ("b^2 - 4ac", ["-4ca + b^2"], ["b^2 + 4ac", "b^2"]),
        ("E = mc^2", ["mc^2", "E = c^2 m"], ["e = mc^2", "E", "m"]),
        ("3\\frac{1}{2}", ["7/2", "3.5", "3 \\frac12"], ["31/2", "15.5", "3"]),
        ("31/2", ["15.5", "15\\frac{1}{2}"], ["3\\frac{1}{2}"]),
        ("2^{10}", ["1024", "2^10"], ["2^{1}0", "1023"]),
        ("5\\sqrt{2}", ["\\sqrt{50}"], ["(2)(3)\\sqrt{2}", "2(3)\\sqrt{2}"]),
        ("2^T", ["2^{T}"], ["2", "2^t"]),
        ("I^2 R", ["R I^2"], ["-R"]),
        ("I^2 + 1", ["1 + I*I"], ["0"]),
        ("\\sqrt{2}", ["sqrt(2)", "√2"], ["\\sqrt(2}", "\\\\text{sqrt2}", "\\infty \\in \\sqrt{2}"]),
        ("6.6 \\times 10^{-34}", ["6.6 × 10^-34", "0.66 \\cdot 10^{-33}"], ["0", "0.0", "5.5 \\times 10^{-34}"]),
        ("10^{-20} x", ["x/10^{20}"], ["0", "2x \\cdot 10^{-20}"]),
        ("\\frac{\\pi}{4}", ["π/4", "pi/4", "0.25\\pi"], ["\\int_0^1 \\frac{1}{1+x^2} dx", "\\pi", "\\frac{pie}{4}"]),
        (
            "x^2",
            ["x*x"],
            ["\\sum_{n=1}^{1} x^2", "\\lim_{y \\to x} y^2", "x^2 \\text{ or } 5", "x^2, 5", "\\boxed{5} x^2"],
        ),
        ("e^2", ["\\exp(2)", "e*e"], ["E^2", "7.38"]),
        ("10,000", ["10000", "10{,}000", "10,\\!000", "10\\,000"], ["10", "10,00"]),
        ("1e+100", ["1e+100"], ["e+100", "1"]),
        # Words.
        ("\\text{June 20}", ["June 20", "june 20."], ["20", "June 2", "June 20 or 21"]),
        ("Paris", ["\\text{Paris}", "\\boxed{\\text{Paris}}", "paris"], ["London", ""]),
        ("x or 5", ["x or 5"], ["5", "x"]),
    ],
)
def test_the_same_is_equal_and_nothing_else_is(right: str, answers: list[str], wrong: list[str]) -> None:
    """Another form of the right answer is right; what shares a part of it, or comes to it only where something of it
    is not read, is wrong."""
    assert [answer for answer in (right, *answers) if not equal(right, answer)] == []
    assert [answer for answer in wrong if equal(right, answer)] == []


def test_every_kind_of_nonsense_is_judged() -> None:
    """Broken formulas are wrong, whatever they are compared with; none raises but for its time."""
    broken = ["", "{", "}", "\\frac", "\\frac{1}{", "^", "x^", "^2", "1^(", "\\sqrt", "(" * 900, "[" * 400 + "]" * 400]
    broken += [
        "\\{\\}",
        "()",
        ",",
        ",,",
        "=",
        "x=",
        "=3",
        "\\left",
        "\\begin{pmatrix}\\end{pmatrix}",
        "|",
        "1/0",
        "_",
        "x_",
    ]
    for right in ("x^2+1", "(1, 2)", "\\{1\\}", "x = 2", "5 km", "7", "Paris"):
        for answer in broken:
            try:
                assert not equal(right, answer), (right, answer)
            except (Failed, Overrun) as error:
                pytest.fail(f"{answer!r}: {error}")
