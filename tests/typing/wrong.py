"""What mypy must refuse: each line that ends in "error: CODE" for that reason, and no other line."""
import numpy as np

import gendistiller_ext as gd
from gendistiller_ext.stream import Stream

model = gd.Model(gd.Config())
wav = np.zeros(16000, np.float32)
words: "np.ndarray[tuple[int, int], np.dtype[np.int16]]" = np.zeros((1, 16000), np.int16)

gd.Model("{}")  # error: arg-type
gd.Model(gd.Config(), device=0)  # error: arg-type
gd.Config(widht=768)  # error: call-arg
model.forward(wav, precision="float16")  # error: arg-type
model.forward(wav, None, 2)  # error: call-arg
model.forward(wav, threads=2)  # error: call-arg
model.forward(words)  # error: arg-type
model.forward([wav])[2]  # error: misc
model.backward([wav])  # error: call-arg
model.distill_step([wav], wav, loss_type="l3")  # error: arg-type
model.distill_step([wav], wav, reduction="max")  # error: arg-type
model.precision = "half"  # error: assignment
model.num_params = 3  # error: misc
model.save("x.safetensors", dtype="float16")  # error: arg-type
model.stream(2, 1, "moving")  # error: arg-type
model.tensors[0].name = "x"  # error: misc
gd.AdamW(gd.Config())  # error: arg-type
gd.AdamW(model, variant="sgd")  # error: arg-type
gd.distill_loss(wav)  # error: call-arg
gd.num_frames(gd.Config(), 1.5)  # error: call-overload
gd.cpu_features().append("avx")  # error: attr-defined
Stream(gd.Config(), 2, 1)  # error: arg-type
gd.no_such_thing  # error: attr-defined
