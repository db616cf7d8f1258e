"""A simulated GPU: tensors that report CUDA as their device and hold their values on the CPU.

Within :func:`shadow_device`, ``device="cuda"`` gives such tensors. An operation on one of them and a tensor of the CPU
raises as PyTorch would, and synchronisations between host and device are counted by the line that caused them.

Not simulated: kernels that are missing or differ on CUDA, the order of floating-point sums, memory, choices by device
in PyTorch's C++ (autocast, fused optimizers), and copies made by C++.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode

import escaip
from escaip.ops.autograd import OPERATORS
from escaip.ops.outer import sum_outer

CUDA = torch.device("cuda", 0)
_PACKAGE = str(Path(escaip.__file__).parent)
aten = torch.ops.aten

# Operations whose output size, or a value read by the host, depends on values.
_WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.bincount, aten.equal, aten.is_nonzero, aten.histc, aten.nonzero_static,
}  # fmt: skip
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_COPYING = {aten.copy_, aten.copy, aten._foreach_copy_}
# Operations besides pointwise ones that accept a CPU scalar.
_NUMBERS = {aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_, aten.index_put, aten.index_put_}


class ShadowTensor(torch.Tensor):
    """A tensor that reports CUDA as its device, with its values in ``held``."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> ShadowTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=held.device,
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    # The true device is the CPU, whose queue autograd uses.
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"shadow of {self.held}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            made = ShadowTensor(self.held.clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                made._is_param = True
            memo[id(self)] = made
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "escaip":
            return _own_operator(func, args)
        tensors = list(_tensors((args, kwargs)))
        _check_devices(func, args, [x for x in tensors if not isinstance(x, ShadowTensor)])
        if _waits:
            _count_waits(func, args, kwargs)
        shadows = {id(x.held): x for x in tensors if isinstance(x, ShadowTensor)}
        found = func(*_mapped(_held, args), **_mapped(_held, kwargs))
        assert all(x.shape == x.held.shape for x in shadows.values()), f"{func} changed a shape in place"
        if func.overloadpacket is aten.copy_ and not isinstance(args[0], ShadowTensor):
            return found
        return _mapped(lambda x: shadows[id(x)] if id(x) in shadows else _shadow(x), found)


def _tensors(x: Any) -> Iterator[Tensor]:
    """Yields all tensors in lists, tuples and dicts."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple | dict):
        for each in x.values() if isinstance(x, dict) else x:
            yield from _tensors(each)


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """Applies a function to the leaves of lists, tuples and dicts."""
    if isinstance(x, dict):
        return {name: _mapped(function, value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return (list if isinstance(x, list) else tuple)(_mapped(function, value) for value in x)
    return function(x)


def _own_operator(func: Any, args: Any) -> Any:
    """Runs one of our operators in Python, as on CUDA; plain operations replace Triton's slow interpreter.

    tests/ops/test_triton.py compares the two.
    """
    name = func._schema.name
    if "_triton" in name:
        blocked = getattr(torch.ops.escaip, name.removeprefix("escaip::").replace("triton", "blocked"))
        return _mapped(_shadow, blocked(*_mapped(_held, args)))
    if name in ("escaip::sum_outer", "escaip::apply_rows"):
        x, y, offsets = _mapped(_held, args)
        center = torch.repeat_interleave(offsets.diff())
        summed = name == "escaip::sum_outer"
        return _shadow(
            sum_outer(x, y, center, len(offsets) - 1) if summed else torch.einsum("tcm,tm->tc", x[center], y)
        )
    suffix = name.removeprefix("escaip::attention_blocked")
    function = getattr(OPERATORS["blocked"], f"run{suffix}") if suffix != name else OPDEFS[name]._init_fn
    with _ShadowMode():
        return function(*args)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, ShadowTensor) else x


def _shadow(x: Any) -> Any:
    return ShadowTensor(x) if isinstance(x, Tensor) and not isinstance(x, ShadowTensor) else x


def _check_devices(func: Any, args: Any, others: list[Tensor]) -> None:
    """Raises as PyTorch does for tensors of the host, other than scalars, sources of copies and indices."""
    packet = func.overloadpacket
    if not others or packet in _COPYING:
        return
    if packet in _INDEXING and isinstance(args[0], ShadowTensor):
        others = [x for x in others if not any(x is index for index in args[1])]
    if torch.Tag.pointwise in func.tags or packet in _NUMBERS or "linalg" in func._schema.name:
        others = [x for x in others if x.dim()]
    if others:
        shapes = ", ".join(str(tuple(x.shape)) for x in others)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func}, "
            f"cpu: {shapes})"
        )


def _count_waits(func: Any, args: Any, kwargs: Any) -> None:
    packet = func.overloadpacket
    if packet in _WAITING or (packet is aten.repeat_interleave and kwargs.get("output_size") is None):
        _wait(str(func))
    elif packet in _INDEXING:
        indices = [x for x in args[1] if x is not None]
        filled = packet is not aten.index and len(args) > 2 and args[2].numel() == 1  # a masked_fill
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices) and not filled:
            _wait(f"{func} by a mask")
        if not all(isinstance(x, ShadowTensor) for x in indices):
            _wait(f"{func} by indices of the host")
    elif packet in _COPYING and len({isinstance(x, ShadowTensor) for x in _tensors(args[:2])}) > 1:
        _wait(f"{func} between devices")


_waits: list[Counter[str]] = []


def _wait(what: str) -> None:
    """Counts a synchronisation, by the line of the package that causes it."""
    if not _waits:
        return
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    place = f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno}" if frame else "elsewhere"
    for counter in _waits:
        counter[f"{place} {what}"] += 1


@contextlib.contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Counts synchronisations of host and device within, by place."""
    counter: Counter[str] = Counter()
    _waits.append(counter)
    try:
        yield counter
    finally:
        _waits.remove(counter)


class _ToDevice(torch.autograd.Function):
    """A copy between host and device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_device: bool) -> Tensor:
        return ShadowTensor(x.detach().clone()) if to_device else x.held.clone()  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _moved(grad, not isinstance(grad, ShadowTensor)), None


def _moved(x: Tensor, to_device: bool, what: str = "copy", waits: bool = True) -> Tensor:
    if isinstance(x, ShadowTensor) == to_device:
        return x
    if waits or not to_device:  # what is copied from memory that is not pinned is staged before the call returns
        _wait(f"{what} {'from the host' if to_device else 'to the host'}")
    return _ToDevice.apply(x, to_device)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, int):
        return True
    return torch.device(device).type == "cuda"


class _ShadowMode(TorchFunctionMode):
    """Removes CUDA devices from the arguments of calls."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        special = _METHODS.get(getattr(func, "__name__", ""))
        if special is not None and args and isinstance(args[0], Tensor):
            return special(func, args, kwargs)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        to_device = _is_cuda(device)
        of_shadow = bool(args) and isinstance(args[0], ShadowTensor)
        name = getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor", "asarray", "scalar_tensor"):
            return _moved(func(*args, **kwargs), to_device, f"{name}()")
        if of_shadow and to_device:
            return func(*args, **kwargs)
        if of_shadow:
            return func(args[0].held, *args[1:], **kwargs)
        return _shadow(func(*args, **kwargs, device="cpu")) if to_device else func(*args, **kwargs, device=device)


def _to(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Replaces all forms of ``Tensor.to``."""
    x, device, rest = args[0], kwargs.pop("device", None), []
    other = kwargs.pop("other", None)
    for value in args[1:]:
        if isinstance(value, Tensor):
            other = value
        elif isinstance(value, torch.device | str):
            device = value
        elif isinstance(value, torch.dtype):
            kwargs["dtype"] = value
        elif isinstance(value, bool):
            rest.append(value)
    kwargs.update(zip(("non_blocking", "copy"), rest, strict=False))
    if other is not None:
        device, kwargs["dtype"] = other.device, other.dtype
    waits = not kwargs.pop("non_blocking", False)
    moved = x if device is None else _moved(x, _is_cuda(device), waits=waits)
    if moved is not x:
        kwargs.pop("copy", None)
    return func(moved, **kwargs) if kwargs.get("dtype") is not None or kwargs.get("copy") else moved


def _new_tensor(func: Any, args: Any, kwargs: Any) -> Tensor:
    to_device = _is_cuda(kwargs.pop("device", None) or args[0].device)
    kwargs.setdefault("dtype", args[0].dtype)
    return _moved(torch.tensor(*args[1:], **kwargs), to_device, "new_tensor()")


def _numpy(func: Any, args: Any, kwargs: Any) -> Any:
    if isinstance(args[0], ShadowTensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
    return func(*args, **kwargs)


def _where(func: Any, args: Any, kwargs: Any) -> Any:
    """Replaces ``torch.where``, which copies even scalar tensors from the host."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if len({isinstance(x, ShadowTensor) for x in tensors}) > 1:
        _wait("where() with a tensor of the host")
    return func(*args, **kwargs)


def _tolist(func: Any, args: Any, kwargs: Any) -> Any:
    return func(_moved(args[0].detach(), False, "tolist()"))


def _data_ptr(func: Any, args: Any, kwargs: Any) -> Any:
    return func(_held(args[0]))


_METHODS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "to": _to, "new_tensor": _new_tensor, "numpy": _numpy, "__array__": _numpy, "tolist": _tolist, "where": _where,
    "data_ptr": _data_ptr,
    "cpu": lambda func, args, kwargs: _moved(args[0], False),
    "cuda": lambda func, args, kwargs: _moved(args[0], True),
}  # fmt: skip


_ENGINE = torch.autograd._engine_run_backward


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    with _ShadowMode():
        return _ENGINE(*args, **kwargs)


@contextlib.contextmanager
def shadow_device() -> Iterator[None]:
    """Makes ``cuda`` a device of this process within the context."""
    answers = {
        "is_available": True, "get_device_capability": (9, 0), "mem_get_info": (2**33, 2**33), "memory_reserved": 0,
        "memory_allocated": 0, "current_device": 0, "device_count": 1, "is_current_stream_capturing": False,
    }  # fmt: skip
    # Modules get new parameters: the values of one cannot be exchanged for those of another class.
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, value=answer: value))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", _run_backward))
        stack.enter_context(_ShadowMode())
        yield
