"""Adds MODEL.TRACT and MODEL.VGG to detectron2's configuration; `build_model` follows them."""

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
    "LAMBDA": 0.1,  # damping
    # Unit of LAMBDA: standardised = of standardised pixels, whatever PIXEL_STD is; input = the
    # number as the stem uses it; trace = of the mean square of what the stem sees, trace(G) / K.
    "UNIT": "standardised",
    "POWER": 1.0,  # of the inverse: 1 = TrAct, 0 = the plain gradient
    "GRAM_PATCHES": 0,  # patches of each batch and rank to estimate the Gram matrix from; 0 = all
    "SYNC": True,  # one Gram matrix over the images of all ranks; False: each rank has its own
    "STEM": "",  # name of the layer that learns by TrAct; "" = the first layer of the backbone
}
_VGG = {
    "DEPTH": 16,  # 11, 13, 16 or 19
    "NORM": "",  # "" = no norms; or BN, FrozenBN, SyncBN, GN, ...
    # Outputs of the stages: conv1 to conv5, each before its pooling (strides 1 to 16), and pool5
    # (stride 32).
    "OUT_FEATURES": ["conv5"],
    "DROPOUT": 0.5,  # probability of dropout after VGGBoxHead's fc6 and fc7
}


def add_tract_config(cfg: CfgNode) -> None:
    """Adds MODEL.TRACT and MODEL.VGG to detectron2's `cfg`, in place; `build_model` follows them.

    Call it after `get_cfg()` and before merging a file. Existing keys keep their values.

    Raises:
        TrActError: the `cfg` is frozen and a key is missing.
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
    if not cfg.key_is_renamed("MODEL.TRACT.RELATIVE"):
        cfg.register_renamed_key("MODEL.TRACT.RELATIVE", "MODEL.TRACT.UNIT", "True is UNIT trace")


class _Registry(Registry):
    """Returns builders that put TrAct on the models they build, if the `cfg` says so.

    The registry is the place for it because `build_model` looks the meta-architecture up here,
    whatever name a program has imported `build_model` under.
    """

    def get(self, name: str) -> Any:
        """The builder registered under this name."""
        return _Builder(super().get(name))


class _Builder:
    """A registered class or function whose models get TrAct if it is called with a `cfg`.

    In every other respect it acts as the class it wraps: it has its attributes, and it can be used
    in `isinstance` and `issubclass` and as a base class.
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
            unit=tract.UNIT,
            power=tract.POWER,
            gram_patches=tract.GRAM_PATCHES,
            pixel_std=cfg.MODEL.PIXEL_STD,
            pixel_format=cfg.INPUT.FORMAT,
        )

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._builder)

    def __getattr__(self, name: str) -> Any:
        if name == "_builder":  # `copy` looks attributes up before it has set them
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


# Done at import, not in `add_tract_config`: every worker process imports this module, whereas a
# program may call `add_tract_config` in its parent process only.
META_ARCH_REGISTRY.__class__ = _Registry


def check(cfg: CfgNode) -> None:
    """Refuses a `cfg` that freezes the stem that TrAct should train.

    Raises:
        TrActError: the stem is frozen; the message says which key to set.
    """
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at > 0:
        raise TrActError(
            f"MODEL.BACKBONE.FREEZE_AT {freeze_at} (2 is detectron2's default) freezes the stem "
            "that MODEL.TRACT trains: set MODEL.BACKBONE.FREEZE_AT 0"
        )
