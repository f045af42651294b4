"""train.py with a differential that subtracts nothing: lambda is held at 0. The same commands and flags.

For ladder.py's variant of this name. The model has all weights of rung 5 and starts from the same values.
"""
import pathlib
import sys

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[1:3]]
import dydilit  # noqa: E402
import train  # noqa: E402


class NoDifferential(dydilit.TokenDifferential):
    """Eq. 8 with factors that are 0 and are not trained."""

    @classmethod
    def of(cls, differential):
        """Makes one of a TokenDifferential, in place: a new one would draw random numbers, and all that follows others."""
        differential.__class__ = cls
        differential.lambdas.requires_grad_(False).zero_()
        return differential


def parts(cfg, i):
    """As dydilit.block_parts, but for the differential."""
    attention, mlp = dydilit.block_parts(cfg, i)
    attention.differential = NoDifferential.of(attention.differential)
    return attention, mlp


if __name__ == "__main__":
    train.explained(train.main, None, parts)
