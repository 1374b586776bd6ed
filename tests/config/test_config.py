"""Configurations: every spelling in, V3's keys out, and mistakes named in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from fathom.config import (
    PRESETS,
    ModelConfig,
    dump_recipe,
    explain_recipe,
    from_hf,
    preset,
    read_config,
    read_recipe,
    to_hf,
)
from fathom.errors import UserError

STDLIB = Path(__file__).parents[2] / "recipes" / "stdlib.toml"


@pytest.mark.parametrize("name", PRESETS)
def test_written_config_reads_back(name: str) -> None:
    """What is written as config.json describes the same model when read."""
    written = to_hf(preset(name), dtype="bfloat16")
    again = from_hf(json.loads(json.dumps(written)), where="config.json")
    assert to_hf(again, dtype="bfloat16") == written


def test_both_spellings_of_rotary_settings_agree() -> None:
    """`rope_scaling` beside `rope_theta`, `type` or `rope_type`, and `rope_parameters` mean the same."""
    config = preset("deepseek-v3")
    written = to_hf(config, dtype="bfloat16")
    old = dict(written, rope_scaling={k: v for k, v in written["rope_scaling"].items() if k != "rope_type"})
    new = {k: v for k, v in written.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {k: v for k, v in written["rope_scaling"].items() if k != "type"} | {"rope_theta": 10000.0}
    assert from_hf(old, where="old") == from_hf(new, where="new") == config


def test_default_rope_parameters_mean_no_scaling() -> None:
    """The spelling of plain RoPE in recent files, rope_type 'default', is read as none."""
    values = to_hf(preset("smollm2-135m"), dtype="float32") | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}
    }
    assert from_hf(values, where="x").rope_scaling is None
    assert from_hf(values, where="x").rope_theta == 100000.0


def test_family_defaults_fill_what_transformers_leaves_out() -> None:
    """A V3 file without topk_method and scoring_func is sigmoid/noaux_tc, a V2 file softmax/greedy."""
    for name, scoring, method in (("moonlight", "sigmoid", "noaux_tc"), ("deepseek-v2-lite", "softmax", "greedy")):
        values = to_hf(preset(name), dtype="float32")
        for key in ("topk_method", "scoring_func", "norm_topk_prob"):
            del values[key]
        assert from_hf(values, where="x") == preset(name)
        assert (from_hf(values, where="x").scoring_func, from_hf(values, where="x").topk_method) == (scoring, method)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "deepseek_v33"}, "unsupported model_type 'deepseek_v33' (did you mean 'deepseek_v3'?)"),
        ({"model_type": None}, "unsupported model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope scaling 'longrope' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq' is not supported"),
        ({"n_group": 7}, "not a multiple of"),
        ({"topk_group": 9}, "exceeds"),
        ({"hidden_size": "wide"}, "'hidden_size' = 'wide'"),
        ({"kv_lora_rank": None}, "needs kv_lora_rank"),
        ({"vocab_size": None}, "'vocab_size' is missing"),
        ({"rope_scaling": "foo"}, "'rope_scaling' = 'foo': must be an object"),
        ({"rope_parameters": [1]}, "'rope_parameters' = [1]: must be an object"),
        ({"quantization_config": "fp8"}, "'quantization_config' = 'fp8': must be an object"),
        ({"layer_types": 5}, "'layer_types' = 5: must be a list"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' = True"),
        ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' = 'yes'"),
        ({"model_type": "deepseek_v2"}, "deepseek_v2 with norm_topk_prob=true"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": False}, "deepseek_v2 needs scoring_func softmax"),
    ],
)
def test_wrong_config_is_one_line_that_names_the_cause(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    """A config.json that cannot be a model says which key, with what value, in which file."""
    (tmp_path / "config.json").write_text(json.dumps(to_hf(preset("deepseek-v3"), dtype="bfloat16") | change))
    with pytest.raises(UserError) as raised:
        read_config(tmp_path)
    assert said in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"text"'])
def test_config_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    """Broken JSON and JSON that is no object are one line, not a traceback."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


def test_config_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A folder where config.json should be is one line with the system's reason."""
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob=true"),
        ({"scoring_func": "sigmoid"}, "needs scoring_func softmax"),
        ({"topk_method": "noaux_tc"}, "topk_method greedy"),
        ({"rope_interleave": False}, "rope_interleave must be true"),
        ({"mlp_bias": True}, "mlp_bias is Llama's"),
    ],
)
def test_nothing_is_built_that_its_readers_would_misread(change: dict[str, Any], said: str) -> None:
    """What a family's readers take for granted holds for a config however it is made, not only for files."""
    with pytest.raises(ValueError, match=said):
        preset("deepseek-v2").replace(**change)


def test_recipe_overrides_reach_every_section() -> None:
    """`--section.field value` and `--section.field=value` change numbers, texts and lists; dashes are underscores."""
    recipe = read_recipe(
        STDLIB,
        ["--train.steps", "7", "--optimizer.lr=1e-3", "--data.sources", '["a", "b"]', "--model.num-hidden-layers", "2",
         "--train.compile", "off", "--name", "other"],
    )  # fmt: skip
    assert (recipe.train.steps, recipe.optimizer.lr, recipe.data.sources) == (7, 1e-3, ("a", "b"))
    assert (recipe.model.num_hidden_layers, recipe.train.compile, recipe.name) == (2, "off", "other")


def test_overrides_are_read_by_the_type_of_their_field() -> None:
    """A text field takes numbers as text, a list field one text, `none` unsets, whole numbers pass for floats."""
    recipe = read_recipe(
        STDLIB,
        ["--name", "2024", "--data.sources", "7", "--model.q_lora_rank", "none", "--optimizer.lr", "1",
         "--eval.sample_prompt", "none", "--train.ema-decay", "none"],
    )  # fmt: skip
    assert (recipe.name, recipe.data.sources, recipe.model.q_lora_rank) == ("2024", ("7",), None)
    assert (recipe.optimizer.lr, recipe.eval.sample_prompt, recipe.train.ema_decay) == (1.0, "none", None)


def test_recipe_file_can_unset_a_preset_field(tmp_path: Path) -> None:
    """`"none"` in TOML is None for an optional field, and an error for one that needs a value."""
    (tmp_path / "r.toml").write_text('name = "x"\n[model]\npreset = "fathom-tiny"\nq_lora_rank = "none"\n')
    assert read_recipe(tmp_path / "r.toml", []).model.q_lora_rank is None
    with pytest.raises(UserError, match=r"'model\.hidden_size' = 'none'"):
        read_recipe(tmp_path / "r.toml", ["--model.hidden_size", "none"])


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        (["--train.stepz", "3"], "--train.stepz: "),
        (["--seed", "1", "--optimiser.lr", "3"], "--optimiser.lr: "),
        (["--train.micro-batch", "-1", "--seed", "1"], "--train.micro_batch: "),
        (["--train.batch_tokens", "1000"], f"{STDLIB} with --train.batch_tokens: "),
        (["--seed", "1", "--model.n_group", "7"], f"{STDLIB} with --model.n_group: "),
        (["--model.preset", "deepseek-v4"], f"{STDLIB} with --model.preset: "),
    ],
)
def test_mistake_on_the_command_line_is_not_blamed_on_the_file(words: list[str], begins: str) -> None:
    """What a flag broke begins with the flag; a rule between fields names the file and the flags it may be about."""
    with pytest.raises(UserError) as raised:
        read_recipe(STDLIB, words)
    assert str(raised.value).startswith(begins)


def test_mistake_in_the_file_is_not_blamed_on_a_flag(tmp_path: Path) -> None:
    """A recipe's own typo begins with the file, whatever is overridden beside it."""
    (tmp_path / "r.toml").write_text('name = "x"\n[model]\npreset = "fathom-tiny"\n[train]\nstepz = 3\n')
    with pytest.raises(UserError, match=rf"^{tmp_path}/r\.toml: unknown key 'train\.stepz'"):
        read_recipe(tmp_path / "r.toml", ["--train.steps", "5"])


def test_explained_recipe_reads_back(tmp_path: Path) -> None:
    """The listing of all fields is a recipe: the same one, unset fields and awkward texts included. Its sentences are
    for a terminal, without backticks."""
    awkward = ["--eval.sample_prompt", 'a\n"b"  # c', "--data.sources", '["a  b", "c"]']
    recipe = read_recipe(STDLIB, ["--model.preset", "deepseek-v3", *awkward])
    text = explain_recipe(recipe)
    (tmp_path / "recipe.toml").write_text(text)
    assert read_recipe(tmp_path / "recipe.toml", []) == recipe
    assert "  # Optimizer steps." in text
    assert "`" not in text


def test_recipe_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    """Whatever keeps a recipe from being read is one line."""
    with pytest.raises(UserError, match="cannot be read as a recipe"):
        read_recipe(tmp_path, [])


def test_written_recipe_reads_back(tmp_path: Path) -> None:
    """A recipe written with every field out is the same recipe."""
    recipe = read_recipe(STDLIB, [])
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
    assert read_recipe(tmp_path / "recipe.toml", []) == recipe


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train.stepz", "3"], "unknown key 'train.stepz' (did you mean 'train.steps'?)"),
        (["--optimiser.lr", "3"], "unknown key 'optimiser' (did you mean 'optimizer'?)"),
        (["--model.rope_scaling.factr", "3"], "factr"),
        (["--train.steps", "-1"], "'train.steps' = -1"),
        (["--train.steps", "many"], "'train.steps' = 'many'"),
        (["--train.steps"], "a value must follow"),
        (["train.steps", "3"], "expected --section.field value"),
        (["--name.x", "3"], "'name' is not a section"),
        (["--model.preset", "deepseek-v4"], "unknown preset 'deepseek-v4' (did you mean 'deepseek-v3'?)"),
        (["--train.batch_tokens", "1000"], "must be a multiple"),
        (["--schedule.decay_start", "0.99"], "decay_start ≤ decay_end"),
        (["--optimizer.lr", "nan"], "lr"),
        (["--train.steps", "true"], "'train.steps' = True"),
        (["--train.steps", '"7"'], "'train.steps' = '7'"),
        (["--model.tie_word_embeddings", "yes"], "'model.tie_word_embeddings' = 'yes'"),
        (["--train.steps", "--dry-run"], "a value must follow"),
        (["--stepz", "3"], "unknown key 'stepz' (did you mean 'train.steps'?)"),
        (["--model.preset", "5"], "unknown preset '5'"),
        (["--model.preset", '["a"]'], "unknown preset"),
        (["--seed", str(2**64)], "'seed' = "),
        (["--seed", "-1"], "'seed' = -1"),
        (["--name", "x" * 101], "a run's name is a folder's name"),
        (["--name", "../up"], "a run's name is"),
        (["--name", "/tmp/x"], "a run's name is"),
        (["--name", ".hidden"], "a run's name is"),
        (["--name", '"a\\u0000b"'], "a run's name is"),
        (["--name", ""], "a run's name is"),
    ],
)
def test_wrong_recipe_names_the_field(words: list[str], said: str) -> None:
    """A typo, a wrong type, a missing value: one line with the field and the nearest known one."""
    with pytest.raises(UserError) as raised:
        read_recipe(STDLIB, words)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rule_between_fields_is_said_without_all_of_them() -> None:
    """A model whose fields do not fit together is one short sentence, not a print of the whole config."""
    with pytest.raises(UserError) as raised:
        read_recipe(STDLIB, ["--model.n_group", "7"])
    assert "'model': n_routed_experts=16 is not a multiple of" in str(raised.value)
    assert len(str(raised.value).removeprefix(str(STDLIB))) < 100


def test_every_field_has_its_help() -> None:
    """No setting of a model or a recipe goes without its sentence."""
    from fathom.config.recipe import PretrainRecipe

    sections: list[type] = [ModelConfig, PretrainRecipe]
    seen = 0
    while sections:
        section = sections.pop()
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                sections.append(field.annotation)
                continue
            assert field.description, f"{section.__name__}.{name}"
            seen += 1
    assert seen > 60
