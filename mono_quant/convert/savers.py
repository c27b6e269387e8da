"""What saves a model of somebody's own class for other libraries does not know of codes: it is refused where it is called."""

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from mono_quant.convert.int8_layers import Int8Module
from mono_quant.errors import UnsupportedModelError

# As huggingface_hub's `PyTorchModelHubMixin` and its like call them.
_SAVERS = ("save_pretrained", "push_to_hub")


@dataclass(frozen=True)
class _Refusal:
    """Stands in a model in the place of a method that would write files which its own class could not read back."""

    cls: str
    method: str

    def __call__(self, *args: Any, **options: Any) -> NoReturn:
        raise UnsupportedModelError(
            f"{self.method} of {self.cls} would write int8 codes that its own from_pretrained cannot read. Use "
            f"quantize(...).{'save(folder)' if self.method == _SAVERS[0] else 'push_to_hub(repo)'}, and "
            f"load(folder, model={self.cls}(...))"
        )


def refuse_savers_(model: nn.Module) -> None:
    """Let the methods by which a model with int8 layers, or a part of it, would save itself raise an error that says how to."""
    for part in model.modules():
        if any(isinstance(m, Int8Module) for m in part.modules()):
            cls = type(part)
            vars(part).update({
                n: _Refusal(cls.__name__, n) for n in _SAVERS if callable(getattr(cls, n, None))
            })
