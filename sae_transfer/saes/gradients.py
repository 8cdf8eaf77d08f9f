"""Gradients of an SAE's reconstruction error, worked out by hand and exactly: what autograd gives, for less.

With f the activations, x^ = f W_dec + b_dec, e = 2 (x^ - x) / batch and p the penalty of an active feature, the
gradient at an active pre-activation is e.W_dec + p, and zero at any other. A feature that is off for a token therefore
needs nothing but its encoder product, and where few are on all other products are sparse.

The batch is worked through in blocks of rows, so that `[batch d_sae]` is never in memory, and each block may go either
way.
"""

import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Int32
from sae_lens import TrainingSAE
from torch import Tensor

# torch says once a process that CSR tensors are in beta; those products used here are tested against autograd.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()

# Elements of `[tok d_sae]` at a time: a few MB on a CPU, which stay in its cache; on a GPU all, as a rule.
BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**30}
# Of the encoder's gradient at a time, whose sparse product comes transposed, in memory of its own. CPU: 2**21 took 25
# ms and 32 MiB where this takes 16 ms and 4 MiB (d_model 512, d_sae 8192, 30,720 active features).
STRIP_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
# Matrix products of fewer rows were slower (by half at 128).
BLOCK_ROWS = 256
# Active features are kept until there is one for so many elements of a block, then summed over tokens: those of a large
# batch are never in memory together, at 32 bytes each. CPU: with 8 for 16, steps at 6% active took 2 to 6% more memory
# than dense ones.
ELEMENTS_A_KEPT_FEATURE = 16


class ActiveFeatures(NamedTuple):
    """The active features of some rows, in row order: `values[i]`, above zero, at `(rows[i], cols[i])`."""

    rows: Int32[Tensor, "active"]
    cols: Int32[Tensor, "active"]
    values: Float[Tensor, "active"]


def blocks(n_rows: int, d_sae: int, device: torch.device) -> Iterator[slice]:
    """Consecutive blocks of rows."""
    return _slices(n_rows, _block_rows(d_sae, device))


def _block_rows(d_sae: int, device: torch.device) -> int:
    return max(BLOCK_ROWS, BLOCK_ELEMENTS[device.type] // d_sae)


class Gradients:
    """Gradients of the squared error and of a penalty per active feature, gathered block by block.

    A batch is: every block once, by `add_dense` or `add_sparse`, then `finish`. The gradients are written into `grad`
    of the SAE's parameters, over what is there.

    Attributes:
        sae_out: Reconstruction `[batch d_model]`.
        counts: On how many rows each feature was active `[d_sae]`.
        act_sums: Sum of each feature's activations `[d_sae]`.
    """

    def __init__(
        self,
        sae: TrainingSAE[Any],
        x: Float[Tensor, "batch d_model"],
        penalty: Float[Tensor, "d_sae"],
        dtype: torch.dtype,
    ) -> None:
        """Start on a batch.

        Args:
            sae: With the parameters W_enc, b_enc, W_dec and b_dec, float32.
            x: Float32.
            penalty: Derivative of the penalties by an active feature's activation.
            dtype: Of dense matrix products and activations; sparse products are float32.
        """
        self._W_enc, self._b_enc, self._W_dec, self._b_dec = sae.W_enc, sae.get_parameter("b_enc"), sae.W_dec, sae.b_dec
        self._subtracts_b_dec = sae.cfg.apply_b_dec_to_input
        self._x, self._penalty, self._dtype = x, penalty, dtype
        self._encoder_in = x - sae.b_dec if self._subtracts_b_dec else x
        self._cast: dict[Tensor, Tensor] = {}
        self._error = torch.empty_like(x)
        self._kept: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # rows, columns, values, gradients
        self._most_kept = _block_rows(len(self._W_dec), x.device) * len(self._W_dec) // ELEMENTS_A_KEPT_FEATURE
        self._has_begun = False  # whether the weights' `grad` is of this batch
        for parameter in (self._W_enc, self._b_enc, self._W_dec, self._b_dec):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        self._b_enc_grad = torch.zeros_like(penalty)
        self.sae_out = torch.empty_like(x)
        self.counts = torch.zeros_like(penalty)
        self.act_sums = torch.zeros_like(penalty)

    def pre_acts(self, block: slice) -> Float[Tensor, "tok d_sae"]:
        """The encoder's product on a block of rows."""
        if sum(len(grad) for *_, grad in self._kept) >= self._most_kept:
            self._add_kept()  # now, between two blocks, when the memory of neither is taken
        encoder_in = self._encoder_in[block].to(self._dtype)
        return torch.addmm(self._of_dtype(self._b_enc), encoder_in, self._of_dtype(self._W_enc))

    def add_dense(self, block: slice, acts: Float[Tensor, "tok d_sae"]) -> None:
        """Take in a block by its activations, positive or zero, which are overwritten."""
        W_dec = self._of_dtype(self._W_dec)
        error = self._take(block, torch.addmm(self._of_dtype(self._b_dec), acts, W_dec)).to(self._dtype)
        self._accumulate(_grad(self._W_dec), acts.T, error)
        self.act_sums += acts.sum(0, dtype=torch.float32)
        is_active = acts.sign_()
        self.counts += is_active.sum(0, dtype=torch.float32)
        grad = torch.addmm(self._penalty.to(self._dtype), error, W_dec.T).mul_(is_active)
        self._accumulate(_grad(self._W_enc), self._encoder_in[block].to(self._dtype).T, grad)
        self._b_enc_grad += grad.sum(0, dtype=torch.float32)
        self._has_begun = True

    def add_sparse(self, block: slice, active: ActiveFeatures) -> None:
        """Take in a block by its active features, whose rows count from the block's first."""
        shape = (block.stop - block.start, len(self._W_dec))
        starts = _starts(active.rows, shape[0])
        error = self._take(
            block, torch.addmm(self._b_dec, _csr(starts, active.cols, active.values, shape), self._W_dec)
        )
        places = _csr(starts, active.cols, torch.zeros_like(active.values), shape)
        grad = torch.sparse.sampled_addmm(places, error, self._W_dec.T, beta=0.0).values() + self._penalty[active.cols]
        self._kept.append((active.rows + block.start, active.cols, active.values, grad))

    def add_features(
        self,
        features: Int[Tensor, "some"],
        W_dec_grad: Float[Tensor, "some d_model"],
        pre_acts_grad: Float[Tensor, "batch some"],
    ) -> None:
        """Add, after `finish`, what another loss has to say about some features."""
        _grad(self._W_dec).index_add_(0, features, W_dec_grad)
        _grad(self._W_enc).index_add_(1, features, self._encoder_in.T @ pre_acts_grad)
        b_enc_grad = pre_acts_grad.sum(0)
        _grad(self._b_enc).index_add_(0, features, b_enc_grad)
        if self._subtracts_b_dec:
            _grad(self._b_dec).sub_(self._W_enc[:, features] @ b_enc_grad)

    def finish(self) -> None:
        """Put the gradients in place."""
        if self._kept:
            self._add_kept()
        _grad(self._b_enc).copy_(self._b_enc_grad)
        torch.sum(self._error, 0, out=_grad(self._b_dec))
        if self._subtracts_b_dec:
            _grad(self._b_dec).sub_(self._W_enc @ self._b_enc_grad)

    def squared_error(self) -> Float[Tensor, ""]:
        """Squared error, mean over the batch."""
        return self._error.square().sum() * (len(self._x) / 4)

    def residual(self, block: slice) -> Float[Tensor, "tok d_model"]:
        """What the reconstruction of a block leaves out."""
        return self._x[block] - self.sae_out[block]

    def _take(self, block: slice, sae_out: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_model"]:
        """Keep a block's reconstruction; its gradient."""
        self.sae_out[block] = sae_out
        return torch.sub(self.sae_out[block], self._x[block], out=self._error[block]).mul_(2 / len(self._x))

    def _of_dtype(self, parameter: Tensor) -> Tensor:
        """Of dense products; made when the first block needs it, once a batch."""
        if parameter not in self._cast:
            self._cast[parameter] = parameter.to(self._dtype)
        return self._cast[parameter]

    def _accumulate(self, grad: Tensor, left: Tensor, right: Tensor) -> None:
        if left.dtype == grad.dtype:
            torch.addmm(grad, left, right, beta=float(self._has_begun), out=grad)
        elif self._has_begun:
            grad.add_(left @ right)
        else:
            grad.copy_(left @ right)

    def _add_kept(self) -> None:
        """The weights' gradients of sparse blocks: a feature's is a sum over the tokens that it was active on."""
        rows, cols, values, grads = (torch.cat(part) for part in zip(*self._kept, strict=True))
        self._kept = []
        starts, order = _starts(cols, len(self._W_dec)), torch.argsort(cols, stable=True)
        del cols
        # one after the other, so that each is there twice alone
        rows = rows[order]
        values = values[order]
        grads = grads[order]
        del order
        ends = starts.long()
        self.counts += ends.diff()
        self.act_sums += torch.segment_reduce(values, "sum", offsets=ends, initial=0.0)
        self._b_enc_grad += torch.segment_reduce(grads, "sum", offsets=ends, initial=0.0)
        beta = float(self._has_begun)
        W_dec_grad, W_enc_grad = _grad(self._W_dec), _grad(self._W_enc)
        acts = _csr(starts, rows, values, (len(self._W_dec), len(self._x)))
        torch.addmm(W_dec_grad, acts, self._error, beta=beta, out=W_dec_grad)
        # a strip of features at a time: the sparse product comes transposed, and large temporaries cost page faults
        size = max(BLOCK_ROWS, STRIP_ELEMENTS[self._x.device.type] // self._x.shape[1])
        strips = list(_slices(len(self._W_dec), size))
        bounds = ends[[0, *(strip.stop for strip in strips)]].tolist()  # all at once: a GPU is waited for
        for strip, (first, last) in zip(strips, pairwise(bounds), strict=True):
            own = starts[strip.start : strip.stop + 1] - starts[strip.start]
            shape = (strip.stop - strip.start, len(self._x))
            # copied, since a slice may begin where a GPU's sparse products cannot read several values at once
            part = (_csr(own, rows[first:last], grads[first:last].clone(), shape) @ self._encoder_in).T
            W_enc_grad[:, strip] = part.add_(W_enc_grad[:, strip]) if self._has_begun else part
        self._has_begun = True


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _starts(rows: Int[Tensor, "active"], n_rows: int) -> Int[Tensor, "starts"]:
    """Where each row begins among the entries, and their number; int32 is the sparse products' own type."""
    starts = torch.zeros(n_rows + 1, dtype=torch.int32, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=n_rows).cumsum(0)
    return starts


def _csr(starts: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, cols, values, shape, check_invariants=False)
