"""Synthetic text about tasks."""

from pathlib import Path

import pytest

from fathom.data import TokenDataset, build
from fathom.data.sources import Corpus, Skipped
from fathom.data.synth import WorkedProblems
from fathom.errors import UserError
from fathom.tasks.catalogue import open_task


def texts(source: str) -> list[str]:
    return [document.text for document in Corpus([source]).documents(Skipped())]


def test_documents_are_of_training_problems_alone() -> None:
    """No document holds a held-out problem, every answer is right, and all levels are there."""
    task, seen = open_task("modular"), set()
    held_out = {
        p.question for level in (1, 2) for p, _ in zip(task.problems("held-out", level=level), range(300), strict=False)
    }
    for text in texts("task:modular?levels=2&documents=2000"):
        question, _, rest = text.partition("=")
        assert f"{question}=" not in held_out
        value = question[0]
        for sign, digit in zip(question[1::2], question[2::2], strict=True):
            value = str(eval(value + sign + digit) % 10)
        assert rest.split("</think>")[-1] == value
        seen.add(len(question))
    assert seen == {3, 5}


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.0, 0.0), (0.3, 0.25, 0.35), (1.0, 1.0, 1.0)])
def test_the_asked_share_thinks(share: float, low: float, high: float) -> None:
    """That share of documents, and no other, has thoughts between think tags."""
    found = texts(f"task:modular?documents=2000&thinking={share}")
    assert low <= sum("<think>" in text for text in found) / len(found) <= high


def test_the_asked_share_is_steps_alone() -> None:
    """That share of documents has steps without a question or an answer, and thoughts keep their share."""
    found = texts("task:modular?documents=2000&thinking=0.25&steps=0.4")
    alone = [text for text in found if "<think>" not in text and ";" in text]
    assert 0.3 <= len(alone) / len(found) <= 0.4  # chains of one step have no semicolon
    assert all("<" not in text and not text.endswith("=") for text in alone)
    assert 0.2 <= sum("<think>" in text for text in found) / len(found) <= 0.3


def test_the_same_source_gives_the_same_text() -> None:
    """Twice the same documents, others with another seed."""
    assert texts("task:arithmetic?documents=50") == texts("task:arithmetic?documents=50")
    assert texts("task:arithmetic?documents=50") != texts("task:arithmetic?documents=50&seed=2")


def test_think_tags_become_tokens_in_synthetic_text_alone(tmp_path: Path) -> None:
    """A tag written by the factory is one token; the same letters in a text from elsewhere are spelled out."""
    (tmp_path / "text.txt").write_text("a <think> b")
    build(["task:modular?documents=100", tmp_path / "text.txt"], tmp_path / "data", vocab_size=266)
    dataset = TokenDataset(tmp_path / "data")
    opening = dataset.tokenizer.encode("<think>", special=True)
    assert len(opening) == 1
    documents = [
        list(dataset.document(split, i)) for split in ("train", "heldout") for i in range(len(dataset.lengths(split)))
    ]
    spelled = [ids for ids in documents if dataset.tokenizer.decode(ids) == "a <think> b"]
    assert len(spelled) == 1
    assert opening[0] not in spelled[0]
    assert sum(opening[0] in ids for ids in documents) > 20


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("task:modullar", "modular"),
        ("task:modular?document=3", "document"),
        ("task:modular?levels=99", "levels"),
        ("task:modular?thinking=2", "thinking"),
        ("task:modular?thinking=0.6&steps=0.5", "more than all documents"),
        ("task:programs", "solution"),
    ],
)
def test_what_cannot_be_written_is_refused(source: str, message: str) -> None:
    """An unknown task or option, a level that there is not, and a task that shows no way to its answers."""
    with pytest.raises(UserError, match=message):
        WorkedProblems(source)
