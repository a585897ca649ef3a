"""Canonical functions, as a user writes them: what `test_golden.py` traces, fuses and compares with the files of `golden/`.

An entry of `PROGRAMS` is a function that makes a step and its arguments. Their sizes matter: how a reduction is cut into
kernels hangs on them, so each stands with the number of kernels that it becomes (`test_golden.KERNELS`)."""

import jitgrad as jg
from jitgrad.nn import functional as F


def randn(*shape, grad=False):
    return jg.full(shape, 0.5, requires_grad=grad)


def softmax():
    def step(x):
        return x.softmax(-1)

    return step, (randn(64, 128),)


def log_softmax_nll():
    def step(x, target):
        loss = F.nll_loss(x.log_softmax(1), target)
        loss.backward()
        return loss, x.grad

    return step, (randn(64, 10, grad=True), jg.zeros(64, dtype=jg.int64))


def layer_norm():
    def step(x, weight, bias, g):
        y = F.layer_norm(x, (256,), weight, bias)
        y.backward(g)
        return y, x.grad, weight.grad, bias.grad

    return step, (randn(64, 256, grad=True), randn(256, grad=True), randn(256, grad=True), randn(64, 256))


def batch_norm():
    def step(x, mean, variance, weight, bias, g):
        y = F.batch_norm(x, mean, variance, weight, bias, training=True)
        y.backward(g)
        return y, x.grad, weight.grad, bias.grad

    channels = [randn(8), randn(8), randn(8, grad=True), randn(8, grad=True)]
    return step, (randn(16, 8, 6, 6, grad=True), *channels, randn(16, 8, 6, 6))


def gelu():
    def step(x, g):
        y = F.gelu(x)
        y.backward(g)
        return y, x.grad

    return step, (randn(64, 256, grad=True), randn(64, 256))


def adam_update():
    parameters = [randn(64, 32, grad=True), randn(32, grad=True), randn(32, 10, grad=True)]
    for p in parameters:
        p.grad = jg.ones_like(p)
    optimizer = jg.optim.Adam(parameters, lr=1e-3)

    def step():
        optimizer.step()

    return step, ()


def attention():
    def step(q, k, v):
        scores = q @ k.transpose(-2, -1) / 8
        return scores.softmax(-1) @ v

    return step, (randn(2, 4, 32, 64), randn(2, 4, 32, 64), randn(2, 4, 32, 64))


def conv_relu_pool():
    def step(x, weight, bias):
        return F.max_pool2d(F.conv2d(x, weight, bias, padding=1).relu(), 2)

    return step, (randn(4, 3, 16, 16), randn(8, 3, 3, 3), randn(8))


def mlp_step():
    model = jg.nn.Sequential(jg.nn.Linear(64, 32), jg.nn.ReLU(), jg.nn.Linear(32, 10))
    optimizer = jg.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step, (randn(128, 64), jg.zeros(128, dtype=jg.int64))


def mixed_precision_step():
    model = jg.nn.Linear(64, 16)
    optimizer = jg.optim.SGD(model.parameters(), lr=0.1)
    scaler = jg.amp.GradScaler("cpu")

    def step(x):
        optimizer.zero_grad()
        with jg.autocast("cpu", dtype=jg.float16):
            out = model(x)
        loss = out.float().square().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    return step, (randn(128, 64),)


PROGRAMS = [softmax, log_softmax_nll, layer_norm, batch_norm, gelu, adam_update, attention, conv_relu_pool, mlp_step,
            mixed_precision_step]
