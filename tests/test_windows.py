"""Layers over windows as a user meets them: a network on volumes, maxima put back, dropout of channels, lazy layers, and
what is said when something does not fit."""

import copy

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import errors, nn
from jitgrad.nn import functional as F


def numbers(*shape):
    return jg.from_numpy(np.random.default_rng([7, *shape]).standard_normal(shape).astype("f"))


# ---- a network on volumes --------------------------------------------------------------------------------------------


class Volumes(nn.Module):
    """An encoder and a decoder with everything that learns or pools in three dimensions."""

    def __init__(self):
        super().__init__()
        self.pad = nn.ReplicationPad3d(1)
        self.encode, self.norm = nn.Conv3d(1, 4, 3, bias=False), nn.BatchNorm3d(4)
        self.pool, self.unpool = nn.MaxPool3d(2, return_indices=True), nn.MaxUnpool3d(2)
        self.between = nn.Conv3d(4, 4, 3, padding="same", groups=2, bias=False)
        self.instance = nn.InstanceNorm3d(4, affine=True)
        self.decode, self.up = nn.ConvTranspose3d(4, 1, 2, stride=2), nn.Upsample(scale_factor=2, mode="trilinear")

    def forward(self, x):
        x = self.norm(self.encode(self.pad(x))).relu()
        small, places = self.pool(x)
        small = self.instance(self.between(small)) + nn.functional.avg_pool3d(x, 2)
        return self.decode(small) + self.up(small).mean(1, keepdim=True) + self.unpool(small, places).mean(1, keepdim=True)


def test_a_network_on_volumes_learns_the_same_compiled():
    jg.manual_seed(0)
    model = Volumes()
    twin = copy.deepcopy(model)
    x = numbers(2, 1, 4, 6, 4)

    def stepping(net):
        optimizer = jg.optim.Adam(net.parameters(), lr=1e-2)

        def step(x):
            optimizer.zero_grad()
            loss = F.mse_loss(net(x), x)
            loss.backward()
            optimizer.step()
            return loss

        return step

    eager, compiled = stepping(model), jg.compile(stepping(twin))
    losses = [(eager(x).item(), compiled(x).item()) for _ in range(12)]
    np.testing.assert_allclose(*zip(*losses), rtol=2e-3)
    assert losses[-1][0] < 0.8 * losses[0][0]
    for (name, p), q in zip(model.state_dict().items(), twin.state_dict().values()):
        np.testing.assert_allclose(p.numpy(), q.numpy(), rtol=2e-2, atol=2e-3, err_msg=name)


@pytest.mark.cpu
def test_pooling_volumes_has_kernels_and_resampling_is_sealed():
    def pooled(x):
        x = F.avg_pool3d(F.max_pool3d(x, 2, 1, 1), 2)
        x = F.adaptive_max_pool3d(x, (2, 3, 2))
        return F.interpolate(x, (3, 5, 4), mode="trilinear").sum()

    compiled = jg.compile(pooled)
    x = numbers(2, 3, 6, 7, 8)
    for _ in range(4):
        np.testing.assert_allclose(compiled(x).item(), pooled(x).item(), rtol=1e-5)
    shown = str(compiled.explain())
    assert "NumPy" not in shown and "sealed; calls: 2 sealed" in shown


# ---- by the definition -----------------------------------------------------------------------------------------------


def test_a_convolution_of_volumes_is_a_sum_of_those_of_images():
    x, w = numbers(2, 3, 5, 6, 4), numbers(4, 3, 2, 3, 3)
    got = F.conv3d(x, w, stride=(2, 1, 1), padding=(0, 1, 0))
    planes = [sum(F.conv2d(x[:, :, 2 * d + k], w[:, :, k], padding=(1, 0)) for k in range(2)) for d in range(2)]
    np.testing.assert_allclose(got.numpy(), jg.stack(planes, 2).numpy(), rtol=1e-4, atol=1e-5)
    back = F.conv_transpose3d(got, w, stride=(2, 1, 1), padding=(0, 1, 0), output_padding=(1, 0, 0))
    x = x.requires_grad_()
    (F.conv3d(x, w, stride=(2, 1, 1), padding=(0, 1, 0)) * got).sum().backward()
    np.testing.assert_allclose(back.numpy(), x.grad.numpy(), rtol=1e-4, atol=1e-4)


def test_output_padding_beyond_the_stride():
    def run(x, w, b):
        y = F.conv_transpose1d(x, w, b, dilation=2, output_padding=1)
        padded = F.conv_transpose1d(x, w, b, padding=1, dilation=3, output_padding=2)
        return y, padded, *jg.autograd.grad(y.sum() + padded.sum(), (x, w, b))

    given = [x.requires_grad_() for x in (jg.ones(1, 1, 5), jg.ones(1, 1, 3), jg.full((1,), 10.0))]
    for found in (run(*given), jg.compile(run)(*given)):
        y, padded, *slopes = [x.tolist() for x in found]
        assert y == [[[11, 11, 12, 12, 13, 12, 12, 11, 11, 10]]]
        assert padded == [[[11, 11, 12, 12, 11, 12, 12, 11, 11, 11, 10]]]
        assert slopes == [[[[5, 6, 6, 6, 6]]], [[[9, 10, 10]]], [21]]


def test_fold_counts_how_often_unfold_takes_an_element():
    x = numbers(2, 3, 5, 6)
    count = F.fold(F.unfold(jg.ones(2, 3, 5, 6), (2, 3)), (5, 6), (2, 3))
    np.testing.assert_array_equal(count[0, 0].numpy(), np.outer([1, 2, 2, 2, 1], [1, 2, 3, 3, 2, 1]))
    np.testing.assert_allclose(F.fold(F.unfold(x, (2, 3)), (5, 6), (2, 3)).numpy(), (x * count).numpy(), rtol=1e-6)


def test_sampling_at_the_own_places_changes_nothing():
    unit = jg.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]]).expand(2, 3, 4)
    x = numbers(2, 3, 4, 5, 6)
    for corners in (True, False):
        again = F.grid_sample(x, F.affine_grid(unit, x.shape, corners), align_corners=corners)
        np.testing.assert_allclose(again.numpy(), x.numpy(), rtol=1e-5, atol=1e-5)
    mirrored = F.affine_grid(unit * jg.tensor([-1.0, 1, 1])[:, None], x.shape, False)
    sampled = F.grid_sample(x, mirrored, align_corners=False)
    np.testing.assert_allclose(sampled.numpy(), x.flip(4).numpy(), rtol=1e-5, atol=1e-5)


def test_linear_interpolation_is_that_of_numpy():
    x = np.random.default_rng(0).standard_normal((2, 3, 7))
    wanted = np.apply_along_axis(lambda row: np.interp(np.linspace(0, 6, 10), np.arange(7), row), 2, x)
    got = F.interpolate(jg.from_numpy(x), 10, mode="linear", align_corners=True)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12)
    flat = F.interpolate(jg.ones(1, 1, 5, 6), (3, 11), mode="bicubic", antialias=True)
    np.testing.assert_allclose(flat.numpy(), 1.0, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_maxima_go_back_to_where_they_were(rank):
    pool, unpool = getattr(nn, f"MaxPool{rank}d")(2, return_indices=True), getattr(nn, f"MaxUnpool{rank}d")(2)
    x = numbers(*(2, 3, 5, 4, 6)[:2 + rank]).requires_grad_()
    values, places = pool(x)
    back = unpool(values, places, output_size=x.shape)
    assert back.shape == x.shape
    found = back.detach().numpy() != 0
    np.testing.assert_array_equal(back.detach().numpy()[found], x.detach().numpy()[found])
    assert found.sum() == values.numel()
    back.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), found.astype("f"))


def test_overlapping_windows_put_one_maximum_back_once():
    x = jg.arange(5.0).flip(0).reshape(1, 1, 5)
    values, places = F.max_pool1d(x, 2, 1, 1, return_indices=True)
    assert places.tolist() == [[[0, 0, 1, 2, 3, 4]]]
    assert F.max_unpool1d(values, places, 2, 1, 1, output_size=(5,)).tolist() == [[[4.0, 3.0, 2.0, 1.0, 0.0]]]


def test_instance_norm_averages_over_several_steps():
    layer = nn.InstanceNorm2d(3, momentum=0.2, track_running_stats=True)
    mean, var = np.zeros(3), np.ones(3)
    for k in range(4):
        x = numbers(5, 3, 4, 4 + k)
        layer(x)
        a = x.numpy().astype("f8")
        mean = 0.8 * mean + 0.2 * a.mean((2, 3)).mean(0)
        var = 0.8 * var + 0.2 * a.var((2, 3), ddof=1).mean(0)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-4)
    layer.eval()
    x = numbers(2, 3, 4, 4)
    wanted = (x.numpy() - mean[:, None, None]) / np.sqrt(var + 1e-5)[:, None, None]
    np.testing.assert_allclose(layer(x).numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_dropout_of_channels():
    jg.manual_seed(0)
    x = jg.ones(40, 30, 2, 2, 2)
    dropped = nn.Dropout3d(0.25)(x).flatten(2)
    assert dropped.std(2).max() == 0 and abs(dropped.mean().item() - 1) < 0.05
    z = jg.randn(60, 50, 4)
    for layer in (nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3)):
        out = layer(z)
        assert abs(out.mean().item()) < 0.05 and abs(out.std().item() - 1) < 0.05
        assert layer.eval()(z) is z
    channels = nn.FeatureAlphaDropout(0.5)(z).numpy()
    kept = ~np.isclose(channels, channels[..., :1]).all(2)
    assert 0.45 < kept.mean() < 0.55


# ---- lazy layers -----------------------------------------------------------------------------------------------------


def lazy_net():
    return nn.Sequential(nn.LazyConv2d(4, 3, groups=2), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))


def test_lazy_layers_take_their_sizes_from_the_first_input():
    net, x = lazy_net(), numbers(3, 2, 6, 6)
    assert net[0].has_uninitialized_params() and "LazyLinear(in_features=0, out_features=5" in repr(net)
    optimizer = jg.optim.SGD(net.parameters(), lr=0.1)
    before = list(net.parameters())
    assert net(x).shape == (3, 5)
    assert [type(part) for part in net] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Flatten, nn.Linear]
    assert [p.shape for p in net.parameters()] == [(4, 1, 3, 3), (4,), (4,), (4,), (5, 64), (5,)]
    assert all(p is q and type(p) is nn.Parameter for p, q in zip(before, net.parameters()))
    assert net[4].weight.abs().max().item() <= 1 / 8 and net[4].weight.std().item() > 0.05       # Linear's initial values
    weight = net[4].weight.detach().clone()
    net(x).square().mean().backward()
    optimizer.step()
    assert (net[4].weight - weight).abs().max().item() > 0
    assert net[1].num_batches_tracked.item() == 2


def test_lazy_layers_take_their_sizes_from_a_state_dict():
    net, again, x = lazy_net(), lazy_net(), numbers(3, 2, 6, 6)
    net(x)
    again.load_state_dict(net.state_dict())
    assert type(again[0]) is nn.Conv2d
    np.testing.assert_array_equal(net.eval()(x).detach().numpy(), again.eval()(x).detach().numpy())
    copied = copy.deepcopy(lazy_net()).double()
    assert copied(x.double()).dtype is jg.float64


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_lazy_layers_of_all_ranks(rank):
    x = numbers(2, 6, *[4] * rank)
    for name, options in (("Conv", (4, 3)), ("ConvTranspose", (4, 3)), ("BatchNorm", ()), ("InstanceNorm", ())):
        lazy, plain = getattr(nn, f"Lazy{name}{rank}d")(*options), getattr(nn, f"{name}{rank}d")
        assert list(lazy.state_dict()) == list(lazy_like(plain, options).state_dict())
        assert lazy(x).shape[:2] == (2, 4 if options else 6) and type(lazy) is plain
        assert lazy(x[:, :, ...]).shape[0] == 2
    unbatched = getattr(nn, f"LazyInstanceNorm{rank}d")()
    assert unbatched(x[0]).shape == x[0].shape and unbatched.num_features == 6
    with pytest.raises(errors.ShapeError, match="dimensions"):
        getattr(nn, f"LazyConv{rank}d")(4, 3)(numbers(3))


def lazy_like(plain, options):
    return plain(6, *options) if options else plain(6, affine=True, track_running_stats=True)


# ---- what does not fit -----------------------------------------------------------------------------------------------

WRONG = [
    (lambda x: F.conv3d(x, x), r"conv3d: expected 4 or 5 dimensions, got f32\[2, 3, 4, 5\]|expected a weight of 5"),
    (lambda x: F.conv3d(x[None], x), r"conv3d: expected a weight of 5 dimensions, got f32\[2, 3, 4, 5\]"),
    (lambda x: F.conv2d(x, x[:, :2]), r"convolution: channels do not fit 1 group"),
    (lambda x: F.conv2d(x, x.double()), r"convolution: operands differ in dtype"),
    (lambda x: F.conv2d(x[..., :2, :2], x[..., :3]), r"the kernel is larger than the padded input"),
    (lambda x: F.conv2d(x, x[:, :, :1], x[0, 0, 0]), r"conv2d: expected a bias of shape \[2\], got f32\[5\]"),
    (lambda x: F.conv2d(x, x, stride=(1, 1, 1)), r"conv2d: stride=\(1, 1, 1\) needs one number, or one for each of 2"),
    (lambda x: F.conv_transpose2d(x, x), r"conv_transpose2d: .* does not have the 2 channels of the weight"),
    (lambda x: F.conv_transpose2d(x, x.mT.mT.transpose(0, 1), output_padding=1), r"output_padding \(1, 1\) must be smaller"),
    (lambda x: F.max_pool2d(x, 9), r"max_pool: the window \(9, 9\) is larger"),
    (lambda x: F.max_pool2d(x, 3, padding=2), r"max_pool: padding .* between 0 and half of the kernel"),
    (lambda x: F.avg_pool3d(x[None].long(), 1), r"avg_pool: needs floating-point operands"),
    (lambda x: F.avg_pool2d(x, 2, divisor_override=0), r"avg_pool2d: divisor_override must not be 0"),
    (lambda x: F.adaptive_avg_pool2d(x, (1, 2, 3)), r"adaptive_avg_pool2d: output_size=\(1, 2, 3\)"),
    (lambda x: F.max_unpool2d(x, x[:1].long(), 2), r"max_unpool2d: input and indices differ in shape"),
    (lambda x: F.max_unpool2d(x, x.long(), 2, output_size=(1, 1)), r"output_size \(1, 1\) is not within a stride"),
    (lambda x: F.fold(x[0], (3, 3), 2), r"fold: an output of \(3, 3\) has 4 windows of 4 elements"),
    (lambda x: F.unfold(x, 7), r"unfold: windows of \(7, 7\).* do not fit into \(4, 5\)"),
    (lambda x: F.interpolate(x, 3, mode="linear"), r"mode='linear' is for 1 dimension.*Did you mean mode='bilinear'\?"),
    (lambda x: F.interpolate(x, 3, mode="cubic"), r"mode='cubic' is none of 'nearest'"),
    (lambda x: F.interpolate(x.long(), 3, mode="bilinear"), r"interpolate: needs a floating-point tensor, got i64"),
    (lambda x: F.grid_sample(x, x), r"grid_sample: input .* and grid .* do not fit"),
    (lambda x: F.grid_sample(x, x[..., :2], padding_mode="wrap"), r"padding_mode='wrap' is none of 'zeros'"),
    (lambda x: F.affine_grid(x, (2, 3, 4, 5)), r"affine_grid: theta .* does not fit size=\(2, 3, 4, 5\)"),
    (lambda x: F.instance_norm(x, weight=x[0, 0, 0]), r"instance_norm: .* has 3 channels, and a parameter is f32\[5\]"),
    (lambda x: F.instance_norm(x, use_input_stats=False), r"needs running_mean and running_var"),
    (lambda x: F.local_response_norm(x[0, 0], 2), r"local_response_norm: expected \[N, C, ...\]"),
    (lambda x: nn.InstanceNorm3d(3)(x[0]), r"InstanceNorm3d: expected 4 or 5 dimensions"),
    (lambda x: nn.BatchNorm3d(3)(x), r"BatchNorm3d: expected 5 dimensions"),
    (lambda x: nn.ReflectionPad1d(1)(x), r"ReflectionPad1d: expected 2 or 3 dimensions"),
    (lambda x: nn.ReflectionPad2d(4)(x), r"reflect padding \(4, 4\) must be between 0 and 3"),
    (lambda x: nn.LazyConv2d(4, 3, groups=2)(x), r"LazyConv2d: 3 channels cannot be divided by groups=2"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[m[:40] for _, m in WRONG])
def test_what_does_not_fit_is_said(call, message):
    with pytest.raises(errors.JitgradError, match=message):
        call(numbers(2, 3, 4, 5))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_place_out_of_range_is_an_index_error(compiled):
    def unpooled(values, places):
        return F.max_unpool2d(values, places, 2)

    function = jg.compile(unpooled) if compiled else unpooled
    with pytest.raises(IndexError, match="index 99 is out of range"):
        function(jg.ones(1, 1, 1, 1), jg.tensor([[[[99]]]]))


def test_wrong_arguments_of_layers():
    for make in (lambda: nn.ConstantPad2d((1, 2, 3), 0.0), lambda: nn.Conv3d(3, 4, 3, groups=2),
                 lambda: nn.Conv3d(2, 4, 3, padding="same", stride=2), lambda: nn.ConvTranspose3d(2, 4, 3, padding="same"),
                 lambda: nn.Dropout3d(1.5), lambda: nn.Conv3d(2, 4, 3, padding_mode="mirror")):
        with pytest.raises(ValueError, match=r"^\w+: "):
            make()


# ---- half precision --------------------------------------------------------------------------------------------------

CONVOLUTIONS = [(nn.Conv1d, (3, 4, 19), {"stride": 2}), (nn.Conv2d, (3, 4, 9, 8), {"padding": 1, "groups": 2}),
                (nn.Conv3d, (2, 4, 5, 6, 7), {"padding": "same"}), (nn.ConvTranspose2d, (3, 4, 5, 6), {"stride": 2})]


@pytest.mark.parametrize("dtype", [jg.bfloat16, jg.float16], ids=str)
@pytest.mark.parametrize(("layer", "shape", "options"), CONVOLUTIONS, ids=lambda x: getattr(x, "__name__", ""))
def test_convolutions_in_half_precision_are_those_of_float32_rounded(layer, shape, options, dtype):
    """On a CPU by the kernels of float32: nothing is left to NumPy."""
    half = layer(4, 6, 3, **options).to(dtype)
    single = copy.deepcopy(half).float()

    def step(layer, x):
        out = layer(x)
        return out, *jg.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])

    x = numbers(*shape).to(dtype).requires_grad_()
    wanted = [t.numpy(force=True) for t in step(single, x.detach().float().requires_grad_())]
    compiled = jg.compile(lambda x: step(half, x))
    unit = 2.0 ** (-10 if dtype is jg.float16 else -7)
    for found in (compiled(x), step(half, x)):
        for mine, exact in zip(found, wanted, strict=True):
            assert mine.dtype is dtype
            assert np.abs(mine.float().numpy(force=True) - exact).max() <= 4 * unit * np.abs(exact).max()
    if x.is_cpu:
        assert all(entry.kernels for entry in compiled.plan.steps)
