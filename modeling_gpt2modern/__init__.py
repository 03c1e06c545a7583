"""Provide the configuration, models and presets of GPT2-Modern; the import registers them with transformers."""

import transformers

from .configuration_gpt2modern import AUTO_MAP, MLPS, PRESETS, GPT2ModernConfig, MLPKind
from .modeling_gpt2modern import (
    GPT2ModernForCausalLM,
    GPT2ModernForQuestionAnswering,
    GPT2ModernForSequenceClassification,
    GPT2ModernForTokenClassification,
    GPT2ModernModel,
    GPT2ModernPreTrainedModel,
)

# AutoModelForCausalLM and the others then load a saved model folder without trust_remote_code.
for auto_class, reference in AUTO_MAP.items():
    key = GPT2ModernConfig.model_type if auto_class == "AutoConfig" else GPT2ModernConfig
    getattr(transformers, auto_class).register(key, globals()[reference.split(".")[1]], exist_ok=True)

__all__ = [
    "MLPS",
    "PRESETS",
    "GPT2ModernConfig",
    "GPT2ModernForCausalLM",
    "GPT2ModernForQuestionAnswering",
    "GPT2ModernForSequenceClassification",
    "GPT2ModernForTokenClassification",
    "GPT2ModernModel",
    "GPT2ModernPreTrainedModel",
    "MLPKind",
]
