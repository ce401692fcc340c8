"""Make permissions bind in this process: root's power to write where they forbid it is given up, for good."""

import ctypes
import os
import sys
import tempfile

_CAP_DAC_OVERRIDE = 1 << 1


def drop() -> None:
    """Give up CAP_DAC_OVERRIDE, where this is root on Linux."""
    if sys.platform == "linux" and os.geteuid() == 0:
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.capget(header, data):
            raise OSError(ctypes.get_errno(), "capget")
        data[0] &= ~_CAP_DAC_OVERRIDE  # effective
        data[1] &= ~_CAP_DAC_OVERRIDE  # permitted
        if libc.capset(header, data):
            raise OSError(ctypes.get_errno(), "capset")


def sealed(directory: str) -> bool:
    """Whether no file can be made in a directory: what the tests of read-only ones rest on."""
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except PermissionError:
        return True
    return False
