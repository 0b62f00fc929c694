"""Which TrAct class belongs to which layer class."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tract_det.tract.autograd import learning_conv2d
from tract_det.tract.modules import TrActConv2d, TrActLayer, TrActLinear
from tract_det.tract.state import TrActError

# Layer class -> its TrAct class. Classes must match exactly: the forward of a subclass may do more
# than its parent's (detectron2's convolution applies a norm), and TrAct would silently drop that.
TRACT_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: TrActConv2d,
    nn.Linear: TrActLinear,
}


# Subclasses of nn.Conv2d whose forward convolves exactly once and does more around it: it pads
# the images, standardises the weight, or (in detectron2) applies a norm and an activation.
# `_InnerConv2d` handles them. They are listed by name because this package imports only torch.
_CONVOLVE_ONCE = {
    "detectron2.layers.wrappers.Conv2d",
    "timm.layers.conv2d_same.Conv2dSame",
    "timm.layers.std_conv.ScaledStdConv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame",
    "timm.layers.std_conv.StdConv2d",
    "timm.layers.std_conv.StdConv2dSame",
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d",
}


def register_layer(layer: type[nn.Module], tract_layer: type[nn.Module]) -> None:
    """Teaches `apply_tract` another layer class.

    Args:
        layer: the class that models use.
        tract_layer: a subclass of `layer` and of `TrActLayer` whose forward uses TrAct. It must not
            need attributes that `layer.__init__` does not set.

    Raises:
        TrActError: `tract_layer` is not such a subclass.
    """
    if not (issubclass(tract_layer, layer) and issubclass(tract_layer, TrActLayer)):
        raise TrActError(
            f"{tract_layer.__name__} must be a subclass of {layer.__name__} and of TrActLayer"
        )
    TRACT_CLASSES[layer] = tract_layer


class _Inside(TorchFunctionMode):
    """Replaces `F.conv2d` inside the forward of a layer by the layer's `convolve`.

    Attributes:
        layer: the layer.
        size: height and width of the layer's input.
        outputs: collects the outputs of the convolutions.
    """

    def __init__(self, layer: "_InnerConv2d", size: tuple[int, ...], outputs: list[Tensor]) -> None:
        super().__init__()
        self.layer, self.size, self.outputs = layer, size, outputs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.conv2d:
            return func(*args, **(kwargs or {}))
        output = self.layer.convolve(self.size, *args, **(kwargs or {}))
        self.outputs.append(output)
        return output


class _InnerConv2d(TrActConv2d):
    """TrAct for a subclass of `nn.Conv2d` that does more than convolve, but convolves once.

    `G` is computed from the images that reach the convolution, that is, after the layer has padded
    them. The weight that reaches the convolution gets TrAct's gradient; if the layer has
    standardised it, autograd takes that gradient further back, to the parameter.
    """

    plain_class: type[nn.Conv2d]

    def forward(self, input: Tensor) -> Tensor:
        """The forward of the plain layer."""
        if not self.learns(self.weight):
            return super().forward(input)
        convolved: list[Tensor] = []
        with _Inside(self, input.shape[-2:], convolved):
            output = super().forward(input)
        if len(convolved) != 1:
            raise TrActError(
                f"{self.plain_class.__name__} convolved {len(convolved)} times, not once: write a "
                "TrAct class for this version of it and add it with register_layer"
            )
        return output

    def convolve(
        self,
        size: tuple[int, ...],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> Tensor:
        """`F.conv2d` with TrAct's weight gradient; `size` is that of the layer's input."""
        patches = self.tract.gram_patches
        if input.shape[-2:] == size:
            sums = self.prepared(lambda: self._sums(input.detach()), input)
        else:
            self._check_sizes(size)
            sums = self.prepared(lambda: self._sums_of(input.detach(), patches), input)
        conv = (stride, padding, dilation, groups)
        return learning_conv2d(input, weight, bias, *conv, sums, key=self.tract.key)

    def _check_sizes(self, size: tuple[int, ...]) -> None:
        """Refuses images of several sizes where the layer pads by the size of its input."""
        if any(tuple(image_size) != tuple(size) for image_size in self.image_sizes or ()):
            raise TrActError(
                f"{self.plain_class.__name__} pads by the size of the batch, so that the windows "
                "of smaller images in it are not known: call set_image_sizes(model, None)"
            )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Skips TrActConv2d, since `_Inside` intercepts this convolution as well.
        return super(TrActConv2d, self)._conv_forward(input, weight, bias)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _inner_module, (self.plain_class,), *super().__reduce_ex__(protocol)[2:]


def tract_class_of(layer: type[nn.Module]) -> type[nn.Module] | None:
    """The TrAct class of `layer`, or None for an unknown class."""
    full_name = f"{layer.__module__}.{layer.__qualname__}"
    if layer not in TRACT_CLASSES and full_name in _CONVOLVE_ONCE:
        name = f"TrAct{layer.__name__}"
        TRACT_CLASSES[layer] = type(name, (_InnerConv2d, layer), {"plain_class": layer})
    return TRACT_CLASSES.get(layer)


def _inner_module(layer: type[nn.Module]) -> nn.Module:
    """An empty module of `layer`'s TrAct class, for copying and unpickling.

    The class is created at run time, so pickle cannot import it by name.
    """
    tract_class = tract_class_of(layer)
    assert tract_class is not None
    return tract_class.__new__(tract_class)
