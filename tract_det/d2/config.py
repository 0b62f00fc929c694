"""MODEL.TRACT and MODEL.VGG in detectron2's configuration, and `build_model` that follows it."""

import copy
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.registry import Registry
from torch import nn

from tract_det.d2.modifier import apply_tract
from tract_det.tract import TrActError

_TRACT = {
    "ENABLED": False,
    "LAMBDA": 0.1,  # of standardised pixels, whatever PIXEL_STD is
    "RELATIVE": False,  # LAMBDA is in units of the patches' mean square instead
    "GRAM_PATCHES": 0,  # estimate the Gram matrix from so many patches; 0 = exact
    "SYNC": True,  # one Gram matrix of all ranks' images
    "STEM": "",  # the layer's name; "" = the first layer of the backbone
}
_VGG = {
    "DEPTH": 16,  # or 11, 13, 19
    "NORM": "",  # or BN, FrozenBN, SyncBN, GN, ...
    # conv1 to conv5, each before its pooling, and pool5: strides 1 to 32.
    "OUT_FEATURES": ["conv5"],
    "DROPOUT": 0.5,  # of VGGBoxHead's fc6 and fc7
}


def add_tract_config(cfg: CfgNode) -> None:
    """Adds MODEL.TRACT and MODEL.VGG to detectron2's `cfg`, in place; `build_model` follows them.

    To be called after `get_cfg()` and before a file is merged. Keys that are there stay.

    Raises:
        TrActError: the `cfg` is frozen and lacks a key.
    """
    for name, defaults in (("TRACT", _TRACT), ("VGG", _VGG)):
        node = cfg.MODEL.get(name, CfgNode())
        if node.keys() >= defaults.keys():
            continue
        if cfg.is_frozen():
            raise TrActError(
                f"add_tract_config cannot add MODEL.{name} to a frozen cfg: call it before "
                "cfg.freeze(), or cfg.defrost() first"
            )
        cfg.MODEL[name] = CfgNode(copy.deepcopy(defaults) | node)


class _Registry(Registry):
    """Hands out builders that put TrAct on what they build, where the `cfg` says so.

    A program may hold `build_model` under a name of its own; all of them come here for the
    meta-architecture.
    """

    def get(self, name: str) -> Any:
        """The builder registered under this name."""
        return _Builder(super().get(name))


class _Builder:
    """A registered class, or function, whose models get TrAct where it is called with a `cfg`.

    In all else it is that class: its attributes, `isinstance` and `issubclass`, a class's base.
    """

    def __init__(self, builder: Callable[..., nn.Module]) -> None:
        self._builder = builder

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        cfg: Any = kwargs.get("cfg", args[0] if args else None)
        tract = cfg.MODEL.get("TRACT") if isinstance(cfg, CfgNode) and "MODEL" in cfg else None
        if tract is None or not tract.ENABLED:
            return self._builder(*args, **kwargs)
        check(cfg)
        return apply_tract(
            self._builder(*args, **kwargs),
            tract.LAMBDA,
            stem=tract.STEM or None,
            sync=tract.SYNC,
            relative=tract.RELATIVE,
            gram_patches=tract.GRAM_PATCHES,
            pixel_std=cfg.MODEL.PIXEL_STD,
            pixel_format=cfg.INPUT.FORMAT,
        )

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._builder)

    def __getattr__(self, name: str) -> Any:
        if name == "_builder":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._builder, name)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._builder)  # type: ignore[arg-type]

    def __subclasscheck__(self, other: type) -> bool:
        return issubclass(other, self._builder)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Builder, (self._builder,)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._builder,)

    def __eq__(self, other: object) -> bool:
        return self._builder == getattr(other, "_builder", other)

    def __hash__(self) -> int:
        return hash(self._builder)


# At import, which every worker of a program comes to: `add_tract_config` may run in its parent.
META_ARCH_REGISTRY.__class__ = _Registry


def check(cfg: CfgNode) -> None:
    """Refuses a `cfg` that freezes the stem that TrAct is to train.

    Raises:
        TrActError: says what to write.
    """
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at > 0:
        raise TrActError(
            f"MODEL.BACKBONE.FREEZE_AT {freeze_at} (2 is detectron2's default) freezes the stem "
            "that MODEL.TRACT trains: set MODEL.BACKBONE.FREEZE_AT 0"
        )
