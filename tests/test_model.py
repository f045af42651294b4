"""The transformer's shell against an independent reading of DiT, the family of models, and their cost."""
import dataclasses
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dydilit
from dydilit import LADDER, MODELS, ModelConfig, build_model
from lab import eq8
from lab.cost import PAPER_GFLOPS, count_macs

TINY = dict(dim=32, depth=2, image_size=64, n_classes=5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomized(model):
    """AdaLN-Zero starts as the identity, and banks with equal entries: random weights make every part speak."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and p.dim() > 1:
                p.normal_(std=0.2)
            elif name.endswith(("gammas", "lambdas")):
                p.mul_(1 + torch.rand_like(p))
    return model.eval()


def inputs(model, batch=3):
    cfg = model.cfg
    return (torch.randn(batch, cfg.in_channels, cfg.input_size, cfg.input_size), torch.randint(0, 1000, (batch,)),
            torch.randint(0, cfg.n_classes + 1, (batch,)))


def dit_state(dim, depth, patch, channels, classes, side):
    """The parameters of a facebookresearch/DiT checkpoint by name and shape."""
    state = {"pos_embed": (1, (side // patch) ** 2, dim), "x_embedder.proj.weight": (dim, channels, patch, patch),
             "x_embedder.proj.bias": (dim,), "t_embedder.mlp.0.weight": (dim, 256), "t_embedder.mlp.0.bias": (dim,),
             "t_embedder.mlp.2.weight": (dim, dim), "t_embedder.mlp.2.bias": (dim,),
             "y_embedder.embedding_table.weight": (classes + 1, dim)}
    for i in range(depth):
        for name, rows, columns in [("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim), ("mlp.fc1", 4 * dim, dim),
                                    ("mlp.fc2", dim, 4 * dim), ("adaLN_modulation.1", 6 * dim, dim)]:
            state[f"blocks.{i}.{name}.weight"], state[f"blocks.{i}.{name}.bias"] = (rows, columns), (rows,)
    rows = patch * patch * 2 * channels
    state.update({"final_layer.linear.weight": (rows, dim), "final_layer.linear.bias": (rows,),
                  "final_layer.adaLN_modulation.1.weight": (2 * dim, dim),
                  "final_layer.adaLN_modulation.1.bias": (2 * dim,)})
    return state


def dit_forward(w, x, t, y, depth, heads, patch):
    """DiT's forward pass on its parameters, one image at a time, from the paper and its public conventions."""
    dim, outputs = w["pos_embed"].shape[2], []
    for image, time, label in zip(x, t, y):
        c, side = image.shape[0], image.shape[1] // patch
        tokens = []
        for row in range(side):
            for column in range(side):
                patch_pixels = image[:, row * patch:(row + 1) * patch, column * patch:(column + 1) * patch]
                tokens.append(w["x_embedder.proj.weight"].reshape(dim, -1) @ patch_pixels.reshape(-1)
                              + w["x_embedder.proj.bias"])
        h = torch.stack(tokens) + w["pos_embed"][0]
        # DiT's frequencies are float32: at t = 950 their rounding reaches the fourth digit of the sinusoids.
        angles = time.float() * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        e = torch.cat([angles.cos(), angles.sin()]).to(x.dtype)
        e = F.silu(w["t_embedder.mlp.0.weight"] @ e + w["t_embedder.mlp.0.bias"])
        e = w["t_embedder.mlp.2.weight"] @ e + w["t_embedder.mlp.2.bias"]
        e = F.silu(e + w["y_embedder.embedding_table.weight"][label])

        def norm(z):
            return (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        for i in range(depth):
            def linear(name, z, b=f"blocks.{i}."):
                return z @ w[b + name + ".weight"].T + w[b + name + ".bias"]
            shift1, scale1, gate1, shift2, scale2, gate2 = linear("adaLN_modulation.1", e).split(dim)
            q, k, v = linear("attn.qkv", norm(h) * (1 + scale1) + shift1).split(dim, dim=1)
            width, out = dim // heads, []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                out.append(((q[:, part] @ k[:, part].T) / math.sqrt(width)).softmax(1) @ v[:, part])
            h = h + gate1 * linear("attn.proj", torch.cat(out, 1))
            z = linear("mlp.fc1", norm(h) * (1 + scale2) + shift2)
            z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
            h = h + gate2 * linear("mlp.fc2", z)
        shift, scale = (w["final_layer.adaLN_modulation.1.weight"] @ e
                        + w["final_layer.adaLN_modulation.1.bias"]).split(dim)
        h = (norm(h) * (1 + scale) + shift) @ w["final_layer.linear.weight"].T + w["final_layer.linear.bias"]
        output = torch.zeros(2 * c, side * patch, side * patch, dtype=x.dtype)
        for n in range(side * side):
            row, column = n // side, n % side
            output[:, row * patch:(row + 1) * patch, column * patch:(column + 1) * patch] = (
                h[n].view(patch, patch, 2 * c).permute(2, 0, 1))
        outputs.append(output)
    return torch.stack(outputs)


def test_dit_checkpoints_load_strictly_and_give_dits_outputs():
    shapes = dit_state(dim=24, depth=2, patch=2, channels=4, classes=5, side=8)
    state = {name: torch.randn(shape, dtype=torch.float64) * 0.3 for name, shape in shapes.items()}
    model = build_model("DiT-S/2", **{**TINY, "dim": 24, "n_heads": 3}).double().eval()
    model.load_state_dict(state, strict=True)
    x, t, y = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([3, 950]), torch.tensor([1, 5])
    torch.testing.assert_close(model(x, t, y), dit_forward(state, x, t, y, 2, 3, 2), rtol=1e-5, atol=1e-5)


def test_dit_names_at_the_size_of_the_public_checkpoint():
    with torch.device("meta"):
        model = build_model("DiT-L/2", dim=1152, depth=28, n_heads=16)
    shapes = dit_state(dim=1152, depth=28, patch=2, channels=4, classes=1000, side=32)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == shapes


def test_positions_are_sines_and_cosines_of_column_then_row():
    positions = dydilit.position_embedding(16, 3)[0]
    for n in range(9):
        for half, place in enumerate([n % 3, n // 3]):
            for k in range(4):
                angle = place / 10000 ** (k / 4)
                assert positions[n, 8 * half + k] == pytest.approx(math.sin(angle), abs=1e-6)
                assert positions[n, 8 * half + 4 + k] == pytest.approx(math.cos(angle), abs=1e-6)


def test_label_dropout_uses_the_last_row_at_a_rate_of_0_1():
    embedder = build_model("DyDi-LiT-XS/4").y_embedder
    assert embedder.embedding_table.num_embeddings == 11
    with torch.no_grad():
        dropped = (embedder(torch.zeros(20_000, dtype=torch.long)) == embedder.embedding_table.weight[10]).all(1)
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.01)
    assert not (embedder.eval()(torch.zeros(100, dtype=torch.long)) == embedder.embedding_table.weight[10]).all(1).any()


def test_mix_ffn_is_expand_convolve_gate_contract():
    ffn = dydilit.MixFFN(4).double()
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    h = F.silu(ffn.expand(x)).view(3, 3, 32).permute(2, 0, 1)[None]
    h = F.conv2d(h, ffn.depthwise.weight, ffn.depthwise.bias, padding=1, groups=32)[0].permute(1, 2, 0).reshape(9, 32)
    torch.testing.assert_close(ffn(x)[0], (h[:, :16] * F.silu(h[:, 16:])) @ ffn.contract.weight.T)


def test_blocks_start_as_the_identity_and_the_model_at_zero():
    model = build_model("DyDi-LiT-S/2", **TINY)
    x = torch.randn(2, 16, 32)
    assert torch.equal(model.blocks[0](x, torch.randn(2, 32)), x)
    assert (model(*inputs(model)) == 0).all()


@pytest.mark.parametrize("label, overrides", LADDER + [("map", dict(differential="map")), ("heads", dict(n_heads=4))])
def test_every_rung_runs_and_every_parameter_learns(label, overrides):
    model = randomized(build_model("DyDi-LiT-S/2", **TINY, **overrides))
    out = model(*inputs(model))
    assert out.shape == (3, 8, 8, 8) and out.isfinite().all()
    out.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


def test_first_rung_is_sana():
    """Its attention, put together here: ReLU on shared projections, and Eq. 4 query by query."""
    attn = build_model("Sana-S/2", **TINY).double().blocks[0].attn
    x = torch.randn(1, 16, 32, dtype=torch.float64)
    q, k, v = (x[0] @ w.T for w in attn.qkv.weight.split(32))
    weights = torch.stack([torch.stack([(a.relu() * b.relu()).sum() for b in k]) for a in q])
    want = torch.stack([row @ v / row.sum() for row in weights])
    torch.testing.assert_close(attn(x)[0], attn.proj(want))


def test_rung_4_attends_with_the_routed_pair():
    attn = dydilit.LinearAttention(ModelConfig(dim=8, **dict(LADDER[3][1]))).double()
    x = torch.randn(1, 16, 8, dtype=torch.float64)
    q, k = attn.kernel(*attn.projection(x))
    want = dydilit.linear_attention(q, k, x @ attn.qkv.weight.T)
    torch.testing.assert_close(attn(x), attn.proj(want))


def test_lambda_initializations_of_table_6():
    for init, want in [((0.01, 0.01), [0.01] * 4), ((0.2, 0.8), [0.2, 0.4, 0.6, 0.8])]:
        model = build_model("DyDi-LiT-S/2", **{**TINY, "depth": 4}, lambda_init=init)
        got = [block.attn.differential.lambdas.unique().item() for block in model.blocks]
        assert got == pytest.approx(want)


@pytest.mark.parametrize("size, dim, n_p", [("S", 384, 3), ("B", 512, 5), ("L", 768, 7)])
def test_sizes_of_the_paper(size, dim, n_p):
    def config(name):
        return ModelConfig(**MODELS[f"{name}-{size}/2"])
    ours = config("DyDi-LiT")
    assert (ours.dim, ours.depth, ours.n_heads, ours.n_projectors, ours.n_gammas, ours.n_lambdas) == (
        dim, 9, 1, n_p, 3 * n_p, 3 * n_p)
    assert (config("Sana").dim, config("Sana").depth, config("DiT").dim, config("DiT").depth) == (dim, 9, dim, 12)


def test_fused_model_gives_the_same_images():
    model = randomized(build_model("DyDi-LiT-S/2", **TINY))
    batch = inputs(model)
    before, count = model(*batch), sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(model.fuse()(*batch), before)
    assert count - sum(p.numel() for p in model.parameters()) == 2 * 6 * 32       # two blocks, 3 + 3 weights a channel


def test_guidance():
    model = randomized(build_model("DyDi-LiT-S/2", **TINY))
    x, t, y = inputs(model.double())
    x = x.double()
    with_class, without = model(x, t, y), model(x, t, torch.full_like(y, 5))
    assert torch.equal(model.forward_with_cfg(x, t, y, 1), with_class)
    got = model.forward_with_cfg(x, t, y, 3.5)
    torch.testing.assert_close(got[:, :4], without[:, :4] + 3.5 * (with_class[:, :4] - without[:, :4]))
    torch.testing.assert_close(got[:, 4:], with_class[:, 4:])


@pytest.mark.parametrize("fields, message", [
    (dict(kernel="gauss"), "kernel='gauss' is not one of ('relu', 'focused', 'dynamic')"),
    (dict(image_size=250), "image_size=250 is not a multiple of vae_factor x patch_size = 8 x 2"),
    (dict(dim=30), "dim=30 is not a multiple of 4"), (dict(n_heads=5), "n_heads=5"),
    (dict(dynamic_projection=False), "needs kernel='dynamic' and dynamic_projection=True"),
    (dict(kernel="relu"), "needs kernel='dynamic' and dynamic_projection=True"),
    (dict(differential="none"), "dwc=True needs a differential"),
    (dict(depth=0), "depth=0 is not a positive integer"), (dict(n_projectors="3"), "n_projectors='3' is not a positive")])
def test_impossible_configurations_are_named(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**fields)


def test_unknown_model_and_wrong_input_are_named():
    with pytest.raises(ValueError, match="no model 'DiT-XXL'; choose one of DiT-S/2"):
        build_model("DiT-XXL")
    model = build_model("DyDi-LiT-XS/4")
    with pytest.raises(ValueError, match=r"the input is \(3, 16, 16\) and not \(3, 32, 32\)"):
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))


def compiled(model, batch):
    """The model's output when torch.compile has traced it, up to the code that it would generate, and its graphs."""
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)
    torch._dynamo.reset()
    return torch.compile(model, backend=backend)(*batch), len(graphs)


def gradients(model, out):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(out.float().square().mean(), parameters)])


@pytest.mark.parametrize("name, overrides", [
    ("Sana-S/2", {}), ("DyDi-LiT-S/2", {}),
    pytest.param("DyDi-LiT-S/2", dict(differential="map", n_heads=4), marks=pytest.mark.slow)])
def test_compiling_changes_neither_outputs_nor_gradients(name, overrides):
    model = randomized(build_model(name, **{**TINY, "depth": 1, **overrides}))
    batch = inputs(model)
    want, (got, _) = model(*batch), compiled(model, batch)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(model, got), gradients(model, want), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("label, overrides", LADDER)
def test_models_can_be_pickled(label, overrides):
    model = randomized(build_model("DyDi-LiT-S/2", **TINY, **overrides))
    batch = inputs(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(*batch), model(*batch))


def test_a_caller_can_hand_in_another_attention():
    def parts(cfg, i):
        attention, feed_forward = dydilit.block_parts(cfg, i)
        return (torch.nn.Identity() if i else attention), feed_forward
    model = build_model("DyDi-LiT-S/2", parts, **TINY)
    assert isinstance(model.blocks[0].attn, dydilit.DyDiLA) and isinstance(model.blocks[1].attn, torch.nn.Identity)
    assert randomized(model)(*inputs(model)).isfinite().all()


# ---- cost ----

@pytest.mark.parametrize("name, overrides, printed", [row for row in PAPER_GFLOPS if row[2]])
def test_gflops_of_the_papers_tables(name, overrides, printed):
    with torch.device("meta"):
        model = build_model(name, **overrides)
    assert sum(count_macs(model)["paper"].values()) / 1e9 == pytest.approx(printed, rel=0.005)


@pytest.mark.parametrize("name, overrides", [("DiT-S/2", {}), ("Sana-S/2", {}), ("DyDi-LiT-S/2", {}),
                                             ("DyDi-LiT-S/2", dict(image_size=512)),
                                             ("DyDi-LiT-S/2", dict(differential="map")), ("DyDi-LiT-S/2", LADDER[3][1]),
                                             ("DyDi-LiT-S/2", dict(parts=eq8.parts_with("mass"))),
                                             ("DyDi-LiT-S/2", dict(n_heads=6, image_size=512))])
def test_honest_count_is_what_runs(name, overrides):
    """Against PyTorch's own count of the operations that a forward pass performs."""
    model = build_model(name, **{**overrides, "depth": 2})
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(*inputs(model, batch=1))
    honest = count_macs(model)["honest"]
    sums = honest.get("normalizer", 0) / 2                  # of keys: additions, which PyTorch does not count
    assert sum(honest.values()) - sums == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)


def test_count_takes_another_image_size():
    with torch.device("meta"):
        small, large = build_model("DyDi-LiT-L/2"), build_model("DyDi-LiT-L/2", image_size=512)
    assert count_macs(small, 512) == count_macs(large)


def test_config_survives_json():
    import json
    cfg = ModelConfig(lambda_init=(0.2, 0.8))
    assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg
