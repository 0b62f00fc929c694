import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.counts import Waits
from tract_det.engine.loop import StopSignal, infer, train
from tract_det.errors import DivergedError, UserError


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
        ((images() * torch.inf, torch.zeros(3)), r"loss (nan|-?inf); lower SOLVER.BASE_LR"),
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


class Broken(Model):
    """Breaks down in its third pass, or as soon as it has diverged."""

    def forward(self, images, targets=None):
        if len(self.seen) == 2 or any(image.isnan().any() for image in self.seen):
            raise RuntimeError("a consequence")
        return super().forward(images, targets)


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_an_error_after_a_loss_that_is_not_finite_is_taken_for_its_consequence(value):
    batch = (images() * value, torch.zeros(3))
    kind, message = (RuntimeError, "a consequence") if value == 1 else (DivergedError, "at step 1:")
    with pytest.raises(kind, match=message), StopSignal() as stop:
        train(
            Engine(Broken()), [batch] * 3, start=0, max_iter=3, lr_at=lambda _: 0.1, stop=stop,
            after_step=lambda step: None, accumulation=1,
        )  # fmt: skip


def test_the_losses_of_all_steps_are_read_together_when_one_is():
    model, steps, transfers = Model(), [], []

    def after_step(step):
        steps.append(step)
        if step.iteration == 3:
            step.read()
        transfers.append(waits.counts["transfer"])

    with StopSignal() as stop, Waits() as waits:
        train(
            Engine(model), [(images(), torch.zeros(3))] * 5, start=0, max_iter=5, accumulation=1,
            lr_at=lambda _: 0.1, stop=stop, after_step=after_step,
        )  # fmt: skip
    assert transfers == [0, 0, 1, 1, 1] and waits.counts == {"transfer": 2}
    for step in steps:
        assert step.losses["loss"] == step.losses["loss_a"] + step.losses["loss_b"]
    assert len({step.losses["loss"] for step in steps}) == 5


def test_the_first_step_that_diverged_is_named_though_a_later_one_is_read():
    good, bad = (images(), torch.zeros(3)), (images() * torch.inf, torch.zeros(3))
    with pytest.raises(DivergedError, match="at step 2: loss_a"), StopSignal() as stop:
        train(
            Engine(Model()), [good, bad, bad, good], start=0, max_iter=4, accumulation=1,
            lr_at=lambda _: 0.1, stop=stop, after_step=lambda step: None,
        )  # fmt: skip


class Copies(TorchFunctionMode):
    """Notes what is copied where, and whether the host waits for it."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "to" and len(args) > 1:
            self.made.append((args[0].dtype, str(args[1]), kwargs.get("non_blocking", False)))
        return function(*args, **kwargs)


def test_images_travel_to_a_device_as_bytes_and_nothing_waits_for_them():
    """The meta device stands for one that is not the CPU."""
    batch = [torch.zeros(3, 4, 4, dtype=torch.uint8)] * 2, [{"boxes": torch.zeros(1, 4)}] * 2

    class Counted(nn.Module):
        def forward(self, images, targets=None):
            assert all(image.device.type == "meta" for image in images)
            weight = torch.ones((), requires_grad=True)
            return [{"scores": torch.zeros(1)}] if targets is None else {"loss": weight * 1}

    engine = Engine(Model())
    engine.module, engine.device = Counted(), torch.device("meta")
    with StopSignal() as stop, Copies() as copies:
        train(
            engine, [batch], start=0, max_iter=1, accumulation=1, lr_at=lambda _: 0.1, stop=stop,
            after_step=lambda step: None,
        )  # fmt: skip
    pixels, boxes = (torch.uint8, "meta", True), (torch.float32, "meta", True)
    assert copies.made == [pixels] * 2 + [boxes] * 2
    with Copies() as copies:
        infer(engine.module, [batch[:1]], device=engine.device, consume=lambda output: None)
    assert copies.made == [pixels] * 2 + [(torch.float32, "cpu", False)]


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
