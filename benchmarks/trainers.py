"""What training.py compares: one step of distillation, from audio to updated weights, with each engine.

Teacher: WavLM Base with random weights, run in evaluation as far as its last target. Student: the preset, with
its dropouts. A trainer is driven as peers.py's engines are: run() makes one step. take() takes the audio alone,
prepare() computes the loss of the first weights too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peers import checkpoint

TEACHER, STUDENT = "wavlm_base", "gendistiller"
LR, CLIP = 2e-4, 5.0


class Ours:
    precision = teacher_precision = "float32"
    package = "gendistiller_ext"

    def __init__(self, folder: Path, model: str, threads: int) -> None:
        import gendistiller_ext as gd

        self.threads, self.steps = threads, 0
        self.teacher, self.student = (gd.Model.load(checkpoint(folder, name)) for name in (TEACHER, model))
        self.layers = self.student.config.target_layers
        self.optimizer = gd.AdamW(self.student, lr=LR, clip=CLIP)
        self.grads = np.zeros(self.student.num_params, np.float32)

    def step(self, dropout: tuple[int, int, int] | None):
        hidden, _ = self.teacher.forward(self.wavs, num_layers=max(self.layers), states=list(self.layers),
                                         precision=self.teacher_precision, num_threads=self.threads)
        self.grads[:] = 0
        return self.student.distill_step(self.wavs, np.stack(hidden), dropout_seed=dropout, into=self.grads,
                                         precision=self.precision, num_threads=self.threads)

    def take(self, wavs: np.ndarray) -> None:
        self.wavs, self.first = wavs, float("nan")

    def prepare(self, wavs: np.ndarray) -> None:
        self.take(wavs)
        self.first = self.step(None).loss

    def run(self) -> list:
        self.steps += 1
        self.step((0, self.steps, 0))
        self.optimizer.step(self.grads)
        return [self.first]


class OursBfloat16(Ours):
    precision = teacher_precision = "bfloat16"


class OursInt8Teacher(OursBfloat16):
    teacher_precision = "int8"


def s3prl_model(config):
    """S3PRL's WavLM of this config: `encoder_layers` blocks over its extractor."""
    from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

    fields = {name: getattr(config, name) for name in vars(WavLMConfig()) if hasattr(config, name)}
    return WavLM(WavLMConfig({**fields, "conv_feature_layers": repr(list(config.conv_feature_layers))}))


def s3prl_student(config):
    """The student in S3PRL's modules: WavLM with one block, which is applied once a target, and the output layer."""
    import torch
    from torch import nn

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wavlm = s3prl_model(config)
            dim = config.encoder_embed_dim
            self.output_layer = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

        def forward(self, wavs):
            wavlm = self.wavlm
            f = wavlm.post_extract_proj(wavlm.layer_norm(wavlm.feature_extractor(wavs).transpose(1, 2)))
            h = wavlm.encoder.layer_norm(f + wavlm.encoder.pos_conv(f.transpose(1, 2)).transpose(1, 2))
            h = nn.functional.dropout(h, config.dropout, self.training).transpose(0, 1)
            states, bias = [], None
            for _ in config.target_layers:
                z, _, bias = wavlm.encoder.layers[0](h, pos_bias=bias)
                h = self.output_layer(z + h)
                states.append(h.transpose(0, 1))
            return torch.stack(states)

    return Student()


class S3prl:
    """PyTorch, eager: S3PRL's WavLM as the teacher, its modules as the student, torch's AdamW."""

    precision = "float32"
    package = "s3prl"

    def __init__(self, folder: Path, model: str, threads: int) -> None:
        import gendistiller_ext as gd
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        teacher, student = (gd.Model.load(checkpoint(folder, name)) for name in (TEACHER, model))
        self.layers = student.config.target_layers
        self.teacher, self.student = s3prl_model(teacher.config).eval(), s3prl_student(student.config)
        self.teacher.load_state_dict({name: torch.tensor(value) for name, value in teacher.params.items()},
                                     strict=False)
        named = {name if name.startswith("output_layer") else f"wavlm.{name}": torch.tensor(value)
                 for name, value in student.params.items()}
        left = self.student.load_state_dict(named, strict=False)
        if left.unexpected_keys or set(left.missing_keys) - {"wavlm.mask_emb"}:
            raise ValueError(f"state_dict: {left}")
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LR)

    def loss(self):
        torch, functional = self.torch, self.torch.nn.functional
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            with torch.no_grad():
                _, results = self.teacher.extract_features(self.wavs, output_layer=max(self.layers),
                                                           ret_layer_results=True)[0]
                target = torch.stack([results[layer][0].transpose(0, 1) for layer in self.layers])
            pred = self.student(self.wavs)
        pred, target = pred.float(), target.float()
        cosine = functional.logsigmoid(functional.cosine_similarity(pred, target, dim=-1))
        return functional.l1_loss(pred, target) - cosine.mean()

    def take(self, wavs: np.ndarray) -> None:
        self.wavs, self.first = self.torch.from_numpy(wavs), float("nan")
        self.student.train()

    def prepare(self, wavs: np.ndarray) -> None:
        self.take(wavs)
        self.student.eval()
        with self.torch.no_grad():
            self.first = float(self.loss())
        self.student.train()

    def run(self) -> list:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.optimizer.step()
        return [self.first]


class S3prlBfloat16(S3prl):
    precision = "bfloat16"


TRAINERS = {
    "gendistiller": Ours,
    "PyTorch": S3prl,
    "gendistiller bfloat16": OursBfloat16,
    "PyTorch bfloat16": S3prlBfloat16,
    "gendistiller bfloat16 + int8 teacher": OursInt8Teacher,
}
