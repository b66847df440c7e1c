"""Frozen layers spread over the processes: each keeps a part of every weight, and a layer is gathered while it runs.

This is FSDP2, `fully_shard` of PyTorch. It is called here and not by accelerate's `prepare`, which shards embedding and
head too, whose rows are read and updated one by one, and which knows FSDP on GPUs only.
"""

import functools
import os
from collections.abc import Callable
from contextlib import suppress

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import PreTrainedModel

from matt_fast.model.capture import Complete
from matt_fast.model.layers import decoder_layers


def check_sharding(shard: bool, processes: int) -> None:
    """Raise a ValueError where layers cannot be spread: one process, or FSDP as accelerate itself sets it up."""
    if processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "shard: wanted accelerate without FSDP settings of its own, which may leave weights unread in all but the "
            "first process; got ACCELERATE_USE_FSDP=true. Configure several GPUs without FSDP, and give --shard"
        )
    if shard and processes == 1:
        raise ValueError("shard: wanted several processes to spread the layers over, got one; see torchrun")


def shard_layers(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Spread the layers of a frozen model over the processes, in place; all processes call it at the same time.

    What is around the layers (embedding, last normalisation, head) is whole in each process, as are adapters in them
    that are trained.

    Args:
        model: frozen but for adapters. In the main process with its weights, on the CPU; in the others it may be on the
            meta device, as `Teacher.outline` gives it, and what it has is not read.
        accelerator: device and processes.

    Returns:
        `model`, on the accelerator's device, which gathers each layer before it runs.

    Raises:
        ValueError: the processes have different models.
    """
    _agree(model)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    layers = decoder_layers(model)
    spread = {id(x) for x in layers.parameters() if x.ndim > 0 and not x.requires_grad}
    around = [x for x in (*model.parameters(), *model.buffers()) if id(x) not in spread]
    _replace(model, [(x, _from_main(x, accelerator)) for x in around])
    ignored = {x for x in model.parameters() if id(x) not in spread}
    for layer in layers:
        _shard_layer(layer, mesh, ignored, accelerator)
    for before, layer in zip([layers[0], *layers], layers, strict=False):
        layer.set_modules_to_backward_prefetch([before])  # by itself FSDP goes on to the teacher's last layer
    # A root of its own lets the layers share their streams, so that one is gathered while another runs.
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    model.forward = _until_complete(model.forward)
    return model


def _until_complete(forward: Callable) -> Callable:
    """A model's forward that ends when all was captured, so that FSDP's hook behind it lets go of the last layer."""

    @functools.wraps(forward)
    def until_complete(*arguments, **options):
        with suppress(Complete):
            return forward(*arguments, **options)

    return until_complete


def _agree(model: PreTrainedModel) -> None:
    """Let all processes have the main one's dtypes: some weights are not in that of the model."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    every = gather_object([{name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}])
    shapes = [{name: shape for name, (shape, _) in found.items()} for found in every]
    if any(x != shapes[0] for x in shapes):
        raise ValueError("model: wanted the same weights in all processes, got others in some")
    dtypes = {name: dtype for name, (_, dtype) in every[0].items()}
    _replace(model, [(x, x.detach().to(dtypes[name])) for name, x in tensors.items() if x.dtype != dtypes[name]])


def _from_main(tensor: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The main process's values, on the device; a copy, without which all of a file would stay mapped to memory."""
    if accelerator.is_main_process:
        return broadcast(tensor.detach().to(accelerator.device, copy=True))
    return broadcast(torch.empty_like(tensor, device=accelerator.device))


def _shard_layer(layer: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter], accelerator: Accelerator) -> None:
    whole = {name: x for name, x in layer.named_parameters() if x not in ignored}
    _replace(layer, [(x, x.detach().to("meta")) for x in whole.values()])
    fully_shard(layer, mesh=mesh, ignored_params=ignored)
    shards = []
    for name, shard in layer.named_parameters():
        if name in whole:
            full = whole.pop(name).detach()
            if not accelerator.is_main_process:
                full = torch.empty(full.shape, dtype=full.dtype, device=accelerator.device)
            shards.append((shard, distribute_tensor(full, mesh, shard.placements)))
    _replace(layer, shards)


def _replace(module: nn.Module, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put tensors in the places of others, (old, new), in all modules that share them."""
    found = {id(x): nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new for x, new in pairs}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: found[id(old)] for name, old in tensors.items() if id(old) in found})
