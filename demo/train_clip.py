"""Train a small CLIP of open_clip's own classes from scratch, on images and captions in memory.

The one trainer of this project's own teachers: the demo's (train_teacher.py) and the studies'.
B images a batch, C channels (1 or 3), P classes, E the joint width.
"""

import json
import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# ImageNet's, because the students that learn from these teachers use them too.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

Tokenizer = Callable[[list[str]], Tensor]


# --- the model ------------------------------------------------------------------------------------


def normalise(pixels: Tensor) -> Tensor:
    """Turn images [B, C, H, W] in [0, 1] into the model's input [B, 3, H, W]."""
    return (pixels - MEAN) / STD


def build(config: dict[str, Any]) -> CLIP:
    """Build the untrained model from an open_clip model config."""
    return CLIP(**config)


def make_tokenizer(config: dict[str, Any]) -> Tokenizer:
    """open_clip's usual tokenizer, with the context of an open_clip model config."""
    return open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])


def load(folder: Path) -> tuple[CLIP, Tokenizer]:
    """The model that ``train`` left in a folder, in single precision, and its tokenizer."""
    config = json.loads((folder / "config.json").read_text())["model_cfg"]
    model = build(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), make_tokenizer(config)


def export(model: CLIP, folder: Path) -> None:
    """Write the model's weights in half precision."""
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    save_file(
        state, folder / "model.safetensors", metadata={"format": "pt", "licence": "Apache-2.0"}
    )


# --- zero-shot ------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    model: CLIP, tokenizer: Tokenizer, prompts: Sequence[list[str]], images: Tensor
) -> Tensor:
    """The zero-shot class [B] of uint8 images [B, C, H, W]; `prompts` are sentences by class."""
    model.eval()
    texts = [model.encode_text(tokenizer(p), normalize=True).mean(dim=0) for p in prompts]
    classes = F.normalize(torch.stack(texts), dim=-1)  # [P, E]
    predicted = []
    for batch in images.split(500):
        features = model.encode_image(normalise(batch.float() / 255), normalize=True)
        predicted.append((features @ classes.T).argmax(dim=-1))
    return torch.cat(predicted)


# --- training -------------------------------------------------------------------------------------


def setting(default: Any, help: str) -> Any:
    """A field of ``Options`` that says what it is for."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Options:
    """How a model is trained; each is a flag of the commands."""

    epochs: int = setting(13, "passes over the images")
    whole_epochs: int = setting(2, "last ones, all patches kept")
    patch_dropout: float = setting(0.5, "share of patches dropped in the epochs before")
    batch_size: int = setting(256, "images a step")
    lr: float = setting(1e-3, "peak learning rate")
    warmup_epochs: float = setting(1.0, "in which it rises; then half a cosine")
    weight_decay: float = setting(0.1, "AdamW's")
    uncropped: float = setting(0.4, "share of whole images")
    smallest_crop: float = setting(0.3, "as share of the area")
    threads: int = setting(2, "of torch")
    seed: int = setting(0, "of everything drawn")

    @classmethod
    def add_flags(cls, parser: ArgumentParser) -> None:
        """A flag for each setting."""
        for one in fields(cls):
            assert one.default is not MISSING
            parser.add_argument(
                "--" + one.name.replace("_", "-"), type=type(one.default), default=one.default,
                help=f"{one.metadata['help']} (%(default)s)",
            )  # fmt: skip

    @classmethod
    def of(cls, args: Namespace) -> "Options":
        """Those of parsed flags."""
        return cls(**{one.name: getattr(args, one.name) for one in fields(cls)})


def augment(images: Tensor, whole: float, smallest: float, generator: torch.Generator) -> Tensor:
    """Crop and flip a batch [B, C, H, W] in one go, as RandomResizedCrop does one by one.

    The share ``whole`` of the images stays uncropped; the others keep between ``smallest``
    and all of their area. Half of either are flipped left to right.
    """
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n).uniform_(low, high, generator=generator)

    area, log_ratio = uniform(smallest, 1.0), uniform(math.log(3 / 4), math.log(4 / 3))
    width = (area * log_ratio.exp()).sqrt().clamp(max=1.0)
    height = (area / log_ratio.exp()).sqrt().clamp(max=1.0)
    uncropped = uniform(0, 1) < whole
    width[uncropped] = height[uncropped] = 1.0
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width * flip, uniform(-1, 1) * (1 - width)
    theta[:, 1, 1], theta[:, 1, 2] = height, uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def make_optimizer(model: nn.Module, lr: float, decay: float) -> torch.optim.AdamW:
    """AdamW; no weight decay for biases, norms, scalars and the embeddings."""
    named = list(model.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or "embedding" in n]
    decayed = [p for n, p in named if p.ndim >= 2 and "embedding" not in n]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)


def bf16_is_fast() -> bool:
    """Whether this CPU has instructions for bf16; without them autocast is slower than fp32."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_bf16" in flags.read_text()


def train(
    folder: Path,
    state: Path,
    images: Tensor,
    captions: Callable[[np.random.Generator], list[str]],
    accuracy: Callable[[CLIP, Tokenizer], float],
    options: Options,
) -> None:
    """Train the model of ``folder/config.json``; print loss, rate, time left and accuracy.

    ``images`` are uint8 [n, C, H, W]. ``captions`` draws a sentence for each, anew in every epoch.
    ``accuracy`` measures the model after an epoch; nothing is chosen by it. After every epoch the
    model is in ``folder/model.safetensors``, in half precision, and the whole training state in
    ``state``, from which a later call with the same options resumes. It is deleted at the end.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    state.parent.mkdir(parents=True, exist_ok=True)
    config = json.loads((folder / "config.json").read_text())["model_cfg"]
    # Patches are dropped in training only; the module has no weights, so the config stays as it is.
    config["vision_cfg"]["patch_dropout"] = options.patch_dropout
    model = build(config)
    optimizer = make_optimizer(model, options.lr, options.weight_decay)
    tokenizer = make_tokenizer(config)
    loss_of = open_clip.loss.ClipLoss()

    steps = len(images) // options.batch_size
    total, warmup = steps * options.epochs, steps * options.warmup_epochs
    first, seconds, half = 0, 0.0, bf16_is_fast()
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["epoch"], saved["seconds"]
        print(f"resuming after epoch {first} of {state}")

    for epoch in range(first, options.epochs):
        start = time.monotonic()
        # Everything random in an epoch follows from seed and epoch, so a resumed run is the same.
        torch.manual_seed(options.seed * 1000 + epoch)
        generator = torch.Generator().manual_seed(options.seed * 1000 + epoch)
        rng = np.random.default_rng([options.seed, epoch])
        tokens = tokenizer(captions(rng))
        order = torch.from_numpy(rng.permutation(len(images)))
        whole = epoch >= options.epochs - options.whole_epochs
        model.visual.patch_dropout.prob = 0.0 if whole else options.patch_dropout
        model.train()
        mean_loss = 0.0
        for step in range(steps):
            done = epoch * steps + step
            scale = min((done + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * done / total))
            for group in optimizer.param_groups:
                group["lr"] = options.lr * scale
            batch = order[step * options.batch_size : (step + 1) * options.batch_size]
            pixels = images[batch].float() / 255
            pixels = augment(pixels, options.uncropped, options.smallest_crop, generator)
            # PyTorch's fused attention has a slow backward pass on a CPU: twice the time.
            with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled=half):
                image_features, text_features, logit_scale = model(normalise(pixels), tokens[batch])
            loss = loss_of(image_features.float(), text_features.float(), logit_scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))  # as CLIP does
            mean_loss += loss.item() / steps
            if step % 50 == 49:
                rate = (step + 1) * options.batch_size / (time.monotonic() - start)
                left = (steps - step - 1) * options.batch_size / rate
                print(
                    f"epoch {epoch + 1}/{options.epochs} step {step + 1}/{steps} "
                    f"loss {loss.item():.3f} {rate:.0f} images/s, epoch ends in {left:.0f} s",
                    flush=True,
                )
        seconds += time.monotonic() - start
        correct = accuracy(model, tokenizer)
        eta = seconds / (epoch + 1) * (options.epochs - epoch - 1)
        print(
            f"epoch {epoch + 1}/{options.epochs}: loss {mean_loss:.3f}, "
            f"scale {model.logit_scale.exp().item():.1f}, zero-shot {correct:.2%}, "
            f"{seconds:.0f} s of training, about {eta:.0f} s left",
            flush=True,
        )
        export(model, folder)
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(saved | {"epoch": epoch + 1, "seconds": seconds}, state)
    state.unlink(missing_ok=True)
