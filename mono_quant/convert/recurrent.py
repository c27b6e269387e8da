"""The forward pass of recurrent layers: what stands between their products, in float32.

The input product of a layer is one over all time steps; the recurrent one is one per step, as each needs the state before.
A padded batch is a packed one in which every step has all sequences.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from mono_quant import kernels
from mono_quant.convert.stored import StoredModule
from mono_quant.errors import InputError

# What a layer carries from step to step, each fp32 [N, H]: its output, and of an LSTM its cells.
State = tuple[Tensor, ...]
Product = Callable[[Tensor], Tensor]
Advance = Callable[[Tensor, State], State]


def lstm_step(given: Tensor, recurrent: Tensor, state: State) -> State:
    """Advance an LSTM by one step.

    Args:
        given: fp32 [N, 4H], the product of the input; the gates are input, forget, cell, output.
        recurrent: fp32 [N, 4H], the product of the last output.
        state: output and cells, fp32 [N, H].
    """
    size = given.shape[1] // 4
    gates = given + recurrent
    candidate = gates[:, 2 * size : 3 * size].tanh()
    # of the third quarter it is not used: one call is cheaper than three
    entry, forget, _, out = gates.sigmoid().chunk(4, dim=1)
    cells = torch.addcmul(forget * state[1], entry, candidate)
    return out * cells.tanh(), cells


def gru_step(given: Tensor, recurrent: Tensor, state: State) -> State:
    """Advance a GRU by one step; as `lstm_step`, with [N, 3H]: the gates are reset, update, new."""
    size = given.shape[1] // 3
    reset, update, _ = (given + recurrent).sigmoid().chunk(3, dim=1)
    new = torch.addcmul(given[:, 2 * size :], reset, recurrent[:, 2 * size :]).tanh()
    return (torch.lerp(new, state[0], update),)


def tanh_step(given: Tensor, recurrent: Tensor, state: State) -> State:
    """Advance an Elman network by one step; as `lstm_step`, with [N, H]."""
    return ((given + recurrent).tanh(),)


def relu_step(given: Tensor, recurrent: Tensor, state: State) -> State:
    """Advance an Elman network by one step; as `lstm_step`, with [N, H]."""
    return ((given + recurrent).relu(),)


STEPS: Mapping[str, Callable[[Tensor, Tensor, State], State]] = {
    "LSTM": lstm_step,
    "GRU": gru_step,
    "RNN_TANH": tanh_step,
    "RNN_RELU": relu_step,
}


def run_forward(steps: Sequence[Tensor], state: State, advance: Advance) -> tuple[list[Tensor], State]:
    """Run over time; sequences that have ended keep the state of their last step.

    Args:
        steps: fp32 [n, G] each, with n sequences that never become more.
        state: the initial one.
        advance: makes the next state of a step and the last state.

    Returns:
        The output of every step, and the last state of every sequence.
    """
    outputs, ended = [], []
    for step in steps:
        # not `len`: in an exported program the batch may be any
        size = step.shape[0]
        if size < state[0].shape[0]:
            ended.append(tuple(part[size:] for part in state))
            state = tuple(part[:size] for part in state)
        state = advance(step, state)
        outputs.append(state[0])
    if not ended:
        return outputs, state
    return outputs, tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))


def run_backward(steps: Sequence[Tensor], state: State, advance: Advance) -> tuple[list[Tensor], State]:
    """Run back in time, as `run_forward`; a sequence begins with its initial state at its own last step."""
    outputs = []
    now = tuple(part[: steps[-1].shape[0]] for part in state)
    for step in reversed(steps):
        before, size = now[0].shape[0], step.shape[0]
        if size > before:
            joining = (part[before:size] for part in state)
            now = tuple(torch.cat(parts) for parts in zip(now, joining, strict=True))
        now = advance(step, now)
        outputs.append(now[0])
    return outputs[::-1], now


class _Recurrent(StoredModule):
    """What layers and cells share: products by name, and states that are given or zero."""

    input_size: int
    hidden_size: int
    bias: bool
    mode: str

    def _matrix(self, name: str, bias: Tensor | None) -> Product:
        """Return the product with the matrix `name`: float [..., K] to float [..., N]; found once, used at every step."""
        raise NotImplementedError

    def _at_once(
        self,
        name: str,
        bias: Tensor | None,
        given: Tensor,
        sizes: Sequence[int],
        state: State,
        backward: bool,
    ) -> tuple[Tensor, State] | None:
        """Run over time in one call, with the recurrent matrix `name`; None where that cannot be."""
        return None

    def _initial(
        self, given: Tensor | Sequence[Tensor] | None, shapes: Sequence[tuple[int, ...]], like: Tensor
    ) -> State:
        if given is None:
            return tuple(like.new_zeros(shape, dtype=torch.float32) for shape in shapes)
        parts = (given,) if isinstance(given, Tensor) else tuple(given)
        found = [tuple(part.shape) for part in parts]
        if found != list(shapes):
            raise InputError(
                f"{type(self).__name__} takes initial states of shape {', '.join(map(str, shapes))} for this input, not "
                f"{', '.join(map(str, found))}; give it what the float layer took"
            )
        return tuple(part.float() for part in parts)


class RecurrentForward(_Recurrent):
    """The forward pass of `nn.LSTM`, `nn.GRU` and `nn.RNN`."""

    replaces = frozenset({"_flat_weights", "_flat_weight_refs"})

    mode: str
    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    _flat_weights_names: list[str]
    _all_weights: list[list[str]]

    def _take_sizes(self, source: nn.RNNBase) -> None:
        for name in (
            "mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size",
            "_flat_weights_names", "_all_weights",
        ):  # fmt: skip
            setattr(self, name, getattr(source, name))

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters of each layer and direction, as float tensors."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    def flatten_parameters(self) -> None:
        """Do nothing: `nn.LSTM` prepares weights for cuDNN here, which reads none of these."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | Sequence[Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """Run over time as the float layer does; see there for shapes. States and sums are fp32 on the way.

        Returns:
            The outputs and the last states in the dtype of `input`.
        """
        if isinstance(input, PackedSequence):
            return self._of_packed(input, hx)
        kernels.check_input(input, type(self).__name__, self.input_size, dims=(2, 3))
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        length, batch = x.shape[:2]
        if length == 0:
            raise InputError(
                f"{type(self).__name__} takes at least one time step, not {tuple(input.shape)}; leave out empty sequences"
            )
        states = self._initial(hx, self._state_shapes((batch,) if batched else ()), x)
        states = states if batched else tuple(part.unsqueeze(1) for part in states)
        out, states = self._run(x.flatten(0, 1), [batch] * length, states)
        out = out.view(length, batch, out.shape[1])
        if not batched:
            return out.squeeze(1), self._answer(tuple(part.squeeze(1) for part in states))
        return out.transpose(0, 1) if self.batch_first else out, self._answer(states)

    def _of_packed(
        self, packed: PackedSequence, hx: Tensor | Sequence[Tensor] | None
    ) -> tuple[PackedSequence, Tensor | State]:
        x, sizes, order, back = packed
        kernels.check_input(x, type(self).__name__, self.input_size, dims=(2,))
        states = self._initial(hx, self._state_shapes((int(sizes[0]),)), x)
        if order is not None:
            states = tuple(part.index_select(1, order) for part in states)
        out, states = self._run(x, sizes.tolist(), states)
        if back is not None:
            states = tuple(part.index_select(1, back) for part in states)
        return PackedSequence(out, sizes, order, back), self._answer(states)

    def _state_shapes(self, batch: tuple[int, ...]) -> list[tuple[int, ...]]:
        runs = self.num_layers * (2 if self.bidirectional else 1)
        sizes = [self.proj_size or self.hidden_size, self.hidden_size][: 2 if self.mode == "LSTM" else 1]
        return [(runs, *batch, size) for size in sizes]

    def _answer(self, states: State) -> Tensor | State:
        return states if self.mode == "LSTM" else states[0]

    def _run(self, x: Tensor, sizes: list[int], states: State) -> tuple[Tensor, State]:
        """Run all layers over packed steps [sum of sizes, I] from states [L * D, N, H]."""
        dtype, x = x.dtype, x.float()
        finals: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for end in ("", "_reverse") if self.bidirectional else ("",):
                state = tuple(part[len(finals)] for part in states)
                out, final = self._run_once(x, sizes, state, f"l{layer}{end}")
                outputs.append(out)
                finals.append(final)
            x = torch.cat(outputs, dim=1) if self.bidirectional else outputs[0]
        return x.to(dtype), tuple(torch.stack(parts).to(dtype) for parts in zip(*finals, strict=True))

    def _run_once(self, x: Tensor, sizes: list[int], state: State, which: str) -> tuple[Tensor, State]:
        """Run one layer in one direction."""
        enter = self._matrix(f"weight_ih_{which}", self._parameters.get(f"bias_ih_{which}"))
        name, bias = f"weight_hh_{which}", self._parameters.get(f"bias_hh_{which}")
        project = self._matrix(f"weight_hr_{which}", None) if self.proj_size else None
        given, backward = enter(x), which.endswith("_reverse")
        if project is None:
            done = self._at_once(name, bias, given, sizes, state, backward)
            if done is not None:
                return done
        recur = self._matrix(name, bias)
        step = STEPS[self.mode]

        def advance(given: Tensor, state: State) -> State:
            new = step(given, recur(state[0]), state)
            return new if project is None else (project(new[0]), *new[1:])

        run = run_backward if backward else run_forward
        outputs, state = run(torch.split(given, sizes), state, advance)
        return torch.cat(outputs), state

    _sizes = nn.RNNBase.extra_repr


class RecurrentCellForward(_Recurrent):
    """The forward pass of `nn.LSTMCell`, `nn.GRUCell` and `nn.RNNCell`."""

    mode: str

    def _take_sizes(self, source: nn.RNNCellBase) -> None:
        for name in ("input_size", "hidden_size", "bias"):
            setattr(self, name, getattr(source, name))
        if isinstance(source, nn.RNNCell):
            self.nonlinearity = source.nonlinearity
            self.mode = f"RNN_{source.nonlinearity.upper()}"
        else:
            self.mode = "LSTM" if isinstance(source, nn.LSTMCell) else "GRU"

    def forward(self, input: Tensor, hx: Tensor | Sequence[Tensor] | None = None) -> Tensor | State:
        """Make one step as the float cell does; see there for shapes. Returns states in the dtype of `input`."""
        kernels.check_input(input, type(self).__name__, self.input_size, dims=(1, 2))
        states = self._initial(
            hx, [(*input.shape[:-1], self.hidden_size)] * (1 + (self.mode == "LSTM")), input
        )
        batched = input.dim() == 2
        x, *rows = (part if batched else part.unsqueeze(0) for part in (input.float(), *states))
        enter = self._matrix("weight_ih", self._parameters.get("bias_ih"))
        given, bias = enter(x), self._parameters.get("bias_hh")
        done = self._at_once("weight_hh", bias, given, [x.shape[0]], tuple(rows), False)
        if done is None:
            recur = self._matrix("weight_hh", bias)
            new = STEPS[self.mode](given, recur(rows[0]), tuple(rows))
        else:
            new = done[1]
        answer = tuple((part if batched else part.squeeze(0)).to(input.dtype) for part in new)
        return answer if self.mode == "LSTM" else answer[0]

    _sizes = nn.RNNCellBase.extra_repr
