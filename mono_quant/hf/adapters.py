"""Merging PEFT's LoRA into converted layers: into the dequantized weight, which is encoded anew.

PEFT finds our layers by itself, for they are instances of the float classes, and its own layers run on them. What these cannot do
is merge: they would add to a weight that is made when it is read, which is refused. So the LoRA layers on converted ones get
classes of ours, which differ in that alone. Adapters of other kinds are merged in the float model.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mono_quant.convert.forwards import ConvForward, ExpertsForward
from mono_quant.convert.stored import StoredModule
from mono_quant.errors import AdapterAttachedError, FrozenWeightError
from mono_quant.hf.late import when_imported

# PEFT and others tell its layers by these names.
_NAMES = ("Linear", "Embedding", "Conv1d", "Conv2d", "ParamWrapper")
_OWN = ("weight", "bias")
_GEOMETRY = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
)  # fmt: skip


def register() -> None:
    """Let PEFT merge into converted layers, as soon as it is there; may be called any number of times."""
    when_imported("peft.tuners.lora.model", _teach_)


def is_adapter(module: nn.Module) -> bool:
    """Say whether a module is one of PEFT's, or holds adapters that transformers attached."""
    return getattr(module, "_hf_peft_config_loaded", False) or any(
        cls.__module__.startswith("peft.") for cls in type(module).__mro__
    )


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model with adapters, which could not be given back.

    Raises:
        AdapterAttachedError: naming one.
    """
    found = next((f"{name} ({type(m).__name__})" for name, m in model.named_modules() if is_adapter(m)), "")
    if found:
        raise AdapterAttachedError(
            f"{type(model).__name__} has adapters attached: {found.lstrip()}. Save them alone (save_pretrained of the model that "
            f"PEFT gave, save_lora_adapter in diffusers, or model.save_pretrained after add_adapter), or call merge_and_unload() first"
        )


def __getattr__(name: str) -> Any:
    # The classes need PEFT's as their bases, and pickle needs to find them here.
    if name in _NAMES:
        return next(cls for cls in classes().values() if cls.__name__ == name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _teach_() -> None:
    from peft.tuners.lora.model import LoraModel

    # should it be gone one day, merging is refused as with every other kind of adapter
    create = getattr(LoraModel, "_create_new_module", None)
    if create is None or hasattr(create, "mono_quant"):
        return

    @functools.wraps(create)
    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **options: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        # PEFT makes adapters of a convolution by calling its class
        given = _float_twin(base, _OWN) if isinstance(base, ConvForward) else target
        # made once, however often PEFT asks where it is
        weights = [base.read(name) for name in base.held] if isinstance(base, StoredModule) else []
        layer = create(lora_config, adapter_name, given, **options)
        del weights
        if isinstance(base, StoredModule):
            layer.base_layer = target
            layer.__class__ = _class_for(layer, base)
        return layer

    create_new_module.mono_quant = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)  # noqa: SLF001


def _class_for(layer: Any, base: StoredModule) -> type[Any]:
    """Return the class that merges, for a layer that PEFT made; its own where there is none."""
    cls = classes().get(type(layer), type(layer))
    if issubclass(cls, MergedExperts) and not isinstance(base, ExpertsForward):
        raise FrozenWeightError(
            f"target_parameters names {layer.parameter_name!r} of {type(base).__name__}, whose weight cannot be changed from outside; "
            f"name the layer in target_modules"
        )
    return cls


def _float_twin(base: StoredModule, names: Iterable[str]) -> nn.Module:
    """Return a module with float32 copies of what a converted layer holds: all that PEFT asks of a base layer."""
    twin, held = nn.Module(), dict(base.named_parameters(recurse=False))
    if isinstance(base, ConvForward):
        sizes = {name: getattr(base, name) for name in _GEOMETRY}
        conv = nn.Conv1d if len(base.kernel_size) == 1 else nn.Conv2d
        twin = torch.nn.utils.skip_init(conv, **sizes, bias=base.bias is not None)  # type: ignore[no-untyped-call]
    for name in names:
        value = base.read(name) if name in base.held else held.get(name)
        plain = None if value is None else value.detach().to(torch.float32, copy=True).as_subclass(Tensor)
        twin.register_parameter(name, None if plain is None else nn.Parameter(plain, requires_grad=False))
    return twin


class Merged:
    """What LoRA layers on converted ones do in another way than PEFT's."""

    stored: ClassVar[tuple[str, ...]] = _OWN
    merged_adapters: list[str]
    merged: bool
    get_base_layer: Any
    _before: tuple[dict[str, nn.Parameter], frozenset[str]]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base layer: into its dequantized weight in float32, encoded anew with new scales.

        That costs what converting costs: every weight moves by up to half a step of its row, so that the merged layer is as
        close to the sum as the converted one is to the float one. Adapters that are merged later start from the weight before
        the first. The most accurate way is to merge into the float model and convert that.

        Raises:
            NonFiniteWeightError: an adapter holds NaN or infinity; nothing is merged then.
            Fp16RangeError: the sum does not fit float16; nothing is merged then.
        """
        from peft.tuners.tuners_utils import check_adapters_to_merge

        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        names = [*self.merged_adapters, *names]
        if self.merged:
            self.unmerge()
        base = self.get_base_layer()
        before, changed = self._held(base), base.changed
        try:
            with self._on_float(base) as twin:
                super().merge(safe_merge, names)  # type: ignore[misc]
            self._take_(base, twin)
        except BaseException:
            self.merged_adapters.clear()
            _put_back_(base, before, changed)
            raise
        self._before = before, changed

    def unmerge(self) -> None:
        """Put the weight and bias of before back, bit for bit."""
        if not self.merged:
            super().unmerge()  # type: ignore[misc]
            return
        _put_back_(self.get_base_layer(), *self._before)
        del self._before
        self.merged_adapters.clear()

    def _held(self, base: StoredModule) -> dict[str, nn.Parameter]:
        """Return what merging changes, as it lies in memory."""
        held = dict(base.named_parameters(recurse=False))
        own = (*self.stored, *(f"{name}_scale" for name in self.stored))
        return {name: held[name] for name in own if name in held}

    @contextmanager
    def _on_float(self, base: StoredModule) -> Iterator[nn.Module]:
        """Have PEFT work on float32 copies of what the base layer holds."""
        twin = _float_twin(base, self.stored)
        owner: Any = self
        while owner.base_layer is not base:
            owner = owner.base_layer
        owner.base_layer = twin
        try:
            yield twin
        finally:
            owner.base_layer = base

    def _take_(self, base: StoredModule, twin: nn.Module) -> None:
        held = self._held(base)
        for name, value in twin.named_parameters():
            if name in base.held:
                base.encode_(name, value)
                base.changed |= {name}
            else:
                setattr(base, name, nn.Parameter(value.to(held[name].dtype), held[name].requires_grad))


def _put_back_(base: StoredModule, before: Mapping[str, nn.Parameter], changed: frozenset[str]) -> None:
    now = dict(base.named_parameters(recurse=False))
    for name, parameter in before.items():
        # the model may have been moved or cast meanwhile
        parameter.data = parameter.data.to(now[name].device, now[name].dtype)
        setattr(base, name, parameter)
    base.changed = changed


class MergedConv(Merged):
    """LoRA on a convolution."""

    def update_layer(self, *args: Any, **options: Any) -> None:
        """Add another adapter, which PEFT makes by calling the class of the base layer."""
        with self._on_float(self.get_base_layer()):
            super().update_layer(*args, **options)  # type: ignore[misc]


class MergedExperts(Merged):
    """LoRA on a stack of experts, PEFT's `target_parameters`."""

    num_experts: int
    scaling: dict[str, float]
    lora_A: Any
    lora_B: Any
    parameter_name: str

    @property
    def stored(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.parameter_name,)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Add the adapters to the products of each expert; PEFT would add them to the weight."""
        names = [name for name in active_adapters if name in self.lora_A]
        with self.get_base_layer().adding(self.parameter_name, functools.partial(self._delta, names)):
            yield

    def _delta(self, names: list[str], x: Tensor, expert: int) -> Tensor:
        return sum((self._delta_of(name, x, expert) for name in names), start=x.new_zeros(()))

    def _delta_of(self, name: str, x: Tensor, expert: int) -> Tensor:
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        down = down.view(self.num_experts, -1, down.shape[-1])[expert]
        up = up.view(up.shape[0], -1, self.num_experts)[..., expert]
        delta: Tensor = x.to(down.dtype) @ down.t() @ up.t() * self.scaling[name]
        return delta


@functools.cache
def classes() -> dict[type[Any], type[Any]]:
    """Make our classes of PEFT's LoRA layers, by those."""
    from peft.tuners.lora import layer

    forms = (Merged, Merged, MergedConv, MergedConv, MergedExperts)
    bases = [(form, getattr(layer, name)) for form, name in zip(forms, _NAMES, strict=True)]
    return {both[1]: type(both[1].__name__, both, {"__module__": __name__}) for both in bases}
