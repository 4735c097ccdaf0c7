"""Activation functions of a model in their fused form."""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2FN

# Names in a model's config of tanh-approximated GELUs that transformers composes of up to eight operations per layer.
# "gelu_python_tanh" is missing in some versions.
COMPOSED = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")


def fuse_gelu(lm: nn.Module) -> None:
    """Replace a model's composed tanh-approximated GELUs, in place, by torch's, which is a single operation.

    Same formula, so outputs differ by rounding only (4.8e-7 at most in float32), and no intermediate result is kept for
    the backward pass. The config keeps the activation's name. Functions that a model's code calls are left alone.
    """
    kinds = {type(ACT2FN[name]) for name in COMPOSED if name in ACT2FN}
    for parent in list(lm.modules()):
        for name, child in list(parent._modules.items()):  # named_children would omit a second reference
            if type(child) in kinds:
                setattr(parent, name, nn.GELU(approximate="tanh").train(child.training))
