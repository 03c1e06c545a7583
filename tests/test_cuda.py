"""What only a CUDA device can show: fast attention, compiled steps, memory of the loss, offloaded caches.

Every check is a function of the device and of the implementation. Those that have a meaning on a CPU run there too, so
that the checks themselves are tested wherever the tests run; the rest is marked `gpu` and skips without a device.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CompileConfig, DynamicCache
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from modeling_gpt2modern import GPT2ModernForCausalLM
from tests.support.models import FLAG_SETS, linear_cross_entropy, random_ids, tiny_model

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
FLASH = {
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
}
CPU, CUDA = pytest.param("cpu"), pytest.param("cuda", marks=GPU)
ON_CPU, ON_CUDA = pytest.param("cpu", "sdpa"), pytest.param("cuda", "sdpa", marks=GPU)
PLACES = [
    ON_CPU,
    ON_CUDA,
    pytest.param("cuda", "flex_attention", marks=GPU),
    *(
        pytest.param("cuda", name, marks=(*GPU, pytest.mark.skipif(not is_there(), reason=f"no {name} is installed")))
        for name, is_there in FLASH.items()
    ),
]
EVERY_PLACE = pytest.mark.parametrize(("device", "attn_implementation"), PLACES)
EVERY_FLAG_SET = pytest.mark.parametrize("flag_set", FLAG_SETS)
SOME_FLAG_SETS = pytest.mark.parametrize("flag_set", ["gpt2", "modern", "speedrun", "sliding_mixed"])

# Norm of the difference over norm of the logits. Two ways to the same attention in bf16, whose numbers are 0.4% apart,
# differed by 0.9 to 1.8% over the flag sets (eager and sdpa on a CPU); documents that see each other, by 68 to 113%.
BF16_TOLERANCE = 0.05
LENGTHS = [[5, 7, 12], [3, 9, 12]]


def bf16_model(flag_set: str, device: str, attn_implementation: str = "eager") -> GPT2ModernForCausalLM:
    """Build a model with heads of 32 dimensions; flex attention needs at least 16."""
    torch.compiler.reset()  # flex attention compiles for each mask, and dynamo keeps eight of one function
    model = tiny_model(flag_set, hidden_size=128).to(device, torch.bfloat16)
    model.set_attn_implementation(attn_implementation)
    return model


def logits_of(model: nn.Module, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """Return the logits of the token ids; those of padded rows are so large that no error would show beside them."""
    with torch.no_grad():
        return model(input_ids, **kwargs).logits[..., : model.config.unpadded_vocab_size]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# Attention


@EVERY_PLACE
@EVERY_FLAG_SET
def test_attention_gives_the_logits_of_eager(flag_set, device, attn_implementation):
    input_ids = random_ids(2, 24).to(device)
    expected = logits_of(bf16_model(flag_set, device), input_ids)
    actual = logits_of(bf16_model(flag_set, device, attn_implementation), input_ids)
    assert relative_error(actual, expected) < BF16_TOLERANCE


@EVERY_PLACE
@SOME_FLAG_SETS
def test_attention_gives_the_gradients_of_eager(flag_set, device, attn_implementation):
    input_ids, gradients = random_ids(2, 24).to(device), []
    for implementation in ("eager", attn_implementation):
        model = bf16_model(flag_set, device, implementation).train()
        model(input_ids, labels=input_ids, skip_logits=True, use_cache=False).loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert relative_error(gradients[1], gradients[0]) < 2 * BF16_TOLERANCE


@EVERY_PLACE
@SOME_FLAG_SETS
def test_padding_on_the_left_changes_no_logits(flag_set, device, attn_implementation):
    input_ids = random_ids(2, 12).to(device)
    mask = F.pad(torch.ones_like(input_ids), (3, 0))
    mask[0, 3:6] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    row = F.pad(input_ids, (3, 0))
    expected = logits_of(bf16_model(flag_set, device), input_ids[:1, 3:])
    model = bf16_model(flag_set, device, attn_implementation)
    actual = logits_of(model, row, attention_mask=mask, position_ids=position_ids)
    assert relative_error(actual[:1, 6:], expected) < BF16_TOLERANCE


def call(model: nn.Module, input_ids: torch.Tensor, lengths: list[list[int]], way: str) -> torch.Tensor:
    """Compute the logits of rows with documents of these lengths, given in one of the possible ways."""
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    position_ids = position_ids.to(input_ids.device)
    ends = torch.tensor(lengths, device=input_ids.device).flatten().cumsum(0)
    cu_seq_lens = F.pad(ends, (1, 0)).to(torch.int32)
    longest = max(map(max, lengths))
    if way == "positions":
        return logits_of(model, input_ids, position_ids=position_ids, use_cache=False)
    if way == "positions and mask of ones":
        mask = torch.ones_like(input_ids)
        return logits_of(model, input_ids, position_ids=position_ids, attention_mask=mask)
    if way == "positions and cache":
        cache = DynamicCache(config=model.config)
        split = [part.split([8, 1, input_ids.shape[1] - 9], dim=1) for part in (input_ids, position_ids)]
        pieces = [
            logits_of(model, ids, position_ids=positions, past_key_values=cache)
            for ids, positions in zip(*split, strict=True)
        ]
        return torch.cat(pieces, dim=1)
    names = {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
    return logits_of(model, input_ids, **names, max_length_q=longest, max_length_k=longest, use_cache=False)


@pytest.mark.parametrize("way", ["positions", "positions and mask of ones", "positions and cache", "lengths"])
@pytest.mark.parametrize("batch_size", [1, 2])
@EVERY_PLACE
@SOME_FLAG_SETS
def test_packed_documents_do_not_see_each_other(flag_set, device, attn_implementation, batch_size, way):
    input_ids, lengths = random_ids(2, 24)[:batch_size].to(device), LENGTHS[:batch_size]
    alone = bf16_model(flag_set, device)
    expected = torch.stack(
        [
            torch.cat([logits_of(alone, document[None])[0] for document in row.split(row_lengths)])
            for row, row_lengths in zip(input_ids, lengths, strict=True)
        ]
    )
    assert relative_error(logits_of(alone, input_ids), expected) > 0.5, "isolation would not show"
    actual = call(bf16_model(flag_set, device, attn_implementation), input_ids, lengths, way)
    assert relative_error(actual, expected) < BF16_TOLERANCE


# Compiled training step


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize(
    ("device", "backend", "attn_implementation"),
    [
        pytest.param("cpu", "aot_eager", "sdpa"),
        pytest.param("cuda", "inductor", "sdpa", marks=GPU),
        pytest.param("cuda", "inductor", "flex_attention", marks=GPU),
    ],
)
@SOME_FLAG_SETS
def test_compiled_training_step_has_the_same_gradients(flag_set, device, backend, attn_implementation, packed):
    """Weights are fp32 under bf16 autocast, as in a training run. There is no graph break, except that transformers
    makes flex attention's mask by a call in which torch warns, which dynamo does not trace."""
    torch.compiler.reset()
    input_ids = random_ids(2, 24).to(device)
    kwargs = {"labels": input_ids, "use_cache": False, "skip_logits": True}
    if packed:
        kwargs["position_ids"] = torch.arange(12, device=device).repeat(2, 2)
    results = []
    for compiled in (False, True):
        model = tiny_model(flag_set, hidden_size=128).to(device).train()
        model.set_attn_implementation(attn_implementation if compiled else "sdpa")
        fullgraph = attn_implementation == "sdpa"
        step = torch.compile(model, fullgraph=fullgraph, backend=backend) if compiled else model
        with torch.autocast(device, torch.bfloat16):
            loss = step(input_ids, **kwargs).loss
        loss.backward()
        results.append((loss.item(), torch.cat([weight.grad.flatten() for weight in model.parameters()])))
    (expected_loss, expected_gradients), (loss, gradients) = results
    assert loss == pytest.approx(expected_loss, rel=0.01)
    assert relative_error(gradients, expected_gradients) < 2 * BF16_TOLERANCE


# The loss


def loss_inputs(device: str, dtype: torch.dtype, num_tokens: int, vocab_size: int, hidden_size: int):
    """Draw hidden states, weight (both require grad) and labels on the CPU, so that every device gets the same."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(num_tokens, hidden_size, generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator).to(device)
    return *(tensor.to(device, dtype).requires_grad_() for tensor in (hidden_states, weight)), labels


def logits_loss(hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden_states, weight).float(), labels)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.01)], ids=str)
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_chunked_loss_is_that_of_fp32(device, dtype, tolerance):
    """Compare with fp32 arithmetic on the same rounded inputs."""
    hidden_states, weight, labels = loss_inputs(device, dtype, 600, 2048, 64)
    exact_inputs = [tensor.detach().float().requires_grad_() for tensor in (hidden_states, weight)]
    exact = logits_loss(*exact_inputs, labels)
    loss = linear_cross_entropy(hidden_states, weight, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=tolerance / 10)
    gradients = torch.autograd.grad(loss, (hidden_states, weight))
    for gradient, expected in zip(gradients, torch.autograd.grad(exact, exact_inputs), strict=True):
        assert relative_error(gradient, expected) < tolerance


def peak_bytes(loss_function, inputs) -> int:
    """Measure the CUDA memory that forward and backward need in addition to their inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(loss_function(*inputs), inputs[:2])
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", [CUDA])
def test_chunked_loss_needs_less_than_a_quarter_of_the_memory(device, dtype):
    inputs = loss_inputs(device, dtype, 8192, 50304, 768)
    assert peak_bytes(linear_cross_entropy, inputs) < 0.25 * peak_bytes(logits_loss, inputs)


# Generation


def greedy_by_hand(model: nn.Module, input_ids: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        logits = logits_of(model, input_ids, use_cache=False)[:, -1]
        input_ids = torch.cat((input_ids, logits.argmax(-1, keepdim=True)), dim=1)
    return input_ids


@pytest.mark.parametrize(
    ("device", "backend"), [pytest.param("cpu", "eager"), pytest.param("cuda", "inductor", marks=GPU)]
)
@pytest.mark.parametrize(("flag_set", "graphs"), [("gpt2", 1), ("speedrun", 1), ("sliding_mixed", 2)])
def test_compiled_generation_with_a_static_cache_does_not_recompile(flag_set, graphs, device, backend):
    torch.compiler.reset()
    model, input_ids = tiny_model(flag_set).to(device), random_ids(2, 6).to(device)
    compile_config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    compile_config._compile_all_devices = True  # generate() compiles on accelerators only
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    generated = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        pad_token_id=0,
        max_new_tokens=8,
        cache_implementation="static",
        compile_config=compile_config,
    )
    assert torch.equal(generated, greedy_by_hand(model, input_ids, 8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + graphs


@pytest.mark.parametrize("cache_implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("device", [CUDA])
@SOME_FLAG_SETS
def test_cache_that_leaves_the_device_gives_the_same_tokens(flag_set, device, cache_implementation):
    """transformers moves the offloaded cache in a CUDA stream, so that a CPU has no such cache."""
    model, input_ids = tiny_model(flag_set).to(device), random_ids(2, 6).to(device)
    settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8, "disable_compile": True}
    mask = torch.ones_like(input_ids)
    generated = model.generate(input_ids, attention_mask=mask, cache_implementation=cache_implementation, **settings)
    assert torch.equal(generated, greedy_by_hand(model, input_ids, 8))
