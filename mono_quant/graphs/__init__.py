"""The graph backend: what `torch.compile` captures, with its repeated patterns replaced by the fused calls of `kernels`."""
