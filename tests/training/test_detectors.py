"""Detectors at a GPU's speed: channels_last, a compiled backbone, batched evaluation."""

import pytest
import torch
from torch import nn

from tests.conftest import tiny_options
from tests.training.runs import assert_close, results, run_here
from tract_det.config.detection import load_cfg
from tract_det.training import assembly
from tract_det.training.detectors import build_detector


def detector(tmp_path, **changes):
    options = tiny_options(tmp_path, tmp_path / "out", **changes)
    cfg = load_cfg("quickstart/shapes.yaml", options)
    torch.manual_seed(0)
    built = build_detector(cfg, None, ("disc", "box"), False)
    assembly.put_tract(cfg, built.model, built.input_variance)
    built.network.train()
    return built


def batch(generator, *sizes):
    images = [torch.randint(0, 256, (3, *size), generator=generator).byte() for size in sizes]
    target = {"boxes": torch.tensor([[5.0, 8, 50, 60]]), "labels": torch.tensor([1]), "seed": 1}
    return images, [target] * len(images)


@pytest.mark.parametrize("is_on", [True, False])
def test_channels_last_is_the_batchs_and_the_weights_memory_format(generator, tmp_path, is_on):
    built = detector(tmp_path, MODEL__CHANNELS_LAST=is_on)
    network = built.network.to(memory_format=built.memory_format)
    seen = []
    network.backbone.body.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sum(network(*batch(generator, (64, 80), (70, 64))).values()).backward()
    for tensor in (*seen, network.backbone.body.conv1.weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == is_on


def test_a_compiled_backbone_is_not_compiled_again_for_each_batch(generator, tmp_path, monkeypatch):
    """And it computes the same. TrAct is told the sizes of the images; the graphs are not."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_it = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_it(self, backend=count))
    changes = {"MODEL__TRACT__ENABLED": True}
    built = detector(tmp_path, MODEL__COMPILE=True, **changes)
    eager = detector(tmp_path, **changes).network
    built.compile()
    sizes, numbers = torch.randint(60, 128, (6, 2, 2), generator=generator).tolist(), []
    for pair in sizes:
        images, targets = batch(generator, *pair)
        losses = [network(images, targets) for network in (built.network, eager)]
        assert all(torch.equal(losses[0][name], value) for name, value in losses[1].items())
        sum(losses[0].values()).backward()
        sum(losses[1].values()).backward()
        numbers.append(len(graphs))
    assert numbers[0] > 0 and numbers[3:] == [numbers[-1]] * 3
    stems = [network.backbone.body.conv1.weight.grad for network in (built.network, eager)]
    torch.testing.assert_close(*stems)


def test_channels_last_and_evaluation_in_batches_change_rounding_alone(voc_tree, tmp_path):
    """The images have one size: nothing is padded."""
    plain = tiny_options(voc_tree, tmp_path / "a", SOLVER__MAX_ITER=1)
    changes = {"MODEL__CHANNELS_LAST": True, "TEST__IMS_PER_BATCH": 3}
    fast = tiny_options(voc_tree, tmp_path / "b", SOLVER__MAX_ITER=1, **changes)
    for options in (plain, fast):
        run_here("train", *options)
    assert_close(tmp_path / "a", tmp_path / "b", 1e-4)
    assert results(tmp_path / "a")["images"] == results(tmp_path / "b")["images"] == 5
