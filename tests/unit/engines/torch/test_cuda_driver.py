"""Calls of CUDA's driver, against a library in C with the same names, types and rules, since there is no GPU here."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from python_backends.engines.torch.cuda_driver import CudaDriver

LIBRARY = r"""
#include <stddef.h>
#include <string.h>
typedef unsigned long long CUdeviceptr;
typedef struct { char reserved[64]; } CUipcMemHandle;
static CUdeviceptr opened;
int cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr address) {
  if (address < 0x100000000000ULL) return 1;
  *base = 0x100000000000ULL; *size = 1 << 20; return 0;
}
int cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr base) {
  memset(handle->reserved, 7, 64); handle->reserved[0] = 0;  /* a handle holds zeros, too */
  memcpy(handle->reserved + 56, &base, 8); return 0;
}
int cuIpcOpenMemHandle_v2(CUdeviceptr *base, CUipcMemHandle handle, unsigned int flags) {
  if (flags != 1 || handle.reserved[0] != 0 || handle.reserved[55] != 7) return 1;
  if (opened) return 201;  /* CUDA_ERROR_INVALID_CONTEXT */
  memcpy(base, handle.reserved + 56, 8); *base += 0x10000000000ULL; opened = *base; return 0;
}
int cuIpcCloseMemHandle(CUdeviceptr base) { if (base != opened) return 1; opened = 0; return 0; }
int cuGetErrorString(int error, const char **text) {
  *text = error == 201 ? "invalid device context" : "invalid argument"; return 0;
}
"""
BEGIN = 0x100000000000


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    directory = tmp_path_factory.mktemp("cuda")
    source, built = directory / "cuda.c", directory / "libcuda.so"
    source.write_text(LIBRARY)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, source], check=True, timeout=60)
    return str(built)


def test_memory_is_shared_opened_and_closed(library: str) -> None:
    owner, reader = CudaDriver(library), CudaDriver(library)
    handle, offset = owner.handle_of(BEGIN + 512)
    assert (len(handle), offset) == (64, 512)
    address = reader.open(handle, offset)
    assert address == BEGIN + 0x10000000000 + 512
    with pytest.raises(OSError, match="cuIpcOpenMemHandle: invalid device context"):
        reader.open(handle, offset)
    reader.close(address)
    reader.close(reader.open(handle, 0))


def test_memory_that_is_not_the_devices_is_refused(library: str) -> None:
    with pytest.raises(OSError, match="cuMemGetAddressRange: invalid argument"):
        CudaDriver(library).handle_of(1)


def test_a_handle_of_another_length_is_refused(library: str) -> None:
    with pytest.raises(OSError, match="64 bytes, not 3"):
        CudaDriver(library).open(b"abc", 0)


def test_without_a_driver_there_is_nothing() -> None:
    with pytest.raises(OSError, match="libnone"):
        CudaDriver("libnone.so.1")
