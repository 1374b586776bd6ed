"""Typed, validated configuration: models (with the keys of `config.json`) and recipes."""

from fathom.config.hf import from_hf, read_config, to_hf
from fathom.config.model import ModelConfig, RopeScaling
from fathom.config.presets import PRESETS, preset
from fathom.config.recipe import PretrainRecipe, dump_recipe, explain_recipe, read_recipe
from fathom.config.section import Section

__all__ = [
    "PRESETS",
    "ModelConfig",
    "PretrainRecipe",
    "RopeScaling",
    "Section",
    "dump_recipe",
    "explain_recipe",
    "from_hf",
    "preset",
    "read_config",
    "read_recipe",
    "to_hf",
]
