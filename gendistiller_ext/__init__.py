"""GenDistiller: distil a large speech encoder into a small generative student, and run it. In C, for NumPy.

    import gendistiller_ext as gd

    model = gd.Model.load("student.safetensors")
    hidden, frames = model.forward([wav, other_wav])    # float32, 16 kHz; states (B, T, D)

Training by hand is `Model.distill_step` and `AdamW`; the command `gendistiller distill` does all of it.
`gendistiller_ext.torch` has the model as a PyTorch module.
"""

from ._core import AdamW, DeviceError, __version__, cpu_features, devices, distill_loss
from .config import Config
from .model import Model, StepResult, num_frames

__all__ = ["AdamW", "Config", "DeviceError", "Model", "StepResult", "__version__", "cpu_features", "devices",
           "distill_loss", "num_frames"]
