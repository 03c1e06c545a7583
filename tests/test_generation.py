"""Generation gives the same tokens with and without each kind of cache, in batches, in beams and with a draft."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    cache_utils,
)

from gpt2modern.conversion import to_native
from modeling_gpt2modern import GPT2ModernForCausalLM
from tests.support.models import FLAG_SETS, random_ids, tiny_model

EVERY_FLAG_SET = pytest.mark.parametrize("flag_set", FLAG_SETS)
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def logits_of(model: nn.Module, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids, **kwargs).logits


def greedy_by_hand(model: GPT2ModernForCausalLM, input_ids: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ids and `count` more, each the most probable next token, by forwards without a cache."""
    for _ in range(count):
        logits = logits_of(model, input_ids, use_cache=False)[:, -1]
        input_ids = torch.cat((input_ids, logits.argmax(-1, keepdim=True)), dim=1)
    return input_ids


# Caches

GENERATION = {
    "no cache": {"use_cache": False},
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("settings", GENERATION.values(), ids=GENERATION)
@EVERY_FLAG_SET
def test_greedy_generation_is_that_by_hand(flag_set, settings):
    model, input_ids = tiny_model(flag_set), random_ids(1, 10)
    generated = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=8, **GREEDY, **settings
    )
    assert torch.equal(generated, greedy_by_hand(model, input_ids, 8))


@EVERY_FLAG_SET
def test_drafts_from_the_first_layers_do_not_change_what_is_generated(flag_set):
    """transformers lowers config.num_hidden_layers for the draft, so that the forward ends after two of the layers."""
    changes = {"layer_types": ["sliding_attention", "full_attention"] * 2} if "mixed" in flag_set else {}
    model, input_ids = tiny_model(flag_set, num_hidden_layers=4, **changes), random_ids(1, 10)
    generated = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=8, assistant_early_exit=2, **GREEDY
    )
    assert torch.equal(generated, greedy_by_hand(model, input_ids, 8))
    assert model.config.num_hidden_layers == len(model.model.layers) == 4


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@EVERY_FLAG_SET
def test_cached_logits_are_those_of_the_full_forward(flag_set, cache):
    model, input_ids = tiny_model(flag_set), random_ids(2, 12)
    config = model.config
    cache = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=16)
    pieces = [logits_of(model, piece, past_key_values=cache) for piece in input_ids.split([5, 1, 1, 3, 2], dim=1)]
    close(torch.cat(pieces, dim=1), logits_of(model, input_ids))


def test_history_of_a_cache_forgets_what_is_cropped_or_reset():
    """Also of one without a configuration, to which transformers adds layers as it goes."""
    model, input_ids = tiny_model("frontier_sliding_mixed", sliding_window=None, layer_types=None), random_ids(2, 9)
    expected, cache, static = logits_of(model, input_ids), DynamicCache(), StaticCache(model.config, max_cache_len=16)
    for kept in (9, 5, 0):
        cache.crop(kept - cache.get_seq_length()) if kept < 9 else logits_of(model, input_ids, past_key_values=cache)
        assert kept == cache.get_seq_length() == cache.layers[-1].get_seq_length()
        if kept < 9:
            close(logits_of(model, input_ids[:, kept:], past_key_values=cache), expected[:, kept:])
    padded, mask = F.pad(input_ids, (3, 0)), F.pad(torch.ones_like(input_ids), (3, 0))
    logits_of(model, random_ids(2, 12, seed=2), past_key_values=static)
    static.reset()  # without position_ids, the first token is not the first of its row
    close(logits_of(model, padded, attention_mask=mask, past_key_values=static)[:, 3:], expected)


def test_layer_with_a_window_keeps_no_more_than_it_sees():
    """The new token adds its own key, so that three cached keys make a window of four."""
    model, cache = tiny_model("sliding_mixed"), None
    cache = model(random_ids(1, 12), use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [3, 12]


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8 cache")
@pytest.mark.parametrize("flag_set", [name for name in FLAG_SETS if "sliding" not in name])
def test_quantised_cache_costs_no_more_than_its_rounding(flag_set):
    """In fp8, which needs no package; transformers refuses quantised caches for layers with a window."""
    model, input_ids = tiny_model(flag_set), random_ids(2, 12)
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}, "output_logits": True}
    mask = torch.ones_like(input_ids)
    common = {"max_new_tokens": 2, "return_dict_in_generate": True} | GREEDY
    generated = model.generate(input_ids, attention_mask=mask, **common, **settings)
    exact = logits_of(model, generated.sequences[:, :-1])[:, -1]
    difference = (generated.logits[1] - exact).abs().max()
    assert 0 < difference < 0.1 * exact[:, :90].abs().max()


def test_cache_quantised_by_hqq_in_eight_bits_gives_the_same_tokens():
    pytest.importorskip("hqq", reason="hqq is not installed")
    model, input_ids = tiny_model("speedrun"), random_ids(2, 12)
    settings = {"backend": "hqq", "nbits": 8, "q_group_size": 8, "axis_key": 1, "axis_value": 1, "residual_length": 4}
    generated = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=8,
        cache_implementation="quantized",
        cache_config=settings,
        **GREEDY,
    )
    assert torch.equal(generated, greedy_by_hand(model, input_ids, 8))


@EVERY_FLAG_SET
def test_generation_goes_on_from_the_cache_of_the_one_before(flag_set):
    model, input_ids = tiny_model(flag_set), random_ids(2, 8)
    first = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=4,
        return_dict_in_generate=True,
        **GREEDY,
    )
    turn = torch.cat((first.sequences, random_ids(2, 3, seed=5)), dim=1)
    second = model.generate(
        turn, attention_mask=torch.ones_like(turn), past_key_values=first.past_key_values, max_new_tokens=4, **GREEDY
    )
    assert torch.equal(second, greedy_by_hand(model, turn, 4))


@pytest.mark.parametrize("flag_set", ["modern", "frontier_sliding_mixed"])
def test_second_turn_sees_the_first_one_across_the_padding_between_them(flag_set):
    """Positions that restart begin a document; positions that continue after padding do not. Windows count padding."""
    model, input_ids = tiny_model(flag_set, sliding_window=None, layer_types=None), random_ids(1, 9)
    padded = torch.cat((input_ids[:, :5], torch.zeros(1, 2, dtype=torch.long), input_ids[:, 5:]), dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 2 + [1] * 4])
    position_ids = mask.cumsum(-1) - 1
    expected = logits_of(model, input_ids)[:, 5:]
    close(logits_of(model, padded, attention_mask=mask, position_ids=position_ids)[:, 7:], expected)
    cache = DynamicCache(config=model.config)
    logits_of(model, padded[:, :6], attention_mask=mask[:, :6], position_ids=position_ids[:, :6], past_key_values=cache)
    turn = {"attention_mask": mask, "position_ids": position_ids[:, 6:], "past_key_values": cache}
    close(logits_of(model, padded[:, 6:], **turn)[:, 1:], expected)


# Batches


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@EVERY_FLAG_SET
def test_rows_of_unequal_length_generate_what_each_does_alone(flag_set, settings):
    model, lengths = tiny_model(flag_set), [9, 4, 6]
    rows = [random_ids(1, length, seed=length) for length in lengths]
    padded = torch.cat([F.pad(row, (9 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([F.pad(torch.ones_like(row), (9 - row.shape[1], 0)) for row in rows])
    generated = model.generate(padded, attention_mask=mask, max_new_tokens=6, **GREEDY, **settings)
    for row, result, length in zip(rows, generated, lengths, strict=True):
        assert torch.equal(result[9 - length :], greedy_by_hand(model, row, 6)[0])


@EVERY_FLAG_SET
def test_padding_on_the_left_changes_no_logits(flag_set):
    model, input_ids = tiny_model(flag_set), random_ids(2, 8)
    mask = F.pad(torch.ones_like(input_ids), (3, 0))
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = logits_of(model, F.pad(input_ids, (3, 0)), attention_mask=mask, position_ids=position_ids)[:, 3:]
    close(logits, logits_of(model, input_ids))


@pytest.mark.parametrize("flag_set", ["gpt2", "padded_vocabulary", "speedrun", "sliding_mixed"])
def test_continuous_batching_generates_what_each_request_does_alone(flag_set):
    """transformers' paged attention packs requests into one row."""
    model = tiny_model(flag_set)
    requests = [random_ids(1, length, seed=length) for length in (5, 9)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    memory = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)  # otherwise half of the machine's
    results = model.generate_batch([request[0].tolist() for request in requests], config, memory)
    for request, result in zip(requests, results.values(), strict=True):
        expected = greedy_by_hand(model, request, 6)[0, request.shape[1] :]
        assert result.generated_tokens == expected.tolist()


def test_continuous_batching_of_a_model_that_needs_the_previous_token_fails_with_the_reason():
    """A row holds tokens of several requests, whose previous ones are not given."""
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    memory = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    results = tiny_model("frontier_sliding_mixed").generate_batch([[1, 2, 3], [4, 5]], config, memory)
    assert all("which neither continuous batching nor" in result.error for result in results.values())


# Searching, sampling, drafting


@EVERY_FLAG_SET
def test_beam_search_is_the_same_with_and_without_a_cache(flag_set):
    model, input_ids = tiny_model(flag_set), random_ids(2, 10)
    common = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 6} | GREEDY
    common |= {"num_beams": 3, "num_return_sequences": 3}
    expected = model.generate(input_ids, use_cache=False, **common)
    assert torch.equal(model.generate(input_ids, **common), expected)
    assert len({tuple(row) for row in expected.tolist()}) == 6


@EVERY_FLAG_SET
@pytest.mark.parametrize("num_layers", [1, 2], ids=["smaller draft", "near copy"])
def test_decoding_with_a_draft_is_greedy_decoding(flag_set, num_layers):
    """A smaller draft is mostly wrong and a near copy mostly right, so that tokens are rejected and accepted."""
    layers = {"num_hidden_layers": num_layers}
    layers |= (
        {"layer_types": ["full_attention"], "sliding_window": None} if "mixed" in flag_set and num_layers == 1 else {}
    )
    model, draft, input_ids = tiny_model(flag_set), tiny_model(flag_set, **layers), random_ids(1, 10)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    generated = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=8, assistant_model=draft, **GREEDY
    )
    assert torch.equal(generated, greedy_by_hand(model, input_ids, 8))


SAMPLING = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 100.0, "top_k": 0},
    "nucleus": {"do_sample": True, "temperature": 100.0, "top_k": 0, "top_p": 0.999},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True, "temperature": 100.0, "top_k": 0},
    "minimum length": {"do_sample": True, "temperature": 100.0, "top_k": 0, "min_new_tokens": 20, "eos_token_id": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "guidance": {"guidance_scale": 1.5, "do_sample": True, "temperature": 100.0, "top_k": 0},
    "early exit": {"assistant_early_exit": 1},
}


@pytest.mark.parametrize("settings", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("flag_set", ["padded_vocabulary", "speedrun"])
def test_padded_rows_are_never_generated(flag_set, settings):
    """Padded rows are not generated even where their logits would be the largest by far."""
    model = tiny_model(flag_set, tie_word_embeddings=False, final_logit_softcapping=None)
    input_ids = random_ids(1 if {"prompt_lookup_num_tokens", "assistant_early_exit"} & set(settings) else 4, 4)
    with torch.no_grad():
        model.lm_head.weight[90:] = 100 * model.lm_head.weight[:90].mean(0)
    torch.manual_seed(0)
    common = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 20, "pad_token_id": 0}
    generated = model.generate(input_ids, **common, **settings)
    assert generated.shape[1] == 24 and generated.max() < 90


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guidance_weighs_the_log_probabilities_with_and_without_the_prompt(dtype):
    """transformers compares logits of `forward` with those that it has processed itself."""
    model, input_ids = tiny_model("padded_vocabulary").to(dtype), random_ids(1, 4)
    settings = {"attention_mask": torch.ones_like(input_ids), "guidance_scale": 1.5, "max_new_tokens": 1, **GREEDY}
    generated = model.generate(input_ids, return_dict_in_generate=True, output_scores=True, **settings)
    alone, given = (logits_of(model, ids)[0, -1].float().log_softmax(-1) for ids in (input_ids[:, -1:], input_ids))
    close(generated.scores[0][0, :90], (1.5 * given - 0.5 * alone)[:90], atol=1e-5 if dtype == torch.float32 else 0.05)
    assert generated.scores[0].shape == (1, 96) and generated.sequences[0, 4] == generated.scores[0].argmax() < 90


def test_transition_scores_of_a_padded_vocabulary_are_log_probabilities():
    """transformers reshapes the scores by config.vocab_size, which is the number of rows of the head."""
    model, input_ids = tiny_model("padded_vocabulary"), random_ids(2, 4)
    settings = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 5, "pad_token_id": 0}
    generated = model.generate(input_ids, output_scores=True, return_dict_in_generate=True, **settings)
    scores = model.compute_transition_scores(generated.sequences, generated.scores, normalize_logits=True)
    logits = logits_of(model, generated.sequences[:, :-1])[:, 3:].log_softmax(-1)
    close(scores, logits.gather(2, generated.sequences[:, 4:, None])[..., 0])


# What goes in and what comes out


@pytest.mark.parametrize("kept", [3, torch.tensor([0, 5]), 1, 0])
@EVERY_FLAG_SET
def test_logits_to_keep_are_those_of_the_full_forward(flag_set, kept):
    model, input_ids = tiny_model(flag_set), random_ids(2, 8)
    full = logits_of(model, input_ids)
    expected = full[:, -kept:] if isinstance(kept, int) else full[:, kept]
    close(logits_of(model, input_ids, logits_to_keep=kept), expected, atol=3e-6)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@EVERY_FLAG_SET
def test_embeddings_may_take_the_place_of_ids(flag_set, settings):
    model, input_ids = tiny_model(flag_set), random_ids(2, 8)
    inputs_embeds = model.get_input_embeddings()(input_ids)
    if model.model.reads_token_ids:
        with pytest.raises(ValueError, match="need input_ids, not inputs_embeds"):
            model(inputs_embeds=inputs_embeds)
        return
    close(logits_of(model, None, inputs_embeds=inputs_embeds), logits_of(model, input_ids))
    mask = torch.ones_like(input_ids)
    generated = model.generate(inputs_embeds=inputs_embeds, attention_mask=mask, max_new_tokens=5, **GREEDY, **settings)
    assert torch.equal(generated, greedy_by_hand(model, input_ids, 5)[:, 8:])


def test_generation_from_nothing_begins_with_the_first_token():
    model = tiny_model("gpt2", bos_token_id=1)
    generated = model.generate(max_new_tokens=5, **GREEDY)
    assert torch.equal(generated, greedy_by_hand(model, torch.tensor([[1]]), 5))


@pytest.mark.parametrize("flag_set", ["gpt2", "speedrun", "sliding_mixed"])
def test_generation_returns_the_states_of_every_step(flag_set):
    model, input_ids = tiny_model(flag_set), random_ids(2, 6)
    model.set_attn_implementation("eager")
    generated = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=3,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
        **GREEDY,
    )
    depth = model.config.num_hidden_layers
    shapes = [[tuple(states.shape) for states in step] for step in generated.hidden_states]
    assert shapes == [[(2, length, 32)] * (depth + 1) for length in (6, 1, 1)]
    full = model(generated.sequences[:, :-1], output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(depth + 1):
        close(torch.cat([step[layer] for step in generated.hidden_states], dim=1), full[layer])
    assert [weights[-1].shape[2] for weights in generated.attentions] == [6, 1, 1]


# What one token costs

PRODUCTS = {"Linear", "Conv1D", "aten.addmm", "aten.mm", "aten.t", "aten.view", "aten._unsafe_view"}


class Operations(TorchDispatchMode):
    """Count the operations of torch that run, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


def calls_of_one_token(model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[Counter, Counter]:
    """Return how often each operation and each class of module is called for one more token, without the products of
    matrices: GPT-2 has queries, keys and values in one matrix."""
    counts = []
    for count in (3, 4):
        modules = Counter()
        hook = register_module_forward_pre_hook(lambda module, _, seen=modules: seen.update([type(module).__name__]))
        with Operations() as operations:
            model.generate(input_ids, attention_mask=mask, max_new_tokens=count, **GREEDY)
        hook.remove()
        counts.append((operations.calls, modules))
    return tuple(
        Counter({name: number for name, number in (more - less).items() if name not in PRODUCTS})
        for less, more in zip(*counts, strict=True)
    )


@pytest.mark.parametrize("flag_set", ["gpt2", "modern"])
def test_token_costs_no_more_calls_than_in_the_stock_model(flag_set):
    model, input_ids = tiny_model(flag_set, num_hidden_layers=12), random_ids(1, 6)
    ours, stock = (
        calls_of_one_token(each, input_ids, torch.ones_like(input_ids)) for each in (model, to_native(model))
    )
    for our_calls, stock_calls in zip(ours, stock, strict=True):
        assert 0 < our_calls.total() <= stock_calls.total(), (our_calls - stock_calls, stock_calls - our_calls)


def test_token_after_padding_looks_for_documents_in_five_operations():
    """Twenty-five operations find the documents of a prompt; one token needs none of them."""
    model, input_ids = tiny_model("modern"), random_ids(2, 6)
    padded = torch.ones_like(input_ids)
    padded[0, :2] = 0
    operations, _ = calls_of_one_token(model, input_ids, padded)
    assert operations["aten.all"] and not operations["aten.cummax"]


# Compiled decoding


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("flag_set", "graphs"),
    [("gpt2", 1), ("speedrun", 1), ("gqa", 1), ("sliding_mixed", 2), ("frontier_sliding_mixed", 2)],
)
def test_compiled_decoding_with_a_static_cache_does_not_recompile(flag_set, graphs):
    """Seven steps and a shorter second prompt, one graph. The sliding layers of a StaticCache count in Python, which
    costs stock Mistral and Qwen3 a second graph too."""
    torch.compiler.reset()
    model, input_ids = tiny_model(flag_set), random_ids(2, 6)
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True  # generate() compiles on accelerators only
    settings = {"cache_implementation": "static", "compile_config": compile_config} | GREEDY
    before = compiled_graphs()
    generated = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=8, **settings)
    assert torch.equal(generated, greedy_by_hand(model, input_ids, 8))
    assert compiled_graphs() == before + graphs

    shorter = random_ids(2, 4, seed=7)
    generated = model.generate(shorter, attention_mask=torch.ones_like(shorter), max_new_tokens=6, **settings)
    assert torch.equal(generated, greedy_by_hand(model, shorter, 6))
    assert compiled_graphs() == before + graphs
