"""For type checkers only: `callbacks/` is installed as `gradflow.callbacks`."""
from callbacks import *  # noqa: F403
