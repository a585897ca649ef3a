"""Programs that must give on a GPU what they give on the CPU: each takes a device and gives what is to be compared.

They run on the stand-in that carries kernels out and on real hardware (`test_gpu_execution.py`)."""

import jitgrad as jg
from jitgrad import nn
from jitgrad.nn import functional as F


def tensor(device, *shape, seed=0, low=-2.0, high=2.0):
    """The same values on every device."""
    made = jg.empty(*shape).uniform_(low, high, generator=jg.Generator().manual_seed(seed))
    return made.to(device)


def arithmetic(device):
    x, y = tensor(device, 5, 7), tensor(device, 7, seed=1)
    return [x + 1, x * y - 2 / (y * y + 1), (x > 0) & (y < 1), x.clamp(-1, 1).exp(), -x.T + x.T.abs(), x.where(x > y, y),
            (3 * x).long() // 4, x.double() ** 3, x.half() * 2, (x.bfloat16() + 1).float(), jg.maximum(x, y), x.sigmoid(),
            x.erf(), x.sin() + y.cos(), x.tanh(), (x + 3).log(), (x + 3).sqrt().reciprocal(), (x + 1j * y).abs(),
            (x + 3).digamma(), x.polygamma(1)]


def reductions(device):
    x = tensor(device, 6, 3, 40)
    return [x.sum(), x.sum(0), x.mean((0, 2)), x.amax(1), x.argmax(2), x.var(2), x.prod(1), (x > 0).any(), x.norm(),
            x.logsumexp(2), tensor(device, 70000).sum(), x.cumsum(1), x.sort(-1)[0], x.topk(3)[1], x.median()]


def movement(device):
    x = tensor(device, 4, 6)
    whole = jg.arange(24, device=device).reshape(4, 6)
    return [x.T.contiguous(), x[1:, ::2] * 2, x.flip(0), x.repeat(2, 1), jg.cat([x, x[:2]]), x.expand(3, 4, 6).clone(),
            x[x > 0], x[[2, 0]], whole[:, -1] + whole[0, 0], x.tril(), x.roll(1, 0), F.pad(x, (1, 2)),
            x.gather(1, whole % 6), jg.stack([x, x * 2], 1), x.unfold(1, 2, 2),
            x.nonzero(), F.one_hot(whole % 5), jg.eye(3, device=device)]


def counting(device):
    """What depends on values in its size, or counts them; long lines of masks are parted."""
    x, whole = (3 * tensor(device, 7, 6)).round(), jg.arange(24, device=device).reshape(4, 6) % 5
    long = tensor(device, 2500)
    return [x.unique(), *x.unique(return_inverse=True, return_counts=True), whole.bool().unique(),
            *jg.unique(x[:, :3] > 0, return_inverse=True, return_counts=True, dim=0), (x > 0).unique(dim=1),
            jg.tensor([1.0, float("nan"), 1.0, float("nan")], device=device).unique(), x[:0].unique(), x.histc(5),
            x.histc(4, -1, 2), whole.ravel().bincount(minlength=9), whole[0].bincount(x[0]), long[long > 1], long.histc(9),
            F.one_hot(whole), x.bfloat16().histc(3)]


def rows(device):
    x, w, b = tensor(device, 9, 33), tensor(device, 33, seed=1), tensor(device, 33, seed=2)
    return [x.softmax(-1), x.log_softmax(0), F.layer_norm(x, (33,), w, b), F.rms_norm(x, (33,), w), F.gelu(x), F.silu(x),
            F.cross_entropy(x, jg.arange(9, device=device)), F.mse_loss(x, x * 2), F.batch_norm(x, None, None, w, b, True)]


def contractions(device):
    x, y = tensor(device, 2, 5, 6), tensor(device, 2, 6, 3, seed=1)
    image, w = tensor(device, 2, 3, 8, 8), tensor(device, 4, 3, 3, 3, seed=2)
    q = tensor(device, 2, 2, 7, 8, seed=3)
    return [x @ y, jg.einsum("bij,bjk->ik", x, y), F.conv2d(image, w, padding=1), F.max_pool2d(image, 2),
            F.avg_pool2d(image, 3), F.scaled_dot_product_attention(q, q, q, is_causal=True),
            F.embedding(jg.arange(3, device=device), w.reshape(12, 9))]


def pooling(device):
    """Windows of all kinds, and what they give back; adaptive ones are of several sizes."""
    x = tensor(device, 2, 3, 9, 11).requires_grad_()
    ys = [F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
          F.max_pool2d(x, 2, 1, dilation=2), F.adaptive_max_pool2d(x, (4, 3)), F.avg_pool1d(x[0], 4, 3),
          F.max_pool3d(x, (2, 3, 2))]
    sum((y * y).sum() for y in ys).backward()
    return [*ys, x.grad]


def recurrence(device):
    """Layers of all kinds, in both directions, and their gradients."""
    jg.manual_seed(5)
    x = tensor(device, 4, 3, 6).requires_grad_()
    layers = [nn.LSTM(6, 9).to(device), nn.GRU(6, 7, bidirectional=True).to(device), nn.RNN(6, 5).to(device)]
    ys = [layer(x)[0] for layer in layers]
    sum((y * y).sum() for y in ys).backward()
    return [*ys, x.grad, *[p.grad for layer in layers for p in layer.parameters()]]


def attention(device):
    """On tensor cores and on CUDA cores: causal; with a mask, heads that share keys and dropout; gradients."""
    jg.manual_seed(9)
    half = [tensor(device, 1, 2, 40, 24, seed=k).bfloat16().requires_grad_() for k in range(3)]
    single = [tensor(device, 1, heads, 10, 8, seed=k).requires_grad_() for k, heads in enumerate((4, 2, 2))]
    mask = tensor(device, 10, 10, seed=3) < 1
    ys = [F.scaled_dot_product_attention(*half, is_causal=True),
          F.scaled_dot_product_attention(*single, mask, 0.2, enable_gqa=True)]
    gs = [g for y, xs in zip(ys, (half, single), strict=True) for g in jg.autograd.grad(y.float().square().sum(), xs)]
    return [*ys, *gs]


def random_numbers(device):
    jg.manual_seed(7)
    x = tensor(device, 8, 9)
    return [F.dropout(x, 0.4), jg.rand(5, device=device), jg.randint(0, 9, (6,), device=device),
            jg.randn(4, 4, device=device), jg.bernoulli(x.sigmoid()), x.clone().normal_(), jg.randperm(10, device=device),
            jg.rand_like(x), F.dropout(x.half(), 0.1)]


def in_place(device):
    x, whole = tensor(device, 4, 6), tensor(device, 4, 6)
    x += 1
    x[1] = 5
    x[:, 2] *= 2
    x.T[3].sub_(1)
    x[x > 2] = 0
    view = whole.view(6, 4)[1:3]
    view.mul_(3)
    whole.index_add_(0, jg.tensor([1, 1], device=device), tensor(device, 2, 6, seed=1))
    return [x, whole, view, x.zero_().add_(2)]


def gradients(device):
    x = tensor(device, 5, 6).requires_grad_()
    w = tensor(device, 6, 4, seed=1).requires_grad_()
    y = (x @ w).tanh().softmax(1)
    (first,) = jg.autograd.grad((y * y).sum(), x, create_graph=True)
    (first ** 2).sum().backward()
    return [first, x.grad, w.grad]


def network():
    """No bias in front of a batch norm: its gradient is 0, and what Adam makes of rounding errors is arbitrary."""
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.3),
                         nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def convolutions(device):
    """Results and gradients of convolutions of one, two and three dimensions, transposed and depthwise ones."""
    found = []
    for k, (layer, shape) in enumerate([
            (nn.Conv1d(8, 9, 3, padding="same"), (2, 8, 7)), (nn.Conv2d(9, 10, 3, 2, 1), (2, 9, 6, 5)),
            (nn.Conv2d(6, 12, (3, 2), padding=1, groups=6), (2, 6, 5, 4)),
            (nn.Conv3d(8, 8, 2, dilation=(1, 2, 1)), (1, 8, 3, 4, 3)),
            (nn.ConvTranspose2d(8, 9, 3, 2, 1, 1), (2, 8, 3, 4))]):
        for n, p in enumerate(layer.parameters()):
            p.data = tensor("cpu", *p.shape, seed=10 * k + n)
        layer, x = layer.to(device), tensor(device, *shape, seed=k).requires_grad_()
        y = layer(x)
        y.tanh().sum().backward()
        found += [y, x.grad, *[p.grad for p in layer.parameters()]]
    return found


def narrow_convolutions(device):
    """On tensor cores: a first layer of three channels, 3x3 with a stride; gradients."""
    found = []
    for k, (weights, shape, attrs) in enumerate([
            ((16, 3, 5, 5), (1, 3, 9, 7), {"stride": 2, "padding": 2}),
            ((24, 32, 3, 3), (1, 32, 5, 5), {"stride": 2, "padding": 1})]):
        x, w = [tensor(device, *size, seed=n, low=-0.5, high=0.5).bfloat16().requires_grad_()
                for n, size in enumerate((shape, weights))]
        y = F.conv2d(x, w, **attrs)
        (y * tensor(device, *y.shape, seed=k, low=0, high=0.5).bfloat16()).sum().backward()
        found += [y, x.grad, w.grad]
    return found


class ResidualBlock(nn.Module):
    """The basic block of ResNet, halving its image."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.across = nn.Conv2d(8, 12, 1, 2, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(12) for _ in range(3)])

    def forward(self, x):
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.norms[2](self.across(x)))


def residual_block(device, compiled=False):
    """Result and all gradients of a block, and what computed them."""
    jg.manual_seed(5)
    block = ResidualBlock().to(device)

    def step(x):
        x = x.detach().requires_grad_()
        block.zero_grad()
        y = block(x)
        (y * y).sum().backward()
        return y.detach(), x.grad

    run = jg.compile(step) if compiled else step
    results = run(tensor(device, 2, 8, 6, 6))
    return [*results, *[p.grad for p in block.parameters()], *block.buffers()], run


OPTIMIZERS = {
    "SGD": lambda params: jg.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda params: jg.optim.Adam(params, lr=0.01, amsgrad=True),
    "AdamW": lambda params: jg.optim.AdamW(params, lr=0.01),
    "RMSprop": lambda params: jg.optim.RMSprop(params, lr=0.01),
    "Adagrad": lambda params: jg.optim.Adagrad(params, lr=0.01),
}


def training(device, optimizer="AdamW", compiled=False, steps=3):
    """Losses and parameters after some steps with a schedule, gradient clipping and dropout; and the step."""
    jg.manual_seed(3)
    model = network().to(device)
    adapt = OPTIMIZERS[optimizer](model.parameters())
    schedule = jg.optim.lr_scheduler.StepLR(adapt, 2, 0.5)

    def step(x, t):
        adapt.zero_grad()
        loss = F.cross_entropy(model(x), t)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adapt.step()
        return loss

    run = jg.compile(step) if compiled else step
    losses = []
    for k in range(steps):
        x, t = tensor(device, 10, 6, seed=k), (jg.arange(10) % 3).to(device)
        losses.append(run(x, t))
        schedule.step()
    return [*losses, *model.parameters(), *model.buffers()], run


PROGRAMS = {f.__name__: f for f in (
    arithmetic, reductions, movement, counting, rows, contractions, pooling, recurrence, attention, random_numbers, in_place,
    gradients, convolutions, narrow_convolutions)}
