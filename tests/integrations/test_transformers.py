import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler

pytest.importorskip("transformers", reason="Transformers is missing: pip install transformers")
pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install accelerate")
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from tests.integrations.common import (
    BATCH,
    RATE,
    assert_same_steps,
    assert_two_processes_take_the_steps_of_one,
    network,
    oracle_steps,
    samples,
)
from tract_det import TrActConv2d
from tract_det.errors import UserError
from tract_det.integrations.transformers import TrActTrainerCallback, with_tract


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, pixel_values, labels):
        logits = self.net(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset or self.train_dataset)


class Weights(TrainerCallback):
    """The stem's weights after every optimizer step."""

    def __init__(self):
        self.after, self.lambdas = [], []

    def on_step_end(self, args, state, control, *, model, **_):
        (stem,) = (module for module in model.modules() if isinstance(module, nn.Conv2d))
        self.after.append(stem.weight.detach().clone())
        self.lambdas.append(getattr(stem, "lambda_", None))


def arguments(folder, **options):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 1,
            "learning_rate": RATE,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **options,
        }
    )


def dataset(number):
    pairs = zip(*samples(number), strict=True)
    return [{"pixel_values": image, "labels": label} for image, label in pairs]


def train(folder, number, *, schedule=None, **options):
    """The trainer after its training, and what `Weights` saw."""
    args, weights = arguments(folder, **options), Weights()
    callbacks = [TrActTrainerCallback(schedule), weights]
    model = with_tract(Classifier(), args)
    trainer = InOrder(model, args, train_dataset=dataset(number), callbacks=callbacks)
    trainer.train()
    return trainer, weights


def test_every_step_is_the_oracles_also_the_short_last_one(tmp_path):
    _, weights = train(tmp_path, 5 * BATCH, gradient_accumulation_steps=2)
    pair = [BATCH, BATCH]
    assert_same_steps(weights.after, oracle_steps([pair, pair, [BATCH]]))


def test_without_accumulation_every_batch_is_a_step_and_logged(tmp_path):
    trainer, weights = train(tmp_path, 2 * BATCH)
    assert_same_steps(weights.after, oracle_steps([[BATCH], [BATCH]]))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    assert all(entry["tract_lambda"] == pytest.approx(0.1) for entry in logs)


def test_a_schedule_sets_lambda_by_the_fraction_of_the_steps(tmp_path):
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 2}
    _, weights = train(tmp_path, 5 * BATCH, schedule=lambda done: 0.1 + done, **options)
    assert weights.lambdas == pytest.approx([0.1 + step / 6 for step in range(6)])


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(
        ViTConfig(**sizes, intermediate_size=32, image_size=12, patch_size=4, num_labels=5)
    )


def test_checkpoints_fit_with_and_without_tract(tmp_path):
    """A saved model of Transformers' own, loaded plainly, and resumed with and without TrAct."""
    options = {"save_strategy": "epoch", "gradient_accumulation_steps": 2}
    data = dataset(2 * BATCH)

    def trainer(name, epochs, *, tract):
        args = arguments(tmp_path / name, **options | {"num_train_epochs": epochs})
        model = with_tract(vit(), args) if tract else vit()
        callbacks = [TrActTrainerCallback()] if tract else []
        return InOrder(model, args, train_dataset=data, callbacks=callbacks)

    for name, tract in (("with", True), ("without", False)):
        first = trainer(name, 1, tract=tract)
        first.train()
        saved = tmp_path / name / "checkpoint-1"
        loaded = ViTForImageClassification.from_pretrained(saved).state_dict()
        state = first.model.state_dict()
        assert list(loaded) == list(state) == list(vit().state_dict())
        assert all(torch.equal(loaded[key], state[key]) for key in state)
        second = trainer(name, 2, tract=not tract)
        second.train(resume_from_checkpoint=str(saved))
        stem = second.model.vit.embeddings.patch_embeddings.projection
        assert second.state.global_step == 2 and isinstance(stem, TrActConv2d) != tract


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    assert_two_processes_take_the_steps_of_one("transformers", tmp_path)


def test_a_trainer_whose_model_has_no_tract_is_refused(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(
        UserError, match=r"Classifier has no TrAct layer.*with_tract\(model, args\)"
    ):
        Trainer(Classifier(), args, callbacks=[TrActTrainerCallback()])
    trainer = Trainer(Classifier(), args, train_dataset=dataset(BATCH))
    trainer.add_callback(TrActTrainerCallback())
    with pytest.raises(UserError, match="Classifier has no TrAct layer"):
        trainer.train()


def test_a_model_that_is_wrapped_or_compiled_is_refused(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(UserError, match="the model is already compiled: make the trainer with"):
        with_tract(torch.compile(Classifier(), backend="eager"), args)
    with pytest.raises(UserError, match="the model is already wrapped in DataParallel"):
        with_tract(nn.DataParallel(Classifier()), args)


def test_one_process_on_several_gpus_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(UserError, match="start with torchrun"):
        with_tract(Classifier(), args)
