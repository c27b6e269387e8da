"""The opt-in by which int8 checkpoints stay int8 in plain calls of transformers."""

from collections.abc import Mapping
from threading import Lock
from typing import Any, ClassVar, Self

from mono_quant.api.on_load import classes, register
from mono_quant.hf.compressed_tensors import STANDARD, ct_problems


class Enabled:
    """int8 stays int8 in plain calls of transformers; leaving it as a context, or `disable`, ends that.

    The last of several that ends puts things back, in whatever order and thread they end.
    """

    _all: ClassVar[set["Enabled"]] = set()
    _lock = Lock()
    _before: ClassVar[Any] = None

    def __init__(self) -> None:
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

        register()
        self._mapping = AUTO_QUANTIZATION_CONFIG_MAPPING
        with self._lock:
            if not self._all:
                Enabled._before = self._mapping[STANDARD]
                self._mapping[STANDARD] = _keeping_int8(self._before)
            self._all.add(self)

    def disable(self) -> None:
        """Let transformers read compressed-tensors checkpoints as it did before, unless another one is enabled; once is enough."""
        with self._lock:
            if self._all == {self}:
                self._mapping[STANDARD] = self._before
            self._all.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()


def enable() -> Enabled:
    """Run int8 compressed-tensors checkpoints in int8 wherever transformers loads them, from now on or in a `with` block.

    `AutoModel.from_pretrained`, `pipeline` and `SentenceTransformer` would otherwise compute in float with what such a
    checkpoint (W8A8, scales per channel, activations per token at run time) stands for. Others are loaded as before.

    Returns:
        A context; its end, or `disable`, puts things back.
    """
    return Enabled()


def _keeping_int8(otherwise: Any) -> type[Any]:
    class Standard:
        """In the place of the config of compressed-tensors."""

        @staticmethod
        def from_dict(block: Mapping[str, Any], **options: Any) -> Any:
            if ct_problems(block):
                return otherwise.from_dict(block, **options)
            return classes()[0](checkpoint=block)

    return Standard
