"""FSDP2: weights, gradients and optimizer state in one piece per process, gathered layer by layer while they are used.

The Accelerate configuration says that and how (accelerate_configs/fsdp2_*.yaml); torch's fully_shard does it. What is
saved is whole, so that a checkpoint does not know on how many processes, sharded or not, it was made.
"""

import warnings

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from modeling_gpt2modern import GPT2ModernForCausalLM


def shard_model(model: GPT2ModernForCausalLM, accelerator: Accelerator, *, torch_compile: bool) -> torch.nn.Module:
    """Cut the model's parameters in place: one unit per decoder layer and one, the root, for all the rest.

    Accelerate's own division is not used: it makes a unit of the head that is gathered when the head is called, and the
    loss without logits reads the head's matrix without calling it. The root is whole from forward to backward.
    Under bf16 the layers compute in bf16 as under autocast, but the residual stream is bf16 too; gradients are summed
    over the processes in fp32, and what a forward is given (rotations, the number of targets) keeps its precision.
    torch_compile: compile each layer; the gathering stays outside.
    """
    # The values that later layers mix in are a view. It would matter if anything were done to it in place.
    warnings.filterwarnings("ignore", message=".* returned a view tensor")
    precision = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    reshard_after_forward = accelerator.state.fsdp_plugin.reshard_after_forward
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            if torch_compile:
                module.compile()
            fully_shard(module, reshard_after_forward=reshard_after_forward, mp_policy=precision)
    return fully_shard(model, mp_policy=precision)


def is_sharded(model: torch.nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def reshard(model: torch.nn.Module) -> None:
    """Give up what a forward pass has gathered and no backward pass has given up: after an evaluation, a sample."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor gathered from its shards: every process has to call it. Others are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor, which every process has, on the device of `example` and cut like it."""
    tensor = tensor.to(example.device, copy=True)
    if not isinstance(example, DTensor):
        return tensor
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)


def whole_model(model: GPT2ModernForCausalLM, *, keep: bool) -> GPT2ModernForCausalLM | None:
    """The same weights as an ordinary model in main memory that can be saved; a model that is not sharded, as it is.

    Every process has to call it; those with keep=False get None for a sharded model.
    """
    if not is_sharded(model):
        return model
    weights = {}
    for name, parameter in model.named_parameters():
        weight = whole_tensor(parameter.detach())
        if keep:
            weights[name] = weight.cpu()
    if not keep:
        return None
    with torch.device("meta"):
        whole = GPT2ModernForCausalLM(model.config)
    whole.load_state_dict(weights, strict=False, assign=True)
    whole.tie_weights()
    return whole
