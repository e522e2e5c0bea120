"""Triton kernels are checked in a process of their own.

Triton reads TRITON_INTERPRET when it is imported, and its compiler cannot read functions that the type checker of the
tests has decorated.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not made for this system")
has_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def check_alone(script: str, *, interpret: bool) -> None:
    """Run lines of Python that fail by raising, in Triton's interpreter or compiled."""
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\nprint('same')"],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1" if interpret else "0",
            "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "same\n", done.stderr
