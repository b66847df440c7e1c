"""What is timed: forward and backward of every engine, and of flash attention at the student's shape."""

import os

import matt_kernels
import torch
import torch.nn.functional as F
from gpu_bench.engines import eager_fits, loss_of
from gpu_bench.failures import Refused
from gpu_bench.inputs import DTYPES, Shape, make_inputs, pair_count
from torch.nn.attention import SDPBackend, sdpa_kernel

from matt_fast.loss.documents import find_documents
from matt_fast.loss.eager import eager_loss


def make_step(name: str, shape: Shape, device: str):
    """A callable that runs forward and backward once."""
    teacher, student, *segments = make_inputs(shape, None, device)
    if name == "flash":
        return flash_step(shape, student)
    for x in student:
        x.requires_grad_()
    inputs = teacher, student, *segments
    if name in ("eager", "compiled eager") and not eager_fits(
        shape, torch.finfo(DTYPES[shape.dtype]).bits // 8, device, shape.heads
    ):
        raise Refused("does not fit")
    if name == "compiled eager":
        return compiled_step(shape, inputs)
    prepared = None
    if name.startswith("triton"):
        ids = [x.to(device) for x in segments]
        # As data workers make it: on the CPU, which knows whether there are long segments.
        prepared = ids, plan_of(shape, inputs, segments).to(device) if "plan" in name else None

    def step():
        torch.autograd.grad(loss_of(name, shape, inputs, prepared), student)

    return step


def plan_of(shape: Shape, inputs, ids) -> matt_kernels.AimPlan:
    """The one that aim_loss itself would make."""
    (teacher, _, _), (query, _, value), *_ = inputs
    widths = matt_kernels.tile_widths(query, value, shape.variant, shape.metric)(teacher.shape[2], query.shape[2])
    return matt_kernels.aim_plan(*ids, variant=shape.variant, widths=widths)


def compiled_step(shape: Shape, inputs):
    teacher, student, *segments = inputs
    torch._dynamo.reset()
    documents = find_documents(*segments)
    options = {"scale": shape.head_dim**-0.5, "sliding_window": None, "softcap": None, "causal": True}
    options |= {"variant": shape.variant, "metric": shape.metric}
    weights = [1 / pair_count(shape, segments[1])]
    backend = "eager" if os.environ.get("TRITON_INTERPRET") == "1" else "inductor"

    @torch.compile(backend=backend)
    def compiled(teacher, student):
        return eager_loss(teacher, student, documents, weights, **options)

    def step():
        torch.autograd.grad(compiled(teacher, student), student)

    return step


def attention_step(backend: SDPBackend, student):
    """torch's attention of the student's q, k, v, causal, by one backend."""
    gradient = torch.randn_like(student[0])

    def step():
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(*student, is_causal=True, enable_gqa=True)
        torch.autograd.grad(output, student, gradient)

    return step


def flash_step(shape: Shape, student):
    backend = SDPBackend.FLASH_ATTENTION if student[0].is_cuda else SDPBackend.MATH
    if shape.dtype == "fp32" and student[0].is_cuda:
        backend = SDPBackend.EFFICIENT_ATTENTION
        student = (student[0], *(x.repeat_interleave(shape.group, 1) for x in student[1:]))
    gradient = torch.randn_like(student[0])
    student = tuple(x.requires_grad_() for x in student)
    shared = student[1].shape[1] != shape.heads

    def step():
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(*student, is_causal=True, enable_gqa=shared)
        torch.autograd.grad(output, student, gradient)

    return step
