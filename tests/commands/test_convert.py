"""The tool through its command line, from and to every form."""

import pickle

import pytest
import torch

from tests.conftest import REPO, run_python
from tract_det.cli import call
from tract_det.engine.checkpoint import save_weights
from tract_det.errors import UserError
from tract_det.modeling.classifiers import build_classifier
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


def test_a_detector_is_refused(tmp_path):
    torch.save({"roi_heads.box_head.fc6.weight": torch.ones(1)}, tmp_path / "d.pth")
    with pytest.raises(UserError, match=r"d\.pth is a whole detector"):
        main([str(tmp_path / "d.pth"), str(tmp_path / "w.pkl"), *STATISTICS])
