"""CUDA IPC by the driver's own library: handles of device memory that other processes of the host open.

CUDA's rules: a handle is of a whole allocation; a process opens it once, and not the one that made it; it is closed before
the owner frees the memory. torch's own sharing adds counters of references, which die with the process that made them.
"""

from __future__ import annotations

import ctypes

_LIBRARY = "libcuda.so.1"
_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1  # the only flag there is, and needed


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = [("reserved", ctypes.c_char * _HANDLE_BYTES)]


class CudaDriver:
    """Calls are about the thread's current device, which torch has made ready."""

    def __init__(self, library: str = _LIBRARY) -> None:
        """Raises OSError where there is no driver."""
        self._cuda = ctypes.CDLL(library)
        pointer, size = ctypes.c_uint64, ctypes.c_size_t
        self._cuda.cuMemGetAddressRange_v2.argtypes = [ctypes.POINTER(pointer), ctypes.POINTER(size), pointer]
        self._cuda.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_Handle), pointer]
        self._cuda.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(pointer), _Handle, ctypes.c_uint]
        self._cuda.cuIpcCloseMemHandle.argtypes = [pointer]
        self._cuda.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
        self._opened: dict[int, int] = {}  # address given out -> begin of its allocation

    def handle_of(self, address: int) -> tuple[bytes, int]:
        """(handle of the allocation that the address is in, how far in). Raises OSError."""
        begin, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        self._check("cuMemGetAddressRange", self._cuda.cuMemGetAddressRange_v2(begin, size, address))
        self._check("cuIpcGetMemHandle", self._cuda.cuIpcGetMemHandle(handle, begin))
        return bytes(handle), address - begin.value

    def open(self, handle: bytes, offset: int) -> int:
        """The address of the memory, so far into its allocation, in this process. Raises OSError."""
        if len(handle) != _HANDLE_BYTES:
            raise OSError(f"a handle has {_HANDLE_BYTES} bytes, not {len(handle)}")
        begin = ctypes.c_uint64()
        opened = self._cuda.cuIpcOpenMemHandle_v2(begin, _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
        self._check("cuIpcOpenMemHandle", opened)
        self._opened[begin.value + offset] = begin.value
        return begin.value + offset

    def close(self, address: int) -> None:
        """Of one that `open` gave. Raises OSError."""
        self._check("cuIpcCloseMemHandle", self._cuda.cuIpcCloseMemHandle(self._opened.pop(address)))

    def _check(self, call: str, result: int) -> None:
        if result:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(result, text)
            raise OSError(f"{call}: {(text.value or b'error %d' % result).decode()}")
