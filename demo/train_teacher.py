"""Train the demo's teacher, a small CLIP, on Fashion-MNIST images and captions.

    python demo/train_teacher.py --source DIR

DIR holds Fashion-MNIST's four idx files (make_data.py says how to obtain them). After every
epoch the model is written to ``demo/teacher/model.safetensors`` in half precision, and the
whole training state to ``--state``. A later call with the same options resumes from it. It is
deleted after the last epoch.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from captions import attributes, caption
from fashion_mnist import read_split
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from zero_shot import TEACHER, accuracy, build, normalise


def augment(images: Tensor, whole: float, smallest: float, generator: torch.Generator) -> Tensor:
    """Crop and flip a batch (n, 1, 28, 28) in one go, as RandomResizedCrop does one by one.

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


def export(model: CLIP, folder: Path) -> None:
    """Write the model's weights in half precision."""
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    save_file(
        state, folder / "model.safetensors", metadata={"format": "pt", "licence": "Apache-2.0"}
    )


def main() -> None:
    """Train, and print loss, rate, time left and zero-shot accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of the idx files")
    parser.add_argument("--output", type=Path, default=TEACHER, help="folder of config.json")
    parser.add_argument("--state", type=Path, default=Path("runs/teacher-state.pt"))
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--whole-epochs", type=int, default=2, help="last ones, all patches kept")
    parser.add_argument("--patch-dropout", type=float, default=0.5, help="in the epochs before")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--uncropped", type=float, default=0.4, help="share of whole images")
    parser.add_argument("--smallest-crop", type=float, default=0.3, help="as share of the area")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.state.parent.mkdir(parents=True, exist_ok=True)
    config = json.loads((args.output / "config.json").read_text())["model_cfg"]
    # Patches are dropped in training only; the module has no weights, so the config stays as it is.
    config["vision_cfg"]["patch_dropout"] = args.patch_dropout
    model = build(config)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    loss_of = open_clip.loss.ClipLoss()

    images_np, labels_np = read_split(args.source, "train")
    images = torch.from_numpy(images_np.copy()).unsqueeze(1)
    words = [attributes(i, int(c)) for i, c in zip(images_np, labels_np, strict=True)]
    test_np, test_labels_np = read_split(args.source, "test")
    test = torch.from_numpy(test_np.copy()), torch.from_numpy(test_labels_np.copy()).long()

    steps = len(images) // args.batch_size
    total, warmup = steps * args.epochs, steps
    first, seconds = 0, 0.0
    if args.state.exists():
        saved = torch.load(args.state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["epoch"], saved["seconds"]
        print(f"resuming after epoch {first} of {args.state}")

    for epoch in range(first, args.epochs):
        start = time.monotonic()
        # Everything random in an epoch follows from seed and epoch, so a resumed run is the same.
        torch.manual_seed(args.seed * 1000 + epoch)
        generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        rng = np.random.default_rng([args.seed, epoch])
        # New captions every epoch: each image gets several templates.
        tokens = tokenizer([caption(w, rng) for w in words])
        order = torch.from_numpy(rng.permutation(len(images)))
        whole = epoch >= args.epochs - args.whole_epochs
        model.visual.patch_dropout.prob = 0.0 if whole else args.patch_dropout
        model.train()
        mean_loss = 0.0
        for step in range(steps):
            done = epoch * steps + step
            lr = args.lr * min((done + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * done / total))
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = order[step * args.batch_size : (step + 1) * args.batch_size]
            pixels = images[batch].float() / 255
            pixels = augment(pixels, args.uncropped, args.smallest_crop, generator)
            # PyTorch's fused attention has a slow backward pass on a CPU: twice the time.
            with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", dtype=torch.bfloat16):
                image_features, text_features, scale = model(normalise(pixels), tokens[batch])
            loss = loss_of(image_features.float(), text_features.float(), scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))  # as CLIP does
            mean_loss += loss.item() / steps
            if step % 50 == 49:
                rate = (step + 1) * args.batch_size / (time.monotonic() - start)
                left = (steps - step - 1) * args.batch_size / rate
                print(
                    f"epoch {epoch + 1}/{args.epochs} step {step + 1}/{steps} "
                    f"loss {loss.item():.3f} {rate:.0f} images/s, epoch ends in {left:.0f} s",
                    flush=True,
                )
        seconds += time.monotonic() - start
        correct = accuracy(model, tokenizer, *test)
        eta = seconds / (epoch + 1) * (args.epochs - epoch - 1)
        print(
            f"epoch {epoch + 1}/{args.epochs}: loss {mean_loss:.3f}, "
            f"scale {model.logit_scale.exp().item():.1f}, zero-shot {correct:.2%}, "
            f"{seconds:.0f} s of training, about {eta:.0f} s left",
            flush=True,
        )
        export(model, args.output)
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch + 1,
                "seconds": seconds,
            },
            args.state,
        )
    args.state.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
