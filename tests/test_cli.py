"""The command line as a person meets it: one line and exit code 2 for a mistake, plain help, no tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fathom
from fathom.cli import main
from fathom.data import build as build_data
from fathom.model.checkpoint import save_model
from tests.model.configs import V3, build

RECIPE = str(Path(__file__).parents[1] / "recipes" / "stdlib.toml")


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrian", "x.toml"], "unknown command 'pretrian' (did you mean 'pretrain'?)"),
        (["pretrain", "nowhere.toml"], "nowhere.toml: no such recipe"),
        (["pretrain"], "required: recipe"),
        (["load", "nowhere"], "nowhere"),
        (["load", "x", "--dtpe", "float32"], "unexpected '--dtpe'"),
        (["load", "x", "--dtype", "float13"], "float13"),
        (
            ["generate", "x", "hello", "--temperature", "-1"],
            "'temperature' = -1.0: Input should be greater than or equal to 0",
        ),
        (["generate", "x", "hello", "--top-p", "0"], "'top_p' = 0.0: Input should be greater than 0"),
        (["data", "build", "nowhere", "--out", "y"], "nowhere"),
        (["data", "verify", "nowhere"], "nowhere"),
        (["load", "x", "--dtpe", "float32"], "did you mean '--dtype'?"),
        (["synth", RECIPE, "--resume", "--overwrite"], "--resume goes on with a run and --overwrite deletes it"),
        (["pretrain", RECIPE, "--over"], "unknown flag '--over' (did you mean '--overwrite'?)"),
        (["pretrain", RECIPE, "--stepz", "3"], "unknown flag '--stepz' (did you mean '--train.steps'?)"),
        (["pretrain", RECIPE, "train.steps", "3"], "unexpected 'train.steps'"),
        (["pretrain", "--train.stepz", "3", RECIPE], "did you mean 'train.steps'?"),
        (["pretrain", "."], "cannot be read as a recipe"),
        (["pretrain", RECIPE, "--train.steps", "x"], "fathom: --train.steps: 'train.steps' = 'x'"),
        (["data", "verfy", "x"], "unknown command 'verfy' (did you mean 'verify'?)"),
        (["quickstart", "--frsh"], "unknown flag '--frsh' (did you mean '--fresh'?)"),
        (["generate", "x", "hello", "--max-tokens", "-5"], "not a whole number of at least 1"),
        (["generate", "x", "hello", "--max-tokens", "0"], "not a whole number of at least 1"),
        (["generate", "x", "hello", "--seed", str(2**64)], "'seed' = "),
        (["generate", "x", "hello", "--temp", "1"], "unexpected '--temp'"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is mistyped or missing, standard error holds one line that names it, and nothing else is printed."""
    code, out, err = _run(capsys, *words)
    assert code == 2
    assert said in err
    assert err.startswith("fathom: ")
    assert err.count("\n") == 1
    assert out == ""


def test_overrides_may_stand_before_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--section.field value` is recognised wherever it stands among the command's own words."""
    seen = []
    monkeypatch.setattr("fathom.train.pretrain.dry_run", seen.append)
    assert main(["pretrain", "--train.steps", "10", RECIPE, "--dry-run", "--name=other", "--seed", "-0"]) == 0
    assert (seen[0].train.steps, seen[0].name) == (10, "other")


def _in_shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = line.replace("fathom ", f"{sys.executable} -m fathom.cli ")
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_reader_that_leaves_is_no_failure(tmp_path: Path) -> None:
    """A table written by rich into a pipe that nobody reads ends with 0 and without a word."""
    save_model(build(V3), tmp_path / "model")
    result = _in_shell(f"fathom load {tmp_path}/model | true")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_under_the_output_is_one_line(tmp_path: Path) -> None:
    """Output that cannot be written is a sentence and exit code 2, also when it fails in the last flush."""
    save_model(build(V3), tmp_path / "model")
    result = _in_shell(f"fathom load {tmp_path}/model > /dev/full")
    assert result.returncode == 2
    assert result.stderr == "fathom: output: No space left on device\n"


def test_ascii_terminal_shows_question_marks() -> None:
    """Text that the terminal's encoding lacks is replaced, not fatal."""
    code = "import sys; from fathom.cli import main; main([]); print('é')"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert result.stdout.splitlines()[-1:] == [b"?"], result.stderr


def test_warning_is_a_note_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the library warns of reaches a person as a sentence, without a source line."""
    save_model(build(V3.replace(num_nextn_predict_layers=0)), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_nextn_predict_layers": 1}))
    code, _, err = _run(capsys, "load", str(tmp_path / "model"))
    assert code == 0
    assert err.startswith("fathom: note: ")
    assert "1 MTP module" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_export_keeps_the_dtype_unless_told(stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Float32 masters stay float32 on any machine, bfloat16 stays bfloat16, and --dtype changes it."""
    save_model(build(V3), tmp_path / "model", dtype=stored)
    assert _run(capsys, "export", str(tmp_path / "model"), str(tmp_path / "same"))[1].endswith(f"({stored})\n")
    other = "bfloat16" if stored == "float32" else "float32"
    _, out, _ = _run(capsys, "export", str(tmp_path / "model"), str(tmp_path / "changed"), "--dtype", other)
    assert out.endswith(f"({other})\n")
    assert json.loads((tmp_path / "same" / "config.json").read_text())["torch_dtype"] == stored


def test_export_in_fp8_stays_fp8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--dtype fp8 writes blocks of the stored weights; exported again they stay, with --dtype bfloat16 they go."""
    save_model(build(V3), tmp_path / "model")
    for source, target, dtype, told in (
        ("model", "fp8", ["--dtype", "fp8"], "fp8"),
        ("fp8", "copy", [], "fp8"),
        ("fp8", "plain", ["--dtype", "bfloat16"], "bfloat16"),
    ):
        code, out, _ = _run(capsys, "export", str(tmp_path / source), str(tmp_path / target), *dtype)
        assert (code, out) == (0, f"wrote {tmp_path / target} ({told})\n")
    save_model(build(V3), tmp_path / "direct", dtype="fp8")
    files = {file.name: file.read_bytes() for file in (tmp_path / "direct").iterdir()}
    for exported in ("fp8", "copy"):
        assert {file.name: file.read_bytes() for file in (tmp_path / exported).iterdir()} == files
    assert "quantization_config" in json.loads(files["config.json"])
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_mistyped_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path whose last part is nearly that of a folder there is answered with its name, without asking a hub."""
    save_model(build(V3), tmp_path / "quickstart")
    code, _, err = _run(capsys, "load", str(tmp_path / "quikstart"))
    assert code == 2
    assert f"did you mean '{tmp_path / 'quickstart'}'?" in err


def test_help_needs_no_torch() -> None:
    """`fathom --help` answers without importing the heavy libraries."""
    code = "import sys; from fathom.cli import main; main([]); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "pretrain" in result.stdout


def test_help_of_a_recipe_says_where_its_fields_are(capsys: pytest.CaptureFixture[str]) -> None:
    """The help of a command that takes a recipe's fields shows their form, the sections and the presets; that of a
    pipeline's, where a stage's fields stand."""
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for words in ("[--section.field value ...]", "--dry-run' lists every field", "optimizer,", "deepseek-v3"):
        assert words in out
    for verb in ("recipe", "quickstart"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert "--zero.train.steps 60" in " ".join(capsys.readouterr().out.split())


def test_folder_that_is_not_the_thing_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run in place of its recipe, token data or a run without a checkpoint in place of a model are called so."""
    text, data, run = tmp_path / "text", tmp_path / "data", tmp_path / "run"
    text.mkdir()
    for number in range(3):
        (text / f"{number}.txt").write_text(f"text number {number} " * 20)
    build_data([text], data, vocab_size=300)
    run.mkdir()
    (run / "recipe.toml").write_text("")
    for words, said in (
        (["pretrain", str(run)], f"the recipe of this run is {run}/recipe.toml"),
        (["generate", str(data), "hi"], "holds tokens to train on, not a model"),
        (["export", str(data), str(tmp_path / "out")], "holds tokens to train on, not a model"),
        (["load", str(run)], "this run has no checkpoint yet"),
    ):
        code, _, err = _run(capsys, *words)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err


def test_library_loads_what_the_command_line_does(tmp_path: Path) -> None:
    """`fathom.load` takes a run's folder for its newest checkpoint."""
    for step in (1, 2):
        config = V3.replace(routed_scaling_factor=float(step))
        save_model(build(config), tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    model, tokenizer = fathom.load(tmp_path / "run", dtype="float32")
    assert (model.config.routed_scaling_factor, tokenizer) == (2.0, None)


def test_load_describes_and_export_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of ours is described; its export without MTP opens with the same main model and no modules."""
    save_model(build(V3), tmp_path / "model")
    code, out, _ = _run(capsys, "load", str(tmp_path / "model"), "--dtype", "float32")
    assert code == 0
    assert "latent (MLA)" in out
    assert "1 MTP module" in out
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "bare"), "--dtype", "float32", "--without-mtp"]) == 0
    code, out, _ = _run(capsys, "load", str(tmp_path / "bare"), "--dtype", "float32")
    assert "MTP" not in out
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "bare")]) == 2  # never overwrites


def test_generate_without_tokenizer_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model folder without a tokenizer can be loaded but not spoken to, and the message says why."""
    save_model(build(V3), tmp_path / "model")
    code, _, err = _run(capsys, "generate", str(tmp_path / "model"), "hello")
    assert code == 2
    assert "no tokenizer.json" in err


def test_debug_shows_the_traceback() -> None:
    """`--debug` lets the exception through, for whoever has to mend the code."""
    from fathom.errors import UserError

    with pytest.raises(UserError):
        main(["--debug", "load", "nowhere"])


@pytest.mark.filterwarnings("ignore:.*no multiple of 128")
def test_load_says_how_weights_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder in FP8 is called one, and what its cache would take in FP8 stands beside."""
    model = build(V3.replace(kv_lora_rank=128))
    for dtype in ("float32", "fp8"):
        save_model(model, tmp_path / dtype, dtype=dtype)
        assert main(["load", str(tmp_path / dtype)]) == 0
        said = capsys.readouterr().out
        assert ("stored in fp8" in said) == (dtype == "fp8")
        assert "in bfloat16, 444 in FP8" in " ".join(said.split())
