"""VGG-11 to VGG-19 for detectron2: the backbone, and the box head with fc6 and fc7.

The backbone's tensors have torchvision's names (`features.0.weight`, ...); the head's layers are
`fc6` and `fc7`. detectron2's own checkpointer loads both from a file of `tract-det convert`.
"""

from collections.abc import Callable, Sequence

from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from torch import Tensor, nn

from tract_det.errors import UserError
from tract_det.modeling.backbones import build_vgg
from tract_det.modeling.heads import VGGHead

DEPTHS = (11, 13, 16, 19)
CHANNELS = {"conv1": 64, "conv2": 128, "conv3": 256, "conv4": 512, "conv5": 512, "pool5": 512}


class VGG(Backbone):
    """The convolutions of a VGG, with torchvision's names.

    Its features are the outputs of the five stages after their last ReLU and before their pooling,
    `conv1` (stride 1) to `conv5` (stride 16), and `pool5` (stride 32) for feature pyramids. Layers
    beyond the last requested feature are not built.
    """

    def __init__(
        self,
        depth: int = 16,
        *,
        norm: str | Callable[[int], nn.Module] = "",
        freeze_at: int = 0,
        out_features: Sequence[str] = ("conv5",),
    ) -> None:
        """Initialises random weights as torchvision does.

        Args:
            depth: one of `DEPTHS`.
            norm: as for `detectron2.layers.get_norm`; "" = no norms.
            freeze_at: number of frozen stages, 0 = none to 5 = all; the batch norms of frozen
                stages become FrozenBatchNorm2d.
            out_features: names of the features to return; keys of `CHANNELS`.

        Raises:
            UserError: there is no such depth, stage or feature; the message names the config key.
        """
        super().__init__()
        _check(depth, freeze_at, out_features)
        # `build_vgg` leaves the last pooling out.
        layers = build_vgg(f"vgg{depth}_bn" if norm else f"vgg{depth}", "BN").features
        layers.append(nn.MaxPool2d(2, 2))
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        ends = dict(zip(CHANNELS, [*(i - 1 for i in pools), pools[-1]], strict=True))
        frozen = ends[f"conv{freeze_at}"] if freeze_at else -1
        for index, layer in enumerate(layers):
            if isinstance(layer, nn.BatchNorm2d):
                layers[index] = get_norm(norm, layer.num_features)
            if index <= frozen:
                layers[index].requires_grad_(False)
                layers[index] = FrozenBatchNorm2d.convert_frozen_batchnorm(layers[index])
        self.features = layers[: max(ends[name] for name in out_features) + 1]
        self._ends = {ends[name]: name for name in out_features}
        self._out_features = list(out_features)
        self._out_feature_channels = CHANNELS
        self._out_feature_strides = {name: 2**i for i, name in enumerate(CHANNELS)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps images `(B, 3, H, W)` to features `(B, C, H / stride, W / stride)`, by name."""
        outputs, hidden = {}, images
        for index, layer in enumerate(self.features):
            hidden = layer(hidden)
            if index in self._ends:
                outputs[self._ends[index]] = hidden
        return outputs


def _check(depth: int, freeze_at: int, out_features: Sequence[str]) -> None:
    if depth not in DEPTHS:
        raise UserError(f"MODEL.VGG.DEPTH is {depth}: it takes one of {DEPTHS}")
    if not 0 <= freeze_at <= 5:
        raise UserError(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}: a VGG takes 0 (nothing) to 5")
    if not out_features or not set(out_features) <= set(CHANNELS):
        raise UserError(
            f"MODEL.VGG.OUT_FEATURES is {list(out_features)}: it takes some of "
            f"{', '.join(CHANNELS)}"
        )


class VGGBoxHead(VGGHead):
    """The box head for StandardROIHeads: fc6 and fc7, each with ReLU and dropout."""

    def __init__(self, input_shape: ShapeSpec, *, fc_dim: int = 4096, dropout: float = 0.5) -> None:
        """Initialises random weights.

        Args:
            input_shape: shape of the pooled features; torchvision's weights are for 512 x 7 x 7.
            fc_dim: width of both layers; 4096 in torchvision's weights.
            dropout: probability of dropout after each layer.
        """
        pooled = input_shape.channels * input_shape.height * input_shape.width
        super().__init__(dropout, pooled, fc_dim)
        self.output_shape = ShapeSpec(channels=fc_dim)
