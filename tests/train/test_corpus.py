import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fathom.config import PretrainRecipe, dump_recipe
from fathom.data import build
from fathom.errors import UserError
from fathom.train import corpus
from fathom.train.corpus import describe_data, open_data

ROOT = Path(__file__).parents[2]


def opened(recipe: PretrainRecipe, **data: Any) -> None:
    open_data(recipe.replace(data=recipe.data.replace(**data).model_dump()), Console(quiet=True))


def test_a_named_folder_is_taken_as_it_is(recipe: PretrainRecipe, data: Path) -> None:
    """A recipe may name a folder alone, or say rightly what is in it, in any spelling."""
    opened(recipe)
    opened(recipe, sources=(f"{data.parent}/./text/",), vocab_size=300)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"sources": ("/elsewhere",)}, r"data\.sources asks for /elsewhere"),
        ({"vocab_size": 301}, None),
    ],
)
def test_a_folder_of_something_else_is_refused(
    recipe: PretrainRecipe, asked: dict[str, Any], words: str | None
) -> None:
    """Sources that the folder was not built from are an error; a vocabulary that came out smaller is not."""
    if words is None:
        opened(recipe, **asked)
    else:
        with pytest.raises(UserError, match=words):
            opened(recipe, **asked)


def test_under_the_default_path_every_field_asks(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default folder, built from something else than the default sources, is not taken for them."""
    monkeypatch.chdir(tmp_path)
    default = PretrainRecipe.model_fields["data"].default
    shutil.copytree(recipe.data.path, default.path)
    with pytest.raises(UserError, match=r"data\.sources asks for stdlib"):
        opened(recipe, path=default.path)


def test_a_folder_that_is_not_there_is_a_typo(
    recipe: PretrainRecipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that was only named is refused with the nearest data folder; with sources, or by default, it is built."""
    built = []
    monkeypatch.setattr(corpus, "build", lambda sources, path, **_: built.append((sources, path)))
    typo = str(data.parent / "shrads")
    with pytest.raises(UserError, match=rf"does not exist \(did you mean '{data}'\?\); .*--data\.sources"):
        opened(recipe, path=typo)
    assert built == []
    monkeypatch.chdir(tmp_path)
    default = PretrainRecipe.model_fields["data"].default
    for path, sources in ((typo, ("notes",)), (default.path, default.sources)):
        with pytest.raises(UserError, match="is not a data folder"):  # nothing was really built
            opened(recipe, path=path, sources=sources)
    assert built == [(("notes",), typo), (default.sources, default.path)]


def test_data_are_described_before_they_are_there(recipe: PretrainRecipe, data: Path) -> None:
    """What is there is said with its sources and sizes; what is not, with what it will be built from."""
    console = Console(quiet=True)
    assert f"built from {data.parent / 'text'}: " in describe_data(recipe, console)
    section = recipe.data.replace(path="nowhere", sources=("notes", "more")).model_dump()
    assert "does not exist and will be built from notes, more" in describe_data(recipe.replace(data=section), console)


def test_a_larger_vocabulary_than_asked_for(recipe: PretrainRecipe, data: Path, tmp_path: Path) -> None:
    """A vocabulary that no such recipe can have built is an error with both sizes."""
    build([data.parent / "text"], tmp_path / "shards", vocab_size=310)
    with pytest.raises(UserError, match=r"vocabulary of 310, but data\.vocab_size asks for 300"):
        opened(recipe, path=str(tmp_path / "shards"), vocab_size=300)


@pytest.mark.parametrize("documents", [1, 2])
def test_nothing_held_out_is_refused_at_once(recipe: PretrainRecipe, documents: int, tmp_path: Path) -> None:
    """A folder without held-out text, from one document or by request, is refused before anything is trained."""
    (tmp_path / "text").mkdir()
    for number in range(documents):
        (tmp_path / f"text/{number}.txt").write_text(f"a text and number {number} " * 20)
    build([tmp_path / "text"], tmp_path / "shards", vocab_size=300, holdout=0.0 if documents > 1 else 0.1)
    with pytest.raises(UserError, match="no document is held out"):
        opened(recipe, path=str(tmp_path / "shards"))


def test_a_corrupt_shard_is_named(recipe: PretrainRecipe, data: Path, tmp_path: Path) -> None:
    """One changed byte is found before training."""
    shutil.copytree(data, tmp_path / "shards")
    shard = tmp_path / "shards/train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000\.bin: is corrupt"):
        opened(recipe, path=str(tmp_path / "shards"))


def test_a_prompt_that_is_not_used_is_not_checked(recipe: PretrainRecipe) -> None:
    """A prompt longer than the context matters only where a sample is written."""
    prompt = {"sample_prompt": "alpha " * 100}
    with pytest.raises(UserError, match=r"eval\.sample_prompt"):
        opened(recipe.replace(eval={"sample_tokens": 1, **prompt}))
    opened(recipe.replace(eval={"sample_tokens": 0, **prompt}))


def test_sigterm_while_data_are_built(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """It ends as Ctrl-C does: exit code 130, and no run folder is left."""
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
    code = (
        "import sys, time, fathom.train.corpus as corpus; from fathom.cli import main\n"
        "def build(sources, path, **_):\n"
        "    print('building', flush=True)\n"
        "    time.sleep(60)\n"
        "corpus.build = build\n"
        "sys.exit(main(['pretrain', 'recipe.toml', '--data.path', 'new', '--data.sources', 'text']))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "building\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "fathom: interrupted\n")
    assert not (tmp_path / "runs").exists()
