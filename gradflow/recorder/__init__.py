"""What runs in a sampled training step: taps on the joins that were found, one buffer on the device, one transfer."""

from gradflow.recorder.recorder import Recorder

__all__ = ["Recorder"]
