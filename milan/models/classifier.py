"""A classifier: an encoder with a head, as fine-tuning trains it and timm loads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from milan.core.device import seeded_weights
from milan.core.size import Size, height_width
from milan.errors import CacheError
from milan.models.encoder import create_vit
from milan.models.export import CHANNELS, load_whole, read_about

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

    class Classifier(VisionTransformer):
        """What load_classifier gives, for type checkers."""

        class_names: list[str]


CLASSIFIER = "classifier.safetensors"
"""The file in the folder of a fine-tuning."""
POOLING = {"mean": "avg", "token": "token"}
"""Our words for timm's: the mean of patches with a norm behind it, or the class token."""
_HEAD_STD = 0.02


def create_classifier(
    model: str, args: dict[str, Any], *, size: Size, classes: int, pooling: str,
    drop_path: float = 0, any_channels: bool = False,
) -> Any:  # fmt: skip
    """A timm ViT with a head for `classes`, drawn by torch's generator; positions are trained.

    Pooling `mean`: the mean of patches, a norm of its own, the head (MAE, models_vit.py); `token`:
    the class token after the encoder's norm. Of RGB, unless it may have `any_channels`. Raises
    ConfigError as create_vit does.
    """
    args = {k: v for k, v in args.items() if k != "img_size"}
    args |= {"drop_path_rate": drop_path, "global_pool": POOLING[pooling]}
    vit = create_vit(model, img_size=size, args=args, any_channels=any_channels)
    vit.reset_classifier(classes)
    nn.init.trunc_normal_(vit.head.weight, std=_HEAD_STD)
    nn.init.zeros_(vit.head.bias)
    return vit


def new_weights(pooling: str) -> tuple[str, ...]:
    """What the names of a classifier's weights that no encoder has begin with."""
    return ("head.", "norm.", "fc_norm.") if pooling == "mean" else ("head.",)


def load_classifier(folder: str | Path) -> Classifier:
    """The classifier of a fine-tuning (its folder, or a classifier.safetensors), in eval mode.

    A timm VisionTransformer: images [B, C, H, W], C 3 for RGB, to logits [B, classes];
    `timm.data.resolve_model_data_config` gives its mean, std and size, and `class_names` the names
    of its classes. Raises CacheError.
    """
    path = Path(folder)
    path = path / CLASSIFIER if path.is_dir() else path
    if not path.is_file():
        raise CacheError(
            f"no {CLASSIFIER} at {folder}",
            expected="the folder of a fine-tuning",
            fix="milan finetune, which leaves one",
        )
    about = read_about(path)
    if "classes" not in about:
        raise CacheError(f"{path} is an encoder, without a head", fix="milan finetune")
    size, names = about["input_size"], about["classes"]
    vit = create_classifier(
        about["model"], about["model_args"], size=size, classes=len(names),
        pooling=about["pooling"], any_channels=CHANNELS in about,
    )  # fmt: skip
    load_whole(vit, path, about["model"])
    describe_input(vit, about["mean"], about["std"], size=size, crop_share=about["crop_share"])
    vit.class_names = names
    return vit.eval()


def describe_input(vit: Any, mean: Any, std: Any, *, size: Size, crop_share: float) -> None:
    """Let timm know what images a ViT takes."""
    vit.pretrained_cfg = {
        **vit.pretrained_cfg, "mean": tuple(mean), "std": tuple(std),
        "input_size": (vit.patch_embed.proj.in_channels, *height_width(size)),
        "crop_pct": crop_share, "interpolation": "bicubic",
    }  # fmt: skip


def seeded_classifier(seed: int, *args: Any, **kwargs: Any) -> Any:
    """create_classifier(*args, **kwargs) with all that is drawn drawn by `seed`."""
    with seeded_weights(seed):
        return create_classifier(*args, **kwargs)
