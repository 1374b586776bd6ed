import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from fathom.cli import main
from fathom.data import TokenDataset, Tokenizer, build, shards, train_bpe
from fathom.data.sources import Corpus, Skipped
from fathom.errors import UserError
from tests.data.texts import text_of


def files_of(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def texts_of(dataset: TokenDataset, split: str) -> list[str]:
    count = dataset.manifest.split(split).documents
    return [dataset.tokenizer.decode(dataset.document(split, n).tolist()) for n in range(count)]


def test_every_document_is_stored_once_and_whole(dataset: TokenDataset, corpus_folder: Path) -> None:
    """Both splits together decode to exactly the corpus, and the manifest's counts are those of the text."""
    expected = [text for text, *_ in Corpus([corpus_folder]).documents(Skipped())]
    train, heldout = texts_of(dataset, "train"), texts_of(dataset, "heldout")
    assert sorted(train + heldout) == sorted(expected)
    assert 5 <= len(heldout) <= 30
    manifest = dataset.manifest
    assert manifest.train.bytes == sum(len(text.encode()) for text in train)
    assert manifest.train.tokens == dataset.lengths("train").sum()
    assert len(manifest.train.shards) > 2
    dataset.verify()


def test_same_inputs_give_identical_files(dataset: TokenDataset, corpus_folder: Path, tmp_path: Path) -> None:
    """A second build writes the same bytes under the same names, manifest and tokenizer included."""
    build([corpus_folder], tmp_path / "again", vocab_size=400, holdout=0.2, shard_tokens=1000)
    assert files_of(tmp_path / "again") == files_of(dataset.path)
    assert TokenDataset(tmp_path / "again").fingerprint == dataset.fingerprint


def test_copies_are_dropped_and_sides_do_not_depend_on_the_rest(tmp_path: Path) -> None:
    """Exact duplicates are stored once and counted; adding other files moves no document to the other side."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for seed in range(40):
        (folder / f"{seed}.txt").write_text(text_of(seed, 20))
    build([folder], tmp_path / "a", vocab_size=300, holdout=0.3)
    for seed in range(10, 60):
        (folder / f"copy-{seed}.md").write_text(text_of(seed, 20))
    report = build([folder], tmp_path / "b", vocab_size=300, holdout=0.3)
    assert report.manifest.skipped["duplicate"].count == 30
    before, after = TokenDataset(tmp_path / "a"), TokenDataset(tmp_path / "b")
    for split in ("train", "heldout"):
        assert set(texts_of(before, split)) < set(texts_of(after, split))


def test_a_small_corpus_still_holds_one_document_out(tmp_path: Path) -> None:
    """Of two or more documents one is held out, of one none; holdout 0 holds nothing out."""
    files = [tmp_path / f"{seed}.txt" for seed in (1, 3, 5)]  # none of them among the lowest percent of hashes
    for seed, file in zip((1, 3, 5), files, strict=True):
        file.write_text(text_of(seed, 20))
    assert build(files, tmp_path / "a", vocab_size=300).manifest.heldout.documents == 1
    one = build(files[:1], tmp_path / "b", vocab_size=300, holdout=0.9).manifest
    assert (one.train.documents, one.heldout.documents) == (1, 0)
    assert build(files, tmp_path / "c", vocab_size=300, holdout=0).manifest.heldout.documents == 0


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A given tokenizer with ids above 65,535 is used as it is, in uint32; tokens read back equal."""
    definition = json.loads(tokenizer.backend.to_str())
    vocab = definition["model"]["vocab"]
    definition["model"]["vocab"] = vocab | {f"\u0100\u0100{n}": len(vocab) + n for n in range(70_000)}
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "big" / "tokenizer_config.json").write_text('{"eos_token": "<｜end▁of▁sentence｜>"}')
    (tmp_path / "x.txt").write_text(text_of(0, 50))
    build([tmp_path / "x.txt"], tmp_path / "data", tokenizer=tmp_path / "big")
    dataset = TokenDataset(tmp_path / "data")
    assert dataset.manifest.dtype == "uint32"
    assert dataset.manifest.bos is None
    assert dataset.document("train", 0).tolist() == tokenizer.encode(text_of(0, 50))
    assert dataset.tokenizer.vocab_size == len(vocab) + 70_000


def test_the_sample_does_not_depend_on_names_or_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When only a sample trains the tokenizer, the same texts under other names give the same tokenizer."""
    monkeypatch.setattr(sys.modules["fathom.data.build"], "SAMPLE_BYTES_PER_TOKEN", 10)
    for seed in range(60):
        for name in (f"a/{seed}.txt", f"b/{99 - seed}.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text_of(seed, 20))
    for name in "ab":
        build([tmp_path / name], tmp_path / f"data-{name}", vocab_size=400)
    tokenizers = {(tmp_path / f"data-{name}" / "tokenizer.json").read_bytes() for name in "ab"}
    assert len(tokenizers) == 1
    whole = train_bpe((text_of(seed, 20) for seed in range(60)), 400)
    assert json.loads(whole.backend.to_str()) != json.loads(tokenizers.pop())


def test_documents_cannot_forge_control_tokens(tmp_path: Path) -> None:
    """A document that spells EOS and role markers is stored as ordinary tokens."""
    (tmp_path / "x.txt").write_text("<｜end▁of▁sentence｜><｜User｜><think>" * 9)
    build([tmp_path / "x.txt"], tmp_path / "data", vocab_size=300)
    assert TokenDataset(tmp_path / "data").document("train", 0).min() >= 10


def test_the_report_is_readable(tmp_path: Path, corpus_folder: Path) -> None:
    """rows() tells documents, tokens, bytes per token and each reason with an example; lines go to a console."""
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    console = Console(file=io.StringIO(), width=100)
    report = build([corpus_folder, tmp_path / "bad.txt"], tmp_path / "data", vocab_size=300, console=console)
    rows = dict(report.rows())
    assert "documents" in rows["train"]
    assert "bytes per token" in rows["train"]
    assert rows["skipped: not UTF-8"] == f"1 (first: {tmp_path / 'bad.txt'})"
    assert len(console.file.getvalue().splitlines()) == 3


def test_a_full_disk_leaves_nothing_and_keeps_the_old_folder(
    tmp_path: Path, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC while writing a shard is one line; no temporary folder stays and the old data folder is whole."""
    path = tmp_path / "data"
    build([corpus_folder], path, vocab_size=300)
    before = files_of(path)
    real = shards.shard_file

    def on_full_device(split: str, number: int) -> str:
        return "/dev/full" if (split, number) == ("train", 2) else real(split, number)

    monkeypatch.setattr(shards, "shard_file", on_full_device)
    with pytest.raises(UserError, match=r"data: cannot be written \(No space left on device\)[^\n]*$"):
        build([corpus_folder], path, vocab_size=300, shard_tokens=1000)
    assert files_of(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("moment", ["reading", "encoding", "renaming"])
def test_an_interrupt_leaves_nothing(
    tmp_path: Path, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Ctrl-C at any moment leaves no trace of the new folder and passes on as KeyboardInterrupt."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    target = {
        "reading": "fathom.data.sources.Corpus.documents",
        "encoding": "fathom.data.tokenizer.Tokenizer.encode_batch",
        "renaming": "pathlib.Path.rename",
    }[moment]
    monkeypatch.setattr(target, interrupt)
    with pytest.raises(KeyboardInterrupt):
        build([corpus_folder], tmp_path / "data", vocab_size=300)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path, corpus_folder: Path) -> None:
    """Leftovers of dead processes for the same target go; those of running ones and of other targets stay."""
    over = subprocess.Popen([sys.executable, "-c", ""])
    over.wait()
    stay = {f".data.building-{os.getppid()}", f".other.building-{over.pid}", ".data.building-notes"}
    go = {f".data.building-{over.pid}", f".data.replaced-{over.pid}"}
    for name in stay | go:
        (tmp_path / name).mkdir()
    build([corpus_folder], tmp_path / "data", vocab_size=300)
    assert {entry.name for entry in tmp_path.iterdir()} == stay | {"data"}


def test_a_kill_between_the_two_renames_loses_nothing(
    tmp_path: Path, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder that a killed build had moved aside is put back before anything else can fail."""
    path = tmp_path / "data"
    build([corpus_folder], path, vocab_size=300)
    before = files_of(path)
    over = subprocess.Popen([sys.executable, "-c", ""])
    over.wait()
    path.rename(tmp_path / f".data.replaced-{over.pid}")
    monkeypatch.setattr(shards, "shard_file", lambda split, number: "/dev/full")
    with pytest.raises(UserError, match="No space left"):
        build([corpus_folder], path, vocab_size=300)
    assert files_of(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(16, "Device or resource busy")])
def test_a_failed_exchange_puts_the_old_folder_back(
    tmp_path: Path, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A failure after the old folder was moved aside and before the new one is in place restores the old one."""
    path = tmp_path / "data"
    build([corpus_folder], path, vocab_size=300)
    before = files_of(path)
    real = Path.rename

    def fails_for_the_new_folder(self: Path, target: Path) -> Path:
        if "building" in self.name:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_folder)
    with pytest.raises((KeyboardInterrupt, UserError)):
        build([corpus_folder], path, vocab_size=310)
    assert files_of(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_a_target_behind_a_link_is_replaced_where_it_lies(tmp_path: Path, corpus_folder: Path) -> None:
    """The link stays a link, and the folder behind it is the new one."""
    build([corpus_folder], tmp_path / "real", vocab_size=300)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    build([corpus_folder], tmp_path / "link", vocab_size=310)
    assert (tmp_path / "link").is_symlink()
    assert TokenDataset(tmp_path / "real").manifest.vocab_size == 310
    assert len(list(tmp_path.iterdir())) == 2


def test_a_document_without_tokens_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Text that a given tokenizer's normaliser removes altogether is skipped and reported, not stored empty."""
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.normalizer = normalizers.Replace("x", "")
    given = Tokenizer(backend, bos_token_id=0, eos_token_ids=(1,), pad_token_id=2, chat_template=None)
    given.save(tmp_path / "model")
    for name, text in (("a", "xxx"), ("b", "some x text")):
        (tmp_path / f"{name}.txt").write_text(text)
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    report = build(files, tmp_path / "data", tokenizer=tmp_path / "model", holdout=0)
    assert report.manifest.train.documents == 1
    assert dict(report.rows())["skipped: nothing left by the tokenizer"] == f"1 (first: {files[0]})"


def test_other_peoples_folders_are_not_replaced(tmp_path: Path, corpus_folder: Path) -> None:
    """A target that exists and is no data folder is refused untouched; an empty folder and an old build are not."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(UserError, match="not a Fathom data folder"):
            build([corpus_folder], tmp_path / name, vocab_size=300)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "x"
    (tmp_path / "empty").mkdir()
    build([corpus_folder], tmp_path / "empty", vocab_size=300)
    build([corpus_folder], tmp_path / "empty", vocab_size=310)
    assert TokenDataset(tmp_path / "empty").manifest.vocab_size == 310


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"holdout": 1.0}, "holdout 1.0"),
        ({"shard_tokens": 0}, "shard_tokens 0"),
        ({"vocab_size": 100}, "at least 266"),
        ({"tokenizer": "/"}, "no tokenizer.json"),
        ({"sources": ["/dev/null"]}, r"no text in the sources \(1 not a file\)"),
    ],
)
def test_wrong_arguments_are_user_errors(tmp_path: Path, corpus_folder: Path, change: dict, sentence: str) -> None:
    """Each wrong argument is one line that names it, and no folder appears."""
    arguments = {"sources": [corpus_folder], "path": tmp_path / "data", "vocab_size": 300, **change}
    with pytest.raises(UserError, match=sentence):
        build(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_names_the_field_and_the_size_of_shards(tmp_path: Path) -> None:
    """--text-field is what is read from JSONL, and --shard-tokens what a file holds at most."""
    rows = [json.dumps({"text": "no", "body": text_of(seed, 20)}) for seed in range(9)]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    words = ["data", "build", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "data"), "--vocab-size", "300"]
    assert main([*words, "--text-field", "body", "--shard-tokens", "100"]) == 0
    dataset = TokenDataset(tmp_path / "data")
    assert set(texts_of(dataset, "train") + texts_of(dataset, "heldout")) == {text_of(seed, 20) for seed in range(9)}
    assert len(dataset.manifest.train.shards) == dataset.manifest.train.documents


@pytest.fixture
def copy(dataset: TokenDataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset.path, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["train-00001.bin", "heldout-00000.bin", "train-documents.bin"])
def test_truncated_and_missing_files_are_named_at_open(copy: Path, name: str) -> None:
    """A file of the wrong size, or missing, is refused on opening with its name."""
    file = copy / name
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=rf"{name}: has \d+ bytes where the manifest says"):
        TokenDataset(copy)
    file.unlink()
    with pytest.raises(UserError, match=rf"{name}: cannot be read"):
        TokenDataset(copy)


@pytest.mark.parametrize("damage", ["filled", "swapped", "first", "last", "across shards"])
def test_a_document_index_that_leads_astray_is_refused_at_open(copy: Path, damage: str) -> None:
    """An index of the right size whose documents are out of order, out of bounds or in two shards is named."""
    file = copy / "train-documents.bin"
    offsets = np.fromfile(file, dtype="<i8")
    if damage == "filled":
        offsets[:] = 2**40
    elif damage == "swapped":
        offsets[[3, 4]] = offsets[[4, 3]]
    elif damage == "across shards":
        boundary = TokenDataset(copy).manifest.train.shards[0].tokens
        offsets[offsets == boundary] += 1
    else:
        offsets[0 if damage == "first" else -1] += 1
    offsets.tofile(file)
    with pytest.raises(UserError, match=r"train-documents\.bin: is corrupt \(its documents"):
        TokenDataset(copy)


@pytest.mark.parametrize("name", ["train-00001.bin", "heldout-documents.bin", "tokenizer.json"])
def test_verify_finds_one_flipped_bit(copy: Path, name: str) -> None:
    """A single changed bit passes the quick check of sizes and is found, and named, by verify()."""
    data = np.fromfile(copy / name, dtype=np.uint8)
    data[len(data) // 2] ^= 1
    data.tofile(copy / name)
    with pytest.raises(UserError, match=f"{name}: is corrupt"):
        TokenDataset(copy).verify()


@pytest.mark.parametrize(
    ("field", "value"), [("eos", 99999), ("bos", -1), ("fim", [3, 4, 400]), ("vocab_size", 2), ("train.tokens", 7)]
)
def test_manifests_that_contradict_themselves_are_user_errors(copy: Path, field: str, value: object) -> None:
    """A control token outside the vocabulary, and a split that is not the sum of its shards, are refused at open."""
    values = json.loads((copy / "manifest.json").read_text())
    *section, name = field.split(".")
    (values[section[0]] if section else values)[name] = value
    (copy / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"manifest\.json: (control token|a split of)[^\n]*$"):
        TokenDataset(copy)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "fathom-tokens", "version": 2}', None])
def test_broken_manifests_are_user_errors(copy: Path, text: str | None) -> None:
    """A manifest that is missing, no JSON, of another version or incomplete is one line."""
    file = copy / "manifest.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        TokenDataset(copy)
