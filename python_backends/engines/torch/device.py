"""What a CUDA device does for the engine beyond tensors: streams, graphs, and memory that other processes open."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

import msgspec
import torch

from python_backends.core.errors import UNREADABLE
from python_backends.engines.torch.cuda_driver import CudaDriver

if TYPE_CHECKING:
    from python_backends.engines.torch.paged_attention import Flex

_WARM_UPS = 2  # before a graph is captured: kernels are compiled and libraries settle on theirs
_FIRST, _LATER = -1, 0  # priorities of streams


class Device(Protocol):
    """Where a model computes, if that has a memory of its own."""

    torch_device: torch.device

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """In the device's memory; can be shared."""

    def staging(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Zeros on the host, int32, that are quickly copied to the device."""

    def flex(self, kinds: int) -> Flex:
        """Attention for so many shapes of rows."""

    def captured(self, compute: Callable[[], None]) -> Callable[[], None]:
        """What does the same work again, on the same memory, whenever it is called. Calls `compute` some times first."""

    def computing(self) -> AbstractContextManager[None]:
        """Steps, sampling and captures happen in it, on one thread; when it ends, they are done."""

    def copying(self) -> AbstractContextManager[None]:
        """Copies beside steps; when it ends, they are done. Any thread."""

    def share(self, tensor: torch.Tensor) -> bytes:
        """What `open` takes in another process of this host. Raises OSError."""

    def open(self, shared: bytes) -> torch.Tensor:
        """The same memory, uint8 [bytes], until `close`. Not in the process that shared it. Raises OSError."""

    def close(self, tensor: torch.Tensor) -> None:
        """Of one that was opened; nothing reads it any more."""


class Shared(msgspec.Struct, frozen=True, array_like=True):
    """Memory of a GPU as another process is told of it."""

    gpu: str  # UUID
    handle: bytes  # CUDA's, of the allocation
    offset: int  # bytes, in the allocation
    num_bytes: int


class CudaDevice:
    """See Device. Never run on a GPU so far, but for its calls of the driver's library (tests have one in C)."""

    def __init__(self, torch_device: torch.device, *, urgent: bool) -> None:
        """urgent: its steps go before those of streams that are not, where one process or MPS has both."""
        index = torch.cuda.current_device() if torch_device.index is None else torch_device.index
        self.torch_device = torch.device("cuda", index)
        self._stream = _stream(self.torch_device, _FIRST if urgent else _LATER)
        self._graph_memory = torch.cuda.graph_pool_handle()
        self._copies = threading.local()  # a stream for each thread
        self._driver = CudaDriver()

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See Device.zeros."""
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def staging(self, shape: tuple[int, ...]) -> torch.Tensor:
        """See Device.staging."""
        return torch.zeros(shape, dtype=torch.int32, pin_memory=True)

    def flex(self, kinds: int) -> Flex:
        """See Device.flex."""
        from python_backends.engines.torch.paged_attention import compiled_flex  # takes a while to import

        return compiled_flex(kinds)

    def captured(self, compute: Callable[[], None]) -> Callable[[], None]:
        """See Device.captured. The memory of graphs is one pool: they never run at once."""
        for _ in range(_WARM_UPS):
            compute()
        torch.cuda.synchronize(self.torch_device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_memory, stream=self._stream):
            compute()
        return graph.replay

    @contextmanager
    def computing(self) -> Iterator[None]:
        """See Device.computing."""
        with torch.cuda.device(self.torch_device), torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    @contextmanager
    def copying(self) -> Iterator[None]:
        """See Device.copying."""
        stream = getattr(self._copies, "stream", None)
        if stream is None:
            stream = self._copies.stream = _stream(self.torch_device, _LATER)
        with torch.cuda.device(self.torch_device), torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def share(self, tensor: torch.Tensor) -> bytes:
        """See Device.share. Not with PYTORCH_CUDA_ALLOC_CONF=expandable_segments, whose memory has no such handle."""
        with torch.cuda.device(self.torch_device):
            handle, offset = self._driver.handle_of(tensor.data_ptr())
        return msgspec.msgpack.encode(Shared(_uuid(self.torch_device), handle, offset, tensor.nbytes))

    def open(self, shared: bytes) -> torch.Tensor:
        """See Device.open."""
        try:
            told = msgspec.msgpack.decode(shared, type=Shared)
        except UNREADABLE as error:
            raise OSError(f"it does not say where its memory is: {error}") from error
        gpu = _device_of(told.gpu)
        if gpu != self.torch_device and not torch.cuda.can_device_access_peer(self.torch_device, gpu):
            raise OSError(f"{self.torch_device} does not reach the memory of {gpu}")
        with torch.cuda.device(gpu):
            begin = self._driver.open(told.handle, told.offset)
        return torch.as_tensor(_Foreign(begin, told.num_bytes), device=gpu)

    def close(self, tensor: torch.Tensor) -> None:
        """See Device.close."""
        with torch.cuda.device(tensor.device):
            self._driver.close(tensor.data_ptr())


class _Foreign:
    """Memory that torch did not allocate, in the form in which libraries show each other such (CUDA Array Interface)."""

    def __init__(self, begin: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {"data": (begin, False), "shape": (num_bytes,), "typestr": "|u1", "version": 3}


def _stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]


def reach_each_other(devices: set[str]) -> bool:
    """Whether each of these GPUs, cuda or cuda:N, reads the memory of the others."""
    parsed = [torch.device(device) for device in devices]
    indices = {torch.cuda.current_device() if device.index is None else device.index for device in parsed}
    return all(a == b or torch.cuda.can_device_access_peer(a, b) for a in indices for b in indices)


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _device_of(gpu: str) -> torch.device:
    """Raises OSError when this process does not see the GPU."""
    for index in range(torch.cuda.device_count()):
        if _uuid(torch.device("cuda", index)) == gpu:
            return torch.device("cuda", index)
    raise OSError(f"this process does not see GPU {gpu}")
