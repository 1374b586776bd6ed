"""What compares rows with other rows: near-duplicates, and held-out questions."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from fathom.errors import UserError
from fathom.synth.decontamination import HeldOut, HeldOutSets, read_questions, refuse_contaminated
from fathom.synth.duplicates import Duplicates
from fathom.tasks.words import units

STORY = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did "
    "Natalia sell altogether in April and May?"
)
OTHER = (
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take to make "
    "three such robes for a choir?"
)


def test_units_are_words_numbers_and_signs_of_any_script() -> None:
    """Case, spaces, width and punctuation vanish; signs and the point inside a number stay."""
    assert units("What  is 1,234.5 - ３?") == ["what", "is", "1,234.5", "-", "3"]
    assert units("小明有3本书。") == list("小明有3本书")
    assert units("3+8=") != units("3-8=")


def test_equal_texts_are_duplicates_at_one() -> None:
    """At a threshold of 1 a text that differs in spaces and case is a duplicate, and one with another word is none."""
    kept = Duplicates(1.0)
    kept.add(STORY)
    assert kept.has(STORY.upper().replace(" ", "\n "))
    assert not kept.has(STORY.replace("friends", "cousins"))


def test_near_duplicates_are_found_and_others_are_not() -> None:
    """A small edit in a long text stays near; half of it changed, or another text, does not; nor does what was not
    kept."""
    pytest.importorskip("datasketch")
    text = " ".join(f"{STORY} {OTHER} Step {number}: {number * 7}." for number in range(3))
    kept = Duplicates(0.8)
    assert not kept.has(text)
    kept.add(text)
    assert kept.has(text.replace("choir", "band", 1))
    assert not kept.has(text.replace("clips", "pins").replace("bolts", "rolls").replace("April", "June"))
    assert not kept.has(OTHER)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without datasketch, near-duplicates are refused with what to install, and equal texts are still found."""
    plain = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name == "datasketch":
            raise ImportError(name)
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    Duplicates(1.0)
    with pytest.raises(UserError, match=r"datasketch: pip install 'fathom-lm\[synth\]'"):
        Duplicates(0.9)


@pytest.mark.parametrize(
    "question",
    [
        "what is   2 + 3 ?",
        "WHAT IS 2+3",
        f"  {STORY.upper()}",
        STORY.replace("friends", "cousins"),
        f"Here is a question. {STORY} Answer with the number alone.",
        "What is 2 + 3? Please reason step by step.",
        "Hello! What is 2 + 3?",
        "I was asked: what is 2+3? That is 5.",
    ],
)
def test_leaks_are_found(question: str) -> None:
    """A held-out question is found in other case and spacing, with a word changed, and inside a longer one."""
    assert HeldOut(["What is 2 + 3?", STORY], 0.5).has(question)


@pytest.mark.parametrize(
    "question",
    ["What is 2 - 3?", "What is 2 + 3 + 4?", OTHER, "", "?", "9*3+8*7=", "3+8*7=1;1+2=3", "Well, thank you so much."],
)
def test_other_questions_are_no_leaks(question: str) -> None:
    """Another sign, a longer sum, a step of a thought, another story, a turn of phrase, or nothing at all is not held
    out."""
    assert not HeldOut(["What is 2 + 3?", STORY, "!", "3+8*7=", "Thank you!"], 0.5).has(question)


def test_wording_that_held_out_questions_share_is_no_leak() -> None:
    """Problems of one template are told apart by what is theirs, and a strict overlap of 0 finds any 13-gram of it."""
    frame = (
        "Use each of the numbers {} once to make {}. Answer with the expression alone, with nothing before it and "
        "nothing behind it at all."
    )
    held_out = [frame.format(f"{n} {n + 1}", 20 + n) for n in range(9)]
    other = frame.format("40 41", 90)
    assert not HeldOut(held_out, 0.0).has(other)
    assert HeldOut([STORY], 0.0).has("In a book: sold half as many clips in May. How many clips did Natalia sell today")
    assert not HeldOut([STORY], 0.5).has("sold half as many clips in May. How many clips did Natalia sell today")


def test_a_copy_is_found_among_questions_of_one_wording() -> None:
    """Forty questions behind one long instruction: a copy with a word added or one of the instruction changed is found,
    another question behind it is not."""
    frame = f"{OTHER} {OTHER.lower()} The numbers for this time are {{}} and {{}}, and nothing else is asked of you."
    held_out = HeldOut([frame.format(100 + n, 300 - n) for n in range(40)], 0.5)
    assert held_out.has(f"Hey! {frame.format(107, 293)} Thanks a lot.")
    assert held_out.has(frame.format(107, 293).replace("choir", "band", 1))
    assert not held_out.has(frame.format(507, 693))


def test_contaminated_rows_are_named(tmp_path: Path) -> None:
    """Training rows that ask held-out questions stop the run with the file and lines of each; clean rows do not."""
    rows = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": "5"}] for q in (OTHER, "what is 2+3", STORY)
    ]
    file = tmp_path / "general.jsonl"
    file.write_text("\n".join(json.dumps({"messages": row}) for row in rows), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        refuse_contaminated([str(file)], HeldOut(["What is 2 + 3?", STORY], 0.5), where="data.files")
    assert f"{file}:2, {file}:3" in str(refused.value)
    assert f"{file}:1" not in str(refused.value)
    refuse_contaminated([str(file)], HeldOut(["What is 2 + 4?"], 0.5), where="data.files")
    hidden = [{"role": "system", "content": STORY}, {"role": "user", "content": "And?"}, rows[0][1]]
    file.write_text(json.dumps({"messages": hidden}), encoding="utf-8")
    with pytest.raises(UserError, match=r"1 training row of data\.files"):
        refuse_contaminated([str(file)], HeldOut([STORY], 0.5), where="data.files")


def test_a_question_in_two_sets_is_still_told_apart() -> None:
    """What is near to a question of one set is refused, whatever other sets hold: also the same question, reworded, and
    in one set with it."""
    near, other = f"{STORY} Please reply.", f"{STORY} Be brief."
    assert HeldOut([STORY], 0.5).has(near)
    assert HeldOut([STORY, other], 0.5).has(near)
    assert HeldOutSets([[STORY], [other]], 0.5).has(near)
    assert not HeldOutSets([["What is 2 + 3?"], []], 0.5).has(near)


def test_held_out_files_are_read_in_their_forms(tmp_path: Path) -> None:
    """Questions stand under any of the known names, and a row without one is named."""
    file = tmp_path / "test.jsonl"
    rows = [{"question": "a"}, {"problem": "b"}, {"prompt": "c"}, {"messages": [{"role": "user", "content": "d"}]}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    assert list(read_questions(file)) == ["a", "b", "c", "d"]
    for bad, said in (('{"text": "x"}', "no question"), ("[1]", "no question"), ("{", "not JSON")):
        file.write_text(f'{{"question": "a"}}\n{bad}\n', encoding="utf-8")
        with pytest.raises(UserError, match=rf"test.jsonl:2: {said}"):
            list(read_questions(file))
    file.write_bytes(b'\xef\xbb\xbf{"question": "a"}\r\n\r\n{"question": "b"}\r\n')
    assert list(read_questions(file)) == ["a", "b"]
    file.write_text("\n")
    for name, said in (
        ("test.jsonl", "holds no question"),
        ("none.jsonl", "no such file"),
        ("x.parquet", "JSON Lines"),
    ):
        with pytest.raises(UserError, match=said):
            list(read_questions(tmp_path / name))
