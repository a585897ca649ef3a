"""Modules: registration, modes, hooks, state dicts; every layer and loss against PyTorch, values and gradients."""

import copy

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import changes, dtypes, nn
from jitgrad.autograd import no_grad
from jitgrad.nn import init
from jitgrad.nn.parameter import Parameter
from jitgrad.tensor import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


def tensor(*shape, seed=0, positive=False):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jg.from_numpy(np.abs(values) if positive else values)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
        self.head = nn.Linear(3, 2)
        self.head_again = self.head
        self.scale = Parameter(jg.ones(3))
        self.register_buffer("seen", jg.from_numpy(np.zeros(2, np.float32)))
        self.register_buffer("scratch", jg.from_numpy(np.zeros(5, np.float32)), persistent=False)

    def forward(self, x):
        return self.head(self.body(x) * self.scale)


# --- structure -------------------------------------------------------------------------------------------------------

def test_attributes_are_filed_by_kind():
    net = Net()
    assert list(dict(net.named_parameters())) == [
        "scale", "body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias", "head.weight", "head.bias"]
    assert [name for name, _ in net.named_modules()] == ["", "body", "body.0", "body.1", "body.2", "head"]
    assert [name for name, _ in net.named_children()] == ["body", "head"]
    assert [name for name, _ in net.named_buffers()] == ["seen", "scratch"]
    assert len(list(net.named_parameters(remove_duplicate=False))) == 9
    assert {"scale", "body", "seen", "forward"} <= set(dir(net))
    assert net.get_submodule("body.2") is net.body[2]
    assert net.get_parameter("body.2.weight") is net.body[2].weight
    assert net.get_buffer("seen") is net.seen
    with pytest.raises(AttributeError, match=r"no submodule '7' \(of the path 'body.7'\)"):
        net.get_submodule("body.7")
    with pytest.raises(AttributeError, match="'Net' object has no attribute 'missing'"):
        _ = net.missing


def test_reassigning_moves_and_deleting_removes():
    net = Net()
    with pytest.raises(TypeError, match="'scale' is a parameter"):
        net.scale = 3
    net.scale = None
    assert "scale" not in dict(net.named_parameters()) and net.scale is None
    del net.scale
    net.scale = 3
    assert net.scale == 3
    net.seen = Parameter(np.zeros(2, np.float32))
    assert "seen" in dict(net.named_parameters()) and "seen" not in dict(net.named_buffers())
    del net.body
    assert not hasattr(net, "body")


def test_registration_is_checked():
    class NoInit(nn.Module):
        def __init__(self):
            self.layer = nn.Linear(1, 1)

    with pytest.raises(AttributeError, match=r"call super\(\).__init__\(\)"):
        NoInit()
    net = Net()
    for name, error in (("a.b", KeyError), ("", KeyError), ("forward", KeyError), (3, TypeError)):
        with pytest.raises(error):
            net.register_buffer(name, None)
    with pytest.raises(TypeError, match="not a Tensor"):
        net.register_buffer("other", 3)
    with pytest.raises(ValueError, match="leaf"):
        net.register_parameter("other", _non_leaf_parameter())
    with pytest.raises(TypeError, match="not a Module"):
        net.add_module("other", 3)
    with pytest.raises(NotImplementedError, match="Module: define forward"):
        nn.Module()(1)


def _non_leaf_parameter():
    p = Parameter(np.ones(2, np.float32), requires_grad=False)
    with no_grad():
        p.zero_()
    p.add_(Parameter(np.ones(2, np.float32)))
    return p


def test_every_change_is_noted_and_assigning_the_same_object_is_not():
    net = Net()

    def noted(change):
        before = changes.count
        change()
        return changes.count != before

    assert noted(net.eval) and not noted(net.eval) and noted(net.train)
    assert noted(lambda: setattr(net, "hidden", [1])) and not noted(lambda: setattr(net, "hidden", net.hidden))
    assert not noted(lambda: setattr(net, "body", net.body)) and noted(lambda: setattr(net, "body", nn.Identity()))
    assert noted(lambda: delattr(net, "body"))
    assert noted(lambda: net.requires_grad_(False)) and not noted(lambda: net.requires_grad_(False))
    assert noted(lambda: net.register_forward_hook(print)) and noted(lambda: net.add_module("x", nn.ReLU()))
    assert noted(lambda: nn.ModuleList([nn.ReLU()]).append(nn.ReLU()))


def test_repr():
    assert repr(nn.Linear(2, 3, bias=False)) == "Linear(in_features=2, out_features=3, bias=False)"
    assert repr(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh()))) == (
        "Sequential(\n  (0): ReLU()\n  (1): Sequential(\n    (0): Tanh()\n  )\n)")
    assert repr(nn.Conv2d(3, 4, 3, padding="same", groups=1, bias=False)) == (
        "Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=same, bias=False)")
    assert repr(nn.ReLU(inplace=True)) == "ReLU(inplace=True)" and repr(nn.Identity()) == "Identity()"


def test_deepcopy_is_independent():
    net = Net()
    net(tensor(2, 4)).sum().backward()
    twin = copy.deepcopy(net)
    assert type(twin.scale) is Parameter and twin.head is twin.head_again
    np.testing.assert_array_equal(twin.scale.grad.numpy(), net.scale.grad.numpy())
    with no_grad():
        twin.scale.zero_()
    assert net.scale.detach().numpy().all()


def test_conversion_keeps_parameters_and_their_ties():
    net = Net()
    scale, head = net.scale, net.head.weight
    net.double()
    assert net.scale is scale and scale.dtype is dtypes.float64 and net.head.weight is head
    assert net.seen.dtype is dtypes.float64
    net.to("cpu", dtypes.float16)
    assert scale.dtype is dtypes.float16
    assert net.float().body[0].weight.dtype is dtypes.float32
    assert net.bfloat16().scale.dtype is dtypes.bfloat16
    with pytest.raises(TypeError, match="floating-point"):
        net.to(dtypes.int64)


def test_zero_grad_and_apply():
    net, visited = Net(), []
    net(tensor(2, 4)).sum().backward()
    held = net.scale.grad
    net.zero_grad(set_to_none=False)
    assert net.scale.grad is held and not held.numpy().any()
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    assert net.apply(lambda m: visited.append(type(m).__name__)) is net
    assert visited == ["Linear", "ReLU", "Linear", "Sequential", "Linear", "Net"]


# --- containers ------------------------------------------------------------------------------------------------------

def test_module_lists():
    layers = nn.ModuleList(nn.Linear(k, k) for k in range(1, 5))
    assert len(layers) == 4 and layers[-1].in_features == 4 and [m.in_features for m in layers[1:3]] == [2, 3]
    del layers[1]
    layers.insert(0, nn.ReLU())
    layers += [nn.Tanh()]
    assert list(layers.state_dict())[:2] == ["1.weight", "1.bias"]
    assert type(layers.pop()) is nn.Tanh and len(layers) == 4
    with pytest.raises(IndexError, match="out of range for 4"):
        layers[7]
    with pytest.raises(TypeError, match="int is not a Module"):
        layers.append(3)


def test_sequential():
    net = nn.Sequential({"a": nn.Linear(2, 3), "b": nn.ReLU(), "c": nn.Linear(3, 1)})
    assert net(tensor(5, 2)).shape == (5, 1) and type(net[1]) is nn.ReLU and "c.weight" in net[1:].state_dict()
    net[1] = nn.Tanh()
    assert type(net.b) is nn.Tanh and len(nn.Sequential(nn.ReLU()).append(nn.ReLU())) == 2


def test_dicts_and_parameter_containers():
    modules = nn.ModuleDict({"a": nn.ReLU(), "b": nn.Linear(2, 2)})
    assert list(modules) == ["a", "b"] and "a" in modules and len(list(modules.parameters())) == 2
    assert type(modules.pop("a")) is nn.ReLU and len(modules) == 1
    params = nn.ParameterList([tensor(2), Parameter(tensor(3))])
    params.append(tensor(4))
    assert [p.shape for p in params] == [(2,), (3,), (4,)] and len(list(params.parameters())) == 3
    named = nn.ParameterDict({"w": tensor(2)})
    named["v"] = tensor(3)
    assert sorted(named.state_dict()) == ["v", "w"] and isinstance(named["w"], Parameter)


# --- hooks -----------------------------------------------------------------------------------------------------------

def test_forward_hooks_see_and_replace():
    layer, seen = nn.Linear(2, 2), []
    first = layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    layer.register_forward_hook(lambda m, args, out: seen.append(args[0].numpy().copy()))
    layer.register_forward_hook(lambda m, args, kwargs, out: out + 1, with_kwargs=True)
    x = tensor(3, 2)
    plain = nn.functional.linear(x * 2, layer.weight, layer.bias) + 1
    np.testing.assert_allclose(layer(x).detach().numpy(), plain.detach().numpy())
    np.testing.assert_allclose(seen[0], x.numpy() * 2)
    first.remove()
    layer(x)
    np.testing.assert_allclose(seen[1], x.numpy())


def test_a_hook_that_is_always_called_sees_failures():
    layer, seen = nn.Linear(2, 2), []
    layer.register_forward_hook(lambda m, args, out: seen.append(out), always_call=True)
    with pytest.raises(RuntimeError):
        layer(tensor(3, 5))
    assert seen == [None]


def test_full_backward_hooks():
    layer, seen = nn.Linear(3, 2), []
    layer.register_full_backward_pre_hook(lambda m, grad_output: (grad_output[0] * 2,))
    handle = layer.register_full_backward_hook(
        lambda m, grad_input, grad_output: seen.append((grad_input, grad_output)) or (grad_input[0] * 10,))
    x = tensor(4, 3)
    x.requires_grad_()
    layer(x).sum().backward()
    (grad_input,), (grad_output,) = seen[0]
    np.testing.assert_allclose(grad_output.numpy(), np.full((4, 2), 2.0))
    expected = np.full((4, 2), 2.0) @ layer.weight.detach().numpy()
    np.testing.assert_allclose(grad_input.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), expected * 10, rtol=1e-5)
    handle.remove()
    layer(tensor(4, 3)).sum().backward()
    assert len(seen) == 1


def test_backward_hook_without_inputs_that_need_gradients():
    layer, seen = nn.Linear(3, 2), []
    layer.register_full_backward_hook(lambda m, grad_input, grad_output: seen.append((grad_input, grad_output)))
    layer(tensor(4, 3)).sum().backward()
    assert seen[0][0] == (None,) and seen[0][1][0].shape == (4, 2) and layer.weight.grad is not None


# --- state dicts -----------------------------------------------------------------------------------------------------

def test_state_dict_shares_memory_and_leaves_scratch_out():
    net = Net()
    state = net.state_dict()
    assert list(state) == ["scale", "seen", "body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias",
                           "head.weight", "head.bias", "head_again.weight", "head_again.bias"]
    with no_grad():
        net.scale.fill_(7.0)
    assert (state["scale"].numpy() == 7).all() and not state["scale"].requires_grad
    assert net.state_dict(keep_vars=True)["scale"] is net.scale


def test_load_copies_in_place():
    net, other = Net(), Net()
    weight = net.body[0].weight
    assert repr(net.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert net.body[0].weight is weight
    for a, b in zip(net.parameters(), other.parameters()):
        np.testing.assert_array_equal(a.detach().numpy(), b.detach().numpy())
    net.load_state_dict({k: v.numpy().astype(np.float64) for k, v in other.state_dict().items()})
    assert weight.dtype is dtypes.float32


def test_everything_that_does_not_fit_is_named_and_nothing_changes():
    net = Net()
    state = {k: v.clone() * 0 + 5 for k, v in net.state_dict().items()}
    before = net.scale.detach().numpy().copy()
    del state["head.bias"], state["seen"]
    state.update({"extra": tensor(1), "body.0.weight": tensor(9, 9), "body.2.bias": tensor(4), "head.weight": "text"})
    with pytest.raises(RuntimeError) as error:
        net.load_state_dict(state)
    for part in ("Missing key(s) in state_dict: 'seen', 'head.bias'", "Unexpected key(s) in state_dict: 'extra'",
                 "size mismatch for body.0.weight: the state dict has (9, 9), the model (3, 4)", "body.2.bias",
                 "not a tensor: head.weight is a str"):
        assert part in str(error.value)
    np.testing.assert_array_equal(net.scale.detach().numpy(), before)
    del state["body.0.weight"], state["body.2.bias"], state["head.weight"]
    found = net.load_state_dict(state, strict=False)
    assert found.missing_keys == ["seen", "body.0.weight", "body.2.bias", "head.weight", "head.bias"]
    assert found.unexpected_keys == ["extra"] and (net.scale.detach().numpy() == 5).all()


def test_load_with_assign_takes_the_tensors():
    net, state = nn.Linear(2, 2), {"weight": tensor(2, 2).double(), "bias": Parameter(tensor(2))}
    net.load_state_dict(state, assign=True)
    assert net.bias is state["bias"] and net.weight.dtype is dtypes.float64 and net.weight.requires_grad


def test_extra_state_and_state_hooks():
    class Counting(nn.Module):
        count = 0

        def get_extra_state(self):
            return {"count": self.count}

        def set_extra_state(self, value):
            self.count = value["count"]

    net, again = nn.Sequential(Counting()), nn.Sequential(Counting())
    net[0].count = 3
    net.register_state_dict_post_hook(lambda module, state, prefix: state.update(added=1))
    again.register_load_state_dict_pre_hook(lambda module, state, prefix: state.pop("added"))
    again.load_state_dict(net.state_dict())
    assert again[0].count == 3


# --- layers against PyTorch ------------------------------------------------------------------------------------------

LAYERS = [
    ("Linear(5, 3)", [(4, 5)]), ("Linear(5, 3, bias=False)", [(2, 3, 5)]), ("Bilinear(3, 4, 2)", [(5, 3), (5, 4)]),
    ("Flatten()", [(2, 3, 4)]), ("Unflatten(1, (2, 3))", [(4, 6)]), ("Identity()", [(3,)]),
    ("Conv1d(4, 6, 3, stride=2, padding=1, groups=2)", [(2, 4, 9)]), ("Conv1d(3, 2, 3, padding='same')", [(2, 3, 7)]),
    ("Conv2d(3, 4, 3)", [(2, 3, 8, 7)]), ("Conv2d(4, 4, (3, 2), stride=2, padding=1, dilation=2)", [(2, 4, 9, 8)]),
    ("Conv2d(4, 8, 3, groups=4, bias=False)", [(2, 4, 6, 6)]), ("Conv2d(2, 3, 4, padding='same')", [(1, 2, 6, 5)]),
    ("Conv2d(2, 3, 3, padding=1, padding_mode='reflect')", [(1, 2, 6, 5)]),
    ("ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1)", [(2, 4, 7)]),
    ("ConvTranspose2d(4, 6, 3, groups=2, dilation=2, bias=False)", [(2, 4, 7, 5)]),
    ("Conv2d(2, 3, 3, padding=(1, 2), padding_mode='circular')", [(1, 2, 6, 5)]),
    ("Conv2d(2, 3, 3, padding=1, padding_mode='replicate')", [(1, 2, 6, 5)]), ("Conv2d(3, 4, 3)", [(3, 8, 7)]),
    ("MaxPool1d(3, 2)", [(2, 3, 9)]), ("MaxPool2d(2)", [(2, 3, 6, 7)]), ("MaxPool2d(3, 2, 1)", [(2, 3, 7, 8)]),
    ("MaxPool2d(3, 2, ceil_mode=True)", [(2, 3, 8, 8)]), ("AvgPool1d(2)", [(2, 3, 8)]),
    ("AvgPool2d(2)", [(2, 3, 6, 6)]), ("AvgPool2d(3, 2, 1, count_include_pad=False)", [(2, 3, 7, 7)]),
    ("AdaptiveAvgPool2d(1)", [(2, 3, 5, 6)]),
    ("AdaptiveAvgPool2d((2, 3))", [(2, 3, 5, 7)]),
    ("BatchNorm1d(4)", [(6, 4)]), ("BatchNorm1d(4, affine=False)", [(3, 4, 5)]), ("BatchNorm2d(3)", [(4, 3, 5, 5)]),
    ("BatchNorm2d(3, momentum=None)", [(4, 3, 2, 2)]), ("BatchNorm2d(3, track_running_stats=False)", [(4, 3, 2, 2)]),
    ("LayerNorm(6)", [(4, 6)]), ("LayerNorm((3, 4), bias=False)", [(2, 3, 4)]), ("GroupNorm(2, 4)", [(3, 4, 5)]),
    ("RMSNorm(6)", [(4, 6)]), ("RMSNorm((3, 4), eps=1e-3)", [(2, 3, 4)]),
    ("ReLU()", [(4, 5)]), ("ReLU6()", [(4, 5)]), ("GELU()", [(4, 5)]), ("GELU('tanh')", [(4, 5)]), ("Tanh()", [(4, 5)]),
    ("Sigmoid()", [(4, 5)]), ("SiLU()", [(4, 5)]), ("Mish()", [(4, 5)]), ("SELU()", [(4, 5)]), ("GLU()", [(4, 6)]),
    ("Softmax(1)", [(4, 5)]), ("LogSoftmax(-1)", [(4, 5)]), ("Softmin(0)", [(4, 5)]), ("Softmax()", [(4, 5)]), 
    ("LeakyReLU(0.2)", [(4, 5)]),
    ("ELU(0.7)", [(4, 5)]), ("Softplus(2.0, 1.0)", [(4, 5)]), ("Hardtanh(-0.5, 0.7)", [(4, 5)]),
    ("Hardswish()", [(4, 5)]), ("Hardsigmoid()", [(4, 5)]), ("LogSigmoid()", [(4, 5)]), ("PReLU(5)", [(4, 5)]),
    ("Dropout(0.0)", [(4, 5)]), ("Dropout2d(0.0)", [(2, 3, 4, 4)]),
    ("Conv3d(4, 6, (3, 2, 1), stride=(1, 2, 1), padding=1, groups=2)", [(2, 4, 5, 6, 4)]),
    ("Conv3d(2, 3, 3, padding='same', bias=False)", [(2, 4, 3, 5)]), ("Conv3d(2, 4, 2, dilation=2)", [(1, 2, 4, 5, 4)]),
    ("Conv3d(2, 3, 3, padding=(1, 2, 0), padding_mode='reflect')", [(1, 2, 4, 5, 4)]),
    ("Conv3d(2, 3, 3, padding='same', padding_mode='circular')", [(1, 2, 4, 5, 4)]),
    ("Conv3d(2, 3, 3, padding=2, padding_mode='replicate')", [(1, 2, 4, 5, 4)]),
    ("Conv1d(2, 3, 3, padding=2, padding_mode='reflect')", [(1, 2, 6)]),
    ("ConvTranspose3d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)", [(2, 4, 3, 2, 4)]),
    ("MaxPool3d(2)", [(2, 3, 4, 5, 6)]), ("MaxPool3d((1, 3, 2), 2, (0, 1, 1), ceil_mode=True)", [(2, 3, 4, 5, 6)]),
    ("AvgPool3d(2)", [(2, 3, 4, 5, 6)]), ("AvgPool3d(3, 2, 1, True, False)", [(2, 3, 4, 5, 6)]),
    ("AvgPool2d(3, 2, 1, divisor_override=4)", [(2, 3, 7, 7)]), ("AvgPool3d(2, divisor_override=3)", [(3, 4, 5, 6)]),
    ("LPPool1d(2, 3)", [(2, 3, 8)]), ("LPPool2d(2, 2, 1)", [(2, 3, 5, 6)]), ("LPPool3d(2, 2)", [(2, 3, 4, 4, 5)]),
    ("AdaptiveAvgPool1d(3)", [(2, 3, 7)]), ("AdaptiveAvgPool3d((2, None, 3))", [(2, 3, 4, 5, 7)]),
    ("AdaptiveMaxPool1d(3)", [(2, 3, 7)]), ("AdaptiveMaxPool2d((2, 3))", [(2, 3, 5, 7)]),
    ("AdaptiveMaxPool3d(2)", [(2, 3, 4, 5, 7)]), ("BatchNorm3d(3)", [(4, 3, 2, 3, 2)]),
    ("BatchNorm3d(3, momentum=None, affine=False)", [(4, 3, 2, 3, 2)]), ("InstanceNorm1d(3)", [(2, 3, 5)]),
    ("InstanceNorm1d(3, affine=True)", [(3, 5)]), ("InstanceNorm2d(3, affine=True)", [(2, 3, 5, 4)]),
    ("InstanceNorm2d(3, track_running_stats=True)", [(2, 3, 5, 4)]), ("InstanceNorm3d(2)", [(2, 3, 3, 4)]),
    ("InstanceNorm3d(3, 1e-3, 0.3, True, True)", [(2, 3, 2, 3, 4)]), ("LocalResponseNorm(3)", [(2, 5, 4)]),
    ("LocalResponseNorm(2, 0.1, 0.5, 2)", [(2, 5, 3, 3, 2)]), ("ReflectionPad1d((2, 1))", [(2, 3, 4)]),
    ("ReflectionPad2d(1)", [(3, 4, 5)]), ("ReflectionPad3d((1, 0, 2, 1, 1, 1))", [(2, 3, 3, 4, 5)]),
    ("ReplicationPad1d(3)", [(2, 3, 4)]), ("ReplicationPad2d((1, 2, 0, 3))", [(2, 3, 4, 5)]),
    ("ReplicationPad3d(1)", [(2, 3, 3, 4, 5)]), ("CircularPad1d((2, 1))", [(2, 3, 4)]),
    ("CircularPad2d((1, 2, 0, 3))", [(2, 3, 4, 5)]), ("CircularPad3d(1)", [(2, 3, 3, 4, 5)]),
    ("ZeroPad1d(2)", [(2, 3, 4)]), ("ZeroPad2d((1, -1, 0, 2))", [(2, 3, 4, 5)]), ("ZeroPad3d(1)", [(3, 3, 4, 5)]),
    ("ConstantPad1d((1, 2), 3.5)", [(2, 3, 4)]), ("ConstantPad2d(1, -1)", [(2, 3, 4, 5)]),
    ("ConstantPad3d((1, 0, 2, 1, 1, 1), 2.0)", [(2, 3, 3, 4, 5)]), ("Upsample(scale_factor=2)", [(2, 3, 4)]),
    ("Upsample((5, 3), mode='bicubic')", [(2, 3, 4, 5)]),
    ("Upsample(scale_factor=(2, 1.5), mode='bilinear')", [(2, 3, 4, 5)]),
    ("Upsample(scale_factor=2, mode='trilinear', align_corners=True)", [(2, 3, 2, 3, 4)]),
    ("UpsamplingNearest2d(scale_factor=2)", [(2, 3, 4, 5)]), ("UpsamplingBilinear2d(6)", [(2, 3, 4, 5)]),
    ("PixelShuffle(2)", [(2, 8, 3, 4)]), ("PixelUnshuffle(2)", [(2, 3, 4, 6)]), ("ChannelShuffle(2)", [(2, 4, 3, 3)]),
    ("Unfold((2, 3), padding=1)", [(2, 3, 4, 5)]), ("Fold((4, 5), 2, stride=1)", [(2, 12, 12)]),
    ("Dropout3d(0.0)", [(2, 3, 2, 2, 2)]), ("AlphaDropout(0.0)", [(4, 5)]), ("FeatureAlphaDropout(0.0)", [(4, 5, 2)]),
    ("TransformerEncoderLayer(8, 2, 16, dropout=0.0)", [(5, 3, 8)]),
    ("TransformerEncoderLayer(8, 2, 16, 0.0, 'gelu', batch_first=True, norm_first=True)", [(3, 5, 8)]),
    ("TransformerDecoderLayer(8, 2, 16, 0.0)", [(4, 3, 8), (5, 3, 8)]),
    ("TransformerDecoderLayer(8, 2, 16, 0.0, 'gelu', batch_first=True, norm_first=True)", [(3, 4, 8), (3, 5, 8)]),
    ("Transformer(8, 2, 1, 2, 16, 0.0, batch_first=True)", [(3, 5, 8), (3, 4, 8)]),
    ("CELU(0.7)", [(4, 5)]), ("Threshold(0.2, -3.0)", [(4, 5)]), ("Softsign()", [(4, 5)]), ("Tanhshrink()", [(4, 5)]),
    ("Hardshrink(0.3)", [(4, 5)]), ("Softshrink(0.3)", [(4, 5)]), ("Softmax2d()", [(2, 3, 4, 5)]),
    ("CosineSimilarity(-1)", [(4, 5), (4, 5)]), ("PairwiseDistance(keepdim=True)", [(4, 5), (4, 5)]),
    ("TripletMarginLoss(2.0, swap=True)", [(4, 5), (4, 5), (4, 5)]),
    ("TripletMarginWithDistanceLoss(margin=2.0, reduction='sum')", [(4, 5), (4, 5), (4, 5)]),
]


def same_module(torch, source):
    """The same layer here and in PyTorch, with the same random parameters."""
    ours, theirs = eval(f"nn.{source}"), eval(f"torch.nn.{source}", {"torch": torch})
    assert list(ours.state_dict()) == list(theirs.state_dict())
    rng = np.random.default_rng(5)
    for p, t in zip(ours.parameters(), theirs.parameters()):
        values = rng.standard_normal(p.shape).astype(np.float32)
        with no_grad():
            p.copy_(jg.from_numpy(values))
        t.data = torch.tensor(values)
    return ours, theirs


def assert_close(ours, theirs, tolerance=1e-5):
    scale = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
    np.testing.assert_allclose(ours.detach().numpy(), theirs.detach().numpy(), rtol=tolerance, atol=tolerance * scale)


def compare(torch, ours, theirs, inputs):
    """Forward, and backward from random gradients of the output."""
    xs = [Tensor(x.copy(), requires_grad=True) for x in inputs]
    ts = [torch.tensor(x, requires_grad=True) for x in inputs]
    out, expected = ours(*xs), theirs(*ts)
    assert out.shape == tuple(expected.shape)
    assert_close(out, expected)
    g = np.random.default_rng(9).standard_normal(out.shape).astype(np.float32)
    out.backward(jg.from_numpy(np.asarray(g)))
    expected.backward(torch.tensor(g))
    for x, t in zip(xs, ts):
        assert_close(x.grad, t.grad, 3e-5)
    for p, t in zip(ours.parameters(), theirs.parameters()):
        assert_close(p.grad, t.grad, 3e-5)


@pytest.mark.parametrize(("source", "shapes"), LAYERS, ids=lambda value: value if isinstance(value, str) else "")
def test_layers_are_those_of_torch(source, shapes):
    torch = pytest.importorskip("torch")
    ours, theirs = same_module(torch, source)
    inputs = [tensor(*shape, seed=k).numpy() for k, shape in enumerate(shapes)]
    compare(torch, ours, theirs, inputs)
    for (name, b), t in zip(ours.named_buffers(), theirs.buffers()):
        assert_close(b, t.to(torch.float32) if name != "num_batches_tracked" else t)
    ours.eval()
    theirs.eval()
    ours.zero_grad()
    theirs.zero_grad()
    compare(torch, ours, theirs, inputs)


PAIR = [(4, 5), (4, 5)]
LOSSES = [("MSELoss", {}), ("L1Loss", {}), ("SmoothL1Loss", {"beta": 0.5}), ("HuberLoss", {"delta": 0.7}),
          ("BCEWithLogitsLoss", {}), ("BCELoss", {}), ("KLDivLoss", {}), ("KLDivLoss", {"log_target": True}),
          ("CrossEntropyLoss", {}), ("CrossEntropyLoss", {"label_smoothing": 0.1}),
          ("CrossEntropyLoss", {"ignore_index": 2}), ("CrossEntropyLoss", {"weight": [1.0, 2.0, 0.5, 1.0, 3.0]}),
          ("NLLLoss", {}),
          ("NLLLoss", {"ignore_index": 1}), ("BCEWithLogitsLoss", {"pos_weight": [1.0, 2.0, 0.5, 1.0, 3.0]}),
          ("SoftMarginLoss", {}), ("HingeEmbeddingLoss", {"margin": 0.5}), ("PoissonNLLLoss", {"full": True}),
          ("PoissonNLLLoss", {"log_input": False}), ("MultiLabelSoftMarginLoss", {"weight": [1.0, 2.0, 0.5, 1.0, 3.0]}),
          ("MultiMarginLoss", {}), ("MultiMarginLoss", {"p": 2, "margin": 0.5, "weight": [1.0, 2.0, 0.5, 1.0, 3.0]})]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("name", "options"), LOSSES, ids=str)
def test_losses_are_those_of_torch(name, options, reduction):
    torch = pytest.importorskip("torch")

    def build(library, make):
        given = {k: make(np.array(v, np.float32)) if isinstance(v, list) else v for k, v in options.items()}
        return getattr(library, name)(reduction=reduction, **given)

    x, target = tensor(4, 5).numpy(), tensor(4, 5, seed=1).numpy()
    if "BCE" in name:
        target = (target > 0).astype(np.float32)
    if name == "BCELoss":
        x = 1 / (1 + np.exp(-x))
    if name == "KLDivLoss":
        target = np.log(np.abs(target)) if options else np.abs(target)
    if name in ("CrossEntropyLoss", "NLLLoss", "MultiMarginLoss"):
        target = np.array([1, 2, 4, 0])
    if name in ("SoftMarginLoss", "HingeEmbeddingLoss"):
        target = np.sign(target)
    if name == "PoissonNLLLoss":
        x, target = np.abs(x), np.round(np.abs(3 * target))
    if name == "MultiLabelSoftMarginLoss":
        target = (target > 0).astype(np.float32)
    ours, theirs = build(nn, Tensor), build(torch.nn, torch.tensor)
    compare(torch, lambda_module(lambda a: ours(a, jg.from_numpy(target))),
            lambda_module(lambda a: theirs(a, torch.tensor(target))), [x])


SIGNS = np.array([1, -1, -1, 1], np.float32)
OF_SEVERAL = [("MarginRankingLoss(0.3)", (4,), [SIGNS]), ("CosineEmbeddingLoss(0.1)", (4, 5), [SIGNS]),
              ("GaussianNLLLoss(full=True)", (4, 5), [np.linspace(0, 2, 20, dtype=np.float32).reshape(4, 5)])]


@pytest.mark.parametrize(("source", "shape", "others"), OF_SEVERAL)
def test_losses_of_two_inputs_are_those_of_torch(source, shape, others):
    torch = pytest.importorskip("torch")
    ours, theirs = same_module(torch, source)
    inputs = [tensor(*shape, seed=k).numpy() for k in (0, 1)]
    compare(torch, lambda_module(lambda *xs: ours(*xs, *map(jg.from_numpy, others))),
            lambda_module(lambda *xs: theirs(*xs, *map(torch.tensor, others))), inputs)


def lambda_module(function):
    """A function with the `parameters` that `compare` asks for."""
    function.parameters = lambda: iter(())
    return function


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "padding", "both"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_is_that_of_torch(batch_first, masks, need_weights):
    torch = pytest.importorskip("torch")
    ours, theirs = same_module(torch, f"MultiheadAttention(8, 2, batch_first={batch_first})")
    q, k = tensor(3, 4, 8).numpy(), tensor(3, 6, 8, seed=1).numpy()
    if not batch_first:
        q, k = (np.ascontiguousarray(a.swapaxes(0, 1)) for a in (q, k))
    options = {}
    causal = np.triu(np.ones((4, 6), bool), 2)
    if masks in ("bool", "both"):
        options["attn_mask"] = causal
    if masks == "float":
        options["attn_mask"] = np.where(causal, -1.5, 0).astype(np.float32)
    if masks in ("padding", "both"):
        options["key_padding_mask"] = np.array([[False] * 6, [False] * 5 + [True], [True] + [False] * 5])
    mine = ours(jg.from_numpy(q), jg.from_numpy(k), jg.from_numpy(k), need_weights=need_weights,
                **{n: jg.from_numpy(m) for n, m in options.items()})
    other = theirs(*map(torch.tensor, (q, k, k)), need_weights=need_weights,
                   **{n: torch.tensor(m) for n, m in options.items()})
    assert_close(mine[0], other[0])
    assert (mine[1] is None) == (other[1] is None)
    if need_weights:
        assert_close(mine[1], other[1])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", ["none", "bool", "padding", "causal", "causal and padding"])
@pytest.mark.parametrize("options", ["add_bias_kv=True", "add_zero_attn=True", "add_bias_kv=True, add_zero_attn=True",
                                     "bias=False, dropout=0.0"])
def test_attention_with_more_keys_and_with_hints_is_that_of_torch(options, masks, need_weights):
    torch = pytest.importorskip("torch")
    ours, theirs = same_module(torch, f"MultiheadAttention(8, 2, {options}, batch_first=True)")
    x, given = tensor(3, 5, 8).numpy(), {}
    if masks == "bool" or ("causal" in masks):
        given["attn_mask"] = np.triu(np.ones((5, 5), bool), 1)
    if "padding" in masks:
        given["key_padding_mask"] = np.arange(5) > np.array([[2], [4], [3]])
    hint = {"is_causal": "causal" in masks and "add" not in options}
    a, t = tensor(3, 5, 8), torch.tensor(x)
    mine = ours(a, a, a, need_weights=need_weights, **hint, **{n: jg.from_numpy(m) for n, m in given.items()})
    other = theirs(t, t, t, need_weights=need_weights, **hint, **{n: torch.tensor(m) for n, m in given.items()})
    assert_close(mine[0], other[0])
    if need_weights:
        assert_close(mine[1], other[1])
    mine[0].square().sum().backward()
    other[0].square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p.grad, q.grad)


def test_attention_with_other_widths_and_self_attention():
    torch = pytest.importorskip("torch")
    ours, theirs = same_module(torch, "MultiheadAttention(8, 2, kdim=3, vdim=5)")
    arrays = tensor(4, 2, 8).numpy(), tensor(6, 2, 3, seed=1).numpy(), tensor(6, 2, 5, seed=2).numpy()
    assert_close(ours(*map(Tensor, arrays))[0], theirs(*map(torch.tensor, arrays))[0])
    ours, theirs = same_module(torch, "MultiheadAttention(8, 4)")
    x = tensor(5, 8)
    t = torch.tensor(x.numpy())
    assert_close(ours(x, x, x)[0], theirs(t, t, t)[0])


def test_embedding():
    torch = pytest.importorskip("torch")
    ours, theirs = nn.Embedding(7, 3, padding_idx=-5), torch.nn.Embedding(7, 3, padding_idx=-5)
    assert not ours.weight.detach().numpy()[2].any() and ours.padding_idx == theirs.padding_idx
    theirs.weight.data = torch.tensor(ours.weight.detach().numpy())
    index = np.array([[1, 2, 2], [6, 0, 1]])
    out, expected = ours(Tensor(index)), theirs(torch.tensor(index))
    assert_close(out, expected)
    (out * out).sum().backward()
    (expected * expected).sum().backward()
    assert_close(ours.weight.grad, theirs.weight.grad)
    frozen = nn.Embedding.from_pretrained(tensor(4, 2))
    assert not frozen.weight.requires_grad and frozen(jg.from_numpy(np.array(3))).shape == (2,)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("options", ["max_norm=1.0", "max_norm=1.5, norm_type=1.0", "scale_grad_by_freq=True",
                                     "padding_idx=2, max_norm=1.0, scale_grad_by_freq=True"])
def test_options_of_an_embedding(options, compiled):
    torch = pytest.importorskip("torch")
    ours, theirs = same_module(torch, f"Embedding(7, 3, {options})")
    for index in (np.array([[1, 2, 2], [6, 2, 1]]), np.array([3, 3])):
        def step(i):
            loss = (ours(i) ** 3).sum()
            return loss, jg.autograd.grad(loss, ours.weight)

        loss, slope = (jg.compile(step) if compiled else step)(Tensor(index))
        wanted = (theirs(torch.tensor(index)) ** 3).sum()
        assert_close(loss, wanted)
        assert_close(slope[0], torch.autograd.grad(wanted, theirs.weight)[0])
        assert_close(ours.weight, theirs.weight)


def test_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="sparse=True asks"):
        nn.Embedding(7, 3, sparse=True)
    with pytest.raises(ValueError, match="sparse=True asks"):
        nn.functional.embedding(Tensor(np.array([1])), tensor(4, 2), sparse=True)


def test_batch_norm_averages_over_several_steps():
    torch = pytest.importorskip("torch")
    for source in ("BatchNorm1d(3)", "BatchNorm1d(3, momentum=None)"):
        ours, theirs = same_module(torch, source)
        for k in range(4):
            x = tensor(5, 3, seed=k).numpy()
            ours(Tensor(x))
            theirs(torch.tensor(x))
        assert_close(ours.running_mean, theirs.running_mean)
        assert_close(ours.running_var, theirs.running_var)
        assert ours.num_batches_tracked.item() == 4


def test_dropout_scales_what_it_keeps_and_rests_in_evaluation():
    x = jg.from_numpy(np.ones((100, 50), np.float32))
    layer = nn.Dropout(0.25)
    out = layer(x).numpy()
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)} and abs((out == 0).mean() - 0.25) < 0.03
    assert layer.eval()(x) is x or (layer(x).numpy() == 1).all()
    channels = nn.Dropout2d(0.5)(jg.from_numpy(np.ones((20, 10, 3, 3), np.float32))).numpy()
    assert ((channels == 0).all((2, 3)) | (channels == 2).all((2, 3))).all()
    with pytest.raises(ValueError, match="probability"):
        nn.Dropout(1.5)


def test_a_whole_model_is_that_of_torch_after_interchange_of_states():
    torch = pytest.importorskip("torch")
    source = "{0}Sequential({0}Conv2d(1, 4, 3), {0}BatchNorm2d(4), {0}ReLU(), {0}Flatten(), {0}Linear(144, 3))"
    ours, theirs = eval(source.format("nn.")), eval(source.format("torch.nn."), {"torch": torch})
    ours.load_state_dict(theirs.state_dict())
    x = tensor(2, 1, 8, 8)
    assert_close(ours(x), theirs(torch.tensor(x.numpy())), 1e-4)
    theirs.load_state_dict({k: torch.tensor(v.numpy()) for k, v in ours.state_dict().items()})


# --- initial values, helpers -----------------------------------------------------------------------------------------

def spread(x):
    return float(x.detach().numpy().std())


def test_initial_values_have_the_right_spread():
    w = jg.from_numpy(np.zeros((200, 300), np.float32))
    assert spread(init.uniform_(w, -1, 1)) == pytest.approx(1 / 3 ** 0.5, rel=0.05)
    assert spread(init.normal_(w, 1.0, 0.5)) == pytest.approx(0.5, rel=0.05)
    assert spread(init.xavier_uniform_(w)) == pytest.approx((2 / 500) ** 0.5, rel=0.05)
    assert spread(init.xavier_normal_(w, gain=2)) == pytest.approx(2 * (2 / 500) ** 0.5, rel=0.05)
    assert spread(init.kaiming_uniform_(w, nonlinearity="relu")) == pytest.approx((2 / 300) ** 0.5, rel=0.05)
    assert spread(init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu")) == pytest.approx(0.1, rel=0.05)
    cut = init.trunc_normal_(w, std=1.0, a=-1.0, b=1.0).numpy()
    assert np.abs(cut).max() <= 1 and cut.std() == pytest.approx(0.54, rel=0.05)
    q = init.orthogonal_(w).numpy()
    np.testing.assert_allclose(q @ q.T, np.eye(200), atol=1e-5)
    np.testing.assert_array_equal(init.eye_(w).numpy(), np.eye(200, 300))
    assert (init.sparse_(w, 0.9).numpy() == 0).mean() == pytest.approx(0.9)
    assert (init.constant_(w, 3).numpy() == 3).all() and not init.zeros_(w).numpy().any()
    assert init.calculate_gain("leaky_relu", 0.2) == pytest.approx((2 / 1.04) ** 0.5)


def test_default_initial_values_are_those_of_torch():
    linear = nn.Linear(400, 300)
    bound = 1 / 400 ** 0.5
    for p in linear.parameters():
        values = p.detach().numpy()
        assert np.abs(values).max() <= bound and np.abs(values).max() > 0.95 * bound
    conv = nn.Conv2d(16, 32, 5)
    assert np.abs(conv.weight.detach().numpy()).max() <= 1 / 400 ** 0.5
    assert spread(nn.Embedding(300, 20).weight) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping_gradients(norm_type):
    torch = pytest.importorskip("torch")
    params = [Parameter(tensor(3, 2, seed=k)) for k in range(3)]
    theirs = [torch.nn.Parameter(torch.tensor(p.detach().numpy())) for p in params]
    for k, (p, t) in enumerate(zip(params, theirs)):
        p.grad = tensor(3, 2, seed=10 + k)
        t.grad = torch.tensor(p.grad.numpy().copy())
    total = nn.utils.clip_grad_norm_(params, 0.5, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5, norm_type)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    nn.utils.clip_grad_value_(params, 0.1)
    torch.nn.utils.clip_grad_value_(theirs, 0.1)
    for p, t in zip(params, theirs):
        assert_close(p.grad, t.grad)
    assert nn.utils.clip_grad_norm_([Parameter(tensor(2))], 1.0).item() == 0


def test_parameters_as_one_vector():
    net, other = Net(), Net()
    vector = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(vector.detach(), other.parameters())
    np.testing.assert_array_equal(nn.utils.parameters_to_vector(other.parameters()).detach().numpy(),
                                  vector.detach().numpy())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_transposed_convolution_is_the_gradient_of_a_convolution(rank):
    x = jg.tensor(np.random.default_rng(0).standard_normal((2, 4, 7, 5, 4)[:2 + rank]).astype(np.float32))
    layer = getattr(nn, f"ConvTranspose{rank}d")(4, 6, 3, stride=3, padding=1, bias=False)
    for size in (None, [s * 3 - 1 for s in x.shape[2:]]):
        y = layer(x, output_size=size)
        assert size is None or list(y.shape[2:]) == size
        image = jg.zeros(*y.shape, requires_grad=True)
        convolve = getattr(nn.functional, f"conv{rank}d")
        forward = convolve(image, layer.weight.detach(), stride=3, padding=1)
        (gradient,) = jg.autograd.grad(forward[tuple(slice(0, n) for n in x.shape)], image, x)
        np.testing.assert_allclose(y.detach().numpy(), gradient.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="output_size"):
        layer(x, output_size=[100] * rank)
    with pytest.raises(ValueError, match="padding_mode"):
        getattr(nn, f"ConvTranspose{rank}d")(4, 6, 3, padding_mode="reflect")
