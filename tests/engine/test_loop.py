import pytest
import torch
from torch import nn

from tract_det.engine.loop import StopSignal, infer, train
from tract_det.errors import UserError


class Engine(nn.Module):
    """What the loop needs of DeepSpeed's, in plain PyTorch."""

    def __init__(self, module):
        super().__init__()
        self.module, self.device = module, torch.device("cpu")
        self.optimizer = torch.optim.SGD(module.parameters(), lr=1.0)

    def forward(self, *batch):
        return self.module(*batch)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.seen = []

    def forward(self, images, targets=None):
        self.seen.append(images)
        flat = torch.stack([image.mean(dim=(1, 2))[:2] for image in images])
        if targets is None:
            return self.layer(flat)
        return {"loss_a": self.layer(flat).mean(), "loss_b": self.layer(flat).square().mean()}


def run(batches, **options):
    model, steps = Model(), []
    with StopSignal() as stop:
        done = train(
            Engine(model), batches, start=0, max_iter=2, lr_at=lambda _: 0.1, stop=stop,
            after_step=steps.append, accumulation=len(batches) // 2, **options,
        )  # fmt: skip
    assert done == 2
    return model, steps


def images(n=3):
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_batch_is_a_tensor_or_a_list():
    tensors, first = run([(images(), torch.zeros(3, dtype=torch.long))] * 4)
    lists, second = run([(list(images()), [{"image_id": "a", "labels": torch.ones(1)}] * 3)] * 4)
    assert torch.is_tensor(tensors.seen[0]) and isinstance(lists.seen[0], list)
    assert [set(step.losses) for step in first] == [{"loss", "loss_a", "loss_b"}] * 2
    assert [step.images for step in first] == [step.images for step in second] == [6, 6]


def test_images_in_one_tensor_take_the_memory_format():
    model, _ = run(
        [(images(), torch.zeros(3, dtype=torch.long))] * 2, memory_format=torch.channels_last
    )
    assert all(seen.is_contiguous(memory_format=torch.channels_last) for seen in model.seen)


def test_what_comes_before_a_step_knows_its_number():
    numbers = []
    run([(images(), torch.zeros(3))] * 2, before_step=numbers.append)
    assert numbers == [0, 1]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((images() * torch.inf, torch.zeros(3)), r"loss nan; lower SOLVER.BASE_LR"),
        (
            ([images(1)[0] * torch.nan], [{"image_id": "a7"}]),
            r"at step 1: .*images: a7; lower SOLVER.BASE_LR",
        ),
    ],
    ids=["tensor", "list"],
)
def test_a_loss_that_is_not_finite_stops_the_training(batch, message):
    with pytest.raises(UserError, match=message):
        run([batch] * 2)


def test_inference_hands_on_what_follows_the_images():
    model, found = Model().train(), []
    batches = [(images(2), torch.tensor([4, 5]), ["a", "b"]), (images(1), torch.tensor([6]), ["c"])]
    count = infer(
        model, batches, device=torch.device("cpu"), consume=lambda *rest: found.append(rest)
    )
    assert count == 3 and model.training
    assert [(labels.tolist(), ids, out.shape) for labels, ids, out in found] == [
        ([4, 5], ["a", "b"], (2, 1)), ([6], ["c"], (1, 1)),
    ]  # fmt: skip
