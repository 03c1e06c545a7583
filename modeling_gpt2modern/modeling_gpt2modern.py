"""Define the GPT2-Modern models: a decoder-only transformer that can be GPT-2 (2019), Llama or models in between.

The file is ordered from the inner to the outer parts: attention, decoder layer, model, models with a head. `__init__`
turns each choice of the configuration into a module; no `forward` chooses by a flag. Modules have the same names as in
Llama. Attention functions are in attention_gpt2modern.py; norms, MLPs and the rotary embedding are in
layers_gpt2modern.py, the loss is in loss_gpt2modern.py.
"""

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .attention_gpt2modern import eager_attention_forward
from .configuration_gpt2modern import GPT2ModernConfig, load_conversion
from .layers_gpt2modern import (
    NORMS,
    EmbeddingResidual,
    Gate,
    GPT2ModernRotaryEmbedding,
    KeyOffset,
    PackedDocuments,
    PreviousTokens,
    ResidualMix,
    Smear,
    ValueEmbedding,
    ValueResidual,
    WeightedSum,
    add_histories,
    apply_rotary,
    bigram_rows,
    build_dropout,
    build_mlp,
    build_norm,
    positions_from_lengths,
    unchanged,
)
from .loss_gpt2modern import linear_cross_entropy_and_z_loss, logits_z_loss, soft_cap

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # transformers 5.17 does not have it

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Return the hidden states of the last `logits_to_keep` tokens (0: all), or of those that a 1D tensor lists."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept, :]


logger = logging.get_logger(__name__)
# Arguments of from_pretrained that say where the files are.
PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "variant")

MASKS: dict[str, Callable] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


class GPT2ModernAttention(nn.Module):
    """Compute causal self-attention with grouped key and value heads (arXiv:2305.13245).

    Differs from Qwen3's: query and key norms and RoPE are optional, and so are changes of the values (a mix with those
    of the first layer, embeddings) and of the keys (offset).
    """

    def __init__(self, config: GPT2ModernConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.is_causal = True

        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.o_proj.writes_residual = True
        self.q_norm, self.k_norm = (
            NORMS[config.norm_type](config.head_dim, eps=config.norm_eps, elementwise_affine=config.qk_norm_affine)
            if config.use_qk_norm
            else unchanged
            for _ in range(2)
        )
        # Layer 0 mixes nothing in: the other layers read its values.
        self.value_residual = ValueResidual() if config.use_value_residual and layer_idx > 0 else unchanged
        self.value_embedding = self.key_offset = unchanged
        if layer_idx in (config.value_embedding_layers or ()):
            self.value_embedding = ValueEmbedding(config.hidden_size, config.num_key_value_heads)
        if config.use_key_offset and config.layer_types[layer_idx] == "full_attention":
            rotary_dim = int(config.head_dim * config.partial_rotary_factor)
            self.key_offset = KeyOffset(rotary_dim, -config.layer_types[layer_idx:].count("full_attention"))

    def forward(
        self,
        hidden_states: torch.Tensor,
        first_value_states: torch.Tensor | None = None,
        value_embeds: torch.Tensor | None = None,
        previous_tokens: PreviousTokens | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return the output (batch, seq_len, hidden_size), the attention weights (None unless attention is eager), and
        the values of the new tokens (batch, num_key_value_heads, seq_len, head_dim), which later layers may read.
        """
        input_shape = hidden_states.shape[:-1]  # (batch, seq_len)
        head_shape = (*input_shape, -1, self.head_dim)
        # query: (batch, num_heads, seq_len, head_dim); key, value: the same with num_key_value_heads
        query_states = self.q_norm(self.q_proj(hidden_states).view(head_shape)).transpose(1, 2)
        key_states = self.k_norm(self.k_proj(hidden_states).view(head_shape)).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        value_states = new_value_states = self.value_residual(value_states, first_value_states)
        value_states = self.value_embedding(value_states, hidden_states, value_embeds)
        key_states = self.key_offset(key_states, previous_tokens, past_key_values)

        if position_embeddings is not None:
            query_states, key_states = apply_rotary(query_states, key_states, *position_embeddings)
        if past_key_values is not None:
            # (batch, num_key_value_heads, key_len, head_dim): the keys and values in the cache and the new ones
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        # (batch, seq_len, num_heads, head_dim) -> (batch, seq_len, hidden_size)
        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1).contiguous())
        return attn_output, attn_weights, new_value_states


def skip_sources(config: GPT2ModernConfig) -> dict[int, int]:
    """Return for each layer that reads a U-Net skip connection the earlier layer whose output it reads."""
    depth = config.num_hidden_layers
    return {index: depth - 1 - index for index in range(depth - depth // 2, depth) if config.use_unet_skips}


class GPT2ModernDecoderLayer(GradientCheckpointingLayer):
    """Add the output of attention, then that of an MLP, to the hidden states; each has a norm of its own before it."""

    def __init__(self, config: GPT2ModernConfig, layer_idx: int):
        super().__init__()
        self.is_value_source = config.use_value_residual and layer_idx == 0
        self.unet_skip = WeightedSum() if layer_idx in skip_sources(config) else unchanged
        self.embedding_residual = EmbeddingResidual() if config.use_x0_residual else unchanged
        self.bigram_residual = WeightedSum((0.05,)) if config.bigram_vocab_size else unchanged

        self.input_layernorm = build_norm(config)
        self.self_attn = GPT2ModernAttention(config, layer_idx)
        self.post_attention_layernorm = build_norm(config)
        self.mlp = build_mlp(config)
        self.dropout = build_dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        skip_states: torch.Tensor | None = None,
        embedding_states: torch.Tensor | None = None,
        first_value_states: torch.Tensor | None = None,
        value_embeds: torch.Tensor | None = None,
        bigram_embeds: torch.Tensor | None = None,
        **attention_kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the new hidden_states; layer 0 of a model with value residuals also returns its attention values.

        hidden_states, skip_states, embedding_states, bigram_embeds: (batch, seq_len, hidden_size); first_value_states:
        (batch, num_key_value_heads, seq_len, head_dim); value_embeds: (batch, seq_len, num_key_value_heads * head_dim).
        Tensors with gradients must be passed as positional arguments, because reentrant gradient checkpointing tracks
        no others.
        """
        hidden_states = self.unet_skip(hidden_states, skip_states)
        hidden_states = self.embedding_residual(hidden_states, embedding_states)
        hidden_states = self.bigram_residual(hidden_states, bigram_embeds)
        attn_output, _, value_states = self.self_attn(
            self.input_layernorm(hidden_states), first_value_states, value_embeds, **attention_kwargs
        )
        hidden_states = hidden_states + self.dropout(attn_output)
        hidden_states = hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        return (hidden_states, value_states) if self.is_value_source else hidden_states


class GPT2ModernPreTrainedModel(PreTrainedModel):
    """Initialise the weights of all GPT2-Modern models, and declare to transformers which features they support."""

    config: GPT2ModernConfig
    config_class = GPT2ModernConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2ModernDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GPT2ModernDecoderLayer, "attentions": GPT2ModernAttention}

    def __init__(self, config: GPT2ModernConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # Saving copies the file of `self.__module__`, but FSDP2 replaces the class by one that torch defines.
        self.__module__ = type(self).__module__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs):
        """Load a model as transformers does. A model of a stock architecture (GPT-2, Llama, ...) is imported with the
        same logits; raises ValueError if it has no counterpart, or if a given `config` contradicts it."""
        name, place = pretrained_model_name_or_path, {key: kwargs[key] for key in PLACE if key in kwargs}
        model_type = None
        with contextlib.suppress(OSError):  # a folder without config.json: transformers says what is missing
            if name is not None and kwargs.get("gguf_file") is None:
                model_type = PreTrainedConfig.get_config_dict(name, **place)[0].get("model_type")
        if model_type in (None, cls.config_class.model_type):
            return super().from_pretrained(name, *args, **kwargs)
        conversion, config = load_conversion(name, model_type), kwargs.get("config") or name
        if isinstance(config, PreTrainedConfig) and not isinstance(config, cls.config_class):
            config = conversion.our_config(config.to_dict(), name)
        source = conversion.from_native(name, like=config, **place)
        weights = {
            key: weight for key, weight in source.state_dict().items() if key not in source.all_tied_weights_keys
        }
        changes = {"config": config, "state_dict": weights, "output_loading_info": True}
        model, report = super().from_pretrained(None, *args, **(kwargs | changes))
        model.name_or_path = model.config.name_or_path = str(name)
        model.generation_config = source.generation_config
        return (model, report) if kwargs.get("output_loading_info") else model

    @classmethod
    def maybe_distribute_model(cls, model: PreTrainedModel, distributed_config, *args, **kwargs) -> nn.Module:
        """Distribute the model over devices as transformers does, which splits even a model without a pipeline plan.
        Raises ValueError if pipeline stages or tensor parallelism are requested but would make its logits wrong.
        """
        if getattr(distributed_config, "tp_size", None) not in (None, 1) and not model.config.base_model_tp_plan:
            raise ValueError(
                f"tp_size={distributed_config.tp_size}, but it cannot split weights of heads; omit tp_size"
            )
        if getattr(distributed_config, "pp_size", None) not in (None, 1) and model.config.base_model_pp_plan is None:
            raise ValueError(
                f"pp_size={distributed_config.pp_size}, but a stage gets only the output of the stage before it, and a "
                "model with learned positions, an embedding norm, residuals across layers or token ids that layers "
                "read needs more; omit pp_size"
            )
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module as transformers does, except output projections, residual weights and token embeddings.

        transformers calls this only for modules with parameters or buffers of their own. Attention and MLP therefore
        only mark the projections that add to the residual stream, by the attribute `writes_residual`.
        """
        super()._init_weights(module)
        config = self.config
        if isinstance(module, ResidualMix):
            init.copy_(module.weight, torch.tensor(module.initial_weight))
        elif isinstance(module, Gate) or module is self.base_model.embed_bigrams:
            init.zeros_(module.weight)
        elif module in self.base_model.value_embeddings:
            init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.Embedding) and config.embedding_initializer_range is not None:
            if module is self.get_input_embeddings():
                init.normal_(module.weight, std=config.embedding_initializer_range)
        elif config.zero_init_projections and (
            getattr(module, "writes_residual", False) or module is self.get_output_embeddings()
        ):
            init.zeros_(module.weight)
        elif getattr(module, "writes_residual", False):
            init.normal_(module.weight, std=config.initializer_range / math.sqrt(2 * config.num_hidden_layers))

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize token and value embeddings and the head as transformers does, and return the former. Rows that
        `pad_to_multiple_of` adds are not token ids: `unpadded_vocab_size` does not count them."""
        real_ids = new_num_tokens or self.config.unpadded_vocab_size or self.config.vocab_size
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for table in self.base_model.value_embeddings:
            self._get_resized_embeddings(table, embeddings.num_embeddings, mean_resizing=mean_resizing)
        self.config.unpadded_vocab_size = real_ids if real_ids < self.config.vocab_size else None
        return embeddings


class GPT2ModernModel(GPT2ModernPreTrainedModel):
    """Compute hidden states from token ids with embeddings, decoder layers and a final norm; this model has no head."""

    _auto_class = "AutoModel"

    def __init__(self, config: GPT2ModernConfig):
        super().__init__(config)
        uses_rope = config.position_embedding_type == "rope"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None if uses_rope else nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.rotary_emb = GPT2ModernRotaryEmbedding(config) if uses_rope else None
        value_size, value_layers = config.num_key_value_heads * config.head_dim, config.value_embedding_layers or []
        num_tables, rows = config.num_value_embeddings or len(value_layers), config.bigram_vocab_size
        self.value_embeddings = nn.ModuleList(nn.Embedding(config.vocab_size, value_size) for _ in range(num_tables))
        self.value_tables = {layer: index % num_tables for index, layer in enumerate(value_layers)}
        self.embed_bigrams = nn.Embedding(rows, config.hidden_size) if rows else None
        self.smear = Smear(config.hidden_size) if config.use_smear else None
        self.backout = WeightedSum((-0.5,)) if config.use_backout else unchanged
        self.num_histories = 0  # what a cache keeps for the next token: the id and, where they are offset, keys
        if config.use_smear or config.use_key_offset or rows is not None:
            self.num_histories = 1 + config.use_key_offset * config.layer_types.count("full_attention")
        self.reads_token_ids = self.num_histories > 0 or num_tables > 0
        self.embedding_norm = build_norm(config) if config.use_embedding_norm else unchanged
        self.dropout = build_dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(GPT2ModernDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = build_norm(config)
        self.layer_types = tuple(config.layer_types)
        # Two thirds of the layers come before the output that is subtracted in the end.
        self.backout_source = max(0, 2 * config.num_hidden_layers // 3 - 1)
        self.skip_sources = skip_sources(config)
        self.read_later = {*self.skip_sources.values(), *({self.backout_source} if config.use_backout else ())}
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Return the final hidden states (batch, seq_len, hidden_size); arguments and output are those of LlamaModel.

        Raises ValueError unless exactly one of input_ids and inputs_embeds is given, and for a learned position that is
        not below max_position_embeddings; IndexError in a compiled graph.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("the model needs exactly one of input_ids and inputs_embeds")
        if input_ids is None and self.reads_token_ids:
            raise ValueError("value embeddings, smear, bigrams and key offsets need input_ids, not inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        batch_size, seq_len = inputs_embeds.shape[:2]
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        document_positions = position_ids
        if kwargs.get("cu_seq_lens_q") is not None:
            document_positions = positions_from_lengths(kwargs["cu_seq_lens_q"], batch_size, seq_len)
        if position_ids is None:
            positions = torch.arange(seq_len, device=inputs_embeds.device).unsqueeze(0) + past_length
            position_ids = positions if document_positions is None else document_positions
        attention_arguments = self._attention_arguments(
            inputs_embeds, attention_mask, past_key_values, past_length, document_positions
        )

        position_embeddings = previous = bigram_embeds = None
        hidden_states = inputs_embeds
        if self.num_histories:
            if kwargs.get("cache") is not None or getattr(attention_mask, "ndim", 2) != 2:  # of continuous batching
                raise ValueError(
                    "smear, bigrams and the key offset need the previous token, which neither continuous batching nor "
                    "a mask of four dimensions gives; use generate, and a mask of two dimensions"
                )
            cache = past_key_values
            history = None if cache is None else add_histories(cache, len(self.layers), self.num_histories)
            positions = position_ids if document_positions is None else document_positions
            previous = PreviousTokens.find(input_ids, positions, attention_mask, history)
        if self.smear is not None:
            previous_embeds = self.embed_tokens(previous.ids.clamp(min=0))
            hidden_states = self.smear(hidden_states, previous_embeds.masked_fill(previous.ids[..., None] < 0, 0))
        if self.embed_bigrams is not None:
            bigram_embeds = self.embed_bigrams(bigram_rows(input_ids, previous.ids, self.config.bigram_vocab_size))
        if self.embed_positions is not None:
            longest = self.embed_positions.num_embeddings
            # To read positions, the CPU waits for the GPU: there only of rows too long for a single document.
            is_read = (position_ids.device.type == "cpu" or seq_len > longest) and not is_tracing(position_ids)
            if is_read and (last := int(position_ids.max())) >= longest:
                raise ValueError(f"position {last} is not below max_position_embeddings={longest}; shorten the input")
            hidden_states = hidden_states + self.embed_positions(position_ids)
        if self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        embedding_states = hidden_states = self.dropout(self.embedding_norm(hidden_states))

        first_value_states = None
        outputs: dict[int, torch.Tensor] = {}  # of the layers that a later layer reads
        # The configuration may name fewer layers than there are: generate(assistant_early_exit=...).
        # A slice of self.layers, as in Llama, would build a new ModuleList in every forward: 50 us for 12 layers.
        for index, layer in zip(range(self.config.num_hidden_layers), self.layers, strict=False):
            table = self.value_tables.get(index)
            hidden_states = layer(
                hidden_states,
                outputs.get(self.skip_sources.get(index)),
                embedding_states,
                first_value_states,
                None if table is None else self.value_embeddings[table](input_ids),
                bigram_embeds,
                previous_tokens=previous,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **(kwargs | attention_arguments[self.layer_types[index]]),
            )
            if isinstance(hidden_states, tuple):
                hidden_states, first_value_states = hidden_states
            if index in self.read_later:
                outputs[index] = hidden_states

        # A draft that ends after fewer layers (assistant_early_exit) has no earlier output to subtract but its own.
        hidden_states = self.backout(hidden_states, outputs.get(self.backout_source, hidden_states))
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def _attention_arguments(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        past_key_values: Cache | None,
        past_length: int | torch.Tensor,
        document_positions: torch.Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """Return, for each type of layer, the keyword arguments that restrict its attention to the permitted tokens: a
        mask, or for flash attention, which takes no mask, the lengths of the documents in the rows.

        document_positions: (batch, seq_len), restarting at each document; None if the caller passed no positions. If
        transformers makes no masks for the attention implementation, as in vLLM, this must separate documents itself. A
        traced graph cannot compute lengths: with flash attention the caller must then pass `cu_seq_lens_*`.
        """
        if isinstance(attention_mask, dict):  # generate() prepares the masks itself for a cache of fixed size
            return {attention_type: {"attention_mask": mask} for attention_type, mask in attention_mask.items()}
        batch_size, seq_len = inputs_embeds.shape[:2]
        makes_masks = self.config._attn_implementation in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
        documents = None
        if document_positions is not None and makes_masks and (attention_mask is None or attention_mask.ndim == 2):
            documents = PackedDocuments.find(document_positions.expand(batch_size, -1), past_length, attention_mask)

        layer_indices = {attention_type: index for index, attention_type in enumerate(self.layer_types)}
        if documents is not None and is_flash_attention_requested(self.config) and not is_tracing():
            return {
                attention_type: documents.flash_arguments(
                    *(past_key_values.get_mask_sizes(seq_len, index) if past_key_values is not None else (seq_len, 0))
                )
                for attention_type, index in layer_indices.items()
            }
        return {
            attention_type: {
                "attention_mask": MASKS[attention_type](
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    and_mask_function=None if documents is None else documents.mask_function,
                )
            }
            for attention_type in layer_indices
        }


@dataclass
class GPT2ModernCausalLMOutput(CausalLMOutputWithPast):
    """Hold the fields of transformers' CausalLMOutputWithPast and `auxiliary_loss`, the part of `loss` that is z-loss
    (a penalty on large logits) or loss of later tokens, without a gradient; None if there is no such part."""

    auxiliary_loss: torch.FloatTensor | None = None


class GPT2ModernForCausalLM(GPT2ModernPreTrainedModel, GenerationMixin):
    """Predict the next token with GPT2ModernModel and a linear head, and compute the loss if labels are given."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GPT2ModernConfig):
        super().__init__(config)
        self.model = GPT2ModernModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.final_logit_softcapping = config.final_logit_softcapping
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        z_loss_coefficient: float = 0.0,
        **kwargs,
    ) -> GPT2ModernCausalLMOutput:
        """Return the logits (batch, seq_len, vocab_size) and, with labels, the fp32 loss in nats per token. Columns of
        the logits that are not token ids hold the minimum of the dtype, so that their probability is 0.

        labels: (batch, seq_len), not shifted, as everywhere in transformers; -100 is ignored. `num_items_in_batch`:
            divisor of the summed loss; None means the number of labels.
        skip_logits: if labels are given, compute the loss without holding all logits in memory, and return no logits.
        z_loss_coefficient: factor of the mean of log(sum(exp(logits)))^2, which is added to the loss.
        kwargs: may contain `shift_labels`, labels that are already shifted. It is not a parameter, because Trainer
            evaluates without a loss unless each parameter with "label" in its name is in the batch. With skip_logits
            also `later_labels` (batch, seq_len, later), the tokens after shift_labels, and `later_weights` (later,),
            factors of their losses, which are added.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        later_labels, later_weights = kwargs.pop("later_labels", None), kwargs.pop("later_weights", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        if labels is not None and shift_labels is None:
            shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=-100)  # (batch, seq_len)

        logits = loss = auxiliary_loss = None
        if skip_logits and shift_labels is not None and self._head_is_a_matrix():
            loss, auxiliary_loss = linear_cross_entropy_and_z_loss(
                hidden_states.flatten(0, -2),  # (batch * seq_len, hidden_size)
                self.lm_head.weight,
                shift_labels.flatten().to(hidden_states.device),
                z_loss_coefficient=z_loss_coefficient,
                vocab_size=self.config.unpadded_vocab_size,
                softcap=self.final_logit_softcapping,
                num_items_in_batch=num_items_in_batch,
                later_labels=later_labels,
                later_weights=later_weights,
            )
        elif later_labels is not None:
            raise ValueError("later_labels need shift_labels, skip_logits=True and a head that is a plain matrix")
        else:
            # (batch, seq_len, vocab_size)
            logits = soft_cap(self.lm_head(hidden_states), self.final_logit_softcapping)
            if self.config.unpadded_vocab_size is not None:
                logits[..., self.config.unpadded_vocab_size :] = torch.finfo(logits.dtype).min
                if num_items_in_batch is not None and shift_labels is None:
                    logger.warning_once("label_smoothing_factor > 0 makes the loss of a padded vocabulary infinite")
            if shift_labels is not None:
                logits_of_ids = logits[..., : self.config.unpadded_vocab_size]  # a label beyond them is an error
                loss = self.loss_function(
                    logits=logits_of_ids,
                    labels=labels,
                    vocab_size=logits_of_ids.shape[-1],
                    shift_labels=shift_labels.contiguous(),
                    num_items_in_batch=num_items_in_batch,
                )
                if z_loss_coefficient:
                    auxiliary_loss = logits_z_loss(
                        logits_of_ids,
                        shift_labels.to(logits.device),
                        z_loss_coefficient=z_loss_coefficient,
                        num_items_in_batch=num_items_in_batch,
                    )
                    loss, auxiliary_loss = loss + auxiliary_loss, auxiliary_loss.detach()

        return GPT2ModernCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            auxiliary_loss=auxiliary_loss if z_loss_coefficient or later_labels is not None else None,
        )

    def _head_is_a_matrix(self) -> bool:
        """Return whether the head is a plain unsharded matrix: False with LoRA, quantisation or tensor parallelism."""
        weight = self.lm_head.weight if type(self.lm_head) is nn.Linear else None
        return type(weight) in (torch.Tensor, nn.Parameter) and weight.shape[0] == self.config.vocab_size


# Label smoothing of transformers' Trainer shifts labels only for the classes in this list.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(GPT2ModernConfig.model_type, GPT2ModernForCausalLM.__name__)


class LinearHead:
    """Build the model and a linear head, in place of the `__init__` of transformers' generic heads: that one builds the
    model by AutoModel, which needs trust_remote_code."""

    accepts_loss_kwargs = False  # the loss is always a mean over the batch; num_items_in_batch is ignored

    def __init__(self, config: GPT2ModernConfig):
        GPT2ModernPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = GPT2ModernModel(config)
        self._add_head(config)
        self.post_init()


class GPT2ModernForSequenceClassification(LinearHead, GenericForSequenceClassification, GPT2ModernPreTrainedModel):
    """Predict one label for each sequence, from the hidden state of its last token that is not padding."""

    _auto_class = "AutoModelForSequenceClassification"

    def _add_head(self, config: GPT2ModernConfig) -> None:
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)


class GPT2ModernForTokenClassification(LinearHead, GenericForTokenClassification, GPT2ModernPreTrainedModel):
    """Predict one label for each token, from its hidden state."""

    _auto_class = "AutoModelForTokenClassification"

    def _add_head(self, config: GPT2ModernConfig) -> None:
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)


class GPT2ModernForQuestionAnswering(LinearHead, GenericForQuestionAnswering, GPT2ModernPreTrainedModel):
    """Predict for each token whether an answer starts or ends with it, from its hidden state."""

    _auto_class = "AutoModelForQuestionAnswering"

    def _add_head(self, config: GPT2ModernConfig) -> None:
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
