"""Provide the configuration, models and presets of GPT2-Modern; the import registers them with transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_gpt2modern import MLPS, PRESETS, GPT2ModernConfig, MLPKind
from .modeling_gpt2modern import (
    GPT2ModernForCausalLM,
    GPT2ModernForQuestionAnswering,
    GPT2ModernForSequenceClassification,
    GPT2ModernForTokenClassification,
    GPT2ModernModel,
    GPT2ModernPreTrainedModel,
)


def register() -> None:
    """Register the GPT2-Modern models with transformers' Auto classes, so that AutoModelForCausalLM and the others load
    a saved model folder without trust_remote_code. A second call changes nothing."""
    AutoConfig.register(GPT2ModernConfig.model_type, GPT2ModernConfig, exist_ok=True)
    AutoModel.register(GPT2ModernConfig, GPT2ModernModel, exist_ok=True)
    AutoModelForCausalLM.register(GPT2ModernConfig, GPT2ModernForCausalLM, exist_ok=True)
    AutoModelForQuestionAnswering.register(GPT2ModernConfig, GPT2ModernForQuestionAnswering, exist_ok=True)
    AutoModelForSequenceClassification.register(GPT2ModernConfig, GPT2ModernForSequenceClassification, exist_ok=True)
    AutoModelForTokenClassification.register(GPT2ModernConfig, GPT2ModernForTokenClassification, exist_ok=True)


register()

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
    "register",
]
