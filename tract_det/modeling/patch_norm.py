"""Norms around a ViT's patch embedding, the related methods that the TrAct paper compares with.

The embedding stays a convolution under its own name, so that TrAct can be put on it as well: its
input is then the normalised patches.
"""

from typing import Any

import timm.layers
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from tract_det.errors import UserError

_EPS = 1e-6  # as in the other layer norms of ViTs


class PatchNorm(nn.LayerNorm):
    """Layer norm of each raw patch; the output is an image again, for the convolution to follow.

    Args:
        channels: of the images.
        patch_size: height and width in pixels, which must divide those of the images.
        affine: whether to learn a scale and a shift for each of the `channels * height * width`
            values of a patch, in the order of a convolution's weight.
    """

    def __init__(self, channels: int, patch_size: tuple[int, int], *, affine: bool) -> None:
        height, width = patch_size
        super().__init__(channels * height * width, eps=_EPS, elementwise_affine=affine)
        self.patch_size = patch_size

    def forward(self, input: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same shape."""
        _, channels, rows, columns = input.shape
        height, width = self.patch_size
        grid = (rows // height, columns // width)
        patches = input.unflatten(3, (grid[1], width)).unflatten(2, (grid[0], height))
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, height, width)
        normed = super().forward(patches.flatten(3)).unflatten(3, (channels, height, width))
        return normed.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class _NormedPatchEmbed(timm.layers.PatchEmbed):
    patch_norm: PatchNorm

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.patch_norm(x))


class _NormedVisionTransformer(VisionTransformer):
    patch_norm: PatchNorm
    embed_norm: nn.Module

    def _process_input(self, x: Tensor) -> Tensor:
        return self.embed_norm(super()._process_input(self.patch_norm(x)))


def add_patch_norm(model: nn.Module, kind: str, name: str) -> None:
    """Puts norms around a ViT's patch embedding, in place; the names of its tensors stay.

    Args:
        model: one of torchvision's ViTs, or a timm model whose `patch_embed` is a plain
            `PatchEmbed` (ViT, DeiT, DeiT-III, Swin, ...).
        kind: "layer_norm" = each raw patch to mean 0 and variance 1, without parameters: the
            embedding is linear and can learn any scale and shift itself. "dual" = DualPatchNorm
            (Kumar, Dehghani, Houlsby, TMLR 2023): a layer norm before and one after the embedding,
            both with scale and shift; an embedding that already ends in a norm keeps it.
        name: of the model, for messages.

    Raises:
        UserError: the model has no such embedding.
    """
    dual = kind == "dual"
    embed: Any = getattr(model, "patch_embed", None)
    if type(model) is VisionTransformer and isinstance(model.conv_proj, nn.Conv2d):
        stem = model.conv_proj
        model.__class__ = _NormedVisionTransformer
        model.patch_norm = _before(stem, dual)
        model.embed_norm = nn.LayerNorm(stem.out_channels, _EPS) if dual else nn.Identity()
    elif _is_plain(embed):
        stem = embed.proj
        if dual and isinstance(embed.norm, nn.Identity):
            embed.norm = nn.LayerNorm(stem.out_channels, _EPS)
        embed.__class__ = _NormedPatchEmbed
        embed.patch_norm = _before(stem, dual)
    else:
        raise UserError(
            f"MODEL.PATCH_NORM {kind}: {name} has no plain patch embedding; leave it empty, "
            "or take a ViT such as timm:deit3_small_patch16_224"
        )


def _is_plain(embed: Any) -> bool:
    """Whether it convolves the images without padding, and gives tokens with channels last."""
    if type(embed) is not timm.layers.PatchEmbed or embed.dynamic_img_pad:
        return False
    return embed.flatten or embed.output_fmt != timm.layers.Format.NCHW


def _before(stem: nn.Conv2d, affine: bool) -> PatchNorm:
    height, width = stem.kernel_size
    return PatchNorm(stem.in_channels, (height, width), affine=affine)
