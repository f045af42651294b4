"""Other forms of Eq. 8, and train.py with them. The library divides it by N, which is the form `length`.

    python notebooks/lab/eq8.py none train ...              train.py's commands and flags, but with Eq. 8 as printed
    python notebooks/lab/eq8.py lambda0-mass train ...      and nothing is subtracted: lambda is held at 0
    python notebooks/lab/eq8.py mass sample --run RUN ...   a run's samples need the word that it was trained with

Words: none, length, scaled, rms, mass and differenced, see Divided, each also with lambda0- in front. The weights have the names
and the first values of the library's model.
"""
import pathlib
import sys

import torch
import torch.nn.functional as F

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402


class Divided(dydilit.TokenDifferential):
    """Eq. 7-8, and then a division by what `denominator` names.

    none: nothing, which is Eq. 8 as printed. length: N. scaled: N sqrt(d). rms: each output token's root mean square. mass: Eq. 4's
    denominator of Q and K, see floored_mass. differenced: the sum of the used weights, which may be anything, zero included.
    """
    DENOMINATORS = ("none", "length", "scaled", "rms", "mass", "differenced")

    @classmethod
    def of(cls, differential, denominator):
        """Makes one of a TokenDifferential, in place. A new one would draw random numbers and change all that follow."""
        if not isinstance(differential, dydilit.TokenDifferential) or differential.router_k is None:
            raise ValueError("eq8.py: the model has no token differential, so there is nothing to divide")
        differential.__class__, differential.denominator = cls, denominator
        return differential

    def forward(self, q, q_red, k, k_red, v, n_heads=1):
        lambda_q, lambda_k = self.choose(self.router_q, q, q_red), self.choose(self.router_k, k, k_red)
        q, k, q_red, k_red, v = (dydilit.split_heads(x, n_heads) for x in (q, k, q_red, k_red, v))
        out = dydilit.token_differential(q, q_red, k, k_red, v, lambda_q, lambda_k)
        if self.denominator == "length":
            out = out / q.shape[-2]
        elif self.denominator == "scaled":
            out = out / (q.shape[-2] * q.shape[-1] ** 0.5)
        elif self.denominator == "rms":
            out = F.rms_norm(out, out.shape[-1:], eps=dydilit.EPS)
        elif self.denominator == "mass":
            out = out / self.floored_mass(q, k, q_red, k_red, lambda_q, lambda_k)
        elif self.denominator == "differenced":
            keys = (k - lambda_k * k_red).sum(dim=-2, keepdim=True)
            used = (q - lambda_q * q_red) @ keys.transpose(-2, -1)
            out = out / torch.where(used.abs() < 1e-6, 1e-6, used)
        return dydilit.merge_heads(out)

    def floored_mass(self, q, k, q_red, k_red, lambda_q, lambda_k):
        """Eq. 4's denominator for Q and K, but at least a tenth of the one with Q', K' added. Returns (B, h, N, 1).

        The tenth is our choice. It matters where Q is near zero and Q' is not.
        """
        with torch.no_grad():
            keys = (k + lambda_k.abs() * k_red).sum(dim=-2, keepdim=True)           # (B, h, 1, d/h)
            total = dydilit.attention_mass(q + lambda_q.abs() * q_red, keys)
        return torch.maximum(dydilit.attention_mass(q, k), total / 10)


WORDS = [prefix + name for prefix in ("", "lambda0-") for name in Divided.DENOMINATORS]


def parts_with(word):
    """dydilit.block_parts with the form of Eq. 8 that a word of WORDS names."""
    def parts(cfg, i):
        attention, mlp = dydilit.block_parts(cfg, i)
        Divided.of(getattr(attention, "differential", None), word.removeprefix("lambda0-"))
        if word.startswith("lambda0-"):
            attention.differential.lambdas.requires_grad_(False).zero_()
        return attention, mlp
    return parts


if __name__ == "__main__":
    import train
    if len(sys.argv) < 2 or sys.argv[1] not in WORDS:
        sys.exit(f"eq8.py: the first word must be one of {', '.join(WORDS)}")
    train.explained(train.main, sys.argv[2:], parts_with(sys.argv[1]))
