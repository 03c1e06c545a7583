"""Write a model with its tokenizer to one GGUF file, the format of llama.cpp and the programs that are built on it.

python -m gpt2modern.conversion.gguf --model DIR --output FILE.gguf [--quantize q8_0]

A GPT2-Modern model is converted to a stock class of transformers first. Stock models are written if llama.cpp computes
the same for them: GPT-2, Llama, Mistral, Qwen2, Qwen3 and Arcee. The tokenizer must be a byte-level BPE that splits
text as GPT-2's does; prepare_data.py trains such ones. Without --quantize the weights keep their precision.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from gpt2modern.cli import one_line_errors, parse_arguments
from gpt2modern.conversion.convert import to_native
from gpt2modern.errors import GPT2ModernError, warn
from gpt2modern.files import atomic_file, check_writable_file
from gpt2modern.loading import load_model, load_tokenizer
from gpt2modern.settings import check_ranges, setting
from modeling_gpt2modern.configuration_gpt2modern import GPT2ModernConfig

try:
    import gguf
except ImportError:  # the extra `gguf`
    gguf = None

# Stock class -> llama.cpp's name of the architecture, and the settings that llama.cpp assumes.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": (
        "gpt2",
        {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "LlamaForCausalLM": ("llama", {"hidden_act": "silu"}),
    "MistralForCausalLM": ("llama", {"hidden_act": "silu"}),
    "Qwen2ForCausalLM": ("qwen2", {"hidden_act": "silu"}),
    "Qwen3ForCausalLM": ("qwen3", {"hidden_act": "silu", "attention_bias": False}),
    "ArceeForCausalLM": ("arcee", {"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False}),
}
PERMUTED = ("llama", "arcee")  # llama.cpp rotates neighbouring dimensions of a head, transformers its two halves
# Splits text before BPE; llama.cpp calls it gpt-2.
GPT2_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass
class GGUFConfig:
    """Hold the arguments of the command. Raises ValueError if --output cannot be written."""

    model: str = setting(help="folder or Hub name of a GPT2-Modern model, or of a stock model")
    output: str = setting(help="file to write, such as model.gguf; an existing one is replaced")
    quantize: Literal["f32", "f16", "bf16", "q8_0"] | None = setting(
        None, "precision of the matrices in the file; by default that of the model"
    )

    def __post_init__(self):
        check_ranges(self)
        check_writable_file("--output", self.output)


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, quantize: str | None) -> None:
    """Write a stock model and its tokenizer to the GGUF file `path`, which appears complete or not at all.

    quantize: precision of matrices, see GGUFConfig; vectors and learned positions are fp32. If llama.cpp would ignore
    a sliding window, prints a warning, and the file says that the model reads no more tokens than that. Raises
    GPT2ModernError if llama.cpp would compute other logits or split text differently, OSError if it cannot be written.
    """
    config, kind = model.config, type(model).__name__
    if kind not in ARCHITECTURES:
        raise GPT2ModernError(f"a {kind} cannot be written as GGUF; supported are {', '.join(ARCHITECTURES)}")
    architecture, assumed = ARCHITECTURES[kind]
    rope = getattr(config, "rope_parameters", None) or {}
    settings = {name: getattr(config, name, value) for name, value in assumed.items()}
    settings |= {"rope_type": rope["rope_type"]} if rope else {}
    for name, value in (assumed | {"rope_type": "default"}).items():
        if settings.get(name, value) != value:
            raise GPT2ModernError(f"llama.cpp computes a {kind} with {name}={value!r}, not {settings[name]!r}")
    quantize = quantize or DTYPES[model.dtype]
    file_type = "ALL_F32" if quantize == "f32" else f"MOSTLY_{quantize.upper()}"
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_name(path.stem)
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(_context_length(config, kind))
        writer.add_vocab_size(config.vocab_size)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or _inner_size(config))
        writer.add_block_count(config.num_hidden_layers)
        writer.add_head_count(config.num_attention_heads)
        if rope:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
                add(head_dim)
            writer.add_head_count_kv(config.num_key_value_heads)
            writer.add_rope_freq_base(rope["rope_theta"])
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        else:
            writer.add_layer_norm_eps(config.layer_norm_epsilon)
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        _add_weights(writer, model, architecture, quantize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _inner_size(config: Any) -> int:
    return config.n_inner or 4 * config.hidden_size


def _context_length(config: Any, kind: str) -> int:
    """Return how many tokens llama.cpp reads with the same logits; warns if a sliding window makes them fewer."""
    window, longest = getattr(config, "sliding_window", None), config.max_position_embeddings
    if (
        not window
        or window >= longest
        or "sliding_attention" not in getattr(config, "layer_types", ["sliding_attention"])
    ):
        return longest
    warn(
        f"llama.cpp ignores the sliding window of a {kind} ({window} tokens): after more than {window} tokens its "
        f"logits differ; the file gives {window} as the context length, not {longest}"
    )
    return window


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Add vocabulary, merges, special tokens and chat template to a GGUFWriter. Raises GPT2ModernError if the tokenizer
    is no byte-level BPE that splits text as GPT-2's does."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    found = {name: (state["pre_tokenizer"] or {}).get(name) for name in GPT2_PRE_TOKENIZER}
    if state["model"]["type"] != "BPE" or state["normalizer"] is not None or found != GPT2_PRE_TOKENIZER:
        raise GPT2ModernError(
            "the tokenizer is not a byte-level BPE that splits text as GPT-2's does; write the file with llama.cpp's "
            "convert_hf_to_gguf.py, which knows some others"
        )
    entries = {index: (token, gguf.TokenType.NORMAL) for token, index in tokenizer.get_vocab().items()}
    for index, token in tokenizer.added_tokens_decoder.items():
        entries[index] = token.content, gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    tokens = [entries.get(index, (f"[PAD{index}]", gguf.TokenType.UNUSED)) for index in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_weights(writer: Any, model: PreTrainedModel, architecture: str, quantize: str) -> None:
    """Add the weights of a model to a GGUFWriter, under the names and in the layout of llama.cpp's `architecture`."""
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], model.config.num_hidden_layers)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": getattr(model.config, "num_key_value_heads", None)}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array, part = weight.float().cpu().numpy(), name.split(".")[-2]
        array = np.ascontiguousarray(array.T) if name in transposed else array
        if architecture in PERMUTED and part in heads:  # (heads, 2 halves, ...) to (heads, ..., 2 neighbours)
            halves = array.reshape(heads[part], 2, -1, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        kind = gguf.GGMLQuantizationType[quantize.upper()]
        if array.ndim == 1 or part == "wpe":
            kind = gguf.GGMLQuantizationType.F32
        elif quantize == "q8_0" and array.shape[1] % 32:  # numbers that share a scale
            kind = gguf.GGMLQuantizationType.F16
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target, gguf.quantize(array, kind), raw_dtype=kind)


def main(argv: list[str] | None = None) -> None:
    """Write the GGUF file that the command line names, and print its class, precision and size."""
    with one_line_errors():
        config = parse_arguments(GGUFConfig, argv, __doc__)
        if gguf is None:
            raise GPT2ModernError("--output needs gguf, which is not installed: pip install gguf")
        model, output = load_model(config.model, dtype="auto"), Path(config.output)
        tokenizer = load_tokenizer(config.model)
        try:
            model = to_native(model) if model.config.model_type == GPT2ModernConfig.model_type else model
            write_gguf(model, tokenizer, output, config.quantize)
        except (ValueError, GPT2ModernError) as error:
            raise GPT2ModernError(f"--model {config.model}: {error}") from None
        except OSError as error:
            raise GPT2ModernError(f"--output {output} cannot be written: {error.strerror or error}") from None
        precision = config.quantize or DTYPES[model.dtype]
        print(f"{type(model).__name__} -> {output}: {precision}, {output.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
