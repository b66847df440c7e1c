"""The losses as autograd functions: each calls one custom op forward and one backward."""

import torch

from matt_kernels import ops

PLAN = slice(6, 14)  # where the plan's tensors are among those kept


class AimLoss(torch.autograd.Function):
    """Variant aim. Arguments: teacher's and student's q, k, v, the plan's eight tensors, and then those of
    ops.aim_forward, in order."""

    @staticmethod
    def forward(ctx, *arguments):
        tensors, options = arguments[: PLAN.stop], arguments[PLAN.stop :]
        loss, *kept = ops.aim_forward(*tensors[:6], list(tensors[PLAN]), *options)
        *ctx.options, _, _, ctx.key_needed, ctx.value_needed = options
        # Only what backward reads: nothing but the queries and dQ when keys and values need no gradient.
        ctx.all_kept = ctx.key_needed or ctx.value_needed
        ctx.save_for_backward(*(tensors if ctx.all_kept else tensors[3:4]), *(kept if ctx.all_kept else kept[:2]))
        return loss

    @staticmethod
    def backward(ctx, output_gradient):
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:6]
        if not ctx.all_kept:
            query, unit, gradient = saved
            found = ops.aim_query_backward(query, gradient, unit, output_gradient), None, None
        else:
            tensors, plan, kept = saved[:6], list(saved[PLAN]), list(saved[PLAN.stop :])
            found = ops.aim_backward(
                *tensors, plan, *ctx.options, kept, output_gradient, ctx.key_needed, ctx.value_needed
            )
        gradients = (x if wanted else None for x, wanted in zip(found, needed, strict=True))
        return None, None, None, *gradients, *[None] * (len(ctx.needs_input_grad) - 6)


class AimStarLoss(torch.autograd.Function):
    """Variant aim_star. Arguments as those of AimLoss, of ops.attend_forward in the end."""

    @staticmethod
    def forward(ctx, *arguments):
        tensors, options = arguments[: PLAN.stop], arguments[PLAN.stop :]
        loss, *kept = ops.attend_forward(*tensors[:6], list(tensors[PLAN]), *options)
        teacher_width, student_width, _, scale, softcap, *_ = options
        ctx.options = teacher_width, student_width, scale, softcap
        ctx.save_for_backward(*tensors[3:], *kept)
        return loss

    @staticmethod
    def backward(ctx, output_gradient):
        query, key, value, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:6]
        plan, kept = list(saved[:8]), list(saved[8:])
        found = ops.attend_backward(query, key, value, plan, *ctx.options, kept, output_gradient, *needed)
        gradients = (x if wanted else None for x, wanted in zip(found, needed, strict=True))
        return None, None, None, *gradients, *[None] * (len(ctx.needs_input_grad) - 6)
