"""The int8 forms of recurrent layers and cells: matrices in int8, biases and matrices with short rows in float."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mono_quant import kernels
from mono_quant.convert.int8_layers import Int8Module
from mono_quant.convert.recurrent import Product, RecurrentCellForward, RecurrentForward, State
from mono_quant.kernels.weights import RowCodes
from mono_quant.planning.kinds import recurrent_parameters, weights_of


class _Int8Recurrent(Int8Module):
    """What the int8 forms share: which parameters a layer has depends on its layers, directions and inputs."""

    mode: str

    def __init__(self, source: nn.Module, encoded: Mapping[str, RowCodes] | None) -> None:
        held = weights_of(source)
        super().__init__(source.get_parameter(held[0]).dtype)
        self.held = held
        for name in recurrent_parameters(source):
            parameter = source._parameters[name]
            if name in held and parameter is not None:
                self._put(name, parameter.shape, None if encoded is None else encoded[name])
            else:
                self.register_parameter(name, parameter)

    def __getattr__(self, name: str) -> Any:
        # the names of weights are no attributes of the class, as they are elsewhere
        return self.read(name) if name in self.held else super().__getattr__(name)

    def _matrix(self, name: str, bias: Tensor | None) -> Product:
        if name in self.held:
            return partial(self.multiply, weight=self.codes(name), weight_scale=self.scale(name), bias=bias)
        weight = self.stored(name).float()
        return partial(F.linear, weight=weight, bias=None if bias is None else bias.float())

    def _at_once(
        self,
        name: str,
        bias: Tensor | None,
        given: Tensor,
        sizes: Sequence[int],
        state: State,
        backward: bool,
    ) -> tuple[Tensor, State] | None:
        # a compiler shall not look into the call
        if name not in self.held or kernels.is_watched():
            return None
        codes, scale = self.codes(name), self.scale(name)
        return kernels.run_recurrent(
            self.mode, given, sizes, state, codes, scale, bias, self.activations, backward
        )


class _Int8Layer(_Int8Recurrent, RecurrentForward):
    def __init__(self, source: nn.RNNBase, encoded: Mapping[str, RowCodes] | None) -> None:
        super().__init__(source, encoded)
        self._take_sizes(source)


class Int8LSTM(_Int8Layer):
    """`nn.LSTM` with int8 weights; inputs and states are quantized per token, everything else is fp32."""

    kind = "lstm"


class Int8GRU(_Int8Layer):
    """`nn.GRU` with int8 weights; inputs and states are quantized per token, everything else is fp32."""

    kind = "gru"


class Int8RNN(_Int8Layer):
    """`nn.RNN` with int8 weights; inputs and states are quantized per token, everything else is fp32."""

    kind = "rnn"


class _Int8Cell(_Int8Recurrent, RecurrentCellForward):
    def __init__(self, source: nn.RNNCellBase, encoded: Mapping[str, RowCodes] | None) -> None:
        super().__init__(source, encoded)
        self._take_sizes(source)


class Int8LSTMCell(_Int8Cell):
    """`nn.LSTMCell` with int8 weights."""

    kind = "lstm_cell"


class Int8GRUCell(_Int8Cell):
    """`nn.GRUCell` with int8 weights."""

    kind = "gru_cell"


class Int8RNNCell(_Int8Cell):
    """`nn.RNNCell` with int8 weights."""

    kind = "rnn_cell"
