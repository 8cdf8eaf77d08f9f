"""Floating-point operations and memory traffic of each part; `estimate` adds them up, the benchmarks divide by them.

Counted are matrix products, and the reads and writes of what is done element by element. Kernel launches are not.
Axes: tok d_model d_sae d_vocab.
"""

from dataclasses import dataclass
from typing import Literal

from sae_transfer.config import SAESpec
from sae_transfer.cost.device import Device
from sae_transfer.cost.shape import ModelShape, sae_params

Precision = Literal["bfloat16", "tf32", "float32"]
BYTES = {"bfloat16": 2, "tf32": 4, "float32": 4}

# A parameter and step, float32: weight, gradient and two moments read and written (the gradient by the clipping), and
# the gradient read once more for its norm.
ADAM_BYTES = 36
# Values read and written by one of Hugging Face's decoder layers outside its products: two norms and two residual sums
# (in units of d_model), rotary embeddings and attention (of the heads' width), activation and gate (of d_mlp).
LAYER_VALUES = (30, 25, 8)
# The same for a logit (made, searched for the maximum, shifted, exponentiated and summed; its tile stays in a CPU's
# cache, so half of it counts), and for a feature in a step by hand, and in SAELens's autograd.
LOGIT_VALUES, STEP_VALUES, AUTOGRAD_VALUES = 4, 14, 30
# The same for an activation: by the stream (into its block, out of it, scaled), and around an SAE's step.
STREAM_VALUES, AROUND_STEP_VALUES = 6, 8
EVALUATED_VALUES = 6  # of a feature while an SAE is evaluated
# Products of 2 d_in d_sae operations a token in a dense step: encode, decode, the gradients of the features and of both
# matrices. Gated has an auxiliary reconstruction beside them.
DENSE_PRODUCTS = {"standard": 5, "topk": 5, "batchtopk": 5, "jumprelu": 5, "gated": 7}
BY_HAND = ("standard", "topk", "batchtopk")  # the others' gradients are SAELens's autograd
TOP_K_BELOW = {"cpu": 0.07, "gpu": 0.0045}  # share of active features up to which their steps take sparse products


@dataclass(frozen=True)
class Part:
    """Work of one kind.

    Attributes:
        name: Of what.
        flops: Floating-point operations in matrix products.
        n_bytes: Read and written outside of them.
        precision: Of the products.
    """

    name: str
    flops: float
    n_bytes: float
    precision: Precision

    def seconds(self, device: Device) -> float:
        """On a device that is always busy: products at its rate, then the rest at its bandwidth, nothing overlapped."""
        return self.flops / device.rates[self.precision] + self.n_bytes / (device.gbps * 1e9)

    def times(self, n: float) -> "Part":
        """The same, n times over."""
        return Part(self.name, n * self.flops, n * self.n_bytes, self.precision)

    def __add__(self, other: "Part") -> "Part":
        assert (self.name, self.precision) == (other.name, other.precision)
        return Part(self.name, self.flops + other.flops, self.n_bytes + other.n_bytes, self.precision)


def layers_part(shape: ModelShape, n_layers: int, context_size: int, precision: Precision) -> Part:
    """Decoder layers, a token: 2 operations a parameter, 4 a value of the half context that causal attention sees."""
    flops = 2 * shape.n_params_layer + 2 * context_size * shape.d_attention
    widths = (shape.d_model, shape.d_attention, shape.d_mlp)
    values = sum(n * width for n, width in zip(LAYER_VALUES, widths, strict=True))
    return Part("language model", n_layers * flops, n_layers * values * BYTES[precision], precision)


def head_part(shape: ModelShape, precision: Precision, products: int = 1) -> Part:
    """Next-token losses, a token: the logits, in float32; the clean pass has a second product, for the KL."""
    flops = products * 2 * shape.d_model * shape.d_vocab
    return Part("language model", flops, LOGIT_VALUES * 4 * shape.d_vocab, precision)


def stream_part(shape: ModelShape, n_saes: int) -> Part:
    """Activations from the model to so many SAEs and around their steps, a token."""
    return Part("activations", 0, (STREAM_VALUES + n_saes * AROUND_STEP_VALUES) * 4 * shape.d_model, "float32")


def sae_step_part(spec: SAESpec, d_in: int, precision: Precision, l0: float | None = None) -> Part:
    """Loss and gradients of one SAE, a token.

    Args:
        spec: The SAE.
        d_in: Width of the site.
        precision: Of dense products.
        l0: Active features where the products after the encoder's are sparse; None where all are dense.

    Returns:
        The work.
    """
    by_hand = spec.architecture in BY_HAND and spec.sparsity_key != "k"  # top-k ones are by hand where they are sparse
    product = 2 * d_in * spec.d_sae
    if l0 is not None:
        # four sparse products, in each of which an active feature takes a float32 row of a matrix
        n_bytes = 6 * BYTES[precision] * spec.d_sae + 4 * 4 * d_in * l0
        return Part("SAE steps", product + 4 * 2 * d_in * l0, n_bytes, precision)
    products = DENSE_PRODUCTS[spec.architecture] + (spec.options.get("apply_b_dec_to_input", False) and not by_hand)
    values = STEP_VALUES * BYTES[precision] if by_hand else AUTOGRAD_VALUES * 4
    return Part("SAE steps", products * product, values * spec.d_sae, precision)


def adam_part(spec: SAESpec, d_in: int) -> Part:
    """Fused Adam with the norm of the gradients, a step of one SAE."""
    return Part("Adam", 0, ADAM_BYTES * sae_params(spec, d_in), "float32")


def reconstruct_part(d_in: int, d_sae: int) -> Part:
    """Encode and decode in evaluation, a token."""
    return Part("SAEs", 4 * d_in * d_sae, EVALUATED_VALUES * 4 * d_sae, "float32")


def is_sparse(spec: SAESpec, *, gpu: bool) -> bool:
    """Whether the step is sparse whatever the data: topk and batchtopk with few enough active features."""
    return spec.sparsity_key == "k" and spec.sparsity_value <= TOP_K_BELOW["gpu" if gpu else "cpu"] * spec.d_sae
