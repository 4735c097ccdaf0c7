"""A GPU that does not exist: the real program runs on `cuda:0`, whose tensors keep their values on the CPU.

What a GPU would refuse (tensors on two devices, numpy of a GPU tensor) is an error here too, and whatever would make
the program wait for one is counted, by the functions that ask for it. Only a C++ compiler is needed (2 s), no CUDA.
Kernels, streams, races, the allocator and NCCL are out of its sight.
"""

from __future__ import annotations

import shutil
import subprocess
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

# Autograd asks torch for the accelerator and its streams, which a torch without CUDA lacks. A stub of each is enough.
STUB = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
static const Device gpu{DeviceType::CUDA, 0};
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return gpu; }
  Device exchangeDevice(Device) const override { return gpu; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
};
struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
static bool ready = [] {
  impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)] = new Guard;
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;
  return true;
}();
"""
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
READS |= {aten._unique2.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor, aten.bincount.default}
INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPY = {aten._to_copy.default, aten.copy_.default}  # these, and INDEX, may take tensors on two devices


class OnGPU(Tensor):
    """A tensor that claims to be on cuda:0; `value` holds its numbers."""

    def __new__(cls, value: Tensor):
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        own = torch.Tensor._make_wrapper_subclass(cls, value.shape, device=torch.device("cuda", 0), **layout)
        own.value = value
        return own

    def __tensor_flatten__(self):
        return ["value"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnGPU(inner["value"])

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """Compute an operation on the CPU; raise RuntimeError where CUDA would."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there, device = [t for t in tensors if isinstance(t, OnGPU)], kwargs.get("device")
    cpu = [t for t in tensors if not isinstance(t, OnGPU) and t.ndim]
    written = function._schema.is_mutable and bool(tensors) and not isinstance(tensors[0], OnGPU)
    if there and (cpu or written) and function not in COPY | INDEX:  # a scalar may come from the CPU, but not go there
        where = f"{function}, {cpu or tensors[:1]} on the CPU"
        raise RuntimeError(f"Expected all tensors to be on the same device: {where}")
    to_gpu = torch.device(device).type == "cuda" if device is not None else bool(there)
    args_, kwargs_ = tree_map(lambda x: x.value if isinstance(x, OnGPU) else x, (args, kwargs))
    if to_gpu and device is not None:
        kwargs_["device"] = torch.device("cpu")
    if kwargs_.get("pin_memory"):
        kwargs_["pin_memory"] = False
    found = function(*args_, **kwargs_)
    if function is aten.copy_.default:
        return args[0]
    if not to_gpu:
        return found
    found = tree_map(lambda x: OnGPU(x) if isinstance(x, Tensor) else x, found)
    return return_and_correct_aliasing(function, args, kwargs, found) if there else found


class FakeGPU(TorchDispatchMode):
    """Count what would wait for a GPU, by the two innermost functions of the project that lead there.

    waits: {(functions, reason): count}; attention: {kernel: calls}. root: the folder of the project's files.
    """

    def __init__(self, root: Path):
        super().__init__()
        self.root, self.waits, self.attention = root, Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if reason := self.wait(function, args, kwargs):
            self.waits[self.place(), reason] += 1
        return compute(function, args, kwargs)

    def place(self) -> str:
        """Return the innermost two functions of the project on the stack."""
        folders = (self.root, self.root / "components")
        codes = (frame.f_code for frame, _ in traceback.walk_stack(None))  # innermost first
        names = [code.co_name for code in codes if Path(code.co_filename).parent in folders]
        return " > ".join([name for name in names if name[0] != "<"][1::-1])

    @staticmethod
    def wait(function, args, kwargs) -> str | None:
        """Return why an operation would wait for a GPU, None if it would not."""
        on_gpu = [isinstance(t, OnGPU) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(on_gpu) and function in READS:
            return function._opname
        if any(on_gpu) and function in INDEX:
            places = [t for t in args[1] if isinstance(t, Tensor)]
            if any(t.dtype in (torch.bool, torch.uint8) for t in places):
                return "index by a mask"
            return None if all(isinstance(t, OnGPU) for t in places) else "index from the CPU"
        if function is aten._to_copy.default and kwargs.get("device") is not None:
            to_gpu = torch.device(kwargs["device"]).type == "cuda"
            if to_gpu != on_gpu[0] and not kwargs.get("non_blocking"):
                return "to the GPU" if to_gpu else "to the CPU"
            if to_gpu and not on_gpu[0] and args[0].ndim and not getattr(args[0], "pinned", False):
                return "from memory that is not pinned"
        if function is aten.copy_.default and on_gpu[0] != on_gpu[1] and not kwargs.get("non_blocking"):
            return "copy_"
        return None

    def attend(self, function, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        """F.scaled_dot_product_attention, noting the kernel that a GPU of sm80 or newer would take."""
        self.attention[kernel(query, key, value, attn_mask, is_causal)] += 1
        return function(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options)


def kernel(query, key, value, mask, is_causal) -> str:
    """Return the attention kernel that CUDA takes (ATen's sdp_utils.cpp), with "copy" if each call copies the mask."""
    cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    half = cast in (torch.bfloat16, torch.float16)
    if mask is None and half and (not is_causal or query.shape[-2] == key.shape[-2]):
        return "flash"
    places = [t.storage_offset() for t in (query, key, value)] + [query.shape[-1], value.shape[-1]]
    if any(n % (8 if half else 4) for n in places) or any(t.stride(-1) != 1 for t in (query, key, value)):
        return "math"
    fits = mask is None or (mask.dtype == cast and mask.stride(-1) == 1 and all(n % 8 == 0 for n in mask.stride()[:-1]))
    return "efficient" if fits else "efficient, copy"


def pin(tensor: Tensor, *_) -> Tensor:
    """Tensor.pin_memory, which needs CUDA."""
    tensor = tensor.clone()
    tensor.pinned = True
    return tensor


def can_fake_gpu() -> bool:
    """Whether this torch lacks CUDA and there is a compiler for the stub."""
    return not torch.backends.cuda.is_built() and shutil.which("g++") is not None


@contextmanager
def fake_gpu(folder: Path, root: Path) -> Iterator[FakeGPU]:
    """Let a torch without CUDA find one GPU. folder: for the compiled stub; root: the folder of the project's files."""
    torch_folder, stub = Path(torch.__file__).parent, folder / "stub.so"
    words = ["g++", "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(stub), f"-I{torch_folder}/include"]
    words += [f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
    if not stub.exists():
        subprocess.run(words, input=STUB, text=True, check=True)
    torch.ops.load_library(str(stub))
    properties = SimpleNamespace(total_memory=80 * 2**30, major=9, minor=0, name="fake")
    fakes = {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "_lazy_init": None}
    fakes |= {"is_bf16_supported": True, "get_device_name": "fake", "get_device_properties": properties}
    fakes |= {"get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "synchronize": None}
    before = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        for name, result in fakes.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, result=result, **__: result))
        stack.enter_context(patch.object(Tensor, "pin_memory", pin))
        stack.enter_context(patch.object(torch.accelerator, "is_available", lambda *_: True))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # the engine has no thread for this GPU
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes one on the CPU and moves it
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        gpu = FakeGPU(root)
        attend = partial(gpu.attend, F.scaled_dot_product_attention)
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attend))
        yield stack.enter_context(gpu)
