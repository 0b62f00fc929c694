"""An arm is a few keys laid over any experiment; what it would undo is refused."""

import pytest

from tests.conftest import REPO
from tract_det.cli import call
from tract_det.config import arms, classification
from tract_det.config.detection import load_cfg
from tract_det.config.machinery import value_at
from tract_det.errors import UserError

VOC = "PascalVOC-Detection/faster_rcnn_VGG_16.yaml"
SMALL = "CIFAR/cpu_small.yaml"
QUICK = "quickstart/shapes.yaml"
CLASSIFIERS_ONLY = {"dual_patch_norm", "foof", "patch_norm", "strong"}
LISTING = f"the arms are {', '.join(arms.names())}$"


def state(cfg):
    return cfg.ARM, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.TRACT.ENABLED


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("load", [load_cfg, classification.load_cfg])
@pytest.mark.parametrize(
    ("arm", "expected"),
    [("frozen", (2, False)), ("plain", (0, False)), ("tract", (0, True))],
)
def test_an_arm_sets_its_keys_and_nothing_else(load, arm, expected):
    path = VOC if load is load_cfg else SMALL
    cfg, before = load(path, arm=arm), load(path)
    assert state(cfg) == (arm, *expected)
    for changed in (cfg, before):
        changed.defrost()
        changed.MODEL.BACKBONE.FREEZE_AT, changed.MODEL.TRACT.ENABLED = 0, False
        changed.ARM = changed.OUTPUT_DIR = ""
    assert cfg == before


def test_an_arm_as_a_config_file_or_as_a_key_is_the_same_arm():
    expected = load_cfg(QUICK, arm="plain")
    assert load_cfg([QUICK, "arms/plain.yaml"]) == expected
    assert load_cfg([QUICK, REPO / "configs/arms/plain.yaml"], arm="plain") == expected
    assert load_cfg(QUICK, ["ARM", "plain"]) == expected


def test_a_later_config_file_overrides_and_both_name_the_run(tmp_path):
    mine = write(tmp_path / "mine.yaml", "SOLVER: {MAX_ITER: 7, BASE_LR: 0.5}")
    cfg = load_cfg([VOC, mine], ["SOLVER.BASE_LR", "0.1"], "tract")
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS) == (7, 0.1, [50000])
    assert cfg.OUTPUT_DIR == "output/PascalVOC-Detection/faster_rcnn_VGG_16+mine/tract"
    assert load_cfg(mine).OUTPUT_DIR == "output/mine"


def test_an_unknown_arm_and_two_arms_are_refused_with_those_there_are():
    with pytest.raises(UserError, match=f"arm tracked: there is no such arm; {LISTING}"):
        load_cfg(VOC, arm="tracked")
    for ask in (
        lambda: load_cfg(VOC, ["ARM", "plain"], "tract"),
        lambda: load_cfg([VOC, "arms/plain.yaml"], arm="tract"),
        lambda: load_cfg([VOC, "arms/plain.yaml", "arms/tract.yaml"]),
        lambda: arms.the_one(["tract", "plain", "tract"]),
    ):
        with pytest.raises(UserError, match=f"plain and tract are asked for.*{LISTING}"):
            ask()
    assert arms.the_one(["tract", "tract"]) == "tract"
    with pytest.raises(UserError, match="arm tract is laid over a config: name that"):
        load_cfg("arms/tract.yaml")


def test_an_arm_of_several_parts_is_one_arm_however_it_is_asked_for(tmp_path):
    expected = load_cfg(QUICK, arm="tract+muon")
    assert expected.OUTPUT_DIR == "output/quickstart/shapes/tract+muon"
    assert state(expected) == ("tract+muon", 0, True)
    assert (expected.SOLVER.OPTIMIZER, expected.SOLVER.BASE_LR) == ("Muon", 0.02)
    assert load_cfg(QUICK, arm="muon+tract") == load_cfg(QUICK, ["ARM", "muon + tract"]) == expected
    assert load_cfg(QUICK, ["ARM", "tract+muon"], "muon+tract") == expected
    mine = write(tmp_path / "mine.yaml", f"_BASE_: {REPO / 'configs' / QUICK}\nARM: muon+tract")
    cfg = load_cfg(mine, ["OUTPUT_DIR", expected.OUTPUT_DIR])
    assert cfg == expected


@pytest.mark.parametrize("declared", ["frozen", "plain", "tract"])
def test_an_arm_without_a_word_of_tract_lies_on_plain(declared, tmp_path):
    mine = write(tmp_path / "mine.yaml", f"ARM: {declared}")
    assert state(load_cfg(mine, arm="muon")) == ("muon", 0, False)
    assert state(load_cfg(mine, arm="frozen+muon")) == ("frozen+muon", 2, False)


def test_an_arm_wins_over_the_recipe_in_a_file_and_the_command_line_over_its_numbers(tmp_path):
    mine = write(tmp_path / "mine.yaml", "SOLVER: {OPTIMIZER: Adam, BASE_LR: 0.3}")
    assert load_cfg(mine, arm="muon").SOLVER.BASE_LR == 0.02
    cfg = load_cfg(mine, ["SOLVER.BASE_LR", "0.01"], "muon")
    assert (cfg.ARM, cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR) == ("muon", "Muon", 0.01)
    with pytest.raises(UserError, match=r"arm muon sets SOLVER\.OPTIMIZER .*sets it Adam"):
        load_cfg(mine, ["SOLVER.OPTIMIZER", "Adam"], "muon")
    above = write(tmp_path / "above.yaml", f"_BASE_: {mine}\nARM: muon\nSOLVER: {{GAMMA: 0.2}}")
    assert load_cfg(above).ARM == "muon" and load_cfg(above).SOLVER.BASE_LR == 0.02


def test_the_config_that_a_run_leaves_behind_is_refused_to_an_arm_that_would_keep_the_others_keys(
    tmp_path,
):
    left = write(tmp_path / "config.yaml", load_cfg(QUICK, arm="muon").dump())
    with pytest.raises(UserError, match=r"arm plain does not set SOLVER\.\S+, and .*config\.yaml"):
        load_cfg(left, arm="plain")
    assert load_cfg(left) == load_cfg(QUICK, arm="muon")
    assert state(load_cfg(left, arm="tract+muon")) == ("tract+muon", 0, True)


@pytest.mark.parametrize("arm", ["frozen+tract", "tract+frozen"])
def test_parts_that_set_one_key_differently_are_refused_with_both_and_the_key(arm):
    with pytest.raises(UserError, match=r"arm frozen\+tract: frozen sets MODEL\.\S+ .*tract sets"):
        load_cfg(VOC, arm=arm)
    with pytest.raises(UserError, match=f"arm tracked: there is no such arm; {LISTING}"):
        load_cfg(VOC, arm="tract+tracked")


def test_an_arm_in_a_file_lies_over_its_bases_and_under_its_own_keys(tmp_path):
    base = write(tmp_path / "base.yaml", "ARM: plain\nMODEL: {TRACT: {ENABLED: False}}")
    mine = write(tmp_path / "mine.yaml", f"_BASE_: {base}\nARM: tract")
    assert state(load_cfg(mine)) == ("tract", 0, True)
    write(mine, f"{mine.read_text()}\nMODEL: {{TRACT: {{ENABLED: False}}}}")
    assert state(load_cfg(mine)) == ("", 0, False)


@pytest.mark.parametrize("verb", ["train", "pretrain"])
def test_the_command_line_takes_one_arm(verb, tmp_path):
    for flags in (["--arm", "traact"], ["--arm", "plain", "--arm", "tract"]):
        with pytest.raises(UserError, match=LISTING):
            call(verb, [*flags, "OUTPUT_DIR", str(tmp_path)])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("load", [load_cfg, classification.load_cfg])
def test_a_key_on_the_command_line_that_contradicts_the_arm_is_refused(load):
    path = VOC if load is load_cfg else SMALL
    for arm, key, value in (
        ("plain", "MODEL.TRACT.ENABLED", "True"),
        ("tract", "MODEL.TRACT.ENABLED", "False"),
        ("frozen", "MODEL.BACKBONE.FREEZE_AT", "0"),
    ):
        with pytest.raises(UserError, match=f"arm {arm} sets {key} .* sets it {value}.*{LISTING}"):
            load(path, [key, value], arm)
    assert load(path, ["MODEL.TRACT.ENABLED", "True"], "tract").MODEL.TRACT.ENABLED


def test_a_key_in_a_file_that_contradicts_the_arm_is_refused_by_the_files_name(tmp_path):
    for key, arm in (
        ("MODEL: {BACKBONE: {FREEZE_AT: 3}}", "frozen"),
        ("MODEL: {BACKBONE: {FREEZE_AT: 2}}", "tract"),
        ("MODEL: {TRACT: {ENABLED: True}}", "plain"),
    ):
        mine = write(tmp_path / "mine.yaml", f"_BASE_: {REPO / 'configs' / VOC}\n{key}")
        with pytest.raises(
            UserError, match=rf"mine\.yaml sets it .*: leave the key out.*{LISTING}"
        ):
            load_cfg(mine, arm=arm)


def test_a_default_that_a_file_spells_out_contradicts_no_arm(tmp_path):
    text = "MODEL: {TRACT: {ENABLED: False}, BACKBONE: {FREEZE_AT: -1}}"
    cfg = load_cfg(write(tmp_path / "mine.yaml", text), arm="tract")
    assert state(cfg) == ("tract", 0, True)


@pytest.mark.parametrize("arm", ["frozen", "plain", "tract"])
def test_the_config_that_a_run_leaves_behind_takes_every_arm(tmp_path, arm):
    left = write(tmp_path / "config.yaml", load_cfg(VOC, arm="frozen").dump())
    assert state(load_cfg(left, arm=arm)) == state(load_cfg(VOC, arm=arm))
    assert load_cfg(left).OUTPUT_DIR == "output/PascalVOC-Detection/faster_rcnn_VGG_16/frozen"


def test_what_a_file_or_the_command_line_sets_wins_over_the_arm_that_the_file_declares(tmp_path):
    assert state(load_cfg(VOC)) == ("plain", 0, False)
    assert state(load_cfg(VOC, ["MODEL.TRACT.ENABLED", "True"])) == ("", 0, True)
    assert f"output/{VOC[:-5]}" == load_cfg(VOC, ["MODEL.TRACT.ENABLED", "True"]).OUTPUT_DIR
    text = f"_BASE_: {REPO / 'configs' / VOC}\nMODEL: {{BACKBONE: {{FREEZE_AT: 2}}}}"
    assert state(load_cfg(write(tmp_path / "mine.yaml", text))) == ("", 2, False)


@pytest.mark.parametrize("arm", arms.names())
def test_every_arm_is_laid_over_a_classifier_and_over_a_detector_or_refused_by_its_key(arm):
    for key, value in arms.read(arm).items():
        assert value_at(classification.load_cfg(SMALL, arm=arm), key) == value
    if arm in CLASSIFIERS_ONLY:
        with pytest.raises(UserError) as caught:
            load_cfg(QUICK, arm=f"{arm}+tract" if arm != "foof" else arm)
        assert arm in str(caught.value) and "detector" in str(caught.value)
        assert "\n" not in str(caught.value) and "did you mean" not in str(caught.value)
    else:
        for key, value in arms.read(arm).items():
            assert value_at(load_cfg(QUICK, arm=arm), key) == value


@pytest.mark.parametrize("arm", arms.names())
def test_an_arm_opens_with_what_it_does_and_where_it_is_from(arm):
    text = (arms.FOLDER / f"{arm}.yaml").read_text()
    assert text.startswith(f"# --arm {arm}: ") and text.isascii()
    assert arm in ("frozen", "plain", "tract") or "arXiv" in text or "https://" in text


@pytest.mark.parametrize(
    ("old", "files", "arm"),
    [
        ("PascalVOC-Detection/faster_rcnn_VGG_16_tract.yaml", [VOC], "tract"),
        (
            "configs/PascalVOC-Detection/faster_rcnn_VGG_16_frozen_0712.yaml",
            [VOC, "schedules/VGG_16_0712.yaml"],
            "frozen",
        ),
        (
            "detectron2/faster_rcnn_R_50_C4_0712.yaml",
            ["detectron2/faster_rcnn_R_50_C4.yaml", "schedules/R_50_0712.yaml"],
            "",
        ),
    ],
)
def test_the_name_of_a_file_before_there_were_arms_is_read_as_what_it_is_now(
    old, files, arm, tmp_path
):
    with pytest.warns(UserWarning, match=f"{old} is now: --config-file .*{arm}"):
        assert load_cfg(old) == load_cfg(files, arm=arm)
    mine = write(tmp_path / "mine.yaml", f"_BASE_: {REPO / 'configs' / old}")
    if "configs" not in old:
        with pytest.raises(UserError, match=rf"_BASE_ .* does not exist: it is now .*{files[-1]}"):
            load_cfg(mine)
    with pytest.warns(UserWarning), pytest.raises(UserError, match=LISTING):
        load_cfg("BCCD-Detection/faster_rcnn_R_18_FPN_tract.yaml", arm="plain")


def test_a_file_of_the_users_own_is_not_taken_for_another_one(tmp_path):
    write(tmp_path / "mine.yaml", "SEED: 1")
    with pytest.raises(UserError, match=r"mine_tract\.yaml does not exist"):
        load_cfg(str(tmp_path / "mine_tract.yaml"))


@pytest.mark.parametrize(
    ("verb", "file", "message"),
    [
        ("pretrain", VOC, "this is a detector's config: tract-det train"),
        ("train", "CIFAR/cpu_small.yaml", "this is a classifier's config: tract-det pretrain"),
    ],
)
def test_a_config_of_the_other_task_is_answered_with_its_verb(verb, file, message):
    with pytest.raises(UserError, match=message):
        call(verb, ["--config-file", file])
