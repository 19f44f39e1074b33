"""What a backend can do, said by the backend: the dispatch and the local step choose by it, not by a backend's name."""

from dataclasses import dataclass

__all__ = ["Abilities"]


@dataclass(frozen=True)
class Abilities:
    """Every backend's module has one, `ABILITIES`, beside its operations and `unavailable(device)`.

    Attributes:
        devices: kinds of device (`torch.device.type`) that its operations are made for.
        closed_form: its operations are worth a local step in closed form; else layers train through autograd.
        in_place: `norm_act_backward` and `norm_act_backward_full` take `out`, which may be the very `conv` they read.
        optimizers: the backend whose fused optimizers go with it, by its name; None: the library's stay.
        weight_gradient: up to so many kernel elements of an output channel (C_in kh kw), a convolution's local step is
            to take `norm_act_weight_grad` for `norm_act_backward` and the library's weight gradient; 0: of none.
        gelu: it has `gelu_forward` and `gelu_backward`.
        silu: it has `silu_forward`, whose way back is `gelu_backward`.
        groups: it has `group_act_forward` and `group_act_backward`.
        attention: it has `attention_forward`, `attention_backward` and `takes_attention`.
        convolutions: it has `convolution` and `convolution_backward`, which a local step is to take for the library's.
        sums: it has `sum_act_forward` and `sum_act_backward`.
        lone_ends: `sum_act_forward` takes None for its second image, too: then a block's end is an activation of one.
        pools: it has `max_pool_forward` and `max_pool_backward`.
        transposes: it has `transposed`, for copies of [B, C, L] whose channels lie together, or cease to.
        partial_gradients: those optimizers step too where some parameters have no gradient, as autograd may leave them.
        vocabulary: it has `score_gradients`, for heads that work in pieces (`kernels.vocabulary`).
    """

    devices: frozenset[str]
    closed_form: bool = True
    in_place: bool = False
    optimizers: str | None = None
    partial_gradients: bool = False
    weight_gradient: int = 0
    gelu: bool = False
    silu: bool = False
    groups: bool = False
    attention: bool = False
    sums: bool = False
    lone_ends: bool = False
    pools: bool = False
    convolutions: bool = False
    transposes: bool = False
    vocabulary: bool = False
