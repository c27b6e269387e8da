"""What int8 and float16 layers share: a weight in another form than arithmetic uses, which nobody can change by accident."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mono_quant import kernels
from mono_quant.convert.computed import computed, read_once
from mono_quant.convert.snapshot import has_memory
from mono_quant.errors import FrozenWeightError

# What pruning, weight norm and spectral norm of torch.nn.utils hang beside a weight that they take over.
_TAKEN_OVER = ("_orig", "_g", "_v")
_REMEDY = "Change the float model and convert that one (quantize), or take a tensor of your own with .clone()"


class StoredModule(nn.Module):
    """A layer whose weight lies in another form than its arithmetic uses; `.weight` reads as a float tensor.

    Attributes:
        held: names of the parameters in that form.
        replaces: plain attributes of the float layer that would keep its weights alive; this one answers them itself.
        changed: those held that were encoded anew since the conversion.
    """

    held: tuple[str, ...] = ("weight",)
    replaces: ClassVar[frozenset[str]] = frozenset()
    changed: frozenset[str] = frozenset()

    # transformers re-initialises modules that do not carry this mark.
    _is_hf_initialized = True

    def __init__(self, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # the float layers among our bases would make weights
        # Tracers of torch.fx tell by this, on the module, what they must not open. Pickle asks the class.
        self.__dict__["__module__"] = "torch.nn"
        # Follows `.to(dtype)`, so that a weight that is read has the dtype a float weight would have.
        self.register_buffer("_float", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of a weight that is read, and of outputs that follow no input."""
        return self.get_buffer("_float").dtype

    def read_as_(self, dtype: torch.dtype) -> None:
        """Let a weight that is read have this dtype."""
        self._float = torch.empty(0, dtype=dtype)

    def stored(self, name: str) -> Tensor:
        """Return the parameter `name` in the form in which it lies in memory.

        Raises:
            FrozenWeightError: something took it away.
        """
        held = self._parameters.get(name)
        if held is None:
            raise FrozenWeightError(f"{self._name(name)} is gone, so the layer cannot run. {_REMEDY}")
        return held

    def read(self, name: str) -> Tensor:
        """Return the parameter `name` as float; what is written into it is refused, unless it is the parameter itself."""
        if kernels.is_watched():
            return self._restore(name)
        stored = self.stored(name)
        if stored.dtype == self.float_dtype:
            return self._restore(name)
        if stored.is_meta:
            # there is nothing to write into, and a loader asks for the parameters of a skeleton
            return nn.Parameter(self._restore(name), requires_grad=False)
        scale = self._parameters.get(f"{name}_scale")
        sources = [stored] if scale is None else [stored, scale]
        refusal = (
            f"{self._name(name)} is made from {self._form(name)} when it is read: what is written into it would be lost. "
            f"{_REMEDY}"
        )
        # an inference tensor does not count the writes into it
        with torch.inference_mode(False):
            if not has_memory(stored):
                return computed(self._restore(name), refusal)
            return read_once(sources, self.float_dtype, lambda: self._restore(name), refusal)

    def encode_(self, name: str, weight: Tensor) -> None:
        """Put new values in the place of the parameter `name`, in the form in which it lies in memory.

        Only those of `weight` that this form can hold are kept: this costs accuracy once more.

        Args:
            name: one of `held`.
            weight: float, in the shape of the float parameter.

        Raises:
            NonFiniteWeightError: a value is NaN or infinite.
            Fp16RangeError: a value does not fit float16.
        """
        raise NotImplementedError

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Let the parameters take gradients, which a stored weight cannot.

        Raises:
            FrozenWeightError: they are to.
        """
        if requires_grad:
            raise FrozenWeightError(
                f"{type(self).__name__} holds {self._form(self.held[0])}, which cannot be trained. Train LoRA adapters on it, or keep "
                f"the layer in float with skip= and train that"
            )
        return super().requires_grad_(requires_grad)

    def _restore(self, name: str) -> Tensor:
        """Return the float tensor that the stored parameter `name` stands for."""
        raise NotImplementedError

    def _product(self, x: Tensor, name: str, rows: int | slice, bias: Tensor | None) -> Tensor:
        """Return `x @ W[rows].T + bias` for the matrix, or the stack of matrices, `name`."""
        raise NotImplementedError

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Set a parameter; one that the layer stores is replaced only by one of the same form.

        Raises:
            FrozenWeightError: it is of another form.
        """
        if name not in self._stored_names():
            taken = next((n for n in self.held for end in _TAKEN_OVER if name == f"{n}{end}"), None)
            if taken is not None:
                raise FrozenWeightError(
                    f"{self._name(taken)} holds {self._form(taken)}, which cannot be pruned or normalized here. "
                    f"Do that to the float model, make it permanent, and convert the result (quantize)"
                )
            super().register_parameter(name, param)
            return
        problem = "is to be removed" if param is None else self._misfit(name, param)
        if param is None or problem:
            raise FrozenWeightError(f"{self._name(name)} {problem}. {_REMEDY}")
        # not by torch's method: it looks whether the class answers the name, and that makes the float weight
        self._parameters[name] = self._settled(name, param)

    def __delattr__(self, name: str) -> None:
        if name in self._stored_names() and name in self._parameters:
            raise FrozenWeightError(f"{self._name(name)} is to be removed. {_REMEDY}")
        super().__delattr__(name)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {n: state_dict[prefix + n] for n in self._stored_names() if prefix + n in state_dict}
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        problems = [f"{prefix}{problem}" for problem in self._state_problems(given, assign)]
        if problems:
            # all or nothing: a layer that is half replaced computes nonsense
            error_msgs += problems
            missing_keys += [prefix + n for n in self._parameters if prefix + n not in state_dict]
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _state_problems(self, given: Mapping[str, Tensor], assign: bool) -> Iterator[str]:
        """Yield what is wrong with the stored parameters of a state dict, each line beginning with a name."""
        raise NotImplementedError

    def _misfit(self, name: str, param: Tensor) -> str:
        """Return why `param` cannot take the place of the stored parameter `name`; empty when it can."""
        held = self.stored(name)
        if param.dtype == held.dtype and param.shape == held.shape:
            return ""
        return f"is {held.dtype} {tuple(held.shape)} and cannot become {param.dtype} {tuple(param.shape)}"

    def _settled(self, name: str, param: nn.Parameter) -> nn.Parameter:
        """Return a new stored parameter as it has to be; it takes no gradient."""
        param.requires_grad = False
        return param

    def _stored_names(self) -> tuple[str, ...]:
        return self.held

    def _name(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"

    def _form(self, name: str) -> str:
        """Say what a stored parameter holds."""
        raise NotImplementedError

    def _sizes(self) -> str:
        """Say what the representation of the float layer says."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Say what the float layer says of itself."""
        return self._sizes()
