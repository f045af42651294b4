"""What a forward pass costs in multiply-accumulates, beside the GFLOPs of Tables 1, 2 and 5.

    python notebooks/lab/cost.py        prints the table of all models
"""
import dataclasses
import pathlib
import sys

import torch

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
from lab import neighbours  # noqa: E402


# Every kind of part that a block may have: (the part, configuration, number of tokens) ->
# {name: (paper's count, honest count)}, MACs per token. See count_macs for the two conventions.

def softmax_attention(part, cfg, n):
    d = cfg.dim
    return {"Q, K, V and output projections": (4 * d * d,) * 2,
            "attention products": (2 * n * d,) * 2}


def mlp(part, cfg, n):
    return {"feed-forward": (8 * cfg.dim ** 2,) * 2}


def mix_ffn(part, cfg, n):
    return {"feed-forward": (12 * cfg.dim ** 2 + 72 * cfg.dim,) * 2}


def dydila(part, cfg, n):
    d, differential = cfg.dim, isinstance(part, dydilit.DyDiLA)
    mass = not differential or getattr(part.differential, "denominator", "") == "mass"      # eq8.py
    products = 2 * min(n, d // cfg.n_heads) * d * (2 if cfg.differential == "map" else 1)
    routers = 2 * d * cfg.n_projectors * cfg.dynamic_projection
    routers += d * cfg.n_gammas * (4 if differential else 2) * (cfg.kernel == "dynamic")
    routers += 2 * d * cfg.n_lambdas * {"none": 0, "map": 1, "token": 2}[cfg.differential]
    return {"Q, K, V and output projections": (4 * d * d,) * 2,
            "Q', K' projectors": (0, 2 * d * d * differential), "routers": (0, routers),
            "attention products": (products, products),
            "normalizer": (0 if differential else 2 * d, 2 * d * mass * (1 + differential)),
            "DWC": (15 * d * cfg.dwc, 9 * d * cfg.dwc)}


def kv_compressed_attention(part, cfg, n):
    d, keys = cfg.dim, n // part.compress.kernel_size[0] ** 2    # a square of tokens each
    return {"Q, K, V and output projections": (4 * d * d,) * 2,
            "key and value compression": (2 * d,) * 2, "attention products": (2 * keys * d,) * 2}


def linear_compressed_attention(part, cfg, n):
    """EDiT: ConvFusion is a 3x3 convolution d -> d/2 and 1x1 d/2 -> d, compression nine weights for
    each of n / 4 keys and values, the products go in the order of dydilit.attention_product."""
    d, keys, width = cfg.dim, n // 4, cfg.dim // cfg.n_heads
    products = 2 * keys * d if keys <= width else 5 * d * width // 4
    return {"Q, K, V and output projections": (4 * d * d,) * 2, "ConvFusion": (5 * d * d,) * 2,
            "key and value compression": (9 * d // 2,) * 2, "attention products": (products,) * 2,
            "normalizer": (0, 5 * d // 4)}


def gated_linear_attention(part, cfg, n, chunk=16):
    """DiG: Q, K at half the width; V, gate and output; the decay's W_1, W_2; and the scan.

    "paper" counts the scan as k^T v and q (k^T v) with one head, "honest" as the chunked form."""
    d = cfg.dim
    return {"Q, K, V, gate and output projections": (4 * d * d,) * 2, "decay": (24 * d,) * 2,
            "attention products": (d * d, chunk * (d // 2 + d) + d * d // cfg.n_heads)}


def swiglu(part, cfg, n):
    """DiG's. "paper" leaves the last of its three products out, see NEIGHBOUR_GFLOPS."""
    hidden = part.contract.in_features
    return {"feed-forward": (2 * hidden * cfg.dim, 3 * hidden * cfg.dim)}


def mixture_of_head_attention(part, cfg, n):
    """MoH-DiT: every head is computed, whether on or not."""
    routers = (cfg.n_heads + 2 * (part.shared < cfg.n_heads)) * cfg.dim
    return {**softmax_attention(part, cfg, n), "routers": (routers,) * 2}


def few_head_linear_attention(part, cfg, n):
    """LiT: the width of a head decides the cost."""
    d = cfg.dim
    products = 2 * min(n, d // neighbours.lit_heads(d)) * d
    return {"Q, K, V and output projections": (4 * d * d,) * 2,
            "attention products": (products,) * 2, "normalizer": (2 * d,) * 2, "DWC": (25 * d,) * 2}


PARTS = {dydilit.SoftmaxAttention: softmax_attention, dydilit.DyDiLA: dydila,
         dydilit.LinearAttention: dydila, dydilit.Mlp: mlp, dydilit.MixFFN: mix_ffn,
         neighbours.KVCompressedAttention: kv_compressed_attention,
         neighbours.LinearCompressedAttention: linear_compressed_attention,
         neighbours.GatedLinearAttention: gated_linear_attention, neighbours.SwiGLU: swiglu,
         neighbours.LocalConv: lambda part, cfg, n: {"DWC": (9 * cfg.dim,) * 2},
         torch.nn.Identity: lambda part, cfg, n: {},
         neighbours.MixtureOfHeadAttention: mixture_of_head_attention,
         neighbours.FewHeadLinearAttention: few_head_linear_attention}


def count_macs(model, image_size=None):
    """Multiply-accumulates of one forward pass on one image, by part, in two conventions.

    "paper" is what the GFLOPs columns hold (they are MACs / 1e9). It leaves out the projectors of
    Q', K' and every router, and counts DWC as three branches. "honest" counts what runs: those too,
    DWC as one convolution, and the normalizer where there is one. Element-wise work is in neither.

    image_size: side in pixels. Returns {"paper": {part: MACs}, "honest": {...}}."""
    cfg = dataclasses.replace(model.cfg, image_size=image_size or model.cfg.image_size)
    n, d, p = (cfg.input_size // cfg.patch_size) ** 2, cfg.dim, cfg.patch_size
    shell = {"patch embedding and final linear": n * 3 * p * p * cfg.in_channels * d + 2 * d * d,
             "timestep MLP": 256 * d + d * d, "AdaLN": len(model.blocks) * 6 * d * d}
    counts = {"paper": dict(shell), "honest": dict(shell)}
    for block in model.blocks:
        for part in (block.attn, block.mlp, block.after):
            for name, per_token in PARTS[type(part)](part, cfg, n).items():
                for convention, macs in zip(("paper", "honest"), per_token):
                    counts[convention][name] = counts[convention].get(name, 0) + n * macs
    return counts


def honest_macs(model, **overrides):
    """MACs of a forward pass, all that run. overrides: what build_model takes, also parts."""
    with torch.device("meta"):
        return sum(count_macs(dydilit.build_model(model, **overrides))["honest"].values())


# (model, overrides, GFLOPs that the paper prints)
PAPER_GFLOPS = [
    ("DiT-S/2", {}, 6.06), ("Sana-S/2", {}, 5.97), ("DyDi-LiT-S/2", {}, 5.98),
    ("DyDi-LiT-S/2", dict(differential="map"), 6.45),
    ("DiT-B/2", {}, 10.50), ("Sana-B/2", {}, 10.38), ("DyDi-LiT-B/2", {}, 10.39),
    ("DiT-L/2", {}, 23.01), ("Sana-L/2", {}, 22.83), ("DyDi-LiT-L/2", {}, 22.85),
    ("DiT-L/2", dict(image_size=512), 106.42), ("Sana-L/2", dict(image_size=512), 98.46),
    ("DyDi-LiT-L/2", dict(image_size=512), 98.55), ("DyDi-LiT-XS/4", {}, None),
]

# The paper's neighbours (system, size, overrides, GFLOPs that the paper prints). It says only that
# "the number of blocks" was adjusted, so the depths are read off its figures; lesson 12 shows how.
# DiG: 15, 14 and 15 blocks. SwiGLU's width is a multiple of 256, which makes B one block shorter.
# Its last product is inside a fused function of the released code, which a counter of layers does
# not see. One d^2 is left: the scan as k^T v and q (k^T v), or values of twice the width without a
# gate. The first is taken here; the numbers are the same.
NEIGHBOUR_GFLOPS = [
    ("pixart", "S", dict(depth=12, n_heads=6), 5.78),
    ("pixart", "B", dict(depth=12, n_heads=8), 10.13),
    ("pixart", "L", dict(depth=12, n_heads=12), 22.45),
    ("pixart", "L", dict(depth=12, n_heads=12, image_size=512), 97.38),
    ("edit", "S", {}, 5.91), ("edit", "B", {}, 10.45),
    ("edit", "L", {}, 23.39), ("edit", "L", dict(image_size=512), 96.17),
    ("dig", "S", dict(depth=15, n_heads=6), 5.92), ("dig", "B", dict(depth=14, n_heads=8), 10.43),
    ("dig", "L", dict(depth=15, n_heads=12), 23.58),
    ("dig", "L", dict(depth=15, n_heads=12, image_size=512), 94.15),
    ("moh", "S", dict(depth=12, n_heads=6), None), ("lit", "S", dict(depth=12), None),  # as DiT
]


def main():
    """Prints every model's parameters and cost beside the paper's figures."""
    print("model                  image  parameters  GFLOPs: paper  paper's count  honest count")
    rows = [(name + " map-wise" * ("differential" in overrides), name, overrides, printed)
            for name, overrides, printed in PAPER_GFLOPS]
    for system, size, overrides, printed in NEIGHBOUR_GFLOPS:
        overrides = dict(parts=neighbours.NEIGHBOURS[system], **overrides)
        rows.append((f"{system}-{size}/2", f"DyDi-LiT-{size}/2", overrides, printed))
    for label, name, overrides, printed in rows:
        with torch.device("meta"):
            model = dydilit.build_model(name, **overrides)
        millions = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        paper, honest = (sum(parts.values()) / 1e9 for parts in count_macs(model).values())
        print(f"{label:22} {model.cfg.image_size:5} {millions:9.2f} M {printed or '-':>14} "
              f"{paper:14.3f} {honest:13.3f}")


if __name__ == "__main__":
    main()
