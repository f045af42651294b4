"""The transformer around the attention against an independent reading of DiT, and what it costs."""
import dataclasses
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dydilit
from dydilit import LADDER, ModelConfig, build_model
from lab import eq8
from lab.cost import PAPER_GFLOPS, count_macs

TINY = dict(dim=32, depth=2, image_size=64, n_classes=5)


def randomized(model, std=0.2):
    """AdaLN-Zero starts as the identity, and banks with equal entries. Here every part speaks."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(std * torch.randn_like(p))
    return model.eval()


def inputs(model, batch=3):
    cfg = model.cfg
    return (torch.randn(batch, cfg.in_channels, cfg.input_size, cfg.input_size),
            torch.randint(1000, (batch,)), torch.randint(cfg.n_classes + 1, (batch,)))


# ---- DiT's shell ----

def dit_forward(w, image, time, label, depth, heads, patch):
    """DiT's forward pass on one image, from its paper and its public conventions."""
    def linear(name, z):
        return z @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(z):
        mean, variance = z.mean(1, keepdim=True), z.var(1, unbiased=False, keepdim=True)
        return (z - mean) / (variance + 1e-6).sqrt()
    c, side, dim = len(image), image.shape[1] // patch, len(w["x_embedder.proj.bias"])
    places = [(slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch))
              for row in range(side) for column in range(side)]
    h = torch.stack([(w["x_embedder.proj.weight"] * image[:, rows, columns]).sum((1, 2, 3))
                     for rows, columns in places])
    positions = [[wave(place / 10000 ** (k / (dim / 4))) for place in (n % side, n // side)
                  for wave in (math.sin, math.cos) for k in range(dim // 4)]
                 for n in range(side ** 2)]
    h = h + w["x_embedder.proj.bias"] + torch.tensor(positions).to(image.dtype)
    # DiT's frequencies are float32: at t = 950 their rounding reaches the waves' fourth digit.
    angles = time.float() * torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
    e = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]).to(image.dtype))
    e = linear("t_embedder.mlp.2", F.silu(e)) + w["y_embedder.embedding_table.weight"][label]
    e = F.silu(e)
    for b in (f"blocks.{i}." for i in range(depth)):
        modulation = linear(b + "adaLN_modulation.1", e).split(dim)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        q, k, v = linear(b + "attn.qkv", norm(h) * (1 + scale1) + shift1).split(dim, dim=1)
        out = [(q_h @ k_h.T / math.sqrt(dim // heads)).softmax(1) @ v_h for q_h, k_h, v_h in zip(
            *(z.split(dim // heads, dim=1) for z in (q, k, v)))]
        h = h + gate1 * linear(b + "attn.proj", torch.cat(out, 1))
        z = linear(b + "mlp.fc1", norm(h) * (1 + scale2) + shift2)
        z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
        h = h + gate2 * linear(b + "mlp.fc2", z)
    shift, scale = linear("final_layer.adaLN_modulation.1", e).split(dim)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    output = torch.zeros(2 * c, *image.shape[1:], dtype=image.dtype)
    for token, (rows, columns) in zip(h, places):
        output[:, rows, columns] = token.view(patch, patch, 2 * c).permute(2, 0, 1)
    return output


def test_dit_checkpoints_load_and_give_dits_outputs_and_gradients():
    """A checkpoint is a dictionary, in which dit_forward finds all it needs and nothing more."""
    model = build_model("DiT-S/2", **TINY | dict(dim=24, n_heads=3, in_channels=3)).double()
    model, (x, t, y) = randomized(model, 0.3), inputs(model)
    state = model.state_dict(keep_vars=True)
    leaves = [state[name] for name in state if name != "pos_embed"]
    got, want = model(x.double(), t, y), torch.stack([
        dit_forward(state, *one, 2, 3, 2) for one in zip(x.double(), t, y)])
    upstream = torch.randn_like(want)
    for one, other in zip([got, *torch.autograd.grad(got, leaves, upstream)],
                          [want, *torch.autograd.grad(want, leaves, upstream)]):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_block_is_of_other_parts_if_it_gets_them_and_of_mix_ffn():
    model = build_model("DyDi-LiT-S/2", lambda cfg, i: (
        torch.nn.ReLU(), dydilit.MixFFN(32), torch.nn.Tanh()), **TINY)
    block, x = randomized(model).blocks[1], torch.randn(2, 16, 32)
    block.adaLN_modulation[1].bias.data = torch.tensor([0.0, 0, 1, 0, 0, 1]).repeat_interleave(32)
    got, ffn = block(x, torch.zeros(2, 32)), block.mlp
    x = x + F.layer_norm(x, [32], eps=1e-6).relu()
    z = F.layer_norm(x, [32], eps=1e-6) @ ffn.expand.weight.T + ffn.expand.bias
    h = F.silu(z).mT.reshape(2, 256, 4, 4)              # expand, convolve, gate, contract
    h = F.conv2d(h, ffn.depthwise.weight, ffn.depthwise.bias, padding=1, groups=256)
    h, gate = h.flatten(2).mT.split(128, dim=2)
    torch.testing.assert_close(got, (x + (h * F.silu(gate)) @ ffn.contract.weight.T).tanh())


def test_label_dropout_takes_the_last_row_at_its_rate_and_only_in_training():
    embedder = build_model("DyDi-LiT-XS/4").y_embedder
    y = torch.arange(10).repeat(2000)
    rows = (embedder(y)[:, None] == embedder.embedding_table.weight).all(2).int().argmax(1)
    assert embedder.embedding_table.num_embeddings == 11 and ((rows == y) | (rows == 10)).all()
    assert (rows == 10).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(embedder.eval()(y), embedder.embedding_table(y))


INITIAL = [             # name, kind, and value, spread or bound; the first name that fits holds
    (r"adaLN|final_layer\.linear", "constant", 0.0),
    ("gammas", "constant", 2.5),
    (r"blocks\.0.*lambdas", "constant", 0.2), (r"blocks\.1.*lambdas", "constant", 0.8),
    (r"embedding_table|t_embedder\.mlp\.\d\.weight", "normal", 0.02),
    ("depthwise.bias", "uniform", 1 / 3),
    ("depthwise|dwc", "uniform", lambda shape: math.prod(shape[2:]) ** -0.5),  # PyTorch's own
    ("bias", "constant", 0.0),
    (r"projection\.weight", "uniform", lambda bank: math.sqrt(6 / sum(bank[1:]))),
    ("", "uniform", lambda shape: math.sqrt(6 / (shape[0] + math.prod(shape[1:]))))]     # Xavier


@pytest.mark.parametrize("name, overrides", [("DiT-S/2", dict(n_heads=4)), ("DyDi-LiT-S/2", {}),
                                             ("DyDi-LiT-S/2", LADDER[3][1])])
def test_initial_values_are_those_of_their_formulas(name, overrides):
    fields = TINY | dict(dim=64, gamma_init=2.5, lambda_init=(0.2, 0.8))
    for name, p in build_model(name, **fields | overrides).named_parameters():
        kind, value = next(rule for pattern, *rule in INITIAL if re.search(pattern, name))
        value = value(p.shape) if callable(value) else value
        spread = p.detach().double().square().mean().sqrt().item()
        few = 2 / p.numel() ** 0.5                          # how far chance moves so many entries
        if kind == "constant":
            assert (p == value).all(), name
        elif kind == "normal":
            assert spread == pytest.approx(value, rel=few) and p.abs().max() > 2.4 * value, name
        elif p.requires_grad:                               # all but the positions
            assert spread == pytest.approx(value / 3 ** 0.5, rel=few), name
            assert (1 - 10 / p.numel()) * value < p.abs().max() <= value, name


# ---- What is done with a model ----

def test_guidance_is_two_passes_put_together():
    model = randomized(build_model("DyDi-LiT-S/2", **TINY).double())
    x, t, y = inputs(model)
    x = x.double()
    with_class, without = model(x, t, y), model(x, t, torch.full_like(y, 5))
    assert torch.equal(model.forward_with_cfg(x, t, y, 1), with_class)
    noise = (1 - 3.5) * without[:, :4] + 3.5 * with_class[:, :4]
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 3.5),
                               torch.cat([noise, with_class[:, 4:]], dim=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float().forward_with_cfg(x.float(), t, y, 3.5).dtype == torch.float32


def test_a_model_fused_once_or_twice_gives_the_same_images():
    model = randomized(build_model("DyDi-LiT-S/2", **TINY))
    batch = inputs(model)
    before, count = model(*batch), sum(p.numel() for p in model.parameters())
    for _ in range(2):
        torch.testing.assert_close(model.fuse()(*batch), before)
        assert sum(p.numel() for p in model.parameters()) == count - 2 * (3 + 3) * 32


@pytest.mark.parametrize("name", ["Sana-S/2", "DyDi-LiT-S/2"])
def test_compiling_changes_neither_outputs_nor_gradients(name):
    """Traced up to the code that it would generate."""
    model = randomized(build_model(name, **TINY | dict(depth=1)))
    batch, parameters = inputs(model), [p for p in model.parameters() if p.requires_grad]
    torch._dynamo.reset()
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager")):
        out = forward(*batch)
        results.append([out, *torch.autograd.grad(out.square().mean(), parameters)])
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_model_is_loaded_with_its_averaged_weights_and_all_else_is_refused(tmp_path):
    model = build_model("DyDi-LiT-XS/4", dim=8, depth=1, lambda_init=(0.2, 0.8))
    ema = {name: w + 1 for name, w in model.state_dict().items()}
    good = dict(model=dataclasses.asdict(model.cfg), ema=ema, step=7, data=dict(names=["?"] * 10))
    torch.save(good, tmp_path / "model.pt")
    loaded, about = dydilit.load_model(tmp_path / "model.pt")
    assert loaded.cfg == model.cfg == ModelConfig(**json.loads(json.dumps(good["model"])))
    assert not loaded.training
    assert about == dict(model=good["model"], step=7, data=good["data"])
    for name, w in loaded.state_dict().items():
        assert torch.equal(w, ema[name])
    for wrong in [dict(good, data=dict(names=["?"] * 9)), dict(good, ema={}), dict(step=7),
                  dict(good, model=dict(dim=7)), dict(good, extra=pytest.approx)]:
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(ValueError, match="wrong.pt: not a model of train.py, or a damaged"):
            dydilit.load_model(tmp_path / "wrong.pt")
    with pytest.raises(FileNotFoundError):
        dydilit.load_model(tmp_path / "none.pt")


# ---- What is refused ----

@pytest.mark.parametrize("fields, message", [
    (dict(kernel="gauss"), "kernel='gauss' is not one of ('relu', 'focused', 'dynamic')"),
    (dict(image_size=24), "image_size=24 is not a multiple of vae_factor x patch_size = 8 x 2"),
    (dict(dim=30), "dim=30 is not a multiple of 4 and n_heads=1"),
    (dict(n_heads=5), "dim=384 is not a multiple of 4 and n_heads=5"),
    (dict(dynamic_projection=False), "needs kernel='dynamic' and dynamic_projection=True"),
    (dict(kernel="relu"), "needs kernel='dynamic' and dynamic_projection=True"),
    (dict(differential="none"), "dwc=True needs a differential"),
    (dict(depth=0), "depth=0 is not a positive integer"),
    (dict(n_heads=True), "n_heads=True is not a positive integer"),
    (dict(label_dropout=-0.1), "label_dropout=-0.1 is not a number in 0..1"),
    (dict(label_dropout=1.1), "label_dropout=1.1 is not a number in 0..1"),
    (dict(gamma_init=True), "gamma_init=True is not a number in 0..1000"),
    (dict(lambda_init=(1, 2, 3)), "lambda_init=(1, 2, 3) is not two numbers"),
    (dict(lambda_init=(0, math.nan)), "lambda_init=(0, nan) is not two numbers"),
    (dict(lambda_init=(0, -1001)), "lambda_init=(0, -1001) is not two numbers")])
def test_impossible_configurations_are_named(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**fields)


def test_unknown_model_and_wrong_input_are_named():
    with pytest.raises(ValueError, match="no model 'DiT-XXL'; choose one of DiT-S/2, DiT-B/2"):
        build_model("DiT-XXL")
    with pytest.raises(ValueError, match="15 tokens do not form a square"):
        dydilit.ReparamDWConv(8)(torch.randn(1, 15, 8))
    with pytest.raises(ValueError, match=r"the input is \(3, 16, 16\) and not \(3, 32, 32\)"):
        build_model("DyDi-LiT-XS/4")(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1))


# ---- Cost ----

@pytest.mark.parametrize("name, overrides, printed", [row for row in PAPER_GFLOPS if row[2]])
def test_gflops_of_the_papers_tables(name, overrides, printed):
    with torch.device("meta"):
        model, other = (build_model(name, **fields) for fields in (
            overrides, overrides | dict(image_size=64)))
    counts = count_macs(model)
    assert sum(counts["paper"].values()) / 1e9 == pytest.approx(printed, rel=0.005)
    assert count_macs(other, model.cfg.image_size) == counts
    assert model.cfg.n_heads == (model.cfg.dim // 64 if name.startswith("DiT") else 1)


@pytest.mark.parametrize("name, overrides", [
    ("DiT-S/2", {}), ("Sana-S/2", {}), ("DyDi-LiT-S/2", {}), ("DyDi-LiT-S/2", LADDER[3][1]),
    ("DyDi-LiT-S/2", dict(differential="map")), ("DyDi-LiT-S/2", dict(n_heads=6, image_size=512)),
    ("DyDi-LiT-S/2", dict(parts=eq8.parts_with("mass")))])
def test_honest_count_is_what_runs(name, overrides):
    """Against PyTorch's own count of the operations that a forward pass performs."""
    model = build_model(name, **overrides, depth=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(*inputs(model, batch=1))
    honest = count_macs(model)["honest"]
    sums = honest.get("normalizer", 0) / 2                  # additions, which PyTorch leaves out
    assert sum(honest.values()) - sums == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)
