"""What the notebooks share, in one import: the library, the pictures, the example, timing, and the check of answers.

A notebook's first cell, `from lab.helpers import *`, brings np, math, torch, F, plt, dydilit, cost and all names below
and in figures.py and example.py. Nothing of the method is here.
"""
import math  # noqa: F401
import statistics
import time
import weakref

import matplotlib.pyplot as plt  # noqa: F401
import numpy as np
import torch
import torch.nn as nn  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dydilit  # noqa: F401
from lab import cost  # noqa: F401
from lab.example import *  # noqa: F403
from lab.figures import *  # noqa: F403
from lab.measures import row_entropy, row_variance  # noqa: F401

if torch.cuda.is_available():
    torch.set_default_device("cuda")        # every tensor that a notebook makes is made there
torch.manual_seed(0)                        # a notebook run from the top draws the same numbers every time


def check(number, answer, expected, tolerance=1e-3):
    """Says whether an exercise's answer is right. answer, expected: numbers, tensors, strings or lists; ... is none."""
    if answer is ...:
        return print(f"Exercise {number}: not answered yet. Put your answer in place of the ... above.")
    try:
        right = (answer == expected if isinstance(expected, str) else
                 bool(np.allclose(array(answer), array(expected), rtol=tolerance, atol=tolerance * 1e-2)))
    except (TypeError, ValueError):         # another shape, or no number at all
        right = False
    print(f"Exercise {number}: " + ("right." if right else "not right yet."))


def median_ms(functions, repeats=7):
    """Median milliseconds of each of {name: function}, called in turn so that a busy machine slows all of them."""
    times = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:                           # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


class Allocations(TorchDispatchMode):
    """Bytes of the tensors made within this context and still alive: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for storage in storages((args, kwargs)):
            self.known.add(storage)         # was there before, or was counted when it was made
        out = operation(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage not in self.known:   # neither a view nor an in-place result
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, nbytes):
        self.now -= nbytes


def storages(tree):
    """The memory of all tensors in nested lists and dictionaries."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]
