"""The sizes of a convolution."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a convolution [B, I, H, W] -> [B, O, H', W'] in groups.

    Attributes:
        images: B.
        groups: of channels; each has its own weights.
        inner, rows: I and O of a group.
        size, out: (H, W) and (H', W').
        kernel, stride, padding, dilation: along both.
    """

    images: int
    groups: int
    inner: int
    rows: int
    size: tuple[int, int]
    out: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def depth(self) -> int:
        """Values of a receptive field."""
        return self.inner * self.kernel[0] * self.kernel[1]

    @property
    def pixels(self) -> int:
        """Of an image."""
        return self.size[0] * self.size[1]

    @property
    def places(self) -> int:
        """Receptive fields of an image and group."""
        return self.out[0] * self.out[1]

    @property
    def is_padded(self) -> bool:
        return any(self.padding)

    def launch_sizes(self) -> list[int]:
        """Return what the kernels take in a row: H, W, W', H' * W', and kernel, stride, padding and dilation."""
        sizes = [*self.size, self.out[1], self.places, *self.kernel]
        return [*sizes, *self.stride, *self.padding, *self.dilation]

    @property
    def maps_pixels(self) -> bool:
        """Say whether each receptive field is a pixel, and each pixel one."""
        return self.kernel == self.stride == (1, 1) and not self.is_padded

    def as_one_image(self) -> "Geometry":
        """Return the sizes with the pixels of all images in one row, where `maps_pixels`."""
        length = self.images * self.pixels
        return replace(self, images=1, size=(1, length), out=(1, length))


def geometry_of(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Geometry | None:
    """Return the sizes of a convolution; None where there is none of these: others say what is wrong."""
    if x.dim() != 4 or weight.dim() != 4 or groups < 1:
        return None
    (images, channels, *size), (rows, inner, *kernel) = x.shape, weight.shape
    if channels != inner * groups or rows % groups or min(*kernel, inner) == 0:
        return None
    out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    if min(out) <= 0:
        return None
    return Geometry(
        images,
        groups,
        inner,
        rows // groups,
        _pair(size),
        _pair(out),
        _pair(kernel),
        _pair(stride),
        _pair(padding),
        _pair(dilation),
    )


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    first, second = numbers
    return first, second


def in_one_row(x: Tensor) -> Tensor | None:
    """Return images [B, C, H, W] as [1, C, 1, B * H * W]; None where their memory does not allow a view."""
    images, channels, height, width = x.shape
    sizes = (images, x.stride(0)), (height, x.stride(2)), (width, x.stride(3))
    # along one pixel no stride means anything
    steps = [(size, stride) for size, stride in sizes if size > 1]
    step = steps[-1][1] if steps else 1
    length = 1
    for size, stride in reversed(steps):
        if stride != length * step:
            return None
        length *= size
    return x.as_strided((1, channels, 1, length), (0, x.stride(1), 0, step))
