"""A device with a memory of its own, as engines/torch/device.py wants it, played by the host.

It keeps CUDA's rules: what is captured is replayed operator by operator on the very same memory, whatever Python would
have done instead; nothing captured may look at a value; memory is opened once in a process, never in the process that
shared it, and is gone when it was closed. Each HostDevice plays a process of its own.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import msgspec
import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostDevice:
    """Implements Device. computed: how often captured work ran in Python; replayed: how often without."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.computed = 0
        self.replayed = 0
        self._process = secrets.token_hex(8)
        self._fds: dict[int, int] = {}  # address -> memfd
        self._open: dict[int, str] = {}  # address -> key of what is open there
        self._maps: list[mmap.mmap] = []

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        fd = os.memfd_create("device")
        os.ftruncate(fd, num_bytes)
        tensor = self._map(fd, num_bytes)
        self._fds[tensor.data_ptr()] = fd
        return tensor.view(dtype).view(shape)

    def staging(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def flex(self, kinds: int) -> Callable[..., torch.Tensor]:
        return reference_flex

    def captured(self, compute: Callable[[], None]) -> Callable[[], None]:
        compute()
        with _Recorder() as recorder:
            compute()
        self.computed += 2

        def replay() -> None:
            self.replayed += 1
            recorder.replay()

        return replay

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def copying(self) -> AbstractContextManager[None]:
        return nullcontext()

    def share(self, tensor: torch.Tensor) -> bytes:
        told = {"process": self._process, "pid": os.getpid(), "fd": self._fds[tensor.data_ptr()], "bytes": tensor.nbytes}
        return msgspec.msgpack.encode(told)

    def open(self, shared: bytes) -> torch.Tensor:
        try:
            told = msgspec.msgpack.decode(shared)
        except msgspec.DecodeError as error:
            raise OSError("invalid argument") from error
        key = f"{told['process']}/{told['fd']}"
        if told["process"] == self._process or key in self._open.values():
            raise OSError("invalid device context")
        fd = os.open(f"/proc/{told['pid']}/fd/{told['fd']}", os.O_RDWR)
        try:
            tensor = self._map(fd, told["bytes"])
        finally:
            os.close(fd)
        self._open[tensor.data_ptr()] = key
        return tensor

    def close(self, tensor: torch.Tensor) -> None:
        del self._open[tensor.data_ptr()]

    @property
    def num_open(self) -> int:
        return len(self._open)

    def _map(self, fd: int, num_bytes: int) -> torch.Tensor:
        memory = mmap.mmap(fd, num_bytes)
        self._maps.append(memory)
        return torch.frombuffer(memory, dtype=torch.uint8)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What CUDA does while it captures: remember each operator with the memory it reads and writes."""

    _waits: ClassVar[set[Any]] = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, Sequence[Any], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        assert func not in self._waits, f"{func} waits for the device"
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def reference_flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_mask: BlockMask) -> torch.Tensor:
    """FlexAttention as it is documented: only the listed blocks of keys are looked at, and in them what the mask lets.

    query [pairs, 1, queries, head_dim]; key and value [1, 1, vectors, head_dim].
    """
    size = block_mask.BLOCK_SIZE[1]
    lists, counts = block_mask.kv_indices[:, 0, 0].long(), block_mask.kv_num_blocks[:, 0, 0]
    pairs, width = lists.shape
    assert query.shape[2] == block_mask.seq_lengths[0]
    assert key.shape[2] == value.shape[2] == block_mask.seq_lengths[1]
    listed = torch.arange(width).expand(pairs, -1) < counts[:, None]
    lists = torch.where(listed, lists, 0)
    vectors = (lists[:, :, None] * size + torch.arange(size)).flatten(1)  # [pairs, width * size]
    listed = listed[:, :, None].expand(-1, -1, size).flatten(1)
    zero = torch.zeros((), dtype=torch.int64)
    seen = listed & block_mask.mask_mod(torch.arange(pairs)[:, None], zero, zero, vectors)
    keys, values = (torch.where(listed[..., None], tensor[0, 0][vectors], 0.0) for tensor in (key, value))
    scores = query[:, 0] @ keys.transpose(1, 2) / math.sqrt(query.shape[-1])
    weights = torch.where(seen[:, None], scores, -torch.inf).softmax(-1)
    return (weights @ values)[:, None]
