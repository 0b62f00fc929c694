"""The same small training for every trainer, and what its first step must do to the stem."""

import torch
from torch import nn

from tests import reference
from tests.conftest import photo_like, run_python

RATE, LAMBDA, BATCH = 0.5, 0.1, 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def samples(number):
    """Images `(number, 3, 12, 12)` and labels `(number,)`."""
    generator = torch.Generator().manual_seed(1)
    images = photo_like(generator, number, 3, 12, 12)
    return images, torch.randint(5, (number,), generator=generator)


def oracle_steps(parts, *, scale=None):
    """The stem's weights, float64, after each step of SGD with `RATE` from `network()`.

    Args:
        parts: number of samples in each micro-batch of each step; the samples come in order.
        scale: number by which a trainer divides the loss of each micro-batch; None = their number.
    """
    model = network().double()
    images, labels = samples(sum(map(sum, parts)))
    weights, start = [], 0
    for sizes in parts:
        end = start + sum(sizes)
        step_images, step_labels = images[start:end].double(), labels[start:end]
        pre = nn.functional.conv2d(step_images, model[0].weight, model[0].bias, 2, 1)
        pre.retain_grad()
        chunks = zip(model[1:](pre).split(sizes), step_labels.split(sizes), strict=True)
        losses = [nn.functional.cross_entropy(logits, wanted) for logits, wanted in chunks]
        model.zero_grad()
        (sum(losses) / (scale or len(sizes))).backward()
        gradient, _, _ = reference.conv_gradient(model[0], step_images, pre.grad, LAMBDA)
        model[0].weight.grad = gradient[0].reshape(model[0].weight.shape)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(RATE * parameter.grad)
        weights.append(model[0].weight.detach().clone())
        start = end
    return weights


def assert_same_steps(weights, expected):
    """Whether every update of the stem is that of the oracle, to 1e-5 of its largest entry."""
    assert len(weights) == len(expected)
    before = previous = network()[0].weight.detach().double()
    for weight, wanted in zip(weights, expected, strict=True):
        update, wanted_update = weight.double() - previous, wanted - before
        error = (update - wanted_update).abs().max() / wanted_update.abs().max()
        assert error < 1e-5, f"relative error {error:.1e}"
        previous, before = weight.double(), wanted


def assert_two_processes_take_the_steps_of_one(framework, folder, *, scale=None):
    """By gloo; each rank of `ranks.py` has every other sample of a step; `scale` as above."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    result = run_python(*launcher, "-m", "tests.integrations.ranks", framework, folder, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    both = [torch.load(folder / f"{rank}.pth") for rank in range(2)]
    for weights in both:
        assert_same_steps(weights, oracle_steps([[2 * BATCH] * 2, [2 * BATCH]], scale=scale))
    assert all(map(torch.equal, *both))
