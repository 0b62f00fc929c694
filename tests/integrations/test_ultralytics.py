import copy
import os
import pickle
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

# Before its import: Ultralytics writes its settings into the home directory.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
pytest.importorskip("cv2", reason="OpenCV cannot be loaded", exc_type=ImportError)
pytest.importorskip("ultralytics", reason="Ultralytics is not installed: pip install ultralytics")
from ultralytics import YOLO
from ultralytics.utils.torch_utils import unwrap_model

from tests import reference
from tests.conftest import run_python
from tract_det import TrActConv2d, TrActError
from tract_det.errors import UserError
from tract_det.integrations.ultralytics import PIXEL_STD, add_tract
from tract_det.pixels import input_variance
from tract_det.tract.modules import tract_layers

LAMBDA, RATE, MOMENTUM, SIDE = 0.1, 0.01, 0.9, 64

NETWORK = """
nc: 2
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [[2], 1, Detect, [nc]]
"""


def write_data(folder):
    """Eight images with a bright box each, the same for training and validation."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for index in range(8):
        image = rng.integers(0, 100, (SIDE, SIDE, 3), dtype=np.uint8)
        image[16:48, 16:48] += 100
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        (folder / "labels" / f"{index}.txt").write_text(f"{index % 2} 0.5 0.5 0.5 0.5\n")
    path = folder / "data.yaml"
    path.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [disc, box]\n")
    return path


@pytest.fixture
def data(tmp_path):
    (tmp_path / "network.yaml").write_text(NETWORK)
    return write_data(tmp_path)


def make(data):
    return YOLO(data.with_name("network.yaml"), task="detect")


def train(model, data, **options):
    """Trains two batches of four; without augmentation unless `options` says otherwise."""
    model.train(
        **{
            "data": str(data),
            "imgsz": SIDE,
            "batch": 4,
            "nbs": 4,
            "epochs": 1,
            "device": "cpu",
            "optimizer": "SGD",
            "lr0": RATE,
            "lrf": 1.0,
            "momentum": MOMENTUM,
            "weight_decay": 0.0,
            "warmup_epochs": 0,
            "mosaic": 0.0,
            "plots": False,
            "val": False,
            "project": str(data.parent / "runs"),
            "name": "run",
            "exist_ok": True,
            "verbose": False,
            **options,
        }
    )
    return model.trainer


class Record:
    """What a training saw.

    Attributes:
        start: copy of the model before the first step.
        batches: the batches as the model gets them.
        ends: for each step, the number of batches up to it.
        rates: for each step, the learning rate and momentum of each group of parameters.
        stems: the stem's weights after each step.
        lambdas: of the layer, at each batch.
        classes: of the stem and of its moving average, when the training begins.
    """

    def __init__(self, model, *, fails_at=None):
        self.batches, self.ends, self.rates, self.stems, self.lambdas = [], [], [], [], []
        self.fails_at = fails_at
        model.add_callback("on_pretrain_routine_end", self.begin)
        model.add_callback("on_train_epoch_start", self.begin_epoch)
        model.add_callback("on_train_batch_end", self.end_batch)

    def begin(self, trainer):
        self.trainer, bare = trainer, unwrap_model(trainer.model)
        self.classes = type(bare.model[0].conv), type(trainer.ema.ema.model[0].conv)
        self.start = copy.deepcopy(trainer.ema.ema).requires_grad_(True)
        self.start.args = bare.args
        preprocess, step = trainer.preprocess_batch, trainer.optimizer_step

        def preprocess_batch(batch):
            batch = preprocess(batch)
            if len(self.batches) == self.fails_at:
                self.fails_at = None
                raise RuntimeError("out of memory")
            self.batches.append(
                {k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()}
            )
            return batch

        def optimizer_step():
            groups = trainer.optimizer.param_groups
            self.rates.append([(group["lr"], group["momentum"]) for group in groups])
            step()
            self.ends.append(len(self.batches))
            self.stems.append(bare.model[0].conv.weight.detach().clone())

        trainer.preprocess_batch, trainer.optimizer_step = preprocess_batch, optimizer_step

    def begin_epoch(self, trainer):
        if trainer.epoch == trainer.start_epoch:  # again, after a lack of memory
            del self.batches[self.ends[-1] if self.ends else 0 :]

    def end_batch(self, trainer):
        self.lambdas += [layer.lambda_ for _, layer in tract_layers(unwrap_model(trainer.model))]

    def oracle(self):
        """The stem's weights after each step: the plain model, TrAct's gradient in float64."""
        model, stem, weights = self.start.train(), self.start.model[0].conv, []
        optimizer = self.trainer.build_optimizer(model, "SGD", RATE, MOMENTUM, 0.0)
        outputs = []
        stem.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        for begin, end, rates in zip([0, *self.ends], self.ends, self.rates, strict=False):
            outputs.clear()
            optimizer.zero_grad()
            for batch in self.batches[begin:end]:
                loss, _ = model(batch)
                outputs[-1].retain_grad()
                loss.sum().backward()
            images = torch.cat([batch["img"] for batch in self.batches[begin:end]])
            dz = torch.cat([output.grad for output in outputs])
            damping = LAMBDA * input_variance(PIXEL_STD)
            gradient, _, _ = reference.conv_gradient(stem, images, dz, damping)
            stem.weight.grad = gradient[0].reshape(stem.weight.shape).float()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)
            for group, (rate, momentum) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"], group["momentum"] = rate, momentum
            optimizer.step()
            weights.append(stem.weight.detach().clone())
        return weights


def assert_oracle(record):
    """Whether every update of the stem is the oracle's, to 1e-5 of its largest entry."""
    previous = before = record.start.model[0].conv.weight.detach().double()
    for weight, wanted in zip(record.stems, record.oracle(), strict=True):
        update, wanted_update = weight.double() - previous, wanted.double() - before
        error = (update - wanted_update).abs().max()
        # At most: the rate of the first step may be 0.
        assert error <= 1e-5 * wanted_update.abs().max(), f"error {error:.1e}"
        previous, before = weight.double(), wanted.double()


def test_every_batch_is_the_oracles_step_and_the_moving_average_is_plain(data):
    model = add_tract(make(data), LAMBDA)
    record = Record(model)
    train(model, data, epochs=2)
    assert record.ends == [1, 2, 3, 4]
    assert record.classes == (TrActConv2d, nn.Conv2d)
    assert_oracle(record)


@pytest.mark.parametrize(
    ("warmup", "ends"),
    [(0, [3, 6, 9, 12]), (1, [1, 3, 6, 9, 12])],
    ids=["constant", "growing"],
)
def test_accumulated_steps_are_the_oracles_across_epochs(data, warmup, ends):
    """Four batches an epoch, three of which make a step; the warmup begins with one."""
    model = add_tract(make(data), LAMBDA)
    record = Record(model)
    train(model, data, batch=2, nbs=6, epochs=3, warmup_epochs=warmup)
    assert record.ends == ends
    assert_oracle(record)


def test_an_epoch_that_begins_again_forgets_the_step_that_was_given_up(data):
    """Ultralytics halves the batch when memory lacks: here at the second half of a step."""
    model = add_tract(make(data), LAMBDA)
    record = Record(model, fails_at=1)
    train(model, data, batch=4, nbs=8)
    assert record.ends == [4]
    assert_oracle(record)


def test_a_schedule_sets_lambda_by_the_fraction_of_the_batches(data):
    model = add_tract(make(data), schedule=lambda done: None if done > 0.7 else 0.1 + done)
    record = Record(model)
    train(model, data, batch=2, nbs=4, epochs=2)
    variance = input_variance(PIXEL_STD)
    wanted = [0.1, 0.1, 0.35, 0.35, 0.6, 0.6, 0.6, 0.6]
    assert [value / variance for value in record.lambdas] == pytest.approx(wanted)


def test_weights_load_in_a_process_without_this_package(data):
    model = add_tract(make(data))
    trainer = train(model, data)
    assert not list(tract_layers(trainer.model)) and not list(tract_layers(model.model))
    assert list(trainer.model.state_dict()) == list(make(data).model.state_dict())
    code = (
        "import sys; sys.modules['tract_det'] = None; from ultralytics import YOLO; "
        "print([type(YOLO(path).model.model[0].conv) for path in sys.argv[1:]])"
    )
    result = run_python("-c", code, trainer.best, trainer.last)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip().splitlines()[-1] == str([nn.Conv2d] * 2)


def _interrupt(trainer):
    if trainer.epoch == 1:
        raise KeyboardInterrupt


@pytest.mark.parametrize("saved_with", [True, False])
def test_resuming_fits_with_and_without_tract(data, saved_with):
    """Two of three epochs with TrAct and the rest without it, or the reverse."""
    model = make(data)
    if saved_with:
        add_tract(model)
    model.add_callback("on_fit_epoch_end", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, data, epochs=3)
    assert type(model.trainer.model.model[0].conv) is nn.Conv2d
    resumed = YOLO(model.trainer.last)
    if not saved_with:
        add_tract(resumed, LAMBDA)
    record = Record(resumed)
    resumed.train(resume=True)
    assert record.classes == (nn.Conv2d if saved_with else TrActConv2d, nn.Conv2d)
    assert record.ends == [1, 2]


def test_the_callbacks_reach_the_processes_that_ultralytics_starts():
    """It pickles them; training in several processes itself is for GPUs alone."""
    model = add_tract(YOLO("yolo11n.yaml"), schedule=abs, stem="model.0.conv")
    copies = pickle.loads(pickle.dumps(dict(model.callbacks)))
    (callback,) = (c for c in copies["on_pretrain_routine_end"] if hasattr(c, "__self__"))
    assert callback.__self__.settings["stem"] == "model.0.conv"


def test_what_is_no_model_of_ultralytics_is_refused(data):
    with pytest.raises(UserError, match="DetectionModel is not a model of Ultralytics: call"):
        add_tract(make(data).model)


def test_a_frozen_stem_is_refused_before_training(data):
    with pytest.raises(TrActError, match=r"'model\.0\.conv' is frozen"):
        train(add_tract(make(data)), data, freeze=1)
