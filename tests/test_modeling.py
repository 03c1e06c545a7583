"""The whole model: what it computes, how it is initialised, and what transformers may do with it."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_gpt2modern import (
    GPT2ModernConfig,
    GPT2ModernForCausalLM,
    GPT2ModernForSequenceClassification,
    GPT2ModernForTokenClassification,
)
from modeling_gpt2modern.modeling_gpt2modern import eager_attention_forward
from tests.support.models import FLAG_SETS, SPEEDRUN_RESIDUALS, TINY, random_ids, tiny_config, tiny_model

EVERY_FLAG_SET = pytest.mark.parametrize("flag_set", FLAG_SETS)


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def logits_of(model: nn.Module, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids, **kwargs).logits


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters()}


# What it computes


@EVERY_FLAG_SET
def test_later_tokens_do_not_change_earlier_logits(flag_set):
    model, input_ids = tiny_model(flag_set), random_ids(2, 12)
    changed = input_ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 90
    before, after = logits_of(model, input_ids), logits_of(model, changed)
    close(after[:, :7], before[:, :7])
    assert (after[:, 7:] - before[:, 7:]).abs().max() > 1e-2


def speedrun_by_hand(
    config: GPT2ModernConfig, weights: dict[str, torch.Tensor], input_ids: torch.Tensor
) -> torch.Tensor:
    """Compute the logits of the speedrun architecture for one row in float64, written from its description."""
    seq_len, depth = len(input_ids), config.num_hidden_layers

    def norm(x):
        return x * (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).rsqrt()

    def rotate(x):
        half = config.head_dim // 2
        angles = torch.arange(seq_len)[:, None] * 10000.0 ** (-torch.arange(half) / half).double()
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin), -1)

    x = x0 = norm(weights["model.embed_tokens.weight"][input_ids])
    outputs, first_values = [], None
    causal = torch.ones(seq_len, seq_len).tril().bool()
    for index in range(depth):
        prefix = f"model.layers.{index}."
        if index >= depth / 2:
            x = x + weights[f"{prefix}unet_skip.weight"] * outputs[depth - 1 - index]
        a, b = weights[f"{prefix}embedding_residual.weight"]
        x = a * x + b * x0
        q, k, v = (
            (norm(x) @ weights[f"{prefix}self_attn.{name}_proj.weight"].T).view(seq_len, -1, config.head_dim)
            for name in "qkv"
        )
        if index == 0:
            first_values = v
        else:
            mix = weights[f"{prefix}self_attn.value_residual.weight"]
            v = (1 - mix) * v + mix * first_values
        scores = torch.einsum("qhd,khd->hqk", rotate(norm(q)), rotate(norm(k))) / math.sqrt(config.head_dim)
        attention = scores.masked_fill(~causal, -math.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", attention, v).reshape(seq_len, -1)
        x = x + mixed @ weights[f"{prefix}self_attn.o_proj.weight"].T
        up = norm(x) @ weights[f"{prefix}mlp.up_proj.weight"].T
        x = x + up.clamp(min=0) ** 2 @ weights[f"{prefix}mlp.down_proj.weight"].T
        outputs.append(x)
    logits = norm(x) @ weights["lm_head.weight"].T
    return (30 * torch.tanh(logits / 30))[:, : config.unpadded_vocab_size]


def test_speedrun_is_its_description():
    model, input_ids = tiny_model("speedrun", num_hidden_layers=4), random_ids(1, 12)
    weights = {name: weight.detach().double().requires_grad_() for name, weight in model.named_parameters()}
    expected = speedrun_by_hand(model.config, weights, input_ids[0])
    actual = model(input_ids).logits[0, :, : model.config.unpadded_vocab_size]
    close(actual.double(), expected, atol=1e-4)

    F.cross_entropy(expected, input_ids[0].roll(-1)).backward()
    F.cross_entropy(actual, input_ids[0].roll(-1)).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad.double(), weights[name].grad, atol=1e-5, rtol=1e-4)


def frontier_by_hand(
    config: GPT2ModernConfig, weights: dict[str, torch.Tensor], input_ids: torch.Tensor
) -> torch.Tensor:
    """Compute the logits of the flag set "frontier_sliding_mixed" for one row in float64, from its description."""
    seq_len, depth, size = len(input_ids), config.num_hidden_layers, config.head_dim
    rotated, groups = size // 2, config.num_attention_heads // config.num_key_value_heads

    def norm(x):
        return x * (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).rsqrt()

    def gate(x, name):
        return 1 / (1 + torch.exp(-(x[..., :12] @ weights[f"{name}.weight"].T)))

    def rotate(x):
        half = rotated // 2
        angles = torch.arange(seq_len)[:, None] * 1024.0 ** (-torch.arange(half) / half).double()
        cos, sin, a, b = angles.cos()[:, None], angles.sin()[:, None], x[..., :half], x[..., half:rotated]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., rotated:]), -1)

    embeds = weights["model.embed_tokens.weight"][input_ids]
    previous = torch.cat((torch.zeros(1, config.hidden_size), embeds[:-1]))
    x = x0 = norm(embeds + weights["model.smear.weight"] * gate(embeds, "model.smear.gate") * previous)
    rows = [config.bigram_vocab_size - 1]
    for before, token in zip(input_ids.tolist(), input_ids.tolist()[1:], strict=False):
        rows.append(((36313 * token) ^ (27191 * before)) % (config.bigram_vocab_size - 1))
    bigrams, outputs, first_values = weights["model.embed_bigrams.weight"][rows], [], None
    distance = torch.arange(seq_len)[:, None] - torch.arange(seq_len)
    for index in range(depth):
        layer = f"model.layers.{index}."
        if index >= depth // 2:
            x = x + weights[f"{layer}unet_skip.weight"] * outputs[depth - 1 - index]
        a, b = weights[f"{layer}embedding_residual.weight"]
        x = a * x + b * x0 + weights[f"{layer}bigram_residual.weight"] * bigrams
        n, attn = norm(x), f"{layer}self_attn."
        q, k, v = ((n @ weights[f"{attn}{name}_proj.weight"].T).view(seq_len, -1, size) for name in "qkv")
        first_values = v if index == 0 else first_values
        mix = weights.get(f"{attn}value_residual.weight", 0)
        v = (1 - mix) * v + mix * first_values
        if index in config.value_embedding_layers:
            table = config.value_embedding_layers.index(index) % config.num_value_embeddings
            e = weights[f"model.value_embeddings.{table}.weight"][input_ids].view(seq_len, -1, size)
            v = v + 2 * gate(n, f"{attn}value_embedding")[..., None] * e
        k, is_full = norm(k), config.layer_types[index] == "full_attention"
        if is_full:
            k = torch.cat((k[..., :rotated], torch.cat((k[:1], k[:-1]))[..., rotated:]), -1)
        k, v = (each.repeat_interleave(groups, 1) for each in (rotate(k), v))
        scores = 0.2 * torch.einsum("qhd,khd->hqk", rotate(norm(q)), k)
        seen = (distance >= 0) & (distance < (seq_len if is_full else config.sliding_window))
        y = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)
        x = x + y.reshape(seq_len, -1) @ weights[f"{attn}o_proj.weight"].T
        up = norm(x) @ weights[f"{layer}mlp.up_proj.weight"].T
        x = x + up.clamp(min=0) ** 2 @ weights[f"{layer}mlp.down_proj.weight"].T
        outputs.append(x)
    x = x + weights["model.backout.weight"] * outputs[2 * depth // 3 - 1]
    logits = norm(x) @ weights["lm_head.weight"].T
    return (30 * torch.tanh(logits / 30))[:, : config.unpadded_vocab_size]


def test_frontier_is_its_description():
    """With half-truncated RoPE, a fixed scale of attention, and short and long windows."""
    layers = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "attention_scale": 0.2,
    }
    layers |= {"value_embedding_layers": [0, 1, 3], "num_value_embeddings": 2}
    model, input_ids = tiny_model("frontier_sliding_mixed", **layers), random_ids(1, 12)
    weights = {name: weight.detach().double().requires_grad_() for name, weight in model.named_parameters()}
    expected = frontier_by_hand(model.config, weights, input_ids[0])
    actual = model(input_ids, use_cache=False).logits[0, :, : model.config.unpadded_vocab_size]
    close(actual.double(), expected, atol=1e-4)

    F.cross_entropy(expected, input_ids[0].roll(-1)).backward()
    F.cross_entropy(actual, input_ids[0].roll(-1)).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad.double(), weights[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flag", ["use_unet_skips", "use_x0_residual", "use_value_residual"])
def test_residual_mix_of_weight_zero_is_the_model_without(flag):
    with_mix, without = tiny_model(**{flag: True}), tiny_model()
    with torch.no_grad():
        for name, weight in with_mix.named_parameters():
            if "residual" in name or "skip" in name:
                weight.copy_(torch.tensor([1.0, 0.0] if "embedding" in name else [0.0]))
    without.load_state_dict(with_mix.state_dict(), strict=False)
    close(logits_of(with_mix, random_ids(1, 8)), logits_of(without, random_ids(1, 8)))


NEUTRAL = [
    {"use_smear": True},
    {"bigram_vocab_size": 50},
]


@pytest.mark.parametrize("axis", NEUTRAL)
def test_axis_that_starts_neutral_is_the_model_without_at_first(axis):
    torch.manual_seed(0)
    changed, without = GPT2ModernForCausalLM(tiny_config(**axis)).eval(), GPT2ModernForCausalLM(tiny_config()).eval()
    without.load_state_dict(changed.state_dict(), strict=False)
    close(logits_of(changed, random_ids(1, 8)), logits_of(without, random_ids(1, 8)))


# One entry per field of the configuration: the base and the change that must matter.
AXES = {
    "position_embedding_type": ({}, {"position_embedding_type": "learned"}),
    "rope_parameters": ({}, {"rope_parameters": {"rope_theta": 100.0}}),
    "partial_rotary_factor": ({}, {"partial_rotary_factor": 0.5}),
    "norm_type": ({}, {"norm_type": "layernorm"}),
    "norm_affine": ({}, {"norm_affine": False}),
    "norm_eps": ({}, {"norm_eps": 0.1}),
    "mlp_type": ({"mlp_type": "gelu"}, {"mlp_type": "gelu_new"}),
    "mlp_bias": ({}, {"mlp_bias": True}),
    "attention_bias": ({}, {"attention_bias": True}),
    "attention_scale": ({}, {"attention_scale": 0.12}),
    "use_qk_norm": ({"qk_norm_affine": False}, {"qk_norm_affine": False, "use_qk_norm": True}),
    "qk_norm_affine": ({"use_qk_norm": True}, {"use_qk_norm": True, "qk_norm_affine": False}),
    "sliding_window": ({"sliding_window": 4}, {"sliding_window": 6}),
    "layer_types": (
        {"sliding_window": 4},
        {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "use_unet_skips": ({}, {"use_unet_skips": True}),
    "use_value_residual": ({}, {"use_value_residual": True}),
    "use_x0_residual": ({}, {"use_x0_residual": True}),
    "use_embedding_norm": ({"norm_affine": False}, {"norm_affine": False, "use_embedding_norm": True}),
    "tie_word_embeddings": ({}, {"tie_word_embeddings": False}),
    "final_logit_softcapping": ({}, {"final_logit_softcapping": 2.0}),
    "value_embedding_layers": ({}, {"value_embedding_layers": [0, 1]}),
    "num_value_embeddings": (
        {"value_embedding_layers": [0, 1]},
        {"value_embedding_layers": [0, 1], "num_value_embeddings": 1},
    ),
    "use_smear": ({}, {"use_smear": True}),
    "bigram_vocab_size": ({}, {"bigram_vocab_size": 50}),
    "use_key_offset": ({"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.5, "use_key_offset": True}),
    "use_backout": ({}, {"use_backout": True}),
    "unpadded_vocab_size": ({}, {"unpadded_vocab_size": 90}),
    "embedding_dropout": ({}, {"embedding_dropout": 0.5}),
    "attention_dropout": ({}, {"attention_dropout": 0.5}),
    "hidden_dropout": ({}, {"hidden_dropout": 0.5}),
    "intermediate_size": ({}, {"intermediate_size": 48}),
    "num_key_value_heads": ({}, {"num_key_value_heads": 2}),
    "head_dim": ({}, {"head_dim": 16}),
    "initializer_range": ({}, {"initializer_range": 0.1}),
    "embedding_initializer_range": ({}, {"embedding_initializer_range": 1.0}),
    "zero_init_projections": ({}, {"zero_init_projections": True}),
}


@pytest.mark.parametrize("axis", AXES)
def test_axis_changes_logits_or_weights(axis):
    torch.manual_seed(0)
    base, changed = (GPT2ModernForCausalLM(tiny_config(**flags)) for flags in AXES[axis])
    shapes, changed_shapes = ({name: weight.shape for name, weight in m.named_parameters()} for m in (base, changed))
    if "init" in axis:
        assert changed.model.embed_tokens.weight.std() / base.model.embed_tokens.weight.std() < 0.6 or any(
            abs(changed.state_dict()[name].std() / weight.std() - 1) > 0.4 for name, weight in base.state_dict().items()
        )
    elif shapes == changed_shapes:
        changed.load_state_dict(base.state_dict())
        before, after = logits_of(base, random_ids(1, 12)), logits_of(changed, random_ids(1, 12))
        assert before.shape != after.shape or (after - before).abs().max() > 1e-4


def test_every_field_is_an_axis():
    fixed = set(TINY) | {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
    assert set(AXES) | fixed == set(GPT2ModernConfig.__annotations__) | {"initializer_range"}


# How it starts


@pytest.mark.parametrize("preset", ["gpt2", "modern", "speedrun"])
def test_initial_standard_deviation_of_every_kind_of_weight(preset):
    config = GPT2ModernConfig.from_preset(preset, hidden_size=256, num_hidden_layers=4, vocab_size=2048)
    torch.manual_seed(0)
    model = GPT2ModernForCausalLM(config)
    base = config.initializer_range
    residual = 0.0 if preset == "speedrun" else base / math.sqrt(2 * 4)
    expected = {
        "embed_tokens.weight": 1.0 if preset == "speedrun" else base,
        "embed_positions.weight": base,
        "o_proj.weight": residual,
        "down_proj.weight": residual,
        "lm_head.weight": residual,
        **{f"{name}_proj.weight": base for name in ("q", "k", "v", "gate", "up")},
    }
    seen = set()
    for name, weight in model.named_parameters():
        kind = next((kind for kind in expected if name.endswith(kind)), None)
        if kind is not None:
            seen.add(kind)
            assert weight.std().item() == pytest.approx(expected[kind], rel=0.1), name
            assert abs(weight.mean().item()) <= 0.05 * expected[kind], name
        elif name.endswith("bias"):
            assert not weight.any(), name
        elif name.endswith("norm.weight"):
            assert weight.eq(1).all(), name
        else:
            initial = {"unet_skip": [1.0], "embedding_residual": [1.0, 0.0], "value_residual": [0.5]}
            assert weight.tolist() == initial[name.split(".")[-2]], name
    absent = {
        "gpt2": {"gate_proj.weight", "lm_head.weight"},
        "modern": {"embed_positions.weight", "lm_head.weight"},
        "speedrun": {"embed_positions.weight", "gate_proj.weight"},
    }
    assert seen == set(expected) - absent[preset]


def test_first_loss_of_gpt2_is_that_of_guessing():
    torch.manual_seed(0)
    model = GPT2ModernForCausalLM(GPT2ModernConfig.from_preset("gpt2")).eval()
    input_ids = torch.randint(0, 50257, (1, 64))
    with torch.no_grad():
        loss = model(input_ids, labels=input_ids).loss.item()
    assert loss == pytest.approx(math.log(50257), rel=0.02)


def test_first_loss_of_speedrun_is_that_of_guessing():
    """The head is zero at the start, so that the loss is ln(50257); with the padded rows it would be ln(50304)."""
    model = GPT2ModernForCausalLM(GPT2ModernConfig.from_preset("speedrun", hidden_size=128, num_hidden_layers=2))
    input_ids = torch.randint(0, 50257, (1, 16))
    for skip_logits in (False, True):
        loss = model(input_ids, labels=input_ids, skip_logits=skip_logits).loss.item()
        assert loss == pytest.approx(math.log(50257), abs=1e-4)


def test_tied_head_is_the_embedding():
    model = tiny_model("modern")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = tiny_model("modern", tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


# Saving and loading


@EVERY_FLAG_SET
def test_loading_restores_every_weight_and_buffer(flag_set, tmp_path):
    """from_pretrained builds on the meta device, and leaves random memory in what it does not initialise."""
    model = tiny_model(flag_set)
    model.save_pretrained(tmp_path)
    loaded = GPT2ModernForCausalLM.from_pretrained(tmp_path)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert tensors.keys() == (dict(loaded.named_parameters()) | dict(loaded.named_buffers())).keys()
    for name, tensor in (dict(loaded.named_parameters()) | dict(loaded.named_buffers())).items():
        assert torch.equal(tensor, tensors[name]), name


def test_weights_missing_from_a_checkpoint_start_as_new_ones_do(tmp_path):
    model = tiny_model("speedrun")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    is_mix = {name: "residual" in name or "skip" in name for name in weights}
    kept = {name: weight for name, weight in weights.items() if not is_mix[name] and "o_proj" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = GPT2ModernForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded["model.layers.1.unet_skip.weight"].tolist() == [1.0]
    assert loaded["model.layers.1.embedding_residual.weight"].tolist() == [1.0, 0.0]
    assert loaded["model.layers.1.self_attn.value_residual.weight"].tolist() == [0.5]
    assert loaded["model.layers.1.self_attn.o_proj.weight"].std().item() == pytest.approx(0.2 / math.sqrt(4), rel=0.1)
    for name, weight in kept.items():
        assert torch.equal(loaded[name], weight), name


INITIAL = {  # the end of a name, and all values with which the weights start
    "smear.weight": [0.0],
    "backout.weight": [-0.5],
    "unet_skip.weight": [1.0],
    "bigram_residual.weight": [0.05],
    "embedding_residual.weight": [1.0, 0.0],
    "value_residual.weight": [0.5],
    **dict.fromkeys(("gate.weight", "value_embedding.weight", "embed_bigrams.weight"), None),
}


@pytest.mark.parametrize("way", ["built", "loaded without them"])
def test_axes_start_as_documented(way, tmp_path):
    """Where no value is given all are 0, so that gates are 1 and bigrams nothing; value embeddings deviate by 0.01."""
    model = GPT2ModernForCausalLM(tiny_config("frontier_sliding_mixed"))
    if way != "built":
        tiny_model("frontier_sliding_mixed").save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        new = (*INITIAL, "value_embeddings.0.weight")
        kept = {name: weight for name, weight in weights.items() if not name.endswith(new)}
        assert len(weights) - len(kept) == 12
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model = GPT2ModernForCausalLM.from_pretrained(tmp_path)
    seen = set()
    for name, weight in model.named_parameters():
        if kind := next((kind for kind in INITIAL if name.endswith(kind)), None):
            seen.add(kind)
            close(weight, torch.zeros_like(weight) if INITIAL[kind] is None else torch.tensor(INITIAL[kind]), atol=0)
    assert seen == set(INITIAL)
    assert model.model.value_embeddings[0].weight.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flag_set", ["gpt2", "modern", "speedrun", "frontier_sliding_mixed"])
def test_half_precision_stays_near_fp32_and_its_loss_is_fp32(flag_set, dtype, tmp_path):
    model, input_ids = tiny_model(flag_set), random_ids(2, 12)
    model.save_pretrained(tmp_path)
    half = GPT2ModernForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = model(input_ids, labels=input_ids)
    for skip_logits in (False, True):
        loss = half(input_ids, labels=input_ids, skip_logits=skip_logits).loss
        assert loss.dtype == torch.float32
        close(loss, expected.loss, atol=0.05)


# The loss


@pytest.mark.parametrize("flag_set", ["modern", "speedrun", "padded_vocabulary"])
def test_loss_is_that_of_the_next_token(flag_set):
    model, input_ids = tiny_model(flag_set), random_ids(2, 12)
    outputs = model(input_ids, labels=input_ids)
    expected = F.cross_entropy(outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1]), input_ids[:, 1:].flatten())
    close(outputs.loss, expected, atol=1e-6)


@pytest.mark.parametrize("flag_set", ["modern", "speedrun", "padded_vocabulary"])
@pytest.mark.parametrize("num_items_in_batch", [None, 7])
def test_loss_without_logits_is_the_loss(flag_set, num_items_in_batch):
    model, input_ids = tiny_model(flag_set), random_ids(2, 12)
    labels = input_ids.clone()
    labels[:, :3] = -100
    with_logits = model(input_ids, labels=labels, num_items_in_batch=num_items_in_batch)
    with_logits.loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients_of(model).items()}
    model.zero_grad()
    without = model(input_ids, labels=labels, num_items_in_batch=num_items_in_batch, skip_logits=True)
    without.loss.backward()
    assert without.logits is None and with_logits.logits is not None
    close(without.loss, with_logits.loss, atol=2e-6)
    torch.testing.assert_close(gradients_of(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_shifted_labels_are_taken_as_they_are(skip_logits):
    model, input_ids = tiny_model("modern"), random_ids(2, 12)
    shift_labels = F.pad(input_ids[:, 1:], (0, 1), value=-100)
    shifted = model(input_ids, labels=input_ids, shift_labels=shift_labels, skip_logits=skip_logits).loss
    close(shifted, model(input_ids, labels=input_ids).loss, atol=1e-6)
    alone = model(input_ids, shift_labels=torch.roll(input_ids, 3, 1), skip_logits=skip_logits).loss
    assert (alone - shifted).abs() > 1e-3


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("flag_set", ["modern", "padded_vocabulary"])
def test_shifted_labels_may_be_a_view(flag_set, skip_logits):
    """Batches of the trainer have one token more than the model gets: the labels are the rest of each row."""
    model, batch = tiny_model(flag_set), random_ids(2, 12)
    arguments = {"skip_logits": skip_logits, "z_loss_coefficient": 1e-3}
    loss = model(batch[:, :-1], shift_labels=batch[:, 1:], **arguments).loss
    close(loss, model(batch, labels=batch, **arguments).loss, atol=1e-6)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_loss_is_divided_by_num_items_in_batch(skip_logits):
    model, input_ids = tiny_model("modern"), random_ids(2, 12)
    mean = model(input_ids, labels=input_ids, skip_logits=skip_logits).loss
    total = model(input_ids, labels=input_ids, num_items_in_batch=torch.tensor(1), skip_logits=skip_logits).loss
    close(total, mean * 22, atol=1e-4)


def test_logits_are_returned_unless_labels_are_given():
    assert tiny_model("modern")(random_ids(1, 4), skip_logits=True).logits is not None


def test_loss_without_logits_goes_through_a_head_that_was_replaced():
    """LoRA and quantisers replace the head by a module that computes more than a product with its weight."""

    class Doubled(nn.Linear):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    model, input_ids = tiny_model("modern", tie_word_embeddings=False), random_ids(1, 8)
    head = Doubled(32, 96, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    expected = model(input_ids, labels=input_ids).loss
    close(model(input_ids, labels=input_ids, skip_logits=True).loss, expected)


def test_trainer_smooths_labels_of_the_next_token(tmp_path):
    """Trainer shifts labels for known class names only."""
    model, input_ids = tiny_model("modern"), random_ids(2, 12)
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": input_ids, "labels": input_ids})
    logits = logits_of(model, input_ids)[:, :-1].flatten(0, 1)
    close(loss, F.cross_entropy(logits, input_ids[:, 1:].flatten(), label_smoothing=0.1))


@pytest.mark.parametrize("flag_set", ["modern", "padded_vocabulary"])
def test_padded_vocabulary_warns_of_smoothed_labels(flag_set, tmp_path):
    """Trainer averages the logarithms of all probabilities; its record shows the infinite loss as 0."""
    logging.warning_once.cache_clear()  # another test may have caused the warning
    model, input_ids = tiny_model(flag_set), random_ids(2, 12)
    trainer = Trainer(model, TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[]))
    with CaptureLogger(logging.get_logger("modeling_gpt2modern.modeling_gpt2modern")) as captured:
        loss = trainer.compute_loss(model, {"input_ids": input_ids, "labels": input_ids}, num_items_in_batch=22)
    assert loss.isinf() == ("label_smoothing_factor > 0" in captured.out) == (flag_set == "padded_vocabulary")
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients_of(model).values())


# Padded vocabulary


def unpadded_twin(model: GPT2ModernForCausalLM) -> GPT2ModernForCausalLM:
    config = tiny_config("padded_vocabulary", vocab_size=90, unpadded_vocab_size=None, tie_word_embeddings=False)
    twin = GPT2ModernForCausalLM(config).eval()
    twin.load_state_dict(
        {
            name: weight[:90] if name in ("model.embed_tokens.weight", "lm_head.weight") else weight
            for name, weight in model.state_dict().items()
        }
    )
    return twin


@pytest.mark.parametrize("skip_logits", [False, True])
def test_padded_vocabulary_changes_nothing(skip_logits):
    model, input_ids = tiny_model("padded_vocabulary", tie_word_embeddings=False), random_ids(2, 12)
    twin = unpadded_twin(model)
    outputs = model(input_ids, labels=input_ids, skip_logits=skip_logits)
    expected = twin(input_ids, labels=input_ids)
    outputs.loss.backward()
    expected.loss.backward()
    close(outputs.loss, expected.loss, atol=1e-6)
    close(model.lm_head.weight.grad[:90], twin.lm_head.weight.grad)
    close(model.model.layers[0].mlp.up_proj.weight.grad, twin.model.layers[0].mlp.up_proj.weight.grad)
    assert not model.lm_head.weight.grad[90:].any()
    if not skip_logits:
        close(outputs.logits[..., :90], expected.logits)


class LargeTensors(TorchDispatchMode):
    """Collect the storages, of at least `size` bytes, that operators running under this mode allocate."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.storages = size, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        storages = [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.storages |= {each.data_ptr(): each for each in storages if each.nbytes() >= self.size}
        return result


@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flag_set", ["padded_vocabulary", "speedrun"])
def test_logits_have_a_column_for_each_row_of_the_head(flag_set, dtype, kept):
    """Those that are not token ids hold the dtype's minimum: no probability, no NaN, no gradient."""
    model = tiny_model(flag_set, tie_word_embeddings=False, hidden_size=16).to(dtype)
    with torch.no_grad():
        model.lm_head.weight[90:] = 100  # would be the largest logits by far
    with LargeTensors(2 * 12 * 96 * dtype.itemsize) as large:
        logits = model(random_ids(2, 12), logits_to_keep=kept).logits
    assert logits.shape == (2, kept or 12, model.config.vocab_size)
    assert logits.dtype == dtype and logits[..., 90:].eq(torch.finfo(dtype).min).all()
    assert logits[..., :90].abs().max() < 1000
    if not kept and flag_set == "padded_vocabulary":
        assert len(large.storages) == 1, "a copy of all logits is made"

    probabilities = logits.softmax(-1)
    close(probabilities[..., 90:], torch.zeros_like(probabilities[..., 90:]), atol=0)
    close(probabilities[..., :90], logits[..., :90].softmax(-1))
    assert logits.log_softmax(-1).logsumexp(-1).isfinite().all()
    (logits.float().softmax(-1)[..., 3].log().sum() + logits.float().clamp(min=-1e4).sum()).backward()
    gradient = model.lm_head.weight.grad
    assert gradient.isfinite().all() and gradient[:90].any() and not gradient[90:].any()


@pytest.mark.parametrize("flag_set", ["padded_vocabulary", "gpt2", "speedrun"])
def test_added_tokens_become_real_ids(flag_set):
    model = tiny_model(flag_set)
    model.resize_token_embeddings(101, pad_to_multiple_of=8)
    assert (model.config.vocab_size, model.config.unpadded_vocab_size) == (104, 101)
    assert model.lm_head.weight.shape[0] == model.get_input_embeddings().num_embeddings == 104
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings
    logits = logits_of(model, torch.tensor([[100]]))
    assert (logits > torch.finfo(logits.dtype).min).sum() == 101
    model.resize_token_embeddings(80)
    assert (model.config.vocab_size, model.config.unpadded_vocab_size) == (80, None)


# Inputs that make no sense


@pytest.mark.parametrize("arguments", [{}, {"input_ids": random_ids(1, 2), "inputs_embeds": torch.zeros(1, 2, 32)}])
def test_ids_and_embeddings_exclude_each_other(arguments):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model("modern")(**arguments)


BEYOND = {
    "tokens": lambda model: model(random_ids(1, 65)),
    "tokens after a cache": lambda model: model(
        random_ids(1, 5), past_key_values=model(random_ids(1, 60)).past_key_values
    ),
    "position": lambda model: model(random_ids(1, 2), position_ids=torch.tensor([[3, 64]])),
    "document": lambda model: model(random_ids(1, 70), cu_seq_lens_q=torch.tensor([0, 5, 70])),
    "prompt": lambda model: model.generate(random_ids(1, 65), max_new_tokens=1),
    "generated token": lambda model: model.generate(random_ids(1, 60), max_new_tokens=9, do_sample=True, top_k=5),
}


@pytest.mark.parametrize("call", BEYOND)
def test_learned_position_beyond_the_last_one_raises(call):
    with pytest.raises(ValueError, match=r"position 6[4-9] is not below max_position_embeddings=64"):
        BEYOND[call](tiny_model("gpt2", eos_token_id=None))


# Positions with gaps are one document


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("gap", ["hole in the mask", "positions skipped"])
def test_a_gap_in_the_positions_begins_no_document(gap, implementation):
    """Tokens after the gap see those before it: in one forward, in two, and one by one from a cache."""
    model = tiny_model("modern")
    input_ids, positions, mask = random_ids(1, 20), torch.arange(20)[None], torch.ones(1, 20, dtype=torch.long)
    if gap == "hole in the mask":
        mask[0, 5:7] = 0
    else:
        positions = positions + 5 * (positions >= 10)
    expected = logits_of(model, input_ids, position_ids=positions, attention_mask=mask[:, None, None].bool() & CAUSAL)
    kept = mask[0].bool()
    model.set_attn_implementation(implementation)
    for sizes in ([20], [10, 10], [1] * 20):
        cache, pieces, end = DynamicCache(config=model.config), [], 0
        for size in sizes:
            start, end = end, end + size
            arguments = {"position_ids": positions[:, start:end], "attention_mask": mask[:, :end]}
            pieces.append(logits_of(model, input_ids[:, start:end], past_key_values=cache, **arguments))
        close(torch.cat(pieces, dim=1)[:, kept], expected[:, kept])


CAUSAL = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]

# Packed documents

LENGTHS = [[5, 7], [3, 9]]
POSITION_IDS = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
PACKED_FLAG_SETS = ["gpt2", "modern", "speedrun", "sliding_mixed", "frontier_sliding_mixed"]


def in_pieces(model, input_ids, sizes, **kwargs):
    """Compute the logits of a row that is given in pieces, with a cache."""
    cache, pieces, end = DynamicCache(config=model.config), [], 0
    for size in sizes:
        start, end = end, end + size
        mask = {"attention_mask": kwargs["attention_mask"][:, :end]} if "attention_mask" in kwargs else {}
        positions = POSITION_IDS[:, start:end]
        pieces.append(logits_of(model, input_ids[:, start:end], position_ids=positions, past_key_values=cache, **mask))
    return torch.cat(pieces, dim=1)


def with_lengths(model, input_ids, **kwargs):
    lengths = F.pad(torch.tensor(LENGTHS).flatten().cumsum(0), (1, 0)).to(torch.int32)
    names = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 9, "max_length_k": 9}
    return logits_of(model, input_ids, **names, **kwargs)


ONES = torch.ones(2, 12, dtype=torch.long)
CALLS = {
    "default": lambda model, ids: logits_of(model, ids, position_ids=POSITION_IDS),
    "no cache": lambda model, ids: logits_of(model, ids, position_ids=POSITION_IDS, use_cache=False),
    "mask of ones": lambda model, ids: logits_of(model, ids, position_ids=POSITION_IDS, attention_mask=ONES),
    "mask of ones, no cache": lambda model, ids: logits_of(
        model, ids, position_ids=POSITION_IDS, attention_mask=ONES, use_cache=False
    ),
    "empty cache": lambda model, ids: logits_of(
        model, ids, position_ids=POSITION_IDS, past_key_values=DynamicCache(config=model.config)
    ),
    "static cache": lambda model, ids: logits_of(
        model, ids, position_ids=POSITION_IDS, past_key_values=StaticCache(config=model.config, max_cache_len=20)
    ),
    "cache piece by piece": lambda model, ids: in_pieces(model, ids, [4, 4, 1, 3]),
    "cache piece by piece, mask of ones": lambda model, ids: in_pieces(model, ids, [4, 4, 1, 3], attention_mask=ONES),
    "lengths": with_lengths,
    "lengths, mask of ones": lambda model, ids: with_lengths(model, ids, attention_mask=ONES),
    "lengths, no cache": lambda model, ids: with_lengths(model, ids, use_cache=False),
    "lengths and positions": lambda model, ids: with_lengths(model, ids, position_ids=POSITION_IDS),
}


def documents_alone(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [
            torch.cat([logits_of(model, document[None])[0] for document in row.split(lengths)])
            for row, lengths in zip(input_ids, LENGTHS, strict=True)
        ]
    )


def varlen_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Compute flash_attn_varlen_func in plain PyTorch: causal from the lower right corner of each document.

    Without lengths, or with padding, it is ordinary causal attention, as in transformers' flash attention.
    """
    seq_len, key_len = query.shape[2], key.shape[2]
    if kwargs.get("max_length_q") is None:
        mask = torch.ones(seq_len, key_len).tril(key_len - seq_len)
        if attention_mask is not None:
            mask = mask * attention_mask[:, None, None, -key_len:]
        mask = mask.expand(len(query), 1, -1, -1)
    else:
        flat = torch.zeros(len(query) * seq_len, len(query) * key_len)
        queries, keys = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
        assert queries[-1] == flat.shape[0] and keys[-1] == flat.shape[1]
        for document in range(len(queries) - 1):
            rows, columns = slice(*queries[document : document + 2]), slice(*keys[document : document + 2])
            block = flat[rows, columns]
            block += torch.ones_like(block).tril(block.shape[1] - block.shape[0])
        blocks = flat.view(len(query), seq_len, len(query), key_len)
        mask = torch.stack([blocks[row, :, row] for row in range(len(query))])[:, None]
        assert flat.sum() == mask.sum(), "a document reaches into another row"
    if kwargs["sliding_window"] is not None:
        mask = mask * torch.ones(seq_len, key_len).triu(key_len - seq_len - kwargs["sliding_window"] + 1)
    minimum = torch.zeros_like(mask).masked_fill(mask == 0, torch.finfo(query.dtype).min)
    return eager_attention_forward(module, query, key, value, minimum, scaling)


@pytest.fixture
def flash_by_hand():
    """Let transformers' names for flash attention call `varlen_attention`, because the kernels need a CUDA device."""
    ALL_ATTENTION_FUNCTIONS.register("flash_attention_by_hand", varlen_attention)
    AttentionMaskInterface.register("flash_attention_by_hand", flash_attention_mask)
    yield "flash_attention_by_hand"
    del ALL_ATTENTION_FUNCTIONS._global_mapping["flash_attention_by_hand"]
    del AttentionMaskInterface._global_mapping["flash_attention_by_hand"]


@pytest.mark.parametrize("flag_set", ["speedrun", "frontier"])
@pytest.mark.parametrize("filled", [0, 1])
def test_positions_of_padding_between_tokens_do_not_count(flag_set, filled):
    model, input_ids, mask = tiny_model(flag_set), random_ids(1, 10), torch.tensor([[1, 0, 0, 1, 1, 1, 1, 0, 1, 1]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filled)
    padded = logits_of(model, input_ids, attention_mask=mask, position_ids=positions)[:, mask[0].bool()]
    close(padded, logits_of(model, input_ids[:, mask[0].bool()]))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("flag_set", PACKED_FLAG_SETS)
def test_packed_documents_do_not_see_each_other(flag_set, attn_implementation, call):
    model, input_ids = tiny_model(flag_set), random_ids(2, 12)
    model.set_attn_implementation(attn_implementation)
    close(CALLS[call](model, input_ids), documents_alone(model, input_ids))


@pytest.mark.parametrize("call", [name for name in CALLS if name != "static cache"])
@pytest.mark.parametrize("flag_set", PACKED_FLAG_SETS)
def test_packed_documents_do_not_see_each_other_under_flash_attention(flag_set, call, flash_by_hand):
    model, input_ids = tiny_model(flag_set), random_ids(2, 12)
    expected = documents_alone(model, input_ids)
    model.config._attn_implementation = flash_by_hand
    close(CALLS[call](model, input_ids), expected)


@pytest.mark.slow
def test_packed_documents_do_not_see_each_other_under_flex_attention():
    """One call only, because flex attention compiles for ten seconds on a CPU and has the same mask function."""
    model, input_ids = tiny_model("modern", head_dim=16), random_ids(2, 12)
    expected = documents_alone(model, input_ids)
    model.set_attn_implementation("flex_attention")
    close(CALLS["mask of ones"](model, input_ids), expected)


@pytest.mark.parametrize("flag_set", ["gpt2", "learned_rmsnorm"])
def test_packed_row_may_be_longer_than_the_learned_positions(flag_set):
    model, input_ids = tiny_model(flag_set), random_ids(2, 80)
    position_ids = torch.arange(40).repeat(2)[None]
    expected = torch.cat([logits_of(model, document) for document in input_ids.split(40, dim=1)], dim=1)
    close(logits_of(model, input_ids, position_ids=position_ids), expected)
    close(logits_of(model, input_ids, cu_seq_lens_q=torch.arange(0, 161, 40)), expected)
    cache = DynamicCache(config=model.config)
    pieces = zip(input_ids.split([30, 50], dim=1), position_ids.split([30, 50], dim=1), strict=True)
    pieces = [logits_of(model, ids, position_ids=positions, past_key_values=cache) for ids, positions in pieces]
    close(torch.cat(pieces, dim=1), expected)


def test_lengths_count_even_where_positions_do_not_restart():
    """RoPE scores depend on distances only, so that positions that continue across documents change nothing else."""
    model, input_ids = tiny_model("modern"), random_ids(2, 12)
    close(with_lengths(model, input_ids, position_ids=torch.arange(12)[None]), documents_alone(model, input_ids))


def test_attention_that_makes_no_masks_gets_none():
    """Servers and paged caches bring their own attention, which separates documents itself."""
    model, seen = tiny_model("modern"), []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((attention_mask, kwargs["cu_seq_lens_k"]))
        return query.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("attention_of_a_server", attention)
    model.config._attn_implementation = "attention_of_a_server"
    with_lengths(model, random_ids(2, 12), position_ids=POSITION_IDS)
    del ALL_ATTENTION_FUNCTIONS._global_mapping["attention_of_a_server"]
    assert [(mask, lengths.tolist()) for mask, lengths in seen] == [(None, [0, 5, 12, 15, 24])] * 2


@pytest.mark.parametrize(
    ("flag_set", "flags"),
    [("gpt2", {}), ("modern", {"use_qk_norm": True}), ("speedrun", {}), ("frontier_sliding_mixed", {})],
)
def test_attention_gets_one_dtype_under_autocast(flag_set, flags, monkeypatch):
    model, seen = tiny_model(flag_set, **flags), set()
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, query, key, value, *args, **kwargs):
        seen.update((query.dtype, key.dtype, value.dtype))
        return sdpa(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attention)
    with torch.autocast("cpu", torch.bfloat16):
        model(random_ids(2, 8))
    assert seen == {torch.bfloat16}


def test_unpacked_calls_keep_the_fast_path_of_sdpa(monkeypatch):
    """No mask is built where rows hold one document, so that sdpa may choose its flash kernel."""
    model, input_ids = tiny_model("modern"), random_ids(2, 12)
    masks = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "sdpa",
        lambda *args, **kwargs: masks.append(args[4]) or sdpa(*args, **kwargs),
    )
    model(input_ids)
    model(input_ids, attention_mask=ONES)
    model(input_ids, position_ids=torch.arange(12)[None])
    assert masks == [None] * 6
    model(input_ids, position_ids=POSITION_IDS)
    assert masks[-1] is not None


# torch.compile and gradient checkpointing


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("flag_set", PACKED_FLAG_SETS)
def test_training_step_compiles_without_graph_breaks(flag_set, packed):
    torch.compiler.reset()
    model, input_ids = tiny_model(flag_set).train(), random_ids(2, 12)
    kwargs = {"labels": input_ids, "use_cache": False, "skip_logits": True}
    kwargs |= {"position_ids": POSITION_IDS} if packed else {}
    expected = model(input_ids, **kwargs).loss
    actual = torch.compile(model, fullgraph=True, backend="eager")(input_ids, **kwargs).loss
    close(actual, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("flag_set", ["gpt2", "modern", "speedrun", "frontier_sliding_mixed"])
def test_gradient_checkpointing_changes_no_gradient(flag_set, use_reentrant):
    model, input_ids = tiny_model(flag_set).train(), random_ids(2, 12)
    model(input_ids, labels=input_ids).loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients_of(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(input_ids, labels=input_ids).loss.backward()
    torch.testing.assert_close(gradients_of(model), expected, atol=1e-6, rtol=0)


# What transformers and its neighbours expect


@EVERY_FLAG_SET
def test_hidden_states_and_attentions_are_recorded(flag_set):
    model, input_ids = tiny_model(flag_set), random_ids(2, 8)
    model.set_attn_implementation("eager")
    outputs = model(input_ids, output_hidden_states=True, output_attentions=True)
    depth = model.config.num_hidden_layers
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 8, 32)] * (depth + 1)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 8, 8)] * depth
    close(torch.stack(outputs.attentions).sum(-1), torch.ones(depth, 2, 4, 8))
    close(outputs.hidden_states[-1], model.model(input_ids).last_hidden_state, atol=0)


def test_every_matrix_is_a_plain_linear():
    """bitsandbytes and PEFT look for nn.Linear itself and ignore subclasses."""
    for flag_set in FLAG_SETS:
        for name, module in tiny_model(flag_set).named_modules():
            if name.endswith(("_proj", "lm_head")):
                assert type(module) is nn.Linear, name


@pytest.mark.parametrize("flag_set", FLAG_SETS)
def test_parallel_plans_name_modules_that_exist(flag_set):
    model = tiny_model(flag_set)
    names = {name for name, _ in model.model.named_modules()}
    for pattern in model.config.base_model_tp_plan:
        assert pattern.replace("*", "1") in names, pattern
    split = {name.rpartition(".")[2] for name in model.config.base_model_tp_plan}
    matrices = {name.rpartition(".")[2] for name in names if name.endswith("_proj")}
    assert matrices <= split or flag_set.startswith("frontier")


def test_pipeline_is_offered_only_where_layers_hand_on_one_tensor():
    assert tiny_config("modern").base_model_pp_plan is not None
    flags = ("use_unet_skips", "use_value_residual", "use_x0_residual", "use_backout", "use_smear")
    for changes in (*({flag: True} for flag in flags), {"bigram_vocab_size": 9}, {"value_embedding_layers": [1]}):
        assert tiny_config("modern", **changes).base_model_pp_plan is None


def test_dropout_of_evaluation_is_none():
    model, input_ids = (
        tiny_model("gpt2", **dict.fromkeys(("embedding_dropout", "attention_dropout"), 0.5)),
        random_ids(1, 8),
    )
    close(logits_of(model, input_ids), logits_of(model, input_ids), atol=0)
    model.train()
    assert (logits_of(model, input_ids) - logits_of(model, input_ids)).abs().max() > 1e-2


@pytest.mark.parametrize("flag_set", ["gpt2", "speedrun"])
def test_sequence_is_classified_by_its_last_token(flag_set):
    torch.manual_seed(0)
    model = GPT2ModernForSequenceClassification(tiny_config(flag_set, num_labels=3, pad_token_id=0)).eval()
    input_ids = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    logits = model(input_ids).logits
    assert logits.shape == (2, 3)
    close(logits[0], model(input_ids[:1, :3]).logits[0])
    assert model(input_ids, labels=torch.tensor([0, 2])).loss.isfinite()


def test_tokens_are_classified_one_by_one():
    torch.manual_seed(0)
    model = GPT2ModernForTokenClassification(tiny_config("modern", num_labels=5)).eval()
    outputs = model(random_ids(2, 6), labels=torch.zeros(2, 6, dtype=torch.long))
    assert outputs.logits.shape == (2, 6, 5)
    close(outputs.loss, F.cross_entropy(outputs.logits.flatten(0, 1), torch.zeros(12, dtype=torch.long)))


def test_speedrun_learns():
    """Three AdamW steps on one batch lower the loss, though outputs of attention and MLP and the head start at zero."""
    torch.manual_seed(0)
    residuals = {"num_hidden_layers": 4, "zero_init_projections": True, "initializer_range": 0.02}
    model, input_ids = GPT2ModernForCausalLM(tiny_config("speedrun", **residuals)).train(), random_ids(2, 12)
    assert all(getattr(model.config, flag) for flag in SPEEDRUN_RESIDUALS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(input_ids, labels=input_ids, skip_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(90), abs=1e-4)
    assert losses[-1] < losses[0] - 0.5
