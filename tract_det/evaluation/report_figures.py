"""What a report shows of an evaluation beyond its figures: curves, and the worst images."""

from typing import Any

import numpy as np

from tract_det.evaluation.detection_results import Evaluated
from tract_det.evaluation.ranking import Ranking, best_f1, loss_by_image

_POINTS = 200  # of a curve: as many as a screen shows
_SHOWN = 0.5  # the score from which a detection is shown where no F1 says one
_MOST = 100  # detections of an image


def report_figures(evaluated: Evaluated, *, images: int = 12) -> dict[str, Any]:
    """The curves of the classes, and the images in which most AP is lost.

    Args:
        evaluated: the matched detections.
        images: how many, at most.

    Returns:
        `curves`, see `curve`, by class name; `worst`, see `worst_images`; both at IoU 0.5.
    """
    names = evaluated.truth.class_names
    return {
        "curves": {
            name: curve(ranking) for name, ranking in zip(names, evaluated.voc, strict=True)
        },
        "worst": worst_images(evaluated, images),
    }


def curve(ranking: Ranking) -> dict[str, list[float]]:
    """Recall and precision at falling scores, in per cent: the last points of equal scores.

    Returns:
        `recall` and `precision`, as long as each other; empty for a class without objects or
        without detections.
    """
    if not ranking.num_objects or not len(ranking.scores):
        return {"recall": [], "precision": []}
    is_last = np.append(ranking.scores[:-1] != ranking.scores[1:], True)
    points = np.flatnonzero(is_last)
    if len(points) > _POINTS:
        points = points[np.linspace(0, len(points) - 1, _POINTS).round().astype(int)]
    return {
        "recall": (100 * ranking.recall[0, points]).tolist(),
        "precision": (100 * ranking.precision[0, points]).tolist(),
    }


def worst_images(evaluated: Evaluated, count: int) -> list[dict[str, Any]]:
    """The images with the largest loss of AP, the worst first; see `ranking.loss_by_image`.

    Args:
        evaluated: the matched detections.
        count: how many, at most; images without a loss are left out.

    Returns:
        Of each its `image` (the id), its `loss` of mean AP in points of per cent, its `objects`
        (`box`, `label`, `difficult`) and its `detections` (`box`, `label`, `score`, and `verdict`:
        true, false or ignored) whose score reaches that of their class's best F1. Boxes are pixel
        edges.
    """
    truth, detections = evaluated.truth, evaluated.detections
    losses = 100 * loss_by_image(evaluated.voc, len(truth.image_ids))
    worst = [int(i) for i in np.argsort(-losses, kind="stable")[:count] if losses[i] > 0]
    bests = [best_f1(ranking).score for ranking in evaluated.voc]
    thresholds = np.nan_to_num(np.array(bests, dtype=float), nan=_SHOWN)
    verdicts = _verdicts(evaluated)
    shown = []
    for i in worst:
        mine = np.flatnonzero(detections.image == i)
        mine = mine[detections.scores[mine] >= thresholds[detections.labels[mine]]]
        mine = mine[np.argsort(-detections.scores[mine], kind="stable")][:_MOST]
        objects = np.flatnonzero(truth.objects.image == i)
        shown.append(
            {
                "image": truth.image_ids[i],
                "loss": float(losses[i]),
                "objects": [
                    {
                        "box": truth.objects.boxes[k].tolist(),
                        "label": int(truth.objects.labels[k]),
                        "difficult": bool(truth.objects.difficult[k]),
                    }
                    for k in objects
                ],
                "detections": [
                    {
                        "box": detections.boxes[k].tolist(),
                        "label": int(detections.labels[k]),
                        "score": float(detections.scores[k]),
                        "verdict": verdicts[k],
                    }
                    for k in mine
                ],
            }
        )
    return shown


def _verdicts(evaluated: Evaluated) -> list[str]:
    """Of each detection whether it is true, false or ignored at IoU 0.5."""
    verdicts = np.full(len(evaluated.detections.scores), "ignored", dtype="<U7")
    for ranking in evaluated.voc:
        verdicts[ranking.detection[ranking.true_positive[0]]] = "true"
        verdicts[ranking.detection[ranking.false_positive[0]]] = "false"
    return verdicts.tolist()
