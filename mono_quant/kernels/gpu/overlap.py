"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits where it reads what that one wrote.

Kernels wait only under their constant `OVERLAP`, which is for launches that ask the driver for it.
"""

try:
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # of some versions of Triton
    gdc_wait = None

__all__ = ["gdc_wait"]
