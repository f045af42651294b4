"""Faults that lesson 9 gives to good pictures, uint8 (M, H, W, 3) in and out, to see which measure notices which fault."""
import math

import numpy as np
import torch
import torch.nn.functional as F

from lab.figures import array


def blur(images, sigma):
    """Gaussian blur. sigma: in pixels."""
    reach = math.ceil(3 * sigma)
    bell = torch.exp(-torch.arange(-reach, reach + 1) ** 2 / (2 * sigma ** 2))
    x = F.pad(torch.as_tensor(images).to(bell.device).permute(0, 3, 1, 2).float(), (reach,) * 4, mode="replicate")
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        x = F.conv2d(x, (bell / bell.sum()).view(shape).expand(3, -1, -1, -1), groups=3)
    return array(x.permute(0, 2, 3, 1).round()).astype(np.uint8)


def noise(images, sd):
    """Gaussian noise. sd: in grey levels of 255."""
    return np.clip(np.rint(images + np.random.default_rng(0).normal(0, sd, images.shape)), 0, 255).astype(np.uint8)


def shift(images, pixels):
    """Everything moves right and down by so many pixels."""
    height, width = images.shape[1:3]
    return np.pad(images, ((0, 0), (pixels, 0), (pixels, 0), (0, 0)), mode="edge")[:, :height, :width]


def rearrange(images, side):
    """The square patches of each image, side x side pixels, in random order."""
    rng, n, out = np.random.default_rng(0), images.shape[1] // side, np.empty_like(images)
    for i, image in enumerate(images):
        parts = image.reshape(n, side, n, side, 3).swapaxes(1, 2).reshape(n * n, side, side, 3)[rng.permutation(n * n)]
        out[i] = parts.reshape(n, n, side, side, 3).swapaxes(1, 2).reshape(image.shape)
    return out
