"""The names that command lines can choose from; this module imports nothing."""

FORMATS = ("images", "voc", "coco", "comp4")  # of detections
EXPORT_FORMATS = ("onnx", "torchscript", "pt2")  # of models
SHOWN = 0.5  # the lowest score in pictures and annotations, unless the user says otherwise
