"""From sources to a data folder: read, train a tokenizer, encode, hold some documents out.

The sources are read twice: once to count, to find the sample that the tokenizer is trained on and to settle
the held-out side, once to encode. Which side a document falls on depends on a hash of its content alone, so a
copy of a document can never lie on the other side; exact copies are dropped altogether.

The folder appears under its name only when it is complete. Until then it is a hidden neighbour
(`.NAME.building-PID`) that is removed on any failure and on Ctrl-C. A process that is killed, by SIGTERM too, leaves it
behind; the next build of the same folder removes it.
"""

import contextlib
import hashlib
import heapq
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from fathom.data.bpe import train_bpe
from fathom.data.dataset import is_data_folder
from fathom.data.shards import MANIFEST, Manifest, SkippedEntry, SplitWriter, file_sha256
from fathom.data.sources import Corpus, Skipped
from fathom.data.tokenizer import Tokenizer
from fathom.errors import UserError
from fathom.scratch import leftovers, neighbour, sweep

SAMPLE_BYTES_PER_TOKEN = 4096
"""Text that the tokenizer is trained on, per token of its vocabulary: 16 MiB for 4,096 tokens. On the standard
library, twice as much changes the number of tokens by less than one percent."""
BATCH_BYTES = 4 * 2**20
"""Text that is encoded at once, on all cores."""


@dataclass(frozen=True)
class BuildReport:
    """What `build` did."""

    path: Path
    manifest: Manifest
    seconds: float

    def rows(self) -> list[tuple[str, str]]:
        """Lines of a table for people: a label and a value each."""
        manifest = self.manifest
        rows = [("folder", str(self.path)), ("vocabulary", f"{manifest.vocab_size:,} tokens")]
        for label, split in (("train", manifest.train), ("held out", manifest.heldout)):
            value = f"{_documents(split.documents)}, {split.tokens:,} tokens, {split.bytes:,} bytes"
            if split.tokens:
                value += f" ({split.bytes / split.tokens:.2f} bytes per token)"
            rows.append((label, value))
        for reason, entry in manifest.skipped.items():
            rows.append((f"skipped: {reason}", f"{entry.count:,} (first: {entry.examples[0]})"))
        rows.append(("time", f"{self.seconds:.1f} s"))
        return rows


def build(
    sources: Sequence[str | Path],
    path: str | Path,
    *,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
    holdout: float = 0.02,
    text_field: str = "text",
    shard_tokens: int = 100_000_000,
    console: Console | None = None,
) -> BuildReport:
    """Turn `sources` (see `Corpus`) into token shards at `path`, replacing an older data folder there.

    A byte-level BPE of `vocab_size` is trained on a sample of the training documents, unless `tokenizer` names
    a model folder to take it from. `holdout` is the share of documents that training never sees; at least one
    of two. The same inputs give byte-identical files. Progress goes to `console`: a bar on a terminal, a line
    per phase elsewhere, nothing without one. Encoding uses all cores (`RAYON_NUM_THREADS` limits them).

    Raises `UserError` for a source that does not exist, sources without text, a target that is something else
    than a data folder, and a disk that cannot be written or is full; nothing half-written is left.
    """
    began = time.monotonic()
    path = Path(path)
    if not 0 <= holdout < 1:
        raise UserError(f"holdout {holdout}: must be a share of documents, at least 0 and below 1")
    if shard_tokens < 1:
        raise UserError(f"shard_tokens {shard_tokens}: must be at least 1")
    _check_target(path)
    given = None if tokenizer is None else _given_tokenizer(Path(tokenizer))
    console = console or Console(quiet=True)
    corpus = Corpus(sources, text_field=text_field)
    sample_bytes = SAMPLE_BYTES_PER_TOKEN * vocab_size if given is None else 0
    survey = _survey(corpus, holdout, sample_bytes=sample_bytes, console=console)
    chosen = given or _train(survey, vocab_size, console)
    with _new_folder(path) as folder:
        chosen.save(folder)
        manifest = _encode(corpus, survey, chosen, folder, shard_tokens=shard_tokens, console=console).replace(
            sources=tuple(str(source) for source in sources), holdout=holdout
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return BuildReport(path=path, manifest=manifest, seconds=time.monotonic() - began)


def _documents(number: int) -> str:
    return f"{number:,} document{'' if number == 1 else 's'}"


def _check_target(path: Path) -> None:
    empty_folder = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty_folder and not is_data_folder(path):
        raise UserError(f"{path}: exists and is not a Fathom data folder; name another or remove it yourself")


def _given_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is None:
        raise UserError(f"{folder}: no tokenizer.json there; name a model folder that has one")
    if not tokenizer.eos_token_ids:
        raise UserError(
            f"{folder}: its files name no EOS token, which must close every document; "
            "set eos_token in tokenizer_config.json"
        )
    return tokenizer


@dataclass(frozen=True)
class _Survey:
    """What the first reading found."""

    documents: int
    heldout_below: int
    """Documents whose key is smaller are held out."""
    sample: list[str]


def _survey(corpus: Corpus, holdout: float, *, sample_bytes: int, console: Console) -> _Survey:
    """Count the documents, fix the held-out side, draw the tokenizer's sample.

    The sample is the documents of smallest key, up to `sample_bytes`: any order of reading gives the same.
    """
    skipped = Skipped()
    documents, lowest = 0, 2**64
    sample: list[tuple[int, int, str]] = []  # a heap with the largest sample key on top
    sampled = 0
    with _progress(console) as progress:
        bar = progress.add_task("reading", total=None)
        for entry in _unique(corpus, skipped):
            documents += 1
            lowest = min(lowest, entry.split_key)
            if sample_bytes:
                heapq.heappush(sample, (-entry.sample_key, entry.split_key, entry.text))
                sampled += entry.bytes
                while sampled > sample_bytes and len(sample) > 1:
                    sampled -= len(heapq.heappop(sample)[2].encode())
            progress.update(bar, advance=1)
    if not documents:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.counts.items())
        raise UserError(f"data: no text in the sources ({reasons or 'no files'}); name others")
    heldout_below = int(holdout * 2**64)
    if holdout and documents > 1:
        heldout_below = max(heldout_below, lowest + 1)
    elif documents == 1:
        heldout_below = 0
    console.print(f"found {_documents(documents)}")
    texts = [text for _, split, text in sorted(sample, reverse=True) if split >= heldout_below]
    return _Survey(documents=documents, heldout_below=heldout_below, sample=texts)


def _train(survey: _Survey, vocab_size: int, console: Console) -> Tokenizer:
    characters = sum(len(text) for text in survey.sample)
    with _progress(console) as progress:
        bar = progress.add_task("training the tokenizer", total=characters)
        tokenizer = train_bpe(survey.sample, vocab_size, lambda read: progress.update(bar, advance=read))
    console.print(f"trained a vocabulary of {tokenizer.vocab_size:,} tokens on {characters:,} characters")
    return tokenizer


def _encode(
    corpus: Corpus,
    survey: _Survey,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    shard_tokens: int,
    console: Console,
) -> Manifest:
    skipped = Skipped()
    name = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    dtype = np.dtype(name).newbyteorder("<")
    with (
        SplitWriter(folder, "train", dtype=dtype, shard_tokens=shard_tokens) as train,
        SplitWriter(folder, "heldout", dtype=dtype, shard_tokens=shard_tokens) as heldout,
        _progress(console) as progress,
    ):
        bar = progress.add_task("encoding", total=survey.documents)
        for batch in _batches(_unique(corpus, skipped)):
            for entry, ids in zip(batch, _ids(tokenizer, batch), strict=True):
                if not ids:
                    skipped.add("nothing left by the tokenizer", entry.origin)
                    continue
                side = heldout if entry.split_key < survey.heldout_below else train
                side.add(np.array(ids), entry.bytes)
            progress.update(bar, advance=len(batch))
        manifest = Manifest(
            dtype=name,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=file_sha256(folder / "tokenizer.json"),
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_ids[0],
            fim=tokenizer.fim,
            sources=(),
            holdout=0.0,
            train=train.finish(),
            heldout=heldout.finish(),
            skipped={
                reason: SkippedEntry(count=count, examples=tuple(skipped.examples[reason]))
                for reason, count in sorted(skipped.counts.items())
            },
        )
    if not manifest.train.documents:
        raise UserError("data: every document was held out; give more documents or a smaller holdout")
    console.print(f"encoded {manifest.train.tokens + manifest.heldout.tokens:,} tokens")
    return manifest


def _ids(tokenizer: Tokenizer, batch: "list[_Entry]") -> Iterator[list[int]]:
    """Token ids of each, in order."""
    sorts = {
        marked: iter(tokenizer.encode_batch([e.text for e in batch if e.marked == marked], special=marked))
        for marked in (False, True)
    }
    return (next(sorts[entry.marked]) for entry in batch)


class _Entry(NamedTuple):
    """A document and what its content decides: two independent 64-bit keys, and its size in UTF-8."""

    text: str
    origin: str
    marked: bool
    split_key: int
    sample_key: int
    bytes: int


def _unique(corpus: Corpus, skipped: Skipped) -> Iterator[_Entry]:
    """The documents without exact copies of earlier ones."""
    seen: set[bytes] = set()
    for text, origin, marked in corpus.documents(skipped):
        content = text.encode()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest in seen:
            skipped.add("duplicate", origin)
            continue
        seen.add(digest)
        split_key, sample_key = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
        yield _Entry(text, origin, marked, split_key, sample_key, len(content))


def _batches(entries: Iterator[_Entry]) -> Iterator[list[_Entry]]:
    batch, size = [], 0
    for entry in entries:
        batch.append(entry)
        size += entry.bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `path` on success and leaves no trace otherwise."""
    target = path.resolve()  # behind a symbolic link, so that the neighbours lie on the same disk
    folder, replaced = neighbour(target, "building"), neighbour(target, "replaced")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in leftovers(target, "replaced"):
            if not target.exists():  # a kill between the two renames of `_swap`
                old.rename(target)
        sweep(target, "building", "replaced")
        folder.mkdir()
        yield folder
        _swap(folder, target, replaced)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "free space or name another folder (nothing was left behind)"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _swap(folder: Path, target: Path, replaced: Path) -> None:
    """Put `folder` in the place of `target`, whose old content moves to `replaced`; all of it or nothing."""
    try:
        if target.exists():
            target.rename(replaced)
        folder.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise


def _progress(console: Console) -> Progress:
    return Progress(console=console, transient=True, disable=not console.is_terminal)
