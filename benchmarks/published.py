"""The published training step, restated: the baseline for ours.

After arXiv 2208.06049 and its code. The teacher runs in every step, and its last block returns its
attention. All patches are embedded, then three quarters dropped. In every decoder block the tokens
return to raster order, and query and key/value are separate products. Attention is written out.
The optimiser is AdamW with the defaults of torch's constructor. Only speed is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn import functional as F

from milan.models.student import build_student
from milan.objectives.resample import resampled_attention, resampled_features


class QuickGELU(nn.Module):
    """CLIP's activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.702 * x)


class TowerBlock(nn.Module):
    """A block of CLIP's image tower: torch's MultiheadAttention, tokens first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), QuickGELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, B, W] to the same, and the attention [B, T, T]."""
        y = self.ln_1(x)
        # With need_weights it does not fuse, as it always computed when this was published.
        y, attention = self.attn(y, y, y, need_weights=True)
        x = x + y
        return x + self.mlp(self.ln_2(x)), attention


class Tower(nn.Module):
    """CLIP's image tower."""

    def __init__(self, *, patch: int, width: int, depth: int, heads: int, joint: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + (224 // patch) ** 2, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList([TowerBlock(width, heads) for _ in range(depth)])
        self.proj = nn.Parameter(torch.randn(width, joint) * width**-0.5)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 3, 224, 224] to features [B, T, C] and attention [B, N]."""
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        x = self.ln_pre(x).transpose(0, 1)
        for block in self.blocks:
            x, attention = block(x)
        return self.ln_post(x.transpose(0, 1)) @ self.proj, attention[:, 0, 1:]


TOWERS: dict[str, dict[str, int]] = {
    "ViT-B/16": {"patch": 16, "width": 768, "depth": 12, "heads": 12, "joint": 512},
    "ViT-L/14": {"patch": 14, "width": 1024, "depth": 24, "heads": 16, "joint": 768},
}


def prompt_block(
    block: Any, prompts: torch.Tensor, x: torch.Tensor, restore: torch.Tensor
) -> torch.Tensor:
    """A decoder block as published: keys and values in raster order again, attention in full."""
    h = block.norm1(x)
    attn, (b, m, d) = block.attn, x.shape
    both = torch.cat([prompts[:, 1:], h], dim=1)
    both = both.gather(1, restore[..., None].expand(-1, -1, d))
    both = torch.cat([prompts[:, :1], both], dim=1)
    q = attn.q(h).reshape(b, m, attn.heads, -1).permute(0, 2, 1, 3)
    kv = attn.kv(both).reshape(b, both.shape[1], 2, attn.heads, -1).permute(2, 0, 3, 1, 4)
    share = ((q @ kv[0].transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1)
    x = x + attn.proj((share @ kv[1]).transpose(1, 2).reshape(b, m, d))
    return x + block.mlp(block.norm2(x))


class Published:
    """One step: teacher, masks, student, loss, optimiser."""

    def __init__(self, tower: str, *, patch: int, device: torch.device) -> None:
        self.teacher = Tower(**TOWERS[tower]).to(device).eval().requires_grad_(False)
        self.student = build_student(
            "vit_base_patch16_224",
            img_size=224,
            target_width=TOWERS[tower]["joint"],
            model_args={"patch_size": patch},
        ).to(device)
        for module in self.student.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]
        groups = param_groups_weight_decay(self.student, 0.05)
        self.optimiser = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))

    def predict(self, images: torch.Tensor, keep: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
        """Predictions [B, T, C] with patches `keep` [B, V] visible and `drop` [B, M] masked."""
        vit, decoder = self.student.encoder, self.student.decoder
        x = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
        token = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        z = decoder.embed(vit.norm(vit.blocks(torch.cat([token, x], dim=1))))

        b, _, d = z.shape
        restore = torch.cat([keep, drop], dim=1).argsort(dim=1)
        tokens = torch.cat([z[:, 1:], decoder.mask_token.expand(b, drop.shape[1], -1)], dim=1)
        tokens = tokens.gather(1, restore[..., None].expand(-1, -1, d))
        full = torch.cat([z[:, :1], tokens], dim=1) + decoder.pos_embed
        visible = full[:, 1:].gather(1, keep[..., None].expand(-1, -1, d))
        prompts = torch.cat([full[:, :1], visible], dim=1)
        masked = full[:, 1:].gather(1, drop[..., None].expand(-1, -1, d))
        for block in decoder.blocks:
            masked = prompt_block(block, prompts, masked, restore)
        tokens = torch.cat([prompts[:, 1:], masked], dim=1)
        tokens = tokens.gather(1, restore[..., None].expand(-1, -1, d))
        return decoder.pred(decoder.norm(torch.cat([prompts[:, :1], tokens], dim=1)))

    def step(self, batches: Sequence[torch.Tensor], context: Any) -> None:
        """Train on micro-batches of one size, forward passes under `context`."""
        self.optimiser.zero_grad()
        for images in batches:
            with context:
                loss = self.loss(images) / len(batches)
            loss.backward()
        # As computed for the log when this was published.
        norms = [p.grad.norm(2) for p in self.student.parameters() if p.grad is not None]
        torch.stack(norms).norm(2).item()
        self.optimiser.step()
        loss.item()

    def loss(self, images: torch.Tensor) -> torch.Tensor:
        """The objective of images [B, 3, 224, 224], the teacher's part included."""
        with torch.no_grad():
            features, attention = self.teacher(images)
            if attention.shape[1] != self.student.patches:  # nothing published for this case: ours
                features = resampled_features(features, self.student.patches, 1)
                attention = resampled_attention(attention, self.student.patches, 1)
        drawn = torch.multinomial(attention.float(), attention.shape[1])
        visible = drawn.shape[1] // 4
        prediction = self.predict(images, drawn[:, :visible], drawn[:, visible:])
        p, f = (F.normalize(x, dim=-1) for x in (prediction, features))
        return (2 - 2 * (p * f).sum(dim=-1)).mean()
