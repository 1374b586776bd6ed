"""Where text comes from: folders, files, the Python standard library, the Hugging Face hub, tasks.

Real folders hold surprises. Whatever cannot be read as text is counted with its reason and a few examples, and
reading goes on; only a source that does not exist at all stops a build.
"""

import json
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fathom.data.synth import WorkedProblems
from fathom.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
MAX_TEXT_BYTES = 256 * 1024
"""A longer text file is cut at line ends into documents of at most this size, so that memory stays bounded, work
spreads over the cores, and a corpus in one file still has documents to hold out."""
MAX_EXAMPLES = 5
INSTALLED_FOLDERS = ("site-packages", "dist-packages")


class Document(NamedTuple):
    """One text, and where it came from: a file, a file and byte or line, a row of a table."""

    text: str
    origin: str
    marked: bool = False
    """Whether control tokens spelled in it are tokens. In text from elsewhere they are text."""


class Skipped:
    """What was left out, and why: a count and the first few examples per reason."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, where: str | os.PathLike[str]) -> None:
        """Count one more thing at `where` (a file, `file:line`) that was left out for `reason`."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(str(where))


class Corpus:
    """The documents of some sources, in an order that depends on their names alone.

    A source is a folder (read recursively, hidden entries left out), a file, `stdlib`, `hub:owner/name`, or `task:NAME`
    for synthetic text about a task (`synth.py`).
    Files are found once, when the corpus is made; it can then be read several times.
    """

    def __init__(self, sources: Sequence[str | Path], *, text_field: str = "text") -> None:
        """`text_field` is the field or column that holds the text in JSONL, Parquet and hub data sets.

        Raises `UserError` for a source that does not exist.
        """
        if not sources:
            raise UserError("data: no sources given; name a folder, a file, 'stdlib', 'hub:owner/name' or 'task:NAME'")
        self._text_field = text_field
        self._found = Skipped()
        self._parts: list[Path | _HubRows | _TaskRows] = []
        for source in sources:
            self._parts.extend(self._open(source))

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        """All documents that hold text; what is left out is added to `skipped`."""
        for reason, count in self._found.counts.items():
            skipped.counts[reason] = skipped.counts.get(reason, 0) + count
            skipped.examples[reason] = list(self._found.examples[reason])
        for part in self._parts:
            read = self._file(part, skipped) if isinstance(part, Path) else part.documents(skipped)
            for document in read:
                if document.text.strip():
                    yield document
                else:
                    skipped.add("empty", document.origin)

    def _open(self, source: str | Path) -> "Iterable[Path | _HubRows | _TaskRows]":
        if source == "stdlib":
            return self._standard_library()
        if isinstance(source, str) and source.startswith("hub:"):
            return [_HubRows(source.removeprefix("hub:"), self._text_field)]
        if isinstance(source, str) and source.startswith("task:"):
            return [_TaskRows(source)]
        path = Path(source)
        if path.is_dir():
            return self._folder(path)
        if path.exists():
            return [path]
        raise UserError(
            f"data source '{source}' does not exist; name a folder, a file, 'stdlib', 'hub:owner/name' or 'task:NAME'"
        )

    def _standard_library(self) -> list[Path]:
        root = Path(sysconfig.get_path("stdlib"))
        if not root.is_dir():
            raise UserError(f"data source 'stdlib': this Python has no library folder at {root}; name another")
        return [file for file in self._folder(root, installed=False) if file.suffix == ".py"]

    def _folder(self, root: Path, *, installed: bool = True) -> Iterator[Path]:
        """Files below `root`, sorted; without `installed`, third-party packages inside it are passed over."""

        def unreadable(error: OSError) -> None:
            self._found.add("unreadable", f"{error.filename} ({error.strerror})")

        for folder, subfolders, names in os.walk(root, onerror=unreadable):
            if not installed:
                subfolders[:] = [name for name in subfolders if name not in INSTALLED_FOLDERS]
            for name in sorted([*subfolders, *names]):
                if name.startswith("."):
                    self._found.add("hidden", os.path.join(folder, name))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in subfolders:
                if os.path.islink(path := os.path.join(folder, name)):  # not followed: it may lead in a circle
                    self._found.add("linked folder", path)
            yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))

    def _file(self, path: Path, skipped: Skipped) -> Iterator[Document]:
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                skipped.add("not a file", path)  # opening a named pipe would wait for ever
            elif path.suffix in JSONL_SUFFIXES:
                yield from _jsonl(path, self._text_field, skipped)
            elif path.suffix == ".parquet":
                yield from _parquet(path, self._text_field, skipped)
            else:
                yield from _text(path, skipped)
        except FileNotFoundError:
            skipped.add("vanished", path)
        except OSError as error:
            skipped.add("unreadable", f"{path} ({error.strerror or error})")


def _text(path: Path, skipped: Skipped) -> Iterator[Document]:
    start = 0
    for piece in _pieces(path):
        origin = f"{path} (byte {start})" if start else str(path)
        start += len(piece)
        if b"\0" in piece:
            skipped.add("binary", origin)
            return
        try:
            text = piece.decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped.add("not UTF-8", origin)
            continue
        yield Document(text, origin)
    if not start:
        skipped.add("empty", path)


def _pieces(path: Path) -> Iterator[bytes]:
    """The file in pieces of at most `MAX_TEXT_BYTES`, each ending at a line end or at least between characters."""
    with path.open("rb") as file:
        piece = b""
        while block := file.read(MAX_TEXT_BYTES - len(piece)):
            piece += block
            if len(piece) == MAX_TEXT_BYTES:
                cut = piece.rfind(b"\n") + 1 or _character_boundary(piece)
                yield piece[:cut]
                piece = piece[cut:]
        if piece:
            yield piece


def _character_boundary(piece: bytes) -> int:
    """The end of the last UTF-8 character that may go on behind the end of `piece`."""
    last = len(piece) - 1
    while last > len(piece) - 4 and piece[last] & 0xC0 == 0x80:
        last -= 1
    return last if piece[last] >= 0xC0 else len(piece)


def _jsonl(path: Path, field: str, skipped: Skipped) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            origin = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                skipped.add("not UTF-8", origin)
            except (ValueError, RecursionError):
                skipped.add("malformed JSON line", origin)
            else:
                yield from _row(row.get(field) if isinstance(row, dict) else None, field, origin, skipped)


def _parquet(path: Path, field: str, skipped: Skipped) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                skipped.add(f"no text in '{field}'", path)
                return
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    origin = f"{path} (row {number})"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError:
                        skipped.add("not UTF-8", origin)
                    else:
                        yield from _row(text, field, origin, skipped)
    except pyarrow.ArrowInvalid as error:
        skipped.add("damaged Parquet", f"{path} ({str(error).splitlines()[0]})")


def _row(value: Any, field: str, origin: str, skipped: Skipped) -> Iterator[Document]:
    """The text in a row of a table. JSON can spell half a surrogate pair, which no encoding holds."""
    if not isinstance(value, str):
        skipped.add(f"no text in '{field}'", origin)
        return
    try:
        value.encode()
    except UnicodeEncodeError:
        skipped.add("not UTF-8", origin)
        return
    yield Document(value, origin)


class _HubRows:
    """The training split of a data set on the Hugging Face hub, through the `datasets` package."""

    def __init__(self, name: str, field: str) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"data source 'hub:{name}' needs the datasets package: pip install 'fathom-lm[hub]'"
            ) from None
        try:
            self._rows = datasets.load_dataset(name, split="train")
        except Exception as error:  # the hub's clients raise errors of many libraries: name, network, access
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"data source 'hub:{name}' cannot be opened ({reason}); check name and network") from None
        columns = self._rows.column_names
        if field not in columns:
            raise UserError(f"data source 'hub:{name}': no column '{field}'; it has {', '.join(columns)}")
        self._name, self._field = name, field

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        """The rows in order."""
        for number, row in enumerate(self._rows):
            origin = f"hub:{self._name} (row {number})"
            yield from _row(row[self._field], self._field, origin, skipped)


class _TaskRows:
    """Synthetic text about a task."""

    def __init__(self, source: str) -> None:
        self._worked = WorkedProblems(source)

    def documents(self, _: Skipped) -> Iterator[Document]:
        """Problems with answers, some with thoughts between think tags, which are tokens."""
        for text, origin in self._worked.documents():
            yield Document(text, origin, marked=True)
