"""The products on a GPU, as Triton kernels: exact, with the bits of the reference.

Nothing imports this folder but `accelerators`, when a tensor on a device asks for it: Triton decides at import whether kernels are
compiled or interpreted, and a machine without a GPU need not have it.
"""
