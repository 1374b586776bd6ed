"""What the name of a model means: a folder, a file, or something to fetch."""

from pathlib import Path

import pytest
import torch

from fathom.errors import UserError
from fathom.model.checkpoint import load_model, resolve, save_model
from tests.model.configs import LLAMA, build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(build(LLAMA), tmp_path / "model")
    return tmp_path / "model"


def test_resolve_tells_folders_files_and_names_apart(folder, monkeypatch):
    """A folder is itself, a misspelt one is refused with the nearest, a stray file is refused."""
    assert resolve(folder) == folder
    with pytest.raises(UserError, match=rf"no such model folder \(did you mean '{folder}'\?\)"):
        resolve(folder.parent / "modle")
    with pytest.raises(UserError, match=r"expected a model folder or a \.gguf file"):
        resolve(folder / "model.safetensors")


def test_a_hub_name_is_fetched_without_pickles(folder, monkeypatch):
    """`owner/model` asks the hub for safetensors and JSON only, and what comes back is loaded."""
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    loaded, saved = load_model("owner/model", dtype="float32").state_dict(), build(LLAMA).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in asked["owner/model"])


@pytest.mark.parametrize("name", ["runs/modle", "./runs/modle", "a/b/c", "~nobody/x", "/no/where", "../x", "none/../x"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(tmp_path, monkeypatch, name):
    """A dot, a tilde, two separators or an existing parent mean a path; the nearest neighbour is named."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "runs" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    near = r" \(did you mean 'runs/model'\?\)" if "modle" in name else ""
    with pytest.raises(UserError, match=rf"no such model folder{near}$"):
        resolve(name)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("no route\nto host"), "cannot be reached"),
        (OSError(28, "No space left on device"), r"did not give it \(No space left on device\)"),
        (ValueError("a long\nstory"), r"did not give it \(ValueError\)"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_line(monkeypatch, error, reason):
    """Whatever the client raises is a short sentence, not a traceback."""
    hub = pytest.importorskip("huggingface_hub")

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    with pytest.raises(UserError, match=rf"^owner/model: no such folder here, and the hub {reason}$"):
        resolve("owner/model")


def test_a_package_names_the_model_that_it_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`package:NAME` is the one .gguf file in an installed package; none, several, and no package are refused."""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('nobody imports this')")
    with pytest.raises(UserError, match=r"0 \.gguf files"):
        resolve("package:carrier")
    (package / "model.gguf").touch()
    assert resolve("package:carrier") == package / "model.gguf"
    (package / "other.gguf").touch()
    with pytest.raises(UserError, match=r"2 \.gguf files"):
        resolve("package:carrier")
    for name in ("no_such_package", "../carrier", ""):
        with pytest.raises(UserError, match="no such Python package"):
            resolve(f"package:{name}")
