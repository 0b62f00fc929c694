"""What is built of the checkout, and installed by its name, is the whole package."""

import shutil
import tarfile
import zipfile

import pytest

from tests.conftest import REPO, run_python

# The backend of pyproject.toml, without an environment of its own, which would need the network.
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
NOT_PACKAGED = ("*.pyc", "*.md")


def build(kind, source, out):
    done = run_python("-c", BUILD.format(kind), out, cwd=source)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return path


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which pip would unpack the wheel that is built of the source archive."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "checkout"
    source.mkdir()
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg"):
        shutil.copy(REPO / name, source)
    for name in ("tract_det", "configs", "benchmarks", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / name, source / name, symlinks=True, ignore=ignored)
    with tarfile.open(build("sdist", source, folder)) as archive:
        # Python has filters from 3.10.12 and 3.11.4 on; the archive is our own.
        filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder / "unpacked", **filters)
    (unpacked,) = (folder / "unpacked").iterdir()
    assert not (unpacked / "tests").exists()
    with zipfile.ZipFile(build("wheel", unpacked, folder)) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def files(root):
    paths = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    return {str(p) for p in paths if not any(p.match(pattern) for pattern in NOT_PACKAGED)}


def test_the_wheel_has_every_module_config_benchmark_and_template(installed):
    package = {f"tract_det/{name}" for name in files(REPO / "tract_det")}
    for folder, pattern in (("configs", "*.yaml"), ("benchmarks", "*.py")):
        paths = (REPO / folder).rglob(pattern)
        package |= {f"tract_det/{path.relative_to(REPO)}" for path in paths}
    assert {name for name in files(installed) if ".dist-info" not in name} == package


def test_an_installed_package_reads_its_configs_and_finds_its_benchmarks(installed, tmp_path):
    for arguments, says in (
        (["paper"], "imagenet-resnet50/60"),
        (["bench", "-h"], "spectrum, stem"),
    ):
        program = f"import tract_det.cli as c; print(c.__file__); c.main({arguments!r})"
        done = run_python("-c", program, cwd=tmp_path, env={"PYTHONPATH": str(installed)})
        assert done.returncode == 0 and says in done.stdout, done.stderr
        assert done.stdout.startswith(str(installed))
