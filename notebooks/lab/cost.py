"""What a forward pass costs in multiply-accumulates, beside the GFLOPs columns of Tables 1, 2 and 5.

    python notebooks/lab/cost.py        prints the table of all models
"""
import dataclasses
import pathlib
import sys

import torch

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402


def count_macs(model, image_size=None):
    """Multiply-accumulates of one forward pass on one image, by part, in two conventions.

    "paper" is what the GFLOPs columns of Tables 1, 2 and 5 hold (they are MACs / 1e9): it leaves out the projectors of
    Q', K' and every router, and counts DWC as three branches. "honest" counts what runs here: those too, DWC as the
    one convolution it is, and the normalizer wherever there is one. Element-wise work is in neither.

    image_size: side in pixels, the model's own by default. Returns {"paper": {part: MACs}, "honest": {...}}.
    """
    cfg = dataclasses.replace(model.cfg, image_size=image_size or model.cfg.image_size)
    n, d, p, c = (cfg.input_size // cfg.patch_size) ** 2, cfg.dim, cfg.patch_size, cfg.in_channels
    blocks, tokens = cfg.depth, cfg.depth * n
    shell = {"patch embedding and final linear": n * 3 * p * p * c * d + 2 * d * d,
             "timestep MLP": 256 * d + d * d,
             "AdaLN": blocks * 6 * d * d}
    if cfg.attention == "softmax":
        paper = {**shell, "Q, K, V and output projections": tokens * 4 * d * d,
                 "attention products": tokens * 2 * n * d, "feed-forward": tokens * 8 * d * d}
        return {"paper": paper, "honest": dict(paper)}
    differential = cfg.differential != "none"
    mass = not differential or cfg.normalizer == "mass"
    products = 2 * min(n, d // cfg.n_heads) * d * (2 if cfg.differential == "map" else 1)
    routers = 2 * d * cfg.n_projectors * cfg.dynamic_projection
    routers += d * cfg.n_gammas * (4 if differential else 2) * (cfg.kernel == "dynamic")
    routers += 2 * d * cfg.n_lambdas * {"none": 0, "map": 1, "token": 2}[cfg.differential]
    paper = {**shell, "Q, K, V and output projections": tokens * 4 * d * d,
             "Q', K' projectors": 0, "routers": 0,
             "attention products": tokens * products, "normalizer": 0 if differential else tokens * 2 * d,
             "DWC": tokens * 15 * d * cfg.dwc, "feed-forward": tokens * (12 * d * d + 72 * d)}
    honest = {**paper, "Q', K' projectors": tokens * 2 * d * d * differential, "routers": tokens * routers,
              "normalizer": tokens * 2 * d * mass * (1 + differential), "DWC": tokens * 9 * d * cfg.dwc}
    return {"paper": paper, "honest": honest}


# (model, overrides, GFLOPs that the paper prints: Tables 1, 2 and 5)
PAPER_GFLOPS = [
    ("DiT-S/2", {}, 6.06), ("Sana-S/2", {}, 5.97), ("DyDi-LiT-S/2", {}, 5.98),
    ("DyDi-LiT-S/2", dict(differential="map"), 6.45),
    ("DiT-B/2", {}, 10.50), ("Sana-B/2", {}, 10.38), ("DyDi-LiT-B/2", {}, 10.39),
    ("DiT-L/2", {}, 23.01), ("Sana-L/2", {}, 22.83), ("DyDi-LiT-L/2", {}, 22.85),
    ("DiT-L/2", dict(image_size=512), 106.42), ("Sana-L/2", dict(image_size=512), 98.46),
    ("DyDi-LiT-L/2", dict(image_size=512), 98.55), ("DyDi-LiT-XS/4", {}, None),
]


def main():
    """Prints every model's parameters and cost beside the paper's figures."""
    print("model             image  parameters  GFLOPs: paper   here, paper's count   here, honest count")
    for name, overrides, printed in PAPER_GFLOPS:
        with torch.device("meta"):
            model = dydilit.build_model(name, **overrides)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        paper, honest = (sum(parts.values()) / 1e9 for parts in count_macs(model).values())
        label = name + (" map-wise" if "differential" in overrides else "")
        print(f"{label:22} {model.cfg.image_size:4} {parameters / 1e6:8.2f} M {f'{printed:.2f}' if printed else '-':>14} "
              f"{paper:20.3f} {honest:20.3f}")


if __name__ == "__main__":
    main()
