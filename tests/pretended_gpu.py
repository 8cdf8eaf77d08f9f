"""A GPU for machines without one: tensors that say `cuda:0`, computed on the CPU.

What is tried so are the branches and devices of code for a GPU, and the data types it asks for: an operation on tensors
of two devices is an error here as it is there, and so is reading one from numpy. Kernels, streams and memory are not
tried, nor what torch.autocast does; and autograd runs forward only.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CUDA = torch.device("cuda:0")
# What torch's own C++ is told, which in a build without CUDA knows nothing of such a device, not even how to guard it.
UNDERLYING = torch.device("privateuseone:0")
_setup_privateuseone_for_python_backend()

aten = torch.ops.aten
WRITING = {aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
INDEXING = {aten.index.Tensor, *WRITING}
# Operations that may see two devices; an index may be on the CPU.
BETWEEN_DEVICES = {aten.copy_.default, aten._to_copy.default, *INDEXING}
# Those that take not even a number from another one.
STRICT = {aten.stack.default, aten.cat.default}
# What is answered by the CPU's tensor: numbers, and where the values lie (safetensors asks whether tensors share them).
OF_THE_CPU = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
OF_THE_CPU |= {Tensor.untyped_storage, Tensor.data_ptr}


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """While it is entered there is one GPU, `cuda` or `cuda:0`, in this thread and in that of an activation stream."""
    answers: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "a pretended GPU",
        "get_device_capability": lambda *_: (9, 0),
        "empty_cache": lambda: None,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda _: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", answer))
        stack.enter_context(mock.patch("sae_transfer.saes.stream.ThreadPoolExecutor", _Pool))
        # by hand and not by autograd, however many features they have
        stack.enter_context(mock.patch.dict("sae_transfer.saes.steps.TOP_K_BELOW", {"cuda": 1.0}))
        stack.enter_context(_modes())
        yield


class _Stream:
    def __init__(self, *_: Any) -> None:
        """Of any device."""

    def synchronize(self) -> None:
        """Everything is done already."""


class _Pool(ThreadPoolExecutor):
    """Modes are of one thread."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        return super().submit(_modes()(work), *args, **options)


@contextlib.contextmanager
def _modes() -> Iterator[None]:
    with _Calls(), _Operations():
        yield


class _OnGpu(Tensor):
    """A tensor said to be on the GPU; views of it and what is written into it are its CPU tensor's."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "_OnGpu":
        strided = on_cpu.layout == torch.strided
        layout = {"strides": on_cpu.stride(), "storage_offset": on_cpu.storage_offset()} if strided else {}
        made = Tensor._make_wrapper_subclass(cls, on_cpu.size(), dtype=on_cpu.dtype, device=UNDERLYING, **layout)
        made.on_cpu = on_cpu
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        # a module's weights are then replaced when it moves here
        return ["on_cpu"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return CUDA
        if func == Tensor.is_cuda.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return True
        if func == Tensor.data.__set__:  # pyright: ignore[reportAttributeAccessIssue]
            args[0].on_cpu = args[1].on_cpu
            return None
        if func in OF_THE_CPU:
            return func(args[0].on_cpu, *args[1:])
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"on {CUDA}: {self.on_cpu}"


class _Calls(TorchFunctionMode):
    """What torch settles before it comes to operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_with_index, (args, kwargs or {}))
        if func is torch.tensor and (device := kwargs.pop("device", None)) is not None:
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Those that make tensors, and those that move them here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation: on the CPU's tensors, after looking at where its own are; the result is where it would be."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    n_here = sum(isinstance(tensor, _OnGpu) for tensor in tensors)
    if func is aten._has_compatible_shallow_copy_type.default:
        return n_here != 1
    if func is aten._fused_sdp_choice.default:
        return 0  # plain products: the fused kernels are called by the names of their devices
    elsewhere = [t for t in tensors if not isinstance(t, _OnGpu) and (t.dim() or func in STRICT)]
    if func in WRITING:
        elsewhere = [args[2]] if args[2].dim() and isinstance(args[2], _OnGpu) != isinstance(args[0], _OnGpu) else []
    elif func in BETWEEN_DEVICES:
        elsewhere = []
    if n_here and elsewhere:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, cuda:0 or cpu")
    if func in INDEXING and n_here and not isinstance(args[0], _OnGpu):
        raise RuntimeError(f"{func}: indices of a tensor on the CPU should be there too")
    asked = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    if asked is not None:
        here = asked.type in (CUDA.type, UNDERLYING.type)
    else:
        here = n_here > 0 and (func is not aten.copy_.default or isinstance(args[0], _OnGpu))
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if inner_kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False  # CUDA's to do
    out = func(*inner_args, **inner_kwargs)
    if asked is not None and tensors and (n_here > 0) != here and out.data_ptr() == inner_args[0].data_ptr():
        out = out.clone()  # between devices everything is a copy
    if not here:
        return args[0] if func is aten.copy_.default else out
    with torch.inference_mode(False):  # a wrapper has no version that inference could do without
        out = tree_map(lambda each: _OnGpu(each) if isinstance(each, Tensor) else each, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if func._schema.is_mutable else out


def _inner(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type in (CUDA.type, UNDERLYING.type) else value
    return value.on_cpu if isinstance(value, _OnGpu) else value


def _with_index(value: Any) -> Any:
    """Which GPU `cuda` means, torch would ask CUDA."""
    is_cuda = isinstance(value, str | torch.device) and str(value) == CUDA.type
    return CUDA if is_cuda else value
