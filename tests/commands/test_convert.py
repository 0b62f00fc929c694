"""The tool through its command line, from and to every form."""

import pickle

import pytest
import torch
from torch import nn

from tests.conftest import REPO, run_python
from tract_det.cli import call
from tract_det.engine.checkpoint import save_weights
from tract_det.errors import UserError
from tract_det.modeling.classifiers import build_classifier
from tract_det.modeling.faster_rcnn import build_faster_rcnn
from tract_det.modeling.heads import BoxHeadOptions
from tract_det.modeling.weight_files import read_weights


def main(arguments):
    call("convert", arguments)


META = {
    "model": "resnet10",
    "class_names": ["a", "b"],
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
}
STATISTICS = ["--pixel-mean", "1", "2", "3", "--pixel-std", "4", "5", "6"]


@pytest.fixture
def pretrained(tmp_path):
    """What tools/pretrain_net.py leaves."""
    torch.manual_seed(0)
    model = build_classifier("resnet10", 2, width=8)
    save_weights(tmp_path / "model_final.pth", model, META)
    return tmp_path / "model_final.pth", model.state_dict()


def test_a_chain_through_every_form_ends_where_it_began(pretrained, tmp_path, capsys):
    source, state = pretrained
    chain = [
        ("a.pkl", ["--format", "BGR"]),
        ("b.safetensors", []),
        ("c.pkl", []),
        ("d.pth", ["--to", "timm"]),
        ("e.pth", []),
    ]
    for name, options in chain:
        main([str(source), str(tmp_path / name), *options])
        source = tmp_path / name
        assert f"wrote {source}" in capsys.readouterr().out
    weights = read_weights(str(source))
    assert weights.meta == META and list(weights.state) == list(state)
    assert all(torch.equal(weights.state[key], state[key]) for key in state)


def test_it_runs_as_a_command_and_its_error_is_one_line(pretrained, tmp_path):
    tool = REPO / "tools" / "convert_weights.py"
    done = run_python(tool, pretrained[0], tmp_path / "w.pkl", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "w.pkl").is_file(), done.stderr
    done = run_python(tool, "nowhere.pth", tmp_path / "w.pkl", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("error: IN nowhere.pth is not a file")
        and done.stderr.count("\n") == 1
    )


def test_statistics_are_needed_once_and_not_twice(pretrained, tmp_path):
    source, state = pretrained
    torch.save(state, tmp_path / "bare.pth")
    bare, out = str(tmp_path / "bare.pth"), tmp_path / "w.pkl"
    with pytest.raises(UserError, match=r"bare\.pth does not say .*--pixel-mean and --pixel-std"):
        main([bare, str(out)])
    assert not out.exists()
    main([bare, str(out), *STATISTICS, "--format", "BGR"])
    content = pickle.loads(out.read_bytes())
    assert (content["PIXEL_MEAN"], content["PIXEL_STD"]) == ([3, 2, 1], [6, 5, 4])
    with pytest.raises(UserError, match=r"says itself .* leave --pixel-mean and --pixel-std out"):
        main([str(source), str(out), *STATISTICS])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["w.txt"], "must end in .pth, .safetensors, .pkl"),
        (["w.pkl", "--to", "timm"], "--to timm does not go into .pkl"),
        (["w.pth", "--to", "detectron2"], "--to detectron2 does not go into .pth"),
        (["w.pth", "--format", "BGR"], "torchvision's models take RGB"),
        (["w.pth", "--pixel-mean", "1", "2", "3"], "go together"),
    ],
)
def test_contradictions_are_refused_by_the_command_line(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["in.pth", *options])
    assert message in capsys.readouterr().err


def test_what_is_left_out_of_a_classifier_of_nan_is_said(tmp_path, capsys):
    shapes = {"features.0": (2, 3, 3, 3), "classifier.0": (4, 98), "classifier.3": (4, 4)}
    state = {f"{key}.weight": torch.ones(shape) for key, shape in shapes.items()}
    torch.save(
        {k: v if "features" in k else v * torch.nan for k, v in state.items()}, tmp_path / "w.pth"
    )
    main([str(tmp_path / "w.pth"), str(tmp_path / "w.pkl"), *STATISTICS])
    said = capsys.readouterr().out
    assert "1 tensors in detectron2's form" in said
    assert "left out: 2 tensors of IN's classifier, which are NaN" in said


SMALL = {"num_classes": 3, "fpn_channels": 16, "box_head": BoxHeadOptions(fc_dim=8)}
VGG = {  # three classes; two sizes and two aspect ratios of anchors
    "backbone.features.0": (4, 3, 3, 3),
    "rpn.head.conv.0.0": (4, 4, 3, 3),
    "rpn.head.cls_logits": (4, 4, 1, 1),
    "rpn.head.bbox_pred": (16, 4, 1, 1),
    "roi_heads.box_head.fc6": (6, 196),
    "roi_heads.box_head.fc7": (6, 6),
    "roi_heads.box_predictor.cls_score": (4, 6),
    "roi_heads.box_predictor.bbox_pred": (16, 6),
}


@pytest.fixture(scope="module", params=["resnet18_fpn", "vgg"])
def detector(request, tmp_path_factory):
    """What tools/train_net.py leaves, of a ResNet or of a small VGG."""
    torch.manual_seed(0)
    model = nn.Module()
    if request.param == "resnet18_fpn":
        model = build_faster_rcnn(backbone=request.param, **SMALL)
    else:
        model.state_dict = lambda: {
            f"{name}.{kind}": torch.randn(shape if kind == "weight" else shape[:1])
            for name, shape in VGG.items()
            for kind in ("weight", "bias")
        }
    ratios = [1.0, 2.0] if request.param == "vgg" else [0.5, 1.0, 2.0]
    meta = META | {"class_names": ["a", "b", "c"], "aspect_ratios": ratios}
    del meta["model"]
    path = tmp_path_factory.mktemp("detector") / "model_final.pth"
    save_weights(path, model, meta)
    return path, read_weights(str(path)).state, meta


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_a_detector_goes_to_detectron2_and_back_bit_for_bit(detector, channels, tmp_path):
    source, state, meta = detector
    there, back = tmp_path / "w.pkl", tmp_path / "w.pth"
    main([str(source), str(there), "--format", channels])
    content = pickle.loads(there.read_bytes())
    assert content["FORMAT"] == channels and len(content["model"]) == len(state)
    stem, written = next(iter(state.values())), torch.tensor(next(iter(content["model"].values())))
    assert torch.equal(written, stem if channels == "RGB" else stem.flip(1))
    main([str(there), str(back)])
    weights = read_weights(str(back))
    assert weights.meta == meta and weights.is_detector
    assert weights.state.keys() == state.keys()
    assert all(torch.equal(weights.state[key], state[key]) for key in state)


def test_the_background_is_detectron2s_last_class_and_has_no_box(detector, tmp_path):
    source, state, _ = detector
    main([str(source), str(tmp_path / "w.pkl")])
    model = pickle.loads((tmp_path / "w.pkl").read_bytes())["model"]
    scores, boxes = (f"roi_heads.box_predictor.{name}.bias" for name in ("cls_score", "bbox_pred"))
    assert model[scores].tolist() == [*state[scores][1:].tolist(), state[scores][0].item()]
    assert model[boxes].tolist() == state[boxes][4:].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("rpn.head.conv.0.0.weight"),
            "it has no 'rpn.head.conv.0.0.weight'",
        ),
        (
            lambda state: state.update({"roi_heads.mask_head.a.weight": torch.ones(1)}),
            "'roi_heads.mask_head.a.weight' has no place in the other",
        ),
        (
            lambda state: state.update({"backbone.body.layer1.0.odd.weight": torch.ones(1)}),
            "'backbone.body.layer1.0.odd.weight' has no place",
        ),
    ],
)
def test_another_detector_is_refused_by_a_tensor(change, message, tmp_path):
    model = build_faster_rcnn(backbone="resnet18_fpn", **SMALL)
    state = dict(model.state_dict())
    change(state)
    torch.save(state, tmp_path / "d.pth")
    with pytest.raises(UserError, match=message) as caught:
        main([str(tmp_path / "d.pth"), str(tmp_path / "w.pkl"), *STATISTICS])
    assert "\n" not in str(caught.value) and not (tmp_path / "w.pkl").exists()


def test_timm_has_no_detectors(detector, tmp_path):
    with pytest.raises(UserError, match="is a whole detector, which timm does not have"):
        main([str(detector[0]), str(tmp_path / "w.safetensors")])
