"""The honest reader: properties that hold for any text. What it gives for single texts is in `hacks.py`."""

import random
from itertools import product

import pytest

from fathom.config.rewards import Layout
from fathom.tasks.reading import read
from fathom.tasks.rewards import consistency

LAYOUTS = [
    Layout(form=form, thoughts=thoughts)
    for form, thoughts in product(("tags", "boxed", "line", "rest"), ("required", "optional"))
]
SCRAPS = [
    "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "\\boxed", "{", "}", "\\", "\\}", "Answer:", "答案：",
    "**", "\n", " ", "42", "41", "so", "六", "<", ">", "/", "&lt;", "&#", "&#999999999;", "<ANSWER>", "＜", "а",
    "\u200b", "\u0301", "\x00", "\ud800", "\u202e", "```", "<!--", "$", "\r", "\x85", "\u2028", "🙂", "ﷺ", "\U0010ffff",
]  # fmt: skip
WELL_FORMED = {
    "tags": ["<think>it is</think><answer>42</answer>", " <think>六 is</think>\n<answer>\n4 2</answer> "],
    "boxed": ["<think>it is</think>\\boxed{42}", "<think>六 is</think> So {\\boxed{4{}2}} it is \\"],
    "line": ["<think>it is</think>\nAnswer: 42\n", "<think>六 is</think> so\n**Answer: 42**\n\n"],
}
WITHOUT_THOUGHT = {"tags": "<answer>42</answer>", "boxed": "It is \\boxed{42}", "line": "So\nAnswer: 42\n"}


def scrambled(source: random.Random, most: int) -> str:
    return "".join(source.choice(SCRAPS) for _ in range(source.randrange(most)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.form}-{layout.thoughts}")
def test_any_text_is_read(layout: Layout) -> None:
    """No text raises; a well-formed one has an answer and no fault, any other says its fault; answers are stripped."""
    source = random.Random(f"{layout}")
    for _ in range(1500):
        text = scrambled(source, 24)
        for starts_thinking, finished in product((False, True), repeat=2):
            reading = read(text, layout, starts_thinking=starts_thinking, finished=finished)
            assert reading.well_formed == (not reading.fault)
            assert finished or not reading.well_formed
            if reading.answer is None:
                assert not reading.well_formed
            else:
                assert reading.answer == reading.answer.strip() != ""
                assert reading.answer in text
            assert all(0 <= consistency(reading.thought, target) <= 1 for target in ("en", "zh"))


@pytest.mark.parametrize("form", WELL_FORMED)
def test_appending_never_gains(form: str) -> None:
    """Text after a well-formed completion cannot change its answer or thought but by losing it, nor mend anything."""
    source = random.Random(form)
    cases = [(text, Layout(form=form)) for text in WELL_FORMED[form]]
    cases.append((WITHOUT_THOUGHT[form], Layout(form=form, thoughts="optional")))
    for text, layout in cases:
        before = read(text, layout, starts_thinking=False, finished=True)
        assert before.well_formed, before
        for _ in range(3000):
            more = text + scrambled(source, 10)
            after = read(more, layout, starts_thinking=False, finished=True)
            assert after.answer in (before.answer, None), more
            assert after.thought in (before.thought, ""), more


@pytest.mark.parametrize("text", ["say <Think> it", "say </ think>", "say ＜/think＞", "say <тһіnk>", "x&lt;think&gt;"])
def test_no_answer_holds_what_looks_like_a_tag(text: str) -> None:
    """Whatever a task's check would make of it, an answer with a look-alike of a tag is none, in any layout."""
    whole = {"tags": f"<answer>{text}</answer>", "boxed": f"\\boxed{{{text}}}", "line": f"Answer: {text}", "rest": text}
    for layout in LAYOUTS:
        reading = read(f"<think>so</think>{whole[layout.form]}", layout, starts_thinking=False, finished=True)
        assert reading.answer is None
        assert reading.fault == "something that looks like a tag in the answer"


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 150_000,
        "</think>" * 130_000,
        "<answer></answer>" * 60_000,
        "<think>a</think>" * 65_000,
        "<" * 1_000_000,
        "<" + " " * 1_000_000,
        "< /" * 300_000,
        "<think " * 150_000,
        "\\boxed{" * 150_000,
        "\\boxed" + " " * 1_000_000,
        "{" * 1_000_000,
        "\\" * 1_000_000,
        "Answer:" * 150_000,
        "\nAnswer" + " " * 1_000_000,
        "*" * 1_000_000,
        "&#" + "9" * 1_000_000,
        "&" * 1_000_000,
        "e" + "\u0301\u0316" * 500_000,
        "\u200b" * 1_000_000,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_a_megabyte_of_anything_is_read(text: str) -> None:
    """No text of a megabyte takes more than a few passes: a quadratic step would take hours here."""
    for layout in LAYOUTS[::2]:
        read(text, layout, starts_thinking=False, finished=True)
    read(f"<think>so</think><answer>{text}</answer>", LAYOUTS[0], starts_thinking=False, finished=True)
    consistency(text, "en")


@pytest.mark.parametrize("layout", LAYOUTS[:2] + LAYOUTS[4:5])
def test_an_opened_prompt_reads_like_the_whole(layout: Layout) -> None:
    """A completion whose `<think>` stands in the prompt is read like the one that has it itself."""
    source = random.Random(1)
    for _ in range(2000):
        rest = scrambled(source, 16)
        mine = read("<think>" + rest, layout, starts_thinking=False, finished=True)
        assert mine == read(rest, layout, starts_thinking=True, finished=True)
