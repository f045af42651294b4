"""What lesson 6 judges samplers with: the exact denoiser of a mixture, and pictures of points in the plane."""
import math
import types

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import dydilit
from lab.figures import BLACK, BLUE, GREEN, ORANGE, PINK, array, clear, curves

REACH = 2.7                                 # the plane is drawn from -REACH to REACH


class Exact:
    """The best possible denoiser of data that are a mixture of blobs N(centre, s^2 I), called like a DyDiLiT.

    centres: (K, C, H, W); classes: (K,), whose blob it is. One class more, "no class", owns all.
    place: where it says that the variance lies between its bounds, -1 to 1, or "best" for the right one of 1,000 steps.
    """
    forward_with_cfg = dydilit.DyDiLiT.forward_with_cfg     # the library's guidance

    def __init__(self, centres, classes, s, place=-1.0):
        self.mu, self.s, self.place = centres.flatten(1).double(), s, place
        member = F.one_hot(classes).T.double()                              # (classes, K)
        member = torch.cat([member, torch.ones_like(member[:1])])
        self.log_w = (member / member.sum(dim=1, keepdim=True)).log()
        self.cfg = types.SimpleNamespace(n_classes=len(member) - 1, in_channels=centres.shape[1])
        self.betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
        self.alpha_bar = (1 - self.betas).cumprod(0)

    def scores(self, x, t, y):
        """Log-density of noisy x (B, D) at timesteps t (B,), a part for each blob, up to a constant. (B, K)."""
        a = self.alpha_bar[t][:, None]
        v = a * self.s ** 2 + 1 - a
        distance = x.square().sum(dim=1, keepdim=True) - 2 * a.sqrt() * x @ self.mu.T + a * self.mu.square().sum(dim=1)
        return self.log_w[y] - distance / (2 * v) - x.shape[1] / 2 * v.log()

    def __call__(self, x, t, y):
        """x: (B, C, H, W); t, y: (B,). Returns (B, 2C, H, W), the noise and the variance's place."""
        shape, x = x.shape, x.flatten(1).double()
        a = self.alpha_bar[t][:, None]
        v = a * self.s ** 2 + 1 - a
        r = self.scores(x, t, y).softmax(dim=1)                             # (B, K), which blob it came from
        mean = r @ self.mu
        x0 = mean + a.sqrt() * self.s ** 2 / v * (x - a.sqrt() * mean)
        noise = (x - a.sqrt() * x0) / (1 - a).sqrt()
        if self.place == "best":
            spread = (r @ self.mu.square() - mean.square()) * ((1 - a) / v) ** 2 + self.s ** 2 * (1 - a) / v
            place = self.best_place(t, spread)
        else:
            place = torch.full_like(x, self.place)
        return torch.cat([noise.view(shape), place.view(shape)], dim=1)

    def best_place(self, t, spread):
        """The place of the variance of x_{t-1} given x_t, from that of x_0 given x_t. t: (B,); spread: (B, D)."""
        prev = torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])
        low = self.betas * (1 - prev) / (1 - self.alpha_bar)
        low[0] = low[1]
        low, high, prev, a = low[t][:, None], self.betas[t][:, None], prev[t][:, None], self.alpha_bar[t][:, None]
        variance = low + prev * (high / (1 - a)) ** 2 * spread
        return (2 * (variance / low).log() / (high / low).log() - 1).nan_to_num(-1).clamp(-1, 1)

    def log_density(self, x, t, y):
        """ln q(x_t | y) of points. x: (B, D) float64; t, y: numbers. Returns (B,)."""
        t, y = (torch.full((len(x),), number) for number in (t, y))
        return self.scores(x, t, y).logsumexp(dim=1) - x.shape[1] / 2 * math.log(2 * math.pi)

    def draw(self, n, y):
        """n clean points of class y. (n, D) float32."""
        blob = torch.multinomial(self.log_w[y].exp(), n, replacement=True)
        return self.mu[blob].float() + self.s * torch.randn(n, self.mu.shape[1])


def contours(exact, y):
    """The plane's axis (120,) and the density of class y on it, (120, 120), its maximum 1."""
    axis = torch.linspace(-REACH, REACH, 120, dtype=torch.float64)
    density = exact.log_density(torch.cartesian_prod(axis, axis), 0, y).exp().view(120, 120).T
    return array(axis), array(density / density.max())


def plane(ax, exact, title=None):
    """Grey where the data lie: above 5 % and above 50 % of the largest density. exact: an Exact of points (2,)."""
    axis, density = contours(exact, exact.cfg.n_classes)
    ax.contourf(axis, axis, density, levels=[0.05, 0.5, 1.01], colors=["#E4E4E4", "#B8B8B8"], antialiased=False)
    ax.grid(False)
    ax.set(aspect="equal", xticks=[-2, 0, 2], yticks=[-2, 0, 2], xlim=(-REACH, REACH), ylim=(-REACH, REACH))
    ax.set_title(title, fontsize=15)


def panels(n, columns, size=3.0):
    """n axes side by side in rows of `columns`, with common scales."""
    rows = math.ceil(n / columns)
    _, axes = plt.subplots(rows, columns, figsize=(size * columns + 0.3, size * rows + 0.3), sharex=True, sharey=True,
                           squeeze=False)
    return axes.flat


def show_points(points, exact, columns, outlines=None):
    """Points over the density of the data, a panel each. points: {title: (n, 2)}; outlines: each panel's class."""
    for i, (ax, (title, xy)) in enumerate(zip(panels(len(points), columns), points.items())):
        plane(ax, exact, title)
        if outlines is not None:
            axis, density = contours(exact, outlines[i])
            ax.contour(axis, axis, density, levels=[0.05], colors=BLACK, linewidths=2, linestyles="-")
        colour = ORANGE if title.startswith("DDIM") else BLUE if title.startswith("DDPM") else GREEN
        ax.plot(*array(xy).T, "o", markersize=3, markeredgewidth=0, color=colour)
    if outlines is not None:
        handles = [plt.Line2D([], [], linestyle="none", marker="o", markersize=6, color=colour, label="samples"),
                   plt.Line2D([], [], color=BLACK, label="the class, above 5 % of its largest density")]
        ax.figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    plt.show()


def show_steps(arrows, exact):
    """Arrows over the density of the data, a panel each. arrows: {title: (from (n, 2), to (n, 2))}."""
    for ax, (title, (start, end)) in zip(panels(len(arrows), len(arrows), 3.5), arrows.items()):
        plane(ax, exact, title)
        start, step = array(start), array(end - start)
        ax.quiver(*start.T, *step.T, angles="xy", scale_units="xy", scale=1, width=0.006, color=BLUE, zorder=2)
        ax.plot(*start.T, "o", markersize=5, color=ORANGE, zorder=3, label="noisy")
        ax.plot([], [], color=BLUE, linestyle="-", marker=">", label="to the best guess")
        reach = max(REACH, 0.2 + max(abs(array(start)).max() for start, _ in arrows.values()))
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    plt.show()


def show_paths(paths, exact):
    """Paths over the density of the data, a panel each. paths: {title: (steps, n, 2)}."""
    for ax, (title, path) in zip(panels(len(paths), len(paths), 4.8), paths.items()):
        plane(ax, exact, title)
        path = array(path)
        for i, colour in enumerate([BLUE, ORANGE, GREEN, PINK][:path.shape[1]]):
            ax.plot(path[:, i, 0], path[:, i, 1], color=colour, linestyle="-", linewidth=1.6)
            for at, marker, size in [(0, "o", 11), (-1, "s", 12)]:
                ax.plot(*path[at, i], marker, markersize=size, color=colour, markeredgecolor=BLACK, markeredgewidth=2)
        ax.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6))
    for marker, word in [("o", "start"), ("s", "end")]:
        ax.plot([], [], marker, markersize=11, color="white", markeredgecolor=BLACK, markeredgewidth=2, label=word)
    ax.legend(loc="lower right")
    plt.show()


def lines(x, ys, xlabel, ylabel, **settings):
    """curves() without markers, for many points, and without a legend for a single line. Returns the axes."""
    ax = curves(x, ys, xlabel, ylabel, **settings)
    plt.setp(ax.lines, marker="None")
    if len(ys) > 1:
        ax.legend()
    return ax


def show_chain(clean, t=150, T=1000):
    """The chain from a picture to noise, q on the way there and p on the way back. clean: (1, 3, S, S)."""
    alpha_bar = (1 - torch.linspace(1e-4, 2e-2, T)).cumprod(0)
    with torch.random.fork_rng():                                           # the lesson's own noise stays as it is
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
            ax.imshow(array((picture + 1) / 2).clip(0, 1), extent=(x, x + width, -0.65, 0.65), interpolation="nearest")
            ax.text(centre[name], -0.68, f"${name}$", ha="center", va="top", fontsize=18)
        x += width + 0.42
    for one, other in zip(list(centre)[:-1], list(centre)[1:]):
        for (start, end), y, bend, colour in [((one, other), 0.72, -0.35, BLUE), ((other, one), -1.12, -0.35, ORANGE)]:
            ax.annotate("", (centre[end], y), (centre[start], y), annotation_clip=False, arrowprops=dict(
                arrowstyle="-|>", linewidth=2, color=colour, connectionstyle=f"arc3,rad={bend}", shrinkA=2, shrinkB=2, mutation_scale=18))
    middle = (centre["x_{t-1}"] + centre["x_t"]) / 2
    ax.text(middle, 1.12, "$q(x_t\\,|\\,x_{t-1})$ adds noise", ha="center", va="bottom", fontsize=16, color=BLUE)
    ax.text(middle, -1.5, "$p(x_{t-1}\\,|\\,x_t)$ is learned", ha="center", va="top", fontsize=16, color=ORANGE)
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
