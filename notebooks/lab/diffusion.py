"""Lessons 6 and 7: pictures of the chain and of points in the plane, and the sampler for points."""
import math

import matplotlib.pyplot as plt
import torch

import dydilit
from lab.figures import BLACK, BLUE, GREEN, ORANGE, PINK, array, clear

REACH = 2.7                                 # the plane is drawn from -REACH to REACH


def sample(model, start, steps, sampler="ddpm", path=False):
    """The library's sampler for points or flat pictures. start: (B, D), standard normal.

    model(x_t, t), with t a number, returns the noise (B, D) and o, a number or (B, D). Returns
    (B, D), or with path all x_t, (steps + 1, B, D)."""
    seen = []

    def ask(x, t):
        seen.append(x.flatten(1))
        noise, o = model(seen[-1], t[0].item())
        return torch.cat([noise, torch.zeros_like(noise) + o], dim=1)[..., None, None]

    diffusion = dydilit.GaussianDiffusion().to(start.device)
    end = diffusion.sample(ask, start[..., None, None], steps, sampler, progress=False).flatten(1)
    return torch.stack([*seen, end]) if path else end


# ---- Points in the plane -------------------------------------------------------------------------
# log_density(x, t, y): of points x (B, 2) at timestep t, of class y or of all (None). Returns (B,).

def contours(log_density, t=0, y=None, reach=REACH):
    """The plane's axis (120,) and the density on it, (120, 120), its maximum 1."""
    axis = torch.linspace(-reach, reach, 120, dtype=torch.float64)
    density = log_density(torch.cartesian_prod(axis, axis), t, y).exp().view(120, 120).T
    return array(axis), array(density / density.max())


def plane(ax, log_density, title=None, t=0, reach=REACH):
    """Grey where data with the noise of t lie: above 5 % and 50 % of the largest density."""
    axis, density = contours(log_density, t, None, reach)
    ax.contourf(axis, axis, density, levels=[0.05, 0.5, 1.01], colors=["#E4E4E4", "#B8B8B8"],
                antialiased=False)
    ax.grid(False)
    reaches, ticks = (-reach, reach), [-2, 0, 2]
    ax.set(aspect="equal", xticks=ticks, yticks=ticks, xlim=reaches, ylim=reaches)
    ax.set_title(title, fontsize=15)


def panels(n, columns, size=3.0, below=0.0):
    """n axes side by side in rows of `columns`, with common scales, and inches below them."""
    rows = math.ceil(n / columns)
    figsize = (size * columns + 0.3, (size + 0.25) * rows + 0.4 + below)
    return plt.subplots(rows, columns, figsize=figsize, sharex=True, sharey=True)[1].flat


def show_points(points, log_density, columns, outlines=None):
    """Points over the data, a panel each. points: {title: (n, 2)}; outlines: each panel's class."""
    axes = panels(len(points), columns, below=0.5 * (outlines is not None))
    for i, (ax, (title, xy)) in enumerate(zip(axes, points.items())):
        plane(ax, log_density, title)
        if outlines is not None:
            axis, density = contours(log_density, y=outlines[i])
            ax.contour(axis, axis, density, levels=[0.05], colors=BLACK, linewidths=2)
        colour = {"DDPM": BLUE, "DDIM": ORANGE}.get(title[:4], GREEN)
        ax.plot(*array(xy).T, "o", markersize=3, markeredgewidth=0, color=colour)
    if outlines is not None:
        handles = [plt.Line2D([], [], linestyle="none", marker="o", color=colour),
                   plt.Line2D([], [], color=BLACK)]
        words = ["samples", "the class, above 5 % of its largest density"]
        ax.figure.legend(handles, words, loc="outside lower center", ncols=2, frameon=False)
    plt.show()


def show_steps(arrows, log_density):
    """Arrows over the data, a panel each. arrows: {title: (from (n, 2), to (n, 2))}."""
    axes = panels(len(arrows), len(arrows), 3.5, below=0.5)
    for ax, (title, (start, end)) in zip(axes, arrows.items()):
        plane(ax, log_density, title, reach=3.6)
        start, step = array(start), array(end - start)
        ax.quiver(*start.T, *step.T, angles="xy", scale_units="xy", scale=1, color=BLUE)
        ax.plot(*start.T, "o", markersize=5, color=ORANGE, zorder=3, label="noisy")
        ax.plot([], [], color=BLUE, linestyle="-", marker=">", label="to the best guess")
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    plt.show()


def show_paths(paths, times, i, log_density):
    """Paths as far as step i, over the density of data with that step's noise, a panel each.

    paths: {title: (steps + 1, n, 2)}; times: the timesteps visited, and None for the end."""
    for ax, (title, path) in zip(panels(len(paths), len(paths), 3.1), paths.items()):
        now = "the end" if times[i] is None else f"t = {times[i]}"
        plane(ax, log_density, f"{title}, {now}", times[i] or 0, reach=3.6)
        path = array(path[:i + 1])
        for j, colour in enumerate([BLUE, ORANGE, GREEN, PINK][:path.shape[1]]):
            ax.plot(*path[:, j].T, color=colour, linestyle="-", linewidth=1.6)
            for at, marker in [(0, "o"), (-1, "s")]:
                ax.plot(*path[at, j], marker, markersize=8, color=colour, markeredgecolor=BLACK,
                        markeredgewidth=1.5)
    plt.show()


# ---- Pictures ------------------------------------------------------------------------------------

def show_chain(clean, t=150, T=1000):
    """The chain from a picture to noise, q on the way there, p on the way back. (1, 3, S, S)."""
    alpha_bar = (1 - torch.linspace(1e-4, 2e-2, T)).cumprod(0)
    with torch.random.fork_rng():                           # the lesson's own noise stays as it is
        torch.manual_seed(0)
        noise = torch.randn_like(clean)
    stations = {"x_0": 0, "x_1": 1, "": None, "x_{t-1}": t - 1, "x_t": t, " ": None, "x_T": T}
    ax = plt.subplots(figsize=(11, 3.55))[1]
    x, centre = 0.0, {}
    for name, step in stations.items():
        width = 0.6 if step is None else 1.3
        centre[name] = x + width / 2
        if step is None:
            ax.text(centre[name], 0, "…", ha="center", va="center", fontsize=22)
        else:
            a = alpha_bar[step - 1] if step else torch.tensor(1.0)
            picture = (a.sqrt() * clean + (1 - a).sqrt() * noise)[0].permute(1, 2, 0)
            ax.imshow(array((picture + 1) / 2).clip(0, 1), extent=(x, x + width, -0.65, 0.65),
                      interpolation="nearest")
            ax.text(centre[name], -0.68, f"${name}$", ha="center", va="top", fontsize=18)
        x += width + 0.42
    for one, other in zip(list(centre)[:-1], list(centre)[1:]):
        for start, end, y, colour in [(one, other, 0.72, BLUE), (other, one, -1.12, ORANGE)]:
            ax.annotate("", (centre[end], y), (centre[start], y), annotation_clip=False,
                        arrowprops=dict(arrowstyle="-|>", linewidth=2, color=colour, shrinkA=2,
                                        connectionstyle="arc3,rad=-0.35", shrinkB=2,
                                        mutation_scale=18))
    middle = (centre["x_{t-1}"] + centre["x_t"]) / 2
    ax.text(middle, 1.12, "$q(x_t\\,|\\,x_{t-1})$ adds noise", ha="center", va="bottom",
            fontsize=16, color=BLUE)
    ax.text(middle, -1.5, "$p(x_{t-1}\\,|\\,x_t)$ is learned", ha="center", va="top", fontsize=16,
            color=ORANGE)
    ax.set(xlim=(-0.1, x - 0.3), ylim=(-1.9, 1.5), aspect="equal")
    clear(ax)
    plt.show()


def show_pictures(pictures):
    """Pictures of any size side by side. pictures: {title: (3, S, S) in [-1, 1]}."""
    _, axes = plt.subplots(1, len(pictures), figsize=(3.0 * len(pictures), 3.4))
    for ax, (title, picture) in zip(axes, pictures.items()):
        ax.imshow(array((picture.permute(1, 2, 0) + 1) / 2).clip(0, 1), interpolation="nearest")
        clear(ax)
        ax.set_title(title)
    plt.show()
