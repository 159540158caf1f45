"""What a user may write: mypy finds nothing."""
from __future__ import annotations

from typing import Optional

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import gendistiller_ext as gd
from gendistiller_ext.config import Precision
from gendistiller_ext.stream import Stream, statistics

model = gd.Model(gd.Config(), seed=1, device="cpu")
wav = np.zeros(16000, np.float32)

hidden, frames = model.forward([wav, wav], num_layers=2, precision="bfloat16", states=(0, 1))
assert_type(hidden, "list[NDArray[np.float32]]")
assert_type(frames, NDArray[np.int64])
assert_type(model.config, gd.Config)
assert_type(model.precision, Precision)
assert_type(model.tensors[0].shape, "tuple[int, ...]")
model.precision = None
model.save("student.safetensors", dtype="int8")
assert_type(gd.num_frames(model.config, 16000), int)
gd.num_frames(model.config, np.array([16000]))

targets = np.zeros((2, 1, 49, 768), np.float32)
result: gd.StepResult = model.distill_step([wav], targets, loss_type="l2", history="teacher")
optimizer = gd.AdamW(model, lr=1e-4, betas=(0.9, 0.999), variant="adamw_s3prl")
norm: float = optimizer.step(result.flat_grads, num_threads=2)
optimizer.load_state(optimizer.state())
loss, l1, cos, grad = gd.distill_loss(hidden[1][None], hidden[0][None], frames, reduction="sum")
gradient: np.ndarray = model.backward([wav], [None, hidden[1]], into=result.flat_grads)

stream: Stream = model.stream(2, 1, "fixed", statistics=statistics(model, [wav]))
state: Optional[np.ndarray] = stream.feed(wav)[0] if stream.frames else None
try:
    gd.Model.load("x.pt", device="cuda")
except gd.DeviceError as error:
    print(error, gd.cpu_features()[-1], gd.devices()[0], gd.__version__)
