"""Convert GPT2-Modern models to stock classes of transformers that compute the same logits, and back."""

from gpt2modern.conversion.architectures import ARCHITECTURES
from gpt2modern.conversion.convert import convert_folder, from_native, our_config, to_native

__all__ = ["ARCHITECTURES", "convert_folder", "from_native", "our_config", "to_native"]
