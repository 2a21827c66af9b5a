"""An ADM U-Net under EDM's preconditioning with the parameter names of the public pickles, written for tests alone.

Dhariwal and Nichol 2021, as Karras et al. 2022 train it. `docs/convert-edm.py` looks at class names, parameters and a
few attributes, and these are the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNetBlock(nn.Module):
    def __init__(self, cin: int, cout: int, emb: int, resample: str = "", attention: bool = False) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.resample = cin, cout, resample
        self.num_heads = cout // 64 if attention else 0
        self.norm0, self.norm1 = nn.GroupNorm(32, cin), nn.GroupNorm(32, cout)
        self.conv0, self.conv1 = nn.Conv2d(cin, cout, 3, padding=1), nn.Conv2d(cout, cout, 3, padding=1)
        self.affine, self.skip = nn.Linear(emb, 2 * cout), nn.Conv2d(cin, cout, 1) if cin != cout else None
        if attention:
            self.norm2, self.qkv, self.proj = (
                nn.GroupNorm(32, cout),
                nn.Conv2d(cout, 3 * cout, 1),
                nn.Conv2d(cout, cout, 1),
            )

    def resized(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2) if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.conv0(self.resized(F.silu(self.norm0(x))))
        scale, shift = self.affine(emb)[..., None, None].chunk(2, 1)
        hidden = self.conv1(F.silu(self.norm1(hidden) * (1 + scale) + shift))
        orig = self.resized(x)
        x = hidden + (orig if self.skip is None else self.skip(orig))
        if self.num_heads:  # queries, keys and values of a channel lie beside each other
            n, c, h, w = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(n * self.num_heads, c // self.num_heads, 3, h * w).unbind(2)
            weight = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(2)
            x = x + self.proj((v @ weight.transpose(1, 2)).reshape(n, c, h, w))
        return x


class DhariwalUNet(nn.Module):
    def __init__(self, side: int, bands: int, labels: int, width: int = 128, mult: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        emb, self.width = 4 * width, width
        self.map_layer0, self.map_layer1 = nn.Linear(width, emb), nn.Linear(emb, emb)
        self.map_label = nn.Linear(labels, emb, bias=False) if labels else None
        enc: dict[str, nn.Module] = {f"{side}x{side}_conv": nn.Conv2d(bands, width * mult[0], 3, padding=1)}
        skips, cout = [width * mult[0]], width * mult[0]
        for level, m in enumerate(mult):
            name = "x".join([str(side >> level)] * 2)
            if level:
                enc[f"{name}_down"] = UNetBlock(cout, cout, emb, "down")
                skips.append(cout)
            enc[f"{name}_block0"] = UNetBlock(cout, width * m, emb, attention=level > 0)
            cout = width * m
            skips.append(cout)
        dec: dict[str, nn.Module] = {}
        for level, m in reversed(list(enumerate(mult))):
            name = "x".join([str(side >> level)] * 2)
            if level == len(mult) - 1:
                dec[f"{name}_in0"] = UNetBlock(cout, cout, emb, attention=True)
                dec[f"{name}_in1"] = UNetBlock(cout, cout, emb)
            else:
                dec[f"{name}_up"] = UNetBlock(cout, cout, emb, "up")
            for i in range(2):
                dec[f"{name}_block{i}"] = UNetBlock(cout + skips.pop(), width * m, emb, attention=level > 0)
                cout = width * m
        self.enc, self.dec = nn.ModuleDict(enc), nn.ModuleDict(dec)
        self.out_norm, self.out_conv = nn.GroupNorm(32, cout), nn.Conv2d(cout, bands, 3, padding=1)

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None) -> Tensor:
        half = self.width // 2
        phase = noise_labels[:, None] * 1e-4 ** (torch.arange(half) / half)
        emb = self.map_layer1(F.silu(self.map_layer0(torch.cat([phase.cos(), phase.sin()], 1))))
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels)
        emb, skips = F.silu(emb), []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for block in self.dec.values():
            x = block(torch.cat([x, skips.pop()], 1) if x.shape[1] != block.in_channels else x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


class EDMPrecond(nn.Module):
    def __init__(self, model: nn.Module, side: int, bands: int, labels: int, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.model, self.img_resolution, self.img_channels, self.label_dim = model, side, bands, labels
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Any = None) -> Tensor:
        s, d = sigma.reshape(-1, 1, 1, 1), self.sigma_data
        output = self.model(x / (s**2 + d**2).sqrt(), sigma.log() / 4, class_labels)
        return d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * output
