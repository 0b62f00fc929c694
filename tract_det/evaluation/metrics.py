"""Names of the metrics that an evaluation reports.

They are apart from the code that computes them, so that a config imports no more than these names.
"""

# Names of `COCOeval.stats[:6]`, in order.
COCO_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# Means over all classes in a detector's results.json, as paths: "voc_07.mAP" is ["voc_07"]["mAP"].
METRICS = (
    *(f"{rule}.{mean}" for rule in ("voc_07", "voc_area") for mean in ("mAP", "mAP_50_95")),
    *(f"coco.{name}" for name in COCO_STATS),
)

# "ema" holds the metrics of the moving average of the weights.
_MODELS = ("", "ema.")
# Means of a detector's training run.
DETECTION_METRICS = tuple(f"{model}{name}" for model in _MODELS for name in METRICS)

# The k of the top-k accuracies.
TOP_K = (1, 5)
# The same for a classifier.
CLASSIFICATION_METRICS = tuple(f"{model}top{k}" for model in _MODELS for k in TOP_K)

# Figures in per cent that differ by less are equal.
ROUNDING = 1e-9

# What can be done about scores that are not finite, for messages.
DIVERGED_MEND = "the training diverged (lower SOLVER.BASE_LR), or check MODEL.WEIGHTS"
