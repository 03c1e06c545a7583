"""The memory estimate is near what autograd keeps; looking for a micro-batch that fits leaves no trace."""

import multiprocessing
import platform
import resource
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from gpt2modern.errors import GPT2ModernError
from gpt2modern.evaluation.generation import generate_samples
from gpt2modern.evaluation.loss import batch_loss
from gpt2modern.training.batches import BatchPlan
from gpt2modern.training.config import TrainConfig
from gpt2modern.training.memory import (
    CPU_TOKENS_PER_PASS,
    activation_bytes,
    estimate_memory,
    fit_micro_batch,
    fits_by_trying,
    freed_memory_kept,
    largest_that_fits,
)
from modeling_gpt2modern import GPT2ModernForCausalLM
from tests.support.models import tiny_config

CONFIG = TrainConfig(data_dir="data", output_dir="out")


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def new_model(preset="modern", **overrides):
    torch.manual_seed(0)
    return GPT2ModernForCausalLM(tiny_config(preset, **overrides))


def runs_out_above(most):
    """Return a model whose forward pass lacks memory for more than `most` sequences."""

    def check(module, arguments, keywords):
        if len(keywords["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model = new_model()
    model.register_forward_pre_hook(check, with_kwargs=True)
    return model


def fitted(accelerator, model, samples_per_step, block_size=16):
    """Return the micro-batch size that `fit_micro_batch` finds for steps of `samples_per_step` blocks."""
    return fit_micro_batch(
        CONFIG, accelerator, model, BatchPlan(samples_per_step, 1, 1, block_size), separator=None
    ).micro_batch_size


def kept_bytes(model, batch, autocast):
    """Return the bytes that autograd keeps besides the weights and their copies."""
    of_weights = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape)[::-1])}
    kept = {}

    def pack(tensor):
        if tuple(tensor.shape) not in of_weights:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        batch_loss(model, batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("preset", ["gpt2", "modern", "speedrun"])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(preset, autocast):
    model = new_model(preset, hidden_size=64, num_attention_heads=2, max_position_embeddings=128).train()
    batch = torch.randint(0, 90, (8, 129), generator=torch.Generator().manual_seed(1))
    estimate = activation_bytes(
        model.config, autocast=autocast, micro_batch_size=8, block_size=128, gradient_checkpointing=False
    ) - 4 * model.config.vocab_size * (64 + 512)  # fmt: skip
    assert estimate == pytest.approx(kept_bytes(model, batch, autocast), rel=0.2)


def test_weights_gradients_and_optimizer_states_are_counted():
    model = new_model("speedrun")
    parameters = model.num_parameters()
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))

    def estimate(optimizer, mixed_precision, shards=1):
        settings, plan = replace(CONFIG, optimizer=optimizer), BatchPlan(shards, 1, shards, block_size=16)
        return estimate_memory(settings, model, plan, autocast=mixed_precision != "no", fsdp2=shards > 1)

    adamw, muon, halved = estimate("adamw", "no"), estimate("muon", "bf16"), estimate("adamw", "no", shards=2)
    assert [adamw[name] for name in ("weights", "gradients", "optimizer states")] == [
        4 * parameters, 4 * parameters, 8 * parameters
    ]  # fmt: skip
    assert (halved["weights"], halved["activations"]) == (2 * parameters, adamw["activations"])
    assert (muon["weights"], muon["optimizer states"]) == (6 * parameters, 8 * parameters - 4 * matrices)
    settings, plan = replace(CONFIG, average_last=0.1), BatchPlan(2, 1, 2, block_size=16)
    averaged = estimate_memory(settings, model, plan, autocast=False, fsdp2=True)
    assert averaged["average of weights"] == 2 * parameters and "average of weights" not in adamw


@pytest.mark.parametrize(("most", "found"), [(0, 0), (1, 1), (5, 4), (99, 16)])
def test_the_largest_size_that_does_not_run_out_of_memory_is_taken(accelerator, most, found):
    model = runs_out_above(most)

    def fits(size):
        return fits_by_trying(CONFIG, accelerator, model, size, 16, None)

    assert largest_that_fits([1, 2, 4, 8, 16], fits) == found


def test_a_model_that_does_not_fit_at_all_is_refused(accelerator):
    tokens = 2**40  # whose activations no machine can hold
    with pytest.raises(GPT2ModernError, match=f"one sequence of {tokens} tokens does not fit"):
        fitted(accelerator, new_model(), 2, block_size=tokens)


def test_another_error_is_not_taken_for_a_lack_of_memory(accelerator):
    def fail(*arguments):
        raise RuntimeError("shapes cannot be multiplied")

    model = new_model()
    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes"):
        fits_by_trying(CONFIG, accelerator, model, 1, 16, None)


def test_trying_leaves_weights_gradients_and_random_numbers_as_they_were(accelerator):
    model = new_model(hidden_dropout=0.5).eval()
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    random_state = torch.get_rng_state()
    assert fits_by_trying(CONFIG, accelerator, model, 2, 16, None)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.fixture
def mps(monkeypatch):
    """The generator of an Apple GPU, without the GPU: what is read from it and what is written back."""
    asked = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: asked.append(("read", device.type)) or "state")
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device: asked.append((state, device.type)))
    return asked


class OnMps(torch.nn.Linear):
    """A model on an Apple GPU, whose memory is too small for anything."""

    device = torch.device("mps")

    def __init__(self):
        super().__init__(2, 2)
        self.config = SimpleNamespace(vocab_size=300, position_embedding_type="rope", model_type="gpt2modern")

    def num_parameters(self):
        return 6

    def to(self, device):
        raise torch.OutOfMemoryError("MPS backend out of memory")


def test_the_generator_of_an_apple_gpu_is_kept_while_sizes_are_tried(mps):
    accelerator = SimpleNamespace(device=torch.device("mps"), num_processes=1)
    assert not fits_by_trying(CONFIG, accelerator, OnMps(), 2, 16, None)
    assert mps == [("read", "mps"), ("state", "mps")]


def test_the_generator_of_an_apple_gpu_is_kept_while_samples_are_drawn(mps, tokenizer_dir):
    assert generate_samples(OnMps(), tokenizer_dir, ["the"], max_new_tokens=2, seeds=[1]) == []
    assert mps == [("read", "mps"), ("state", "mps")]


def test_on_a_cpu_half_of_the_free_memory_is_the_limit(accelerator, monkeypatch):
    model = new_model()
    plan = BatchPlan(4, 4, 1, block_size=16)
    needed = sum(estimate_memory(CONFIG, model, plan, autocast=accelerator.mixed_precision != "no").values())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * needed))
    assert fitted(accelerator, model, 8) == 4
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * needed - 2))
    assert fitted(accelerator, model, 8) == 2


def test_on_a_cpu_a_pass_has_a_largest_number_of_tokens(accelerator):
    assert fitted(accelerator, new_model(), 8, block_size=CPU_TOKENS_PER_PASS // 2) == 2


def page_faults_of_allocations() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def page_faults_without_and_with_memory_kept() -> list[int]:
    counts = [page_faults_of_allocations()]
    with freed_memory_kept():
        page_faults_of_allocations()
        counts.append(page_faults_of_allocations())
    return [*counts, page_faults_of_allocations()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_freed_in_a_run_is_not_faulted_in_again():
    pages = 2**26 // resource.getpagesize()  # of one tensor; fewer if the kernel gives large pages
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a heap that no other test has grown
        before, kept, after = pool.apply(page_faults_without_and_with_memory_kept)
    assert kept < pages / 4
    assert before > 4 * pages
    assert after > pages  # they return to the kernel again
