"""Tools that the notebooks share and that are no lessons. Importing it lets them find dydilit.py and train.py."""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
