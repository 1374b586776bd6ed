import json
import os
import sys
import sysconfig
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fathom.data.sources import MAX_TEXT_BYTES, Corpus, Skipped
from fathom.errors import UserError


def read(*sources: str | Path, **options: str) -> tuple[list[str], Skipped]:
    skipped = Skipped()
    return [text for text, *_ in Corpus(sources, **options).documents(skipped)], skipped


def test_folders_are_read_recursively_in_a_fixed_order(tmp_path: Path) -> None:
    """Text, Markdown, source code, JSONL and Parquet in nested folders, by sorted names, however created."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_text("# md")
    (tmp_path / "z.py").write_text("pass")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    table = pyarrow.table({"n": [1, 2], "text": ["three", "four"]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    (tmp_path / "noext").write_bytes("\ufeffbom\r\n".encode())
    texts, skipped = read(tmp_path)
    assert texts == ["one", "two", "three", "four", "bom\r\n", "pass", "# md"]
    assert skipped.counts == {}
    assert read(tmp_path / "z.py", tmp_path / "a.jsonl")[0] == ["pass", "one", "two"]


def test_what_cannot_be_read_is_counted_and_skipped(tmp_path: Path) -> None:
    """Bad bytes, binary, empty, hidden, a pipe, a dangling link: one count each, the good file still read."""
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "binary.bin").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    texts, skipped = read(tmp_path)
    assert texts == ["good"]
    assert skipped.counts == {
        "hidden": 1,
        "not UTF-8": 1,
        "binary": 1,
        "empty": 2,
        "not a file": 1,
        "vanished": 1,
    }
    assert skipped.examples["not UTF-8"] == [str(tmp_path / "latin.txt")]


def test_links_to_folders_are_counted_and_not_followed(tmp_path: Path) -> None:
    """A linked folder, be it a circle, is left out and counted; a link given as the source itself is read."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "real" / "circle").symlink_to(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for source in (tmp_path / "real", tmp_path / "link"):
        texts, skipped = read(source)
        assert texts == ["a"]
        assert skipped.examples == {"linked folder": [str(source / "circle")]}


def test_a_file_that_vanishes_midway_is_skipped(tmp_path: Path) -> None:
    """A file deleted after it was listed, and one that fails while being read, are counted, not fatal."""
    for name in "abc":
        (tmp_path / name).write_text(name)
    skipped = Skipped()
    documents = Corpus([tmp_path]).documents(skipped)
    assert next(documents).text == "a"
    (tmp_path / "b").unlink()
    assert [text for text, *_ in documents] == ["c"]
    assert skipped.examples == {"vanished": [str(tmp_path / "b")]}


def test_a_file_that_fails_while_being_read_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk error in the middle of a file (EIO) is counted with its message and reading goes on."""
    for name in "ab":
        (tmp_path / name).write_text(name)
    real_open = Path.open

    def failing(self: Path, *args: object) -> object:
        if self.name == "a":
            raise OSError(5, "Input/output error")
        return real_open(self, *args)

    monkeypatch.setattr(Path, "open", failing)
    texts, skipped = read(tmp_path)
    assert texts == ["b"]
    assert skipped.examples == {"unreadable": [f"{tmp_path / 'a'} (Input/output error)"]}


def test_malformed_json_lines_are_counted_with_file_and_line(tmp_path: Path) -> None:
    """Each kind of bad line is skipped under its own reason and named as file:line."""
    file = tmp_path / "x.jsonl"
    file.write_bytes(
        b'{"text": "ok"}\n{"text": \n{"body": "x"}\n[1]\n{"text": "\\ud800"}\n{"text": "\xff"}\n{"text": 3}\n'
        + b"[" * 100_000
        + b'\n{"text": "end"}'
    )
    texts, skipped = read(file)
    assert texts == ["ok", "end"]
    assert skipped.examples == {
        "malformed JSON line": [f"{file}:2", f"{file}:8"],
        "no text in 'text'": [f"{file}:3", f"{file}:4", f"{file}:7"],
        "not UTF-8": [f"{file}:5", f"{file}:6"],
    }
    assert read(file, text_field="body")[0] == ["x"]


def test_damaged_parquet_is_skipped(tmp_path: Path) -> None:
    """A truncated Parquet file, one without the column, nulls and bad bytes in it are counted, not fatal."""
    rows = pyarrow.array([b"good", b"\xff", None]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    pyarrow.parquet.write_table(pyarrow.table({"x": ["y"]}), tmp_path / "c.parquet")
    texts, skipped = read(tmp_path)
    assert texts == ["good"]
    assert skipped.counts == {"not UTF-8": 1, "no text in 'text'": 2, "damaged Parquet": 1}


def test_long_files_become_several_documents_that_join_to_the_file(tmp_path: Path) -> None:
    """Pieces end at line ends, or between characters in a file without lines, and lose no byte."""
    lines = "".join(f"line {n} naïve\n" for n in range(60_000))
    no_lines = "日本🙂" * 90_000
    (tmp_path / "a").write_text(lines, encoding="utf-8")
    (tmp_path / "b").write_text(no_lines, encoding="utf-8")
    for name, whole in (("a", lines), ("b", no_lines)):
        texts, skipped = read(tmp_path / name)
        assert "".join(texts) == whole
        assert len(texts) > 2
        assert max(len(text.encode()) for text in texts) <= MAX_TEXT_BYTES
        assert skipped.counts == {}
    assert all(text.endswith("\n") for text in read(tmp_path / "a")[0])


def test_the_standard_library_is_python_source_without_installed_packages() -> None:
    """`stdlib` yields this Python's own modules, twice the same, and nothing from site-packages."""
    corpus = Corpus(["stdlib"])
    names = [origin for _, origin, _ in corpus.documents(Skipped())]
    root = sysconfig.get_path("stdlib")
    assert any(name == os.path.join(root, "argparse.py") for name in names)
    assert not any("-packages" in name for name in names)
    assert all(name.startswith(root) and ".py" in name for name in names)
    assert [origin for _, origin, _ in Corpus(["stdlib"]).documents(Skipped())] == names


@pytest.mark.parametrize("sources", [["/no/such/folder"], ["stdlib", "stdlibb"], []])
def test_a_source_that_does_not_exist_is_a_user_error(sources: list[str]) -> None:
    """A missing source is refused when the corpus is made, before anything is read."""
    with pytest.raises(UserError, match=r"^data"):
        Corpus(sources)


class FakeRows:
    """What `datasets.load_dataset` returns, as far as we use it."""

    column_names = ["text", "id"]

    def __iter__(self):
        return iter([{"text": "row one", "id": 1}, {"text": None, "id": 2}, {"text": "", "id": 3}])


def test_hub_names_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """hub:owner/name loads the train split; rows without text are counted; a wrong column is a UserError."""
    asked = []
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, split: asked.append((name, split)) or FakeRows()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    texts, skipped = read("hub:owner/name")
    assert texts == ["row one"]
    assert asked == [("owner/name", "train")]
    assert json.dumps(skipped.counts) == '{"no text in \'text\'": 1, "empty": 1}'
    with pytest.raises(UserError, match="no column 'body'; it has text, id"):
        read("hub:owner/name", text_field="body")


def test_hub_failures_are_user_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, and with whatever error the client raises, a hub source is one line."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'fathom-lm\[hub\]'"):
        Corpus(["hub:owner/name"])
    fake = types.ModuleType("datasets")

    def offline(name: str, split: str) -> None:
        raise RuntimeError("cannot reach the hub\nsecond line")

    fake.load_dataset = offline
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(UserError, match=r"hub:owner/name' cannot be opened \(cannot reach the hub\)"):
        Corpus(["hub:owner/name"])
