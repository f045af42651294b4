"""The tests are of the CPU, where runs repeat bit for bit; CUDA_VISIBLE_DEVICES=0 pytest takes them to a GPU."""
import os
import pathlib
import sys

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
