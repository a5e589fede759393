"""The emoji's pictures, and the small picture tower that only the training needs."""

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tests.train_builtin.phrases import file_name, picture_files


def read_pictures(sources, records, style, size=48):
    """(pictures uint8 [n, 3, size, size] on white, their rows in records); some may be missing."""
    files = picture_files(sources, style)
    rows = [i for i, r in enumerate(records) if file_name(r["emoji"]) in files]
    out = np.empty((len(rows), 3, size, size), np.uint8)
    for k, i in enumerate(rows):
        image = Image.open(files[file_name(records[i]["emoji"])]).convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image)
        out[k] = np.asarray(page.convert("RGB").resize((size, size), Image.BICUBIC)).transpose(2, 0, 1)
    return torch.from_numpy(out), rows


def augment(pictures, generator, strength=1.0, size=32):
    """Pictures [n, 3, 48, 48] uint8 under a small random affine map each: float [n, 3, size, size]."""
    n = len(pictures)
    angle, zoom, dx, dy = ((torch.rand(4, n, generator=generator) * 2 - 1) * strength).unbind()
    angle, zoom = angle * 0.25, 1 + zoom * 0.15
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    maps = torch.stack([cos, -sin, dx * 0.12, sin, cos, dy * 0.12], dim=1).view(n, 2, 3)
    grid = F.affine_grid(maps, (n, 3, size, size), align_corners=False)
    return F.grid_sample(1 - pictures.float() / 255, grid, align_corners=False)  # padding reads as white


class Residual(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outside) for _ in range(2))
        self.short = nn.Conv2d(inside, outside, 1, bias=False)

    def forward(self, x):
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(y + self.short(F.avg_pool2d(x, 2)))


class PictureTower(nn.Module):
    """A small ResNet: [n, 3, 32, 32] to unit features [n, embed]."""

    def __init__(self, embed):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(Residual(32, 48), Residual(48, 96), Residual(96, 128))
        self.head = nn.Linear(128, embed)

    def forward(self, x):
        x = F.relu(self.stem(x.contiguous(memory_format=torch.channels_last)))
        return F.normalize(self.head(self.blocks(x).mean((2, 3))).float(), dim=-1)
