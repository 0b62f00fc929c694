"""Which TrAct class stands for which layer class."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tract_det.tract.autograd import learning_conv2d
from tract_det.tract.modules import TrActConv2d, TrActLayer, TrActLinear
from tract_det.tract.state import TrActError
from tract_det.tract.sums import over_ranks

# Layer class -> its TrAct class. An exact match: a subclass may do more in its forward than its
# parent does (detectron2's convolution holds a norm), and losing that would be silent.
TRACT_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: TrActConv2d,
    nn.Linear: TrActLinear,
}


# Subclasses of nn.Conv2d, by name since this package imports torch alone, whose forward convolves
# once and does something before or after: it pads the images, standardises the weight, or (in
# detectron2) applies a norm and an activation. `_InnerConv2d` is right for them.
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
        layer: the class as models use it.
        tract_layer: a subclass of it and of `TrActLayer`, with TrAct in its forward; it must need
            no attribute that `layer.__init__` does not set.
    """
    if not (issubclass(tract_layer, layer) and issubclass(tract_layer, TrActLayer)):
        raise TrActError(
            f"{tract_layer.__name__} must be a subclass of {layer.__name__} and of TrActLayer"
        )
    TRACT_CLASSES[layer] = tract_layer


class _Inside(TorchFunctionMode):
    """Gives the convolution inside a layer's forward TrAct's weight gradient.

    Attributes:
        layer: the layer.
        size: height and width of its input.
        outputs: of its convolutions, filled in here.
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

    `G` is that of the images as they reach the convolution: padded. TrAct's gradient is that of the
    weight that they meet, and goes back from there: where a layer standardises its weight, the step
    on the weight is TrAct's step on the standardised one, as far as a weight can follow it.
    """

    plain_class: type[nn.Conv2d]

    def forward(self, input: Tensor) -> Tensor:
        """The plain layer's."""
        if not self.learns(self.weight):
            return super().forward(input)
        convolved: list[Tensor] = []
        with _Inside(self, input.shape[-2:], convolved):
            output = super().forward(input)
        if len(convolved) != 1:
            raise TrActError(
                f"{self.plain_class.__name__} convolved {len(convolved)} times, not once: this "
                "version of it needs a TrAct class of its own (register_layer)"
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
        """`F.conv2d`, given the `size` of the layer's own input, with TrAct's weight gradient."""
        if input.shape[-2:] == size:
            own = self._sums(input.detach())
        else:
            self._check_sizes(size)
            own = self._sums_of(input.detach(), self.tract.gram_patches)
        sums = over_ranks(*own, sync=self.tract.sync)
        conv = (stride, padding, dilation, groups)
        return learning_conv2d(input, weight, bias, *conv, sums, key=self.tract.key)

    def _check_sizes(self, size: tuple[int, ...]) -> None:
        if any(tuple(each) != tuple(size) for each in self.image_sizes or ()):
            raise TrActError(
                f"{self.plain_class.__name__} pads a batch by the batch's own size, so that images "
                "of several sizes have no gradient of their own: call set_image_sizes(model, None)"
            )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Not by TrActConv2d: `_Inside` sees this one too.
        return super(TrActConv2d, self)._conv_forward(input, weight, bias)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _inner_module, (self.plain_class,), *super().__reduce_ex__(protocol)[2:]


def tract_class_of(layer: type[nn.Module]) -> type[nn.Module] | None:
    """`layer`'s TrAct class, or None where TrAct does not know it."""
    full_name = f"{layer.__module__}.{layer.__qualname__}"
    if layer not in TRACT_CLASSES and full_name in _CONVOLVE_ONCE:
        name = f"TrAct{layer.__name__}"
        TRACT_CLASSES[layer] = type(name, (_InnerConv2d, layer), {"plain_class": layer})
    return TRACT_CLASSES.get(layer)


def _inner_module(layer: type[nn.Module]) -> nn.Module:
    """An empty module of `layer`'s TrAct class, which no import finds: for copies and pickles."""
    made = tract_class_of(layer)
    assert made is not None
    return made.__new__(made)
