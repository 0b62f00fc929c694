"""In how many directions the stem of a config learns, plain and with TrAct.

    tract-det bench spectrum --config-file quickstart/shapes.yaml
    tract-det bench spectrum --config-file BCCD-Detection/faster_rcnn_R_18_FPN.yaml \
        --lambdas 0.1,0.01,0.001 DATASETS.ROOT path/to/BCCD
    tract-det bench spectrum --config-file FILE --weights output/model_final.pth

It takes the gradient of the stem on a few training batches, without training, and decomposes it by
the eigenvectors of the patches' Gram matrix G. The number of directions is the participation ratio
of the gradient's energy over these eigenvectors: K if all have the same share, 1 if one has all. A
plain gradient lies in the few directions of large contrast, TrAct's is spread over those whose
eigenvalue is well above lambda. Adam's step is the mean gradient over its root mean square, element
by element, over the batches.
"""

import argparse
import importlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tract_det import find_stem
from tract_det.cli import run
from tract_det.config import tasks
from tract_det.config.pairs import refuse_half_pairs
from tract_det.modeling.weight_files import read_weights
from tract_det.pixels import lambda_in_unit
from tract_det.training import session
from tract_det.training.task import BuiltModel


class Batch(NamedTuple):
    """One batch at the stem.

    Attributes:
        gram: G, (K, K) float64.
        gradient: dZ^T X, (M, K) float64.
    """

    gram: Tensor
    gradient: Tensor


def directions(gradient: Tensor, eigenvectors: Tensor) -> float:
    """Participation ratio of a gradient's energy over directions.

    Args:
        gradient: `(..., K)`.
        eigenvectors: `(K, K)`, orthonormal columns.
    """
    energy = (gradient @ eigenvectors).square().flatten(0, -2).sum(0)
    return float(energy.sum().square() / energy.square().sum())


def adam_step(gradients: Tensor) -> Tensor:
    """Adam's step after many batches: mean over root mean square, (B, M, K) to (M, K)."""
    return gradients.mean(0) / gradients.square().mean(0).sqrt().clamp_min(1e-30)


def batches_at_stem(built: BuiltModel, loader: Iterable[Any]) -> Iterator[Batch]:
    """G and the plain gradient of each batch.

    Args:
        built: the model, whose weights stay.
        loader: images and targets, as the network takes them.
    """
    stem = built.model.get_submodule(find_stem(built.model))
    built.network.train()
    seen: dict[str, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["x"] = args[0].detach()
        output.register_hook(lambda gradient: seen.update(dz=gradient))

    handle = stem.register_forward_hook(note)
    for images, targets in loader:
        sum(built.network(images, targets).values()).backward()
        yield at_stem(stem, seen["x"].double(), seen["dz"].double())
    handle.remove()


def at_stem(stem: nn.Module, x: Tensor, dz: Tensor) -> Batch:
    """From a layer's input and the gradient by its output, both float64."""
    if isinstance(stem, nn.Conv2d):
        mode = "constant" if stem.padding_mode == "zeros" else stem.padding_mode
        sides = stem._reversed_padding_repeated_twice  # not updated where `padding` is
        if not isinstance(stem.padding, str):
            sides = [side for side in reversed(stem.padding) for _ in range(2)]
        padded = F.pad(x, sides, mode=mode)
        options = {"dilation": stem.dilation, "stride": stem.stride}
        patches = F.unfold(padded, stem.kernel_size, **options).mT.flatten(0, 1)
        dz = dz.flatten(2).mT.flatten(0, 1)
    else:
        patches, dz = x.flatten(0, -2), dz.flatten(0, -2)
    return Batch(patches.T @ patches / len(patches), dz.T @ patches)


def report(
    batches: Sequence[Batch], lambdas: Sequence[float], unit: str, input_variance: float
) -> str:
    """The table.

    Args:
        batches: of the stem.
        lambdas: in the unit.
        unit: MODEL.TRACT.UNIT.
        input_variance: of what the stem sees, in units of standardised pixels.
    """
    gram = torch.stack([batch.gram for batch in batches]).mean(0)
    K = len(gram)
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    trace = float(eigenvalues.sum())
    lines = [
        f"{K} directions; mean square of the stem's input {trace / K:.3g}, "
        f"{100 * float(eigenvalues[-1]) / trace:.0f} % of it in the largest direction",
        f"{'':16}{'eigenvalues':>14}{'directions of the':>20}",
        f"{'':16}{'above lambda':>14}{'gradient':>12}{'Adam step':>12}",
    ]
    plain = torch.stack([batch.gradient for batch in batches])
    rows: list[tuple[str, str, Tensor]] = [("plain", "", plain)]
    for value in lambdas:
        damping = lambda_in_unit(value, unit, input_variance)
        if unit == "trace":
            damping *= trace / K
        identity = torch.eye(K, dtype=gram.dtype)
        solved = [
            torch.linalg.solve(batch.gram + damping * identity, batch.gradient.T).T
            for batch in batches
        ]
        above = str(int((eigenvalues > damping).sum()))
        rows.append((f"lambda {value:g}", above, torch.stack(solved)))
    for name, above, gradients in rows:
        gradient = directions(gradients, eigenvectors)
        step = directions(adam_step(gradients), eigenvectors)
        lines.append(f"{name:16}{above:>14}{gradient:12.1f}{step:12.1f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="quickstart/shapes.yaml", metavar="FILE")
    parser.add_argument("--weights", default="", help="of a training; default: those of the config")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--lambdas", default="1,0.1,0.01,0.001", metavar="A,B")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args(argv)
    refuse_half_pairs(args.opts)
    name = tasks.task_of(args.config_file)
    cfg = tasks.loader_of(name)(args.config_file, args.opts, "plain")
    task = importlib.import_module(f"tract_det.training.{name}").TASK
    torch.manual_seed(cfg.SEED)
    training, _ = task.read_data(cfg)
    weights = read_weights(args.weights) if args.weights else task.read_weights(cfg)
    built = session.build(task, cfg, training, weights)
    loader = islice(task.loader(cfg, training, built.meta, 0), args.batches)
    lambdas = [float(value) for value in args.lambdas.split(",")]
    batches = list(batches_at_stem(built, loader))
    print(report(batches, lambdas, cfg.MODEL.TRACT.UNIT, built.input_variance))


if __name__ == "__main__":
    run(main)
