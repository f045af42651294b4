"""The tests are of the CPU, where runs repeat bit for bit; CUDA_VISIBLE_DEVICES=0 pytest takes them to a GPU."""
import os
import pathlib
import sys

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
