"""int8 recurrent layers against torch's documented formulas in float64, with quantized weights and tokens, and against theory."""

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from models import relative_error, seeded
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import mono_quant as mq
from mono_quant import kernels
from mono_quant.errors import FrozenWeightError, InputError

WEIGHTS = {"fidelity": False, "disable_defaults": ["small"]}
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
LAYERS = {
    "lstm": lambda **o: nn.LSTM(20, 24, **o),
    "lstm_all": lambda **o: nn.LSTM(20, 24, 2, bidirectional=True, proj_size=17, **o),
    "lstm_three": lambda **o: nn.LSTM(20, 24, 3, bias=False, **o),
    "lstm_few": lambda **o: nn.LSTM(3, 24, bidirectional=True, **o),
    "gru": lambda **o: nn.GRU(20, 24, **o),
    "gru_all": lambda **o: nn.GRU(20, 24, 2, bidirectional=True, bias=False, **o),
    "rnn": lambda **o: nn.RNN(20, 24, 2, **o),
    "relu": lambda **o: nn.RNN(20, 24, nonlinearity="relu", bidirectional=True, **o),
}
EACH = pytest.mark.parametrize("name", LAYERS)
LENGTHS = (2, 6, 4)
# torch says so of its own layer
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
MODULES = {
    "lstm": lambda: nn.LSTM(20, 24, 2, bidirectional=True, proj_size=17),
    "gru": lambda: nn.GRU(20, 24, batch_first=True),
    "rnn": lambda: nn.RNN(20, 24),
    "lstm_cell": lambda: nn.LSTMCell(20, 24),
    "gru_cell": lambda: nn.GRUCell(20, 24),
    "rnn_cell": lambda: nn.RNNCell(20, 24, nonlinearity="relu"),
    "few_inputs": lambda: nn.LSTM(3, 24),
}
EVERY = pytest.mark.parametrize("kind", MODULES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "chosen"])
def qmax(request):
    """Run on the reference, and with 12 bits on the path that this machine chooses; gives the largest activation code."""
    chosen = (None, "int12") if request.param == "chosen" else ("reference", "int8")
    with kernels.using(*chosen):
        yield 2 ** (kernels.SCHEMES[kernels.activation_scheme()].bits - 1) - 1


class Around(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer = make()

    def forward(self, *args):
        return self.layer(*args)


def int8(layer):
    model = Around(lambda: layer).eval()
    return mq.quantize(model, **WEIGHTS).model.layer


def flat(answer):
    leaves, _ = torch.utils._pytree.tree_flatten(answer)
    return [leaf for leaf in leaves if torch.is_tensor(leaf)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(flat(one), flat(other), strict=True))


# --- the formulas of torch's documentation, one sequence and one step at a time


def rounded(x, qmax):
    """A token in codes, as the reference defines them; its gradient is that of the token itself."""
    a = x.detach().abs().amax(-1, keepdim=True)
    codes = (x.detach() * (qmax / a.clamp_min(1e-30))).round()
    return x + (codes * (a / qmax) - x).detach()


def rounded_rows(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().double() * scale.double()


class Exact:
    """Products in float64: of the float layer where `qmax` is None, else of quantized tokens and rows."""

    def __init__(self, layer, qmax=None):
        self.own = dict(layer.named_parameters())
        self.qmax = qmax

    def __call__(self, x, name):
        weight = self.own[name].detach()
        bias = self.own.get(name.replace("weight", "bias"))
        bias = 0 if bias is None else bias.detach().double()
        # few inputs stay in float
        if self.qmax is None or weight.shape[1] < 16:
            return x @ weight.double().t() + bias
        return rounded(x, self.qmax) @ rounded_rows(weight).t() + bias


def one_step(mode, given, recurrent, h, c):
    size = given.shape[-1] // GATES[mode]
    g, r = ([x[..., k * size : (k + 1) * size] for k in range(GATES[mode])] for x in (given, recurrent))
    if mode == "LSTM":
        i, f, o = ((g[k] + r[k]).sigmoid() for k in (0, 1, 3))
        c = f * c + i * (g[2] + r[2]).tanh()
        return o * c.tanh(), c
    if mode == "GRU":
        reset, z = ((g[k] + r[k]).sigmoid() for k in (0, 1))
        return (1 - z) * (g[2] + reset * r[2]).tanh() + z * h, c
    total = g[0] + r[0]
    return (total.tanh() if mode == "RNN_TANH" else total.relu()), c


def one_sequence(layer, x, state, product):
    """Outputs [T, D * H] of a sequence [T, I] and the last states; `state` is a list of (h, c) by layer and direction."""
    last = []
    for depth in range(layer.num_layers):
        both = []
        for end in ["", "_reverse"][: 1 + layer.bidirectional]:
            h, c = state[len(last)]
            steps = reversed(list(x)) if end else list(x)
            outputs = []
            for token in steps:
                given, recurrent = (
                    product(token, f"weight_ih_l{depth}{end}"),
                    product(h, f"weight_hh_l{depth}{end}"),
                )
                h, c = one_step(layer.mode, given, recurrent, h, c)
                h = product(h, f"weight_hr_l{depth}{end}") if layer.proj_size else h
                outputs.append(h)
            both.append(outputs[::-1] if end else outputs)
            last.append((h, c))
        x = [torch.cat(tokens) for tokens in zip(*both, strict=True)]
    return torch.stack(x), [torch.stack([pair[k] for pair in last]) for k in (0, 1)]


def oracle(layer, sequences, states, product):
    """Answer for each sequence by itself; `states` are [L * D, N, H]."""
    found = []
    for n, x in enumerate(sequences):
        h = states[0][:, n].double()
        c = states[1][:, n].double() if len(states) > 1 else h
        found.append(one_sequence(layer, x.double(), list(zip(h, c, strict=True)), product))
    last = [torch.stack([states[k] for _, states in found], 1) for k in (0, 1)][: len(states)]
    return [out for out, _ in found], last


# --- calls of every form


@dataclass
class Call:
    """A call of a layer, and the sequences and initial states that it is about."""

    layer: nn.Module
    args: tuple
    sequences: list
    states: list

    def sequences_of(self, answer):
        """The outputs of an answer by sequence, and its last states [L * D, N, H]."""
        out, last = answer
        last = list(last) if isinstance(last, tuple) else [last]
        if isinstance(out, PackedSequence):
            padded, lengths = pad_packed_sequence(out)
            return [padded[:length, n] for n, length in enumerate(lengths)], last
        if out.dim() == 2:
            return [out], [part.unsqueeze(1) for part in last]
        return list(out if self.layer.batch_first else out.transpose(0, 1)), last


def call(name, form, given):
    layer = LAYERS[name](batch_first=form == "batch_first").eval()
    x = torch.randn(6, 3, layer.input_size)
    lengths = sorted(LENGTHS, reverse=True) if form == "sorted" else LENGTHS
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 1 + (layer.mode == "LSTM")]
    states = [torch.randn(layer.num_layers * (1 + layer.bidirectional), 3, size) for size in sizes]
    states = states if given else [torch.zeros_like(part) for part in states]
    sequences = list(x.transpose(0, 1))
    if form in ("sorted", "unsorted"):
        sequences = [s[:length] for s, length in zip(sequences, lengths, strict=True)]
        x = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=form == "sorted")
    elif form == "unbatched":
        x, sequences, states = x[:, 0], sequences[:1], [part[:, :1] for part in states]
    elif form == "batch_first":
        x = x.transpose(0, 1).contiguous()
    hx = [part[:, 0] if form == "unbatched" else part for part in states]
    hx = tuple(hx) if layer.mode == "LSTM" else hx[0]
    return Call(layer, (x, hx) if given else (x,), sequences, states)


FORMS = pytest.mark.parametrize("form", ["padded", "batch_first", "unbatched", "sorted", "unsorted"])
GIVEN = pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])


@GIVEN
@FORMS
@EACH
def test_the_formulas_are_those_of_torch(name, form, given):
    made = call(name, form, given)
    expected = oracle(made.layer, made.sequences, made.states, Exact(made.layer))
    answer = made.sequences_of(made.layer(*made.args))
    assert all(
        torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(flat(answer), flat(expected), strict=True)
    )


@GIVEN
@FORMS
@EACH
def test_an_int8_layer_is_the_formula_on_quantized_tokens_and_rows(name, form, given, qmax):
    made = call(name, form, given)
    layer = int8(made.layer)
    with torch.no_grad():
        expected, answer = made.layer(*made.args), layer(*made.args)
    # types, shapes and strides are torch's
    assert [type(part) for part in (*answer, answer[1])] == [type(part) for part in (*expected, expected[1])]
    pairs = list(zip(flat(answer), flat(expected), strict=True))
    assert all((a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) for a, b in pairs)
    if isinstance(answer[0], PackedSequence):
        assert same(answer[0][1:], expected[0][1:])
    found = made.sequences_of(answer)
    oracles = oracle(made.layer, made.sequences, made.states, Exact(made.layer, qmax))
    # fp32 sums; one code on the other side would be a thousand times as much
    assert all(
        torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(flat(found), flat(oracles), strict=True)
    )


class Ball:
    """A number of the float layer, and how far that of the int8 layer can be from it."""

    def __init__(self, middle, radius=0.0):
        self.middle, self.radius = middle, torch.zeros_like(middle) + radius
        self.shape = middle.shape

    def __getitem__(self, index):
        return Ball(self.middle[index], self.radius[index])

    def __add__(self, other):
        return Ball(self.middle + other.middle, self.radius + other.radius)

    def __rsub__(self, number):
        return Ball(number - self.middle, self.radius)

    def __mul__(self, other):
        a, b = self.middle.abs(), other.middle.abs()
        radius = a * other.radius + b * self.radius + self.radius * other.radius
        return Ball(self.middle * other.middle, radius)

    def sigmoid(self):
        return Ball(self.middle.sigmoid(), self.radius / 4)

    def tanh(self):
        return Ball(self.middle.tanh(), self.radius)


def widened(layer, qmax):
    """The product of balls: rounding moves a token by half a code and a weight by half of its own."""

    def product(x, name):
        weight, bias = (
            dict(layer.named_parameters())[n].detach().double()
            for n in (name, name.replace("weight", "bias"))
        )
        code = (x.middle.abs() + x.radius).max() / qmax
        radius = x.radius + code / 2
        step = weight.abs().amax(1) / 127
        wrong = weight.abs() @ radius + step / 2 * (x.middle.abs() + radius).sum()
        return Ball(weight @ x.middle + bias, wrong)

    return product


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_distance_to_the_float_layer_is_within_what_rounding_can_do(name, qmax):
    layer = LAYERS[name]().eval()
    x, zero = torch.randn(4, 20), Ball(torch.zeros(24, dtype=torch.float64))
    with torch.no_grad():
        out, expected = int8(layer)(x)[0], copy.deepcopy(layer).double()(x.double())[0]
    product, h, c = widened(layer, qmax), zero, zero
    for step, token in enumerate(x.double()):
        h, c = one_step(layer.mode, product(Ball(token), "weight_ih_l0"), product(h, "weight_hh_l0"), h, c)
        assert torch.allclose(h.middle, expected[step])
        assert bool(((out[step].double() - expected[step]).abs() <= h.radius + 1e-6).all())
    # the bound says something: outputs go up to 1
    assert 0 < float(h.radius.max()) < 0.5


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_the_error_is_not_larger_than_that_of_torch_ao(cls):
    layer, x = cls(64, 96, 2, bidirectional=True).eval(), torch.randn(12, 4, 64)
    theirs = torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(layer)), {cls}, torch.qint8)
    with torch.no_grad(), kernels.using(activations="int8"):
        expected, ours, other = (run(x)[0] for run in (layer, int8(layer), theirs))
    assert 0 < relative_error(expected, ours) < relative_error(expected, other) < 0.1


@pytest.mark.parametrize("name", ["lstm_all", "gru_all"])
def test_gradients_pass_straight_through_the_rounding(name):
    layer = LAYERS[name]().eval()
    x = torch.randn(3, 2, 20)
    states = [torch.randn(4, 2, size) for size in ((17, 24) if name == "lstm_all" else (24,))]

    def gradients(answer, *leaves):
        out, last = answer
        total = out.square().sum() + sum(
            part.sum() for part in (last if isinstance(last, tuple) else (last,))
        )
        return torch.autograd.grad(total, leaves)

    leaves = [part.clone().requires_grad_() for part in (x, *states)]
    found = gradients(int8(layer)(leaves[0], leaves[1:] if len(states) > 1 else leaves[1]), *leaves)
    wide = [part.double().requires_grad_() for part in (x, *states)]
    qmax = 2 ** (kernels.SCHEMES[kernels.activation_scheme()].bits - 1) - 1
    outputs, last = oracle(layer, list(wide[0].transpose(0, 1)), wide[1:], Exact(layer, qmax))
    expected = gradients((torch.stack(outputs, 1), tuple(last)), *wide)
    assert all(relative_error(b, a) < 1e-5 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["lstm_all", "gru_all", "rnn"])
def test_dropout_between_layers_is_that_of_torch_while_training(name):
    layer = LAYERS[name](dropout=0.5)
    quiet, x = int8(layer).train(), torch.randn(5, 3, 20)
    layer.train()
    with torch.no_grad():
        expected, found = (seeded(lambda run=run: run(x)[0]) for run in (layer, quiet))
        assert relative_error(expected, found) < 0.03
        assert not torch.equal(quiet(x)[0], quiet(x)[0])
        assert torch.equal(quiet.eval()(x)[0], quiet(x)[0])


# --- cells


@pytest.mark.parametrize("kind", ["lstm_cell", "gru_cell", "rnn_cell"])
def test_a_cell_is_one_step_of_its_layer(kind, qmax):
    cell = MODULES[kind]().eval()
    options = {"nonlinearity": "relu"} if kind == "rnn_cell" else {}
    layer = {"lstm_cell": nn.LSTM, "gru_cell": nn.GRU, "rnn_cell": nn.RNN}[kind](20, 24, **options).eval()
    layer.load_state_dict({f"{name}_l0": tensor for name, tensor in cell.state_dict().items()})
    quiet, x = int8(cell), torch.randn(5, 3, 20)
    with torch.no_grad():
        out, last = int8(layer)(x)
        state = None
        for step, token in enumerate(x):
            state = quiet(token, state)
            assert torch.equal(state[0] if kind == "lstm_cell" else state, out[step])
        assert same(state, tuple(part[0] for part in last) if kind == "lstm_cell" else last[0])
        for given in (
            (x[0],),
            (x[0, 1],),
            (x[0, :0],),
            (x[1, 2], [torch.randn(24)] * 2 if kind == "lstm_cell" else torch.randn(24)),
        ):
            found, expected = flat(quiet(*given)), flat(cell(*given))
            assert [part.shape for part in found] == [part.shape for part in expected]
            assert not found[0].numel() or relative_error(expected[0], found[0]) < 0.05


# --- what goes in and comes out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@EVERY
def test_a_model_of_another_dtype_answers_in_it_and_computes_in_float32(kind, dtype):
    layer = MODULES[kind]().to(dtype).eval()
    quiet = int8(layer)
    x = torch.randn(3, layer.input_size, dtype=dtype)
    with torch.no_grad():
        found, wide = flat(quiet(x)), flat(quiet(x.float()))
        expected = flat(copy.deepcopy(layer).float()(x.float()))
    assert all(part.dtype == dtype for part in found) and all(part.dtype == torch.float32 for part in wide)
    # one rounding, at the end
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found, wide, strict=True))
    assert all(relative_error(b, a) < 0.05 for a, b in zip(wide, expected, strict=True))


@EVERY
def test_casts_leave_codes_and_scales_what_they_are(kind):
    quiet = int8(MODULES[kind]())
    before = {name: tensor.clone() for name, tensor in quiet.state_dict().items()}
    quiet.half()
    x = (
        torch.randn(2, 3, quiet.input_size)
        if hasattr(quiet, "num_layers")
        else torch.randn(3, quiet.input_size)
    )
    with torch.no_grad():
        assert all(part.dtype == torch.float16 for part in flat(quiet(x.half())))
    for name, tensor in quiet.state_dict().items():
        is_code = before[name].dtype == torch.int8 or name.endswith("_scale")
        assert torch.equal(tensor, before[name] if is_code else before[name].half())
    assert all(getattr(quiet, name).dtype == torch.float16 for name in quiet.held)


def test_empty_batches_come_back_empty_and_empty_sequences_are_refused_as_in_torch():
    for make in (LAYERS["lstm_all"], LAYERS["gru"]):
        layer = make().eval()
        quiet, nobody, nothing = int8(layer), torch.zeros(4, 0, 20), torch.zeros(0, 2, 20)
        assert [part.shape for part in flat(quiet(nobody))] == [part.shape for part in flat(layer(nobody))]
        with pytest.raises(RuntimeError, match="sequence length"):
            layer(nothing)
        with pytest.raises(InputError, match=r"at least one time step, not \(0, 2, 20\); leave out"):
            quiet(nothing)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(4, 2, 21),), r"Int8LSTM takes inputs with 20 features, not \(4, 2, 21\)"),
        ((torch.zeros(20),), r"20 features, not \(20,\)"),
        ((torch.zeros(4, 2, 20, dtype=torch.long),), "floating-point inputs"),
        ((torch.zeros(4, 2, 20), torch.zeros(1, 2, 24)), r"of shape \(1, 2, 24\), \(1, 2, 24\) for this input, not \(1, 2, 24\);"),
        ((torch.zeros(4, 2, 20), [torch.zeros(1, 3, 24)] * 2), r"not \(1, 3, 24\), \(1, 3, 24\); give it what"),
        ((torch.zeros(4, 20), [torch.zeros(1, 1, 24)] * 2), r"of shape \(1, 24\), \(1, 24\)"),
        ((pack_padded_sequence(torch.zeros(4, 2, 21), torch.tensor([4, 2])),), r"20 features, not \(6, 21\)"),
    ],
)  # fmt: skip
def test_what_the_float_layer_refuses_is_refused_with_a_remedy(args, message):
    layer = nn.LSTM(20, 24)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        layer(*args)
    with pytest.raises(InputError, match=message):
        int8(layer)(*args)


# --- weights that are read, written, copied and filled


@EVERY
def test_weights_read_as_float_and_refuse_writes(kind):
    layer = MODULES[kind]()
    quiet = int8(layer)
    for name, parameter in layer.named_parameters():
        read = getattr(quiet, name)
        assert read.shape == parameter.shape and read.dtype == parameter.dtype
        if name not in quiet.held:
            assert torch.equal(read, parameter)
            continue
        assert torch.equal(read, rounded_rows(parameter.detach()).float())
        with pytest.raises(FrozenWeightError, match=f"{name} is made from int8 codes"):
            read.mul_(2)
        with pytest.raises(FrozenWeightError, match=f"{name} is torch.int8"):
            setattr(quiet, name, nn.Parameter(parameter.detach()))
        with pytest.raises(FrozenWeightError, match="removed"):
            delattr(quiet, name)
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        _ = quiet.weight


def test_what_torch_keeps_beside_the_parameters_reads_as_float_too():
    layer = MODULES["lstm"]()
    quiet, x = int8(layer), torch.randn(2, 3, 20)
    before = quiet(x)
    quiet.flatten_parameters()
    assert same(before, quiet(x))
    named = dict(layer.named_parameters())
    flat_names = layer._flat_weights_names
    assert [w.shape for w in quiet._flat_weights] == [named[n].shape for n in flat_names]
    assert [[w.shape for w in group] for group in quiet.all_weights] == [
        [w.shape for w in group] for group in layer.all_weights
    ]
    assert all(w.dtype == torch.float32 for w in quiet._flat_weights)
    # no float weight lives on
    assert not {id(p) for p in layer.parameters() if p.dim() > 1} & {id(v) for v in vars(quiet).values()}
    assert {"_flat_weights", "_flat_weight_refs"}.isdisjoint(vars(quiet))
    assert repr(quiet) == "Int8" + repr(layer)


@EVERY
def test_copies_and_state_dicts_compute_the_same(kind):
    layer, fresh = MODULES[kind](), MODULES[kind]()
    quiet, x = int8(layer), torch.randn(3, layer.input_size)
    expected = quiet(x)
    buffer = io.BytesIO()
    torch.save(quiet, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(quiet), pickle.loads(pickle.dumps(quiet)), torch.load(buffer, weights_only=False), int8(fresh)
    ]  # fmt: skip
    assert not same(copies[-1](x), expected)
    assert copies[-1].load_state_dict(quiet.state_dict(), strict=True).missing_keys == []
    assert all(same(other(x), expected) for other in copies)
    names = [name for name, _ in layer.named_parameters()]
    assert [n for n in quiet.state_dict() if not n.endswith("_scale")] == names
    with pytest.raises(RuntimeError, match="holds int8 codes"):
        quiet.load_state_dict(layer.state_dict(), strict=False)
    assert same(quiet(x), expected)


@EVERY
def test_other_tensors_can_be_put_in_their_place_for_a_call(kind):
    quiet, other = int8(MODULES[kind]()), int8(MODULES[kind]())
    x = torch.randn(3, quiet.input_size)
    with torch.no_grad():
        assert same(torch.func.functional_call(quiet, other.state_dict(), (x,)), other(x))
        assert not same(quiet(x), other(x))


@EVERY
def test_plan_conversion_and_folder_agree(kind, tmp_path):
    model = Around(MODULES[kind]).eval()
    result, planned = mq.quantize(model, **WEIGHTS), mq.plan(model, **WEIGHTS)
    facts = [(r.name, r.action, r.reason, r.kind, r.bytes_after, r.dtype_after) for r in result.report.rows]
    assert facts == [(r.name, r.action, r.reason, r.kind, r.bytes_after, r.dtype_after) for r in planned.rows]
    layer = result.model.layer
    assert {r.name for r in result.report.quantized} == {f"layer.{name}" for name in layer.held}
    assert all(r.sqnr_db > 40 for r in result.report.quantized)
    held = sum(t.numel() * t.element_size() for t in result.model.state_dict().values())
    assert result.report.bytes_after == held
    loaded = mq.load(result.save(tmp_path / "out"), model=lambda: Around(MODULES[kind]))
    x = torch.randn(3, layer.input_size)
    assert type(loaded.layer) is type(layer) and same(loaded(x), result.model(x))
    again = mq.quantize(model, inplace=True, **WEIGHTS).model
    assert again is model and same(again(x), result.model(x))


def test_few_inputs_stay_in_float_and_everybody_says_so():
    model = nn.Sequential(nn.LSTM(3, 64)).eval()
    result = mq.quantize(model, probe=torch.randn(4, 2, 3))
    assert result.model[0].held == ("weight_hh_l0",) and 0 < result.report.fidelity["relative_error"] < 0.02
    assert torch.equal(result.model[0].weight_ih_l0, model[0].weight_ih_l0)
    (kept,) = result.report.kept_layers
    reason = "short rows: 3 weights share one scale, fewer than 16"
    assert (kept.name, kept.weights, kept.reason) == ("0.weight_ih_l0", 768, reason)
    assert f"0.weight_ih_l0  768  {reason}" in result.report.table() and "`0.weight_ih_l0`" in result.card()
    # one of the features is a thousand times the others: a token in eight bits would be that one alone
    x = torch.randn(4, 2, 3) * torch.tensor([1.0, 1000.0, 1.0])
    with torch.no_grad():
        model[0].weight_ih_l0[:, 1] /= 1000
        result = mq.quantize(model, fidelity=False)
        assert relative_error(model(x)[0], result.model(x)[0]) < 0.02


def test_rules_speak_of_the_whole_layer_and_names_of_kept_layers_are_unique():
    model = nn.ModuleDict({
        "big": nn.LSTM(32, 32, 2), "small": nn.GRU(16, 8), "cell": nn.GRUCell(64, 32), "attention": nn.MultiheadAttention(48, 4)
    })  # fmt: skip
    skipped = {
        "none": mq.dynamic_quantize(model)[1],
        "type": mq.dynamic_quantize(model, skip_types=["LSTM", "MultiheadAttention"])[1],
        "name": mq.dynamic_quantize(model, skip=["big", "cell"])[1],
        "size": mq.dynamic_quantize(model, min_params=10_000)[1],
    }
    assert skipped == {
        "none": ["small"],
        "type": ["big", "small", "attention"],
        "name": ["big", "small", "cell"],
        "size": ["small", "cell", "attention"],
    }
    table = mq.plan(model, skip_types=["LSTM"]).table()
    assert table.count("skipped by the user: type LSTM") == 2 and f"  big    {4 * 32 * 32 * 4:,}  " in table


# --- compilers and other onlookers


def near(a, b):
    """Equal to fp32 accuracy: gates are torch's where someone looks at the call, and native ones elsewhere."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["few_inputs", "gru_cell"])
def test_a_compiled_layer_computes_the_same(kind):
    quiet = int8(MODULES[kind]())
    run = torch.compile(quiet, backend="eager", fullgraph=True)
    with torch.no_grad():
        for size in (3, 2):
            x = torch.randn(size, quiet.input_size)
            near(run(x), quiet(x))


def test_an_exported_layer_computes_the_same():
    quiet, x = int8(MODULES["gru"]()), torch.randn(2, 3, 20)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(quiet, (x,), dynamic_shapes=({0: batch},))
        more = torch.randn(5, 3, 20)
        near(program.module()(x), quiet(x))
        near(program.module()(more), quiet(more))


def test_many_sequences_at_once_are_each_what_they_are_alone():
    """A token's codes depend on that token alone, so neither padding nor neighbours change an answer."""
    quiet = int8(LAYERS["lstm_all"]())
    x = torch.randn(6, 3, 20)
    with torch.no_grad():
        packed = quiet(pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False))
        for n, (out, length) in enumerate(
            zip(pad_packed_sequence(packed[0])[0].transpose(0, 1), LENGTHS, strict=True)
        ):
            alone, last = quiet(x[:length, n])
            assert torch.equal(out[:length], alone)
            assert same(last, tuple(part[:, n] for part in packed[1]))
