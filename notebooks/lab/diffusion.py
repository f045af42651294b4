"""Lesson 7: pictures of points in the plane, and the sampler for points."""
import math

import matplotlib.pyplot as plt
import torch

import dydilit
from lab.figures import BLACK, BLUE, GREEN, ORANGE, PINK, array

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
