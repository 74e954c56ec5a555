"""A pretended GPU: tensors that claim to be on cuda:0 and are computed on the CPU.

It refuses what mixes devices, as CUDA does, and counts what a GPU would wait for: copies between host and device, and
operations whose result the host must know (`Watch`). Whoever imports this becomes a process with one GPU, hence
`prepare` starts another process: torch asks for the number of devices deep in its autograd engine, so that a small
library must answer in its place.
"""

import contextlib
import ctypes
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda:0")
aten = torch.ops.aten
_LIBRARIES = {
    # c10::cuda::device_count() of torch, and the driver that torch looks for.
    "devices.so": "int devices = 0; signed char _ZN3c104cuda12device_countEv(void) { return (signed char)devices; }",
    "libcuda.so.1": """
        int cuInit(unsigned flags) { return 100; }
        int cuDriverGetVersion(int *version) { *version = 0; return 100; }
        int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = *active = 0; return 0; }
    """,
}


def prepare(folder: Path) -> dict[str, str]:
    """Build the libraries; return the environment of a process that pretends."""
    for name, text in _LIBRARIES.items():
        source = folder / f"{name}.c"
        source.write_text(text)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(folder / name), str(source)], check=True)
    places = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    own = {"LD_PRELOAD": str(folder / "devices.so"), "LD_LIBRARY_PATH": places, "PYTHONPATH": str(ROOT)}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def pretend() -> None:
    """Make torch believe in one GPU."""
    torch._C._ensureCUDADeviceGuardSet()
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10_cuda.so"))
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_byte)(lambda index: False)
    pretend.kept = answer  # type: ignore[attr-defined]
    c10._ZN3c104cuda9_internal20setHasPrimaryContextEPFbaE(answer)
    ctypes.c_int.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "devices").value = 100
    torch.__future__.set_overwrite_module_params_on_conversion(True)

    class Properties:
        multi_processor_count, total_memory, name, major, minor = 132, 80 << 30, "pretended", 9, 0

    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda._lazy_init = lambda: None
    cuda.amp.common.amp_definitely_not_available = lambda: False
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
    cuda.get_device_properties = lambda device=None: Properties()
    cuda.get_device_name = lambda device=None: Properties.name
    cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.max_memory_allocated = lambda device=None: 0
    cuda.mem_get_info = lambda device=None: (60 << 30, 80 << 30)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.synchronize = lambda device=None: None
    cuda.device_of = cuda.device = lambda what: contextlib.nullcontext()
    tensor = torch.tensor

    def made(data, *arguments, device=None, **options):
        there = device is not None and torch.device(device).type == "cuda"
        found = tensor(data, *arguments, device=None if there else device, **options)
        return found.to(device) if there else found

    torch.tensor = made


class OnGPU(torch.Tensor):
    """A tensor that claims to be on the GPU, around one on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        form = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=CUDA)
        self = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **form)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def __getitem__(self, index):
        return super().__getitem__(_indices(index))  # of a list, torch would make a tensor on the GPU itself

    def __setitem__(self, index, value):
        super().__setitem__(_indices(index), value)

    def __deepcopy__(self, memo):
        copy = OnGPU(self.inner.clone())
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(copy, self.requires_grad)
        return copy.requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol):
        return self.inner.clone().__reduce_ex__(protocol)

    def __repr__(self, **_):
        return f"OnGPU({tuple(self.shape)}, {self.dtype})"

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()


class Watch(TorchDispatchMode):
    """Everything that is created on cuda:0 while it is active is pretended, and counted.

    Attributes:
        events: (kind, where): how often the host waited (`wait`), or copied (`copy`, `pinned copy`), at a line of ours.
        operations: number of kernels that a GPU would have launched.
        bytes: that they would have read and written, each operand and result once.
    """

    active: "Watch | None" = None

    def __init__(self):
        super().__init__()
        self.events: Counter[tuple[str, str]] = Counter()
        self.operations = self.bytes = 0

    def __enter__(self):
        Watch.active = self
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def note(self, kind):
        self.events[kind, _place()] += 1

    def forget(self):
        self.events.clear()
        self.operations = self.bytes = 0

    def launched(self, *tensors, times=1):
        """Count kernels, and the bytes of what they take and give."""
        self.operations += times
        self.bytes += sum(t.numel() * t.element_size() for t in _tensors(tensors))


def _place():
    """The line of dpopt that is at work."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(ROOT / "dpopt")):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


_WAITS = {
    getattr(aten, name).default
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")
} | {aten.repeat_interleave.Tensor}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_FREE = {
    getattr(aten, name).default
    for name in (
        *("view", "detach", "alias", "t", "expand", "permute", "squeeze", "unsqueeze", "_unsafe_view", "as_strided"),
        *("_reshape_alias", "lift_fresh", "split_with_sizes", "diagonal", "empty_like", "empty_strided", "new_empty"),
        *("new_empty_strided", "is_pinned", "_local_scalar_dense"),
    )
} | {aten.transpose.int, aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.unbind.int, aten.squeeze.dim}
_FREE |= {aten.squeeze.dims, aten.empty.memory_format, aten.view.dtype}


def compute(func, args, kwargs):
    """One operation: on the device where CUDA would run it, or not at all."""
    watch = Watch.active
    tensors = list(_tensors((args, kwargs)))
    there, here = [t for t in tensors if isinstance(t, OnGPU)], [t for t in tensors if not isinstance(t, OnGPU)]
    wanted = kwargs.get("device")
    on_gpu = bool(there) if wanted is None else torch.device(wanted).type == "cuda"
    if any(t.device.type == "meta" for t in here) or (wanted is not None and torch.device(wanted).type == "meta"):
        return func(*_mapped(_inner, args), **_mapped(_inner, kwargs))
    if func is aten._pin_memory.default:
        return args[0]
    if func is aten.is_pinned.default:
        return True
    if func in (aten._to_copy.default, aten.copy_.default):
        source, target = (args[0], on_gpu) if func is aten._to_copy.default else (args[1], isinstance(args[0], OnGPU))
        on_gpu = target
        if isinstance(source, OnGPU) != target:
            later = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            watch.note("pinned copy" if later and target else "copy")
    elif there:
        # A tensor of one number may come from the host. So may indices, at the price of a copy.
        strangers = [t for t in here if t.ndim]
        if func in _INDEXING:
            if isinstance(args[0], OnGPU) and any(i is not None and not isinstance(i, OnGPU) for i in args[1]):
                watch.note("copy")
                strangers = []
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                watch.note("wait")
        if strangers:
            watch.note("mix")
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} at {_place()}")
        if func in _WAITS:
            watch.note("wait")
    known = {id(t.inner): t for t in there}
    options = _mapped(_inner, kwargs)
    if options.get("device") is not None:
        options["device"] = torch.device("cpu")
    options.pop("pin_memory", None)
    result = func(*_mapped(_inner, args), **options)
    if on_gpu and func not in _FREE:
        watch.launched(args, kwargs, result)

    def wrapped(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, OnGPU):
            return x
        return known.get(id(x)) if id(x) in known else OnGPU(x) if on_gpu else x

    return _mapped(wrapped, result)


def _tensors(x):
    """Those in arguments or results; torch's own walk takes half of a run's time."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (tuple, list, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from _tensors(part)


def _mapped(f, x):
    if isinstance(x, (tuple, list)):
        return type(x)([_mapped(f, part) for part in x])
    return {name: _mapped(f, part) for name, part in x.items()} if isinstance(x, dict) else f(x)


def _indices(index):
    return torch.tensor(index) if isinstance(index, list) else index


def _inner(x):
    return x.inner if isinstance(x, OnGPU) else x
