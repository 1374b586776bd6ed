"""`fathom serve`, `chat` and `generate` as commands: what they say while they start, and what they refuse before."""

import io
from pathlib import Path

import pytest

from fathom.cli import main
from fathom.data import Tokenizer
from fathom.errors import UserError
from fathom.model.checkpoint import save_model
from fathom.serve import machine
from fathom.serve.server import check_origins, listen
from tests.model.configs import LLAMA, build


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model that chats."""
    folder = tmp_path_factory.mktemp("models") / "small"
    model = build(LLAMA.replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=128))
    save_model(model, folder, tokenizer=tokenizer)
    return str(folder)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list:
    """The settings that the service would run with."""
    seen: list = []

    def run(app, listener) -> None:
        seen.append(app.state.service.settings)
        app.state.service.engine.close()

    monkeypatch.setattr("fathom.serve.server.run", run)
    return seen


def test_serve_says_what_it_opens_and_is(folder: str, served: list, capsys: pytest.CaptureFixture[str]) -> None:
    """First what is being opened, then context, thinking and the name for requests, then the address."""
    options = ["--temperature", "0.5", "--allow-origin", "https://a.b", "--log-requests", "--max-context", "100"]
    assert main(["serve", folder, "--port", "0", *options]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"fathom: opening {folder} …"
    assert f"fathom: {folder}: context of 100 tokens, thinks visibly" in said
    assert "fathom: model name for requests: small" in said
    assert "fathom: requests that do not say: temperature 0.5, top_p 1" in said
    assert said[-1].startswith("fathom: serving at http://127.0.0.1:")
    assert (served[0].sampling.temperature, served[0].allow_origins) == (0.5, ("https://a.b",))
    assert served[0].log_requests
    assert set(served[0].hosts) == {"localhost", "127.0.0.1", "[::1]", "a.b"}


def test_a_cache_in_fp8_is_refused_for_a_model_without_such_latents(
    folder: str, served: list, capsys: pytest.CaptureFixture[str]
) -> None:
    """--kv-cache reaches the engine, whose refusal is one line that says what it takes."""
    assert main(["serve", folder, "--port", "0", "--dtype", "bfloat16", "--kv-cache", "fp8"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("fathom: kv_cache fp8 (--kv-cache) is for latents, their width a multiple of 128")
    assert not served


def test_folder_s_own_sampling_is_served(folder: str, served: list) -> None:
    """`generation_config.json` decides what the options leave open."""
    file = Path(folder, "generation_config.json")
    before = file.read_text()
    file.write_text('{"temperature": 0.6, "top_p": 0.95}')
    try:
        main(["serve", folder, "--port", "0", "--top-p", "0.9"])
    finally:
        file.write_text(before)
    assert (served[0].sampling.temperature, served[0].sampling.top_p) == (0.6, 0.9)


def test_generate_through_a_pipe_says_nothing_else(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Notes about loading are for people at a terminal; --top-k 1 is greedy at any temperature."""
    texts = []
    for options in (["--temperature", "0"], ["--top-k", "1", "--temperature", "2"]):
        assert main(["generate", folder, "one", "--max-tokens", "8", *options]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert err == ""
    assert texts[0] == texts[1]


def test_chat_takes_sampling_and_effort(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same seed gives the same answer; an effort that is none is refused before anything is opened."""
    answers = []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        assert main(["chat", folder, "--seed", "5", "--top-p", "0.9", "--effort", "low", "--max-tokens", "12"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert main(["chat", "nowhere", "--effort", "huge"]) == 2
    assert "'effort' = 'huge'" in capsys.readouterr().err


def test_address_is_taken_before_the_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A port in use is told at once, not after the loading."""
    monkeypatch.setattr("fathom.load", lambda *_, **__: pytest.fail("opened the model"))
    with listen("127.0.0.1", 0) as listener:
        port = str(listener.getsockname()[1])
        assert main(["serve", "model", "--port", port]) == 2
    assert f"--port {port}: cannot listen there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "x"], "fathom: --port: 'x' is not a port"),
        (["--temperature", "3"], "fathom: --temperature: '3' is not a number from 0 to 2"),
        (["--top-p", "0"], "fathom: --top-p: '0' is not a number above 0 to 1"),
        (["--top-p", "nan"], "fathom: --top-p: 'nan'"),
        (["--allow-origin", "a.example"], "fathom: --allow-origin a.example: is no origin; give https://host"),
        (["--cache-memory", "900000"], "fathom: --cache-memory 900000: this machine has "),
        (["--wieghts", "int8"], "did you mean '--weights'?"),
        (["--kv-cache", "int8"], "fathom: --kv-cache: "),
    ],
)
def test_wrong_option_is_one_plain_sentence(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the option, and nothing of the program's insides, before the model is opened."""
    monkeypatch.setattr("fathom.load", lambda *_, **__: pytest.fail("opened the model"))
    assert main(["serve", "model", *options]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "argument" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("origin", ["https://a.b/", "https://a.b/path", "a.b", "null", "https://", "HTTPS://A.B", ""])
def test_what_no_browser_sends_is_no_origin(origin: str) -> None:
    """An origin with a path, without a scheme or in capitals would never match, so it is refused."""
    with pytest.raises(UserError, match="is no origin"):
        check_origins([origin])
    good = ("https://a.b", "http://localhost:3000", "http://[::1]:80", "*", "chrome-extension://abc")
    assert check_origins(good) == good


def test_cache_memory_is_bounded_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than there is in all is refused with both figures; what is there is not."""
    monkeypatch.setattr(machine, "memory", lambda: (23 * 10**9, 8 * 10**9))
    with pytest.raises(UserError, match="--cache-memory 5000: this machine has 23 GB, 8 of them free"):
        machine.check_cache_memory(5000)
    machine.check_cache_memory(20)
    monkeypatch.setattr(machine, "memory", lambda: (23 * 10**9, None))
    with pytest.raises(UserError, match="this machine has 23 GB; give less"):
        machine.check_cache_memory(5000)


def test_container_s_limit_counts(tmp_path: Path) -> None:
    """Of a limit below the machine's memory what is not used is free; `max` and version 1's huge number are none."""
    whole = machine.memory(tmp_path)
    assert 0 < whole[1] <= whole[0]
    (tmp_path / "memory.max").write_text("50000000\n")
    (tmp_path / "memory.current").write_text("20000000\n")
    assert machine.memory(tmp_path) == (50_000_000, 30_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory(tmp_path)[0] == whole[0]
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert machine.memory(tmp_path)[0] == whole[0]
