"""Which teacher to load, as the user names it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from milan.core.size import Size, as_size
from milan.errors import CacheError

DEFAULT_TEACHER: Final = "ViT-B-16-quickgelu"
DEFAULT_PRETRAINED: Final = "openai"


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher's name, its weights, and how to run it. Checked by `load_teacher`."""

    name: str = DEFAULT_TEACHER
    """An open_clip name, `timm:NAME`, `hf-hub:…`, `local-dir:…` (of timm `timm:local-dir:…`), or a
    model config (JSON)."""
    pretrained: str | None = None
    """A tag of open_clip or timm, a file (.safetensors, or .pt loaded safely), or `none`: random
    weights. Default: `openai` for the default teacher, timm's own default for a ViT of timm."""
    norm: str | None = None
    """`imagenet` (as in the published results; default of the default teacher) or `own`."""
    img_size: Size | None = None
    """Of its images, in pixels; positions are interpolated. Default: the teacher's own."""
    precision: str = "auto"
    """fp32, bf16 or fp16 (autocast); auto: fp16 on CUDA as published, else fp32."""
    offline: bool = False
    """Never use the network; the error says which file to place where."""
    texts: bool = False
    """Load the text tower as well."""
    block: int | None = None
    """Give the tokens of this block, counted from 1, in place of the tower's output."""

    def as_stored(self, identity: dict[str, Any], *, texts: bool) -> TeacherSpec:
        """This teacher, run as for a store: `auto` is the precision there, on whichever device, and
        its tokens are of the same block."""
        precision = identity["precision"] if self.precision == "auto" else self.precision
        return replace(self, precision=precision, texts=texts, block=identity.get("block"))

    @classmethod
    def recorded(cls, values: dict[str, Any]) -> TeacherSpec:
        """The one that a store's origin.json has. Raises CacheError if it has other fields."""
        try:
            spec = cls(**values)
            return replace(spec, img_size=None if spec.img_size is None else as_size(spec.img_size))
        except TypeError as error:
            raise CacheError(
                f"the teacher in the store's origin.json is not one: {error}",
                expected="name, pretrained, norm, img_size, precision, offline, texts, block",
                fix="--teacher NAME --pretrained TAG",
            ) from None
