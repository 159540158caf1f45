"""Distillation in S3PRL's own trainer: its data, optimiser, schedule and checkpoints, our forward and backward.

Beside states-STEP.ckpt, from which S3PRL resumes, EXPDIR gets student.safetensors, for `-u gendistiller -k`.
"""
from __future__ import annotations

import os
from typing import Any, Union

import numpy as np
import torch
import yaml
from pretrain.bucket_dataset import WaveDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gendistiller_ext as gd
from gendistiller_ext.audio.files import AudioFile
from gendistiller_ext.training.data import read_files
from gendistiller_ext.student import student_config
from gendistiller_ext.training.teachers import load_teacher
from gendistiller_ext.torch import GenDistiller

STATE = "GenDistiller"
STUDENT_OPTIONS = ("preset", "init_from_teacher")
LOSS_OPTIONS = ("lam", "loss_type", "feat_pen_loss", "history", "detach_history")


class Waves(WaveDataset):
    """Batches of S3PRL's bucket CSVs: (wavs (B, N), the same, lengths (B,), mask (B, N))."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        root = self.libri_root or ""
        batch = read_files([AudioFile(name, os.path.join(root, name)) for name in self.X[index]])
        for error in batch.failed:
            raise error
        wavs = [torch.from_numpy(self._sample(wav)) for wav in batch.wavs]
        lengths = torch.tensor([len(wav) for wav in wavs])
        padded = nn.utils.rnn.pad_sequence(wavs, batch_first=True)
        return padded, padded, lengths, (torch.arange(padded.shape[1]) < lengths[:, None]).float()


class _Distil(torch.autograd.Function):
    """The engine's forward, loss and backward are one call: the gradient is there when the loss is."""

    @staticmethod
    def forward(ctx, step, tensors, *params):
        result = step()
        flat = torch.from_numpy(result.flat_grads)
        ctx.pieces = [flat.narrow(0, tensor.offset, tensor.size).view(param.shape)
                      for tensor, param in zip(tensors, params)]
        ctx.devices = [param.device for param in params]
        return torch.tensor(result.loss, dtype=torch.float32, device=params[0].device)

    @staticmethod
    def backward(ctx, grad):
        scale = float(grad)
        return (None, None, *(piece.mul(scale).to(device) for piece, device in zip(ctx.pieces, ctx.devices)))


class UpstreamPretrainExpert(nn.Module):
    """What run_pretrain.py's Runner drives. upstream_config: a YAML file like config_model.yaml, or its content.

    The kernels run on the CPU in float32; multi_gpu is refused.
    """

    def __init__(self, datarc: dict, upstream_config: Union[str, dict], device: str = "cpu",
                 multi_gpu: bool = False, **kwargs: Any) -> None:
        super().__init__()
        if multi_gpu:
            raise ValueError("multi_gpu: expected False: gendistiller's kernels run on the CPU")
        if isinstance(upstream_config, str):
            with open(upstream_config, encoding="utf-8") as stream:
                upstream_config = yaml.safe_load(stream)
        self.datarc, self.upstream_config, self.device = datarc, upstream_config, device
        if not upstream_config.get("teacher"):
            raise ValueError("teacher: expected a checkpoint or s3prl:NAME in the upstream's config (-g), got none")
        student = dict(upstream_config.get("student") or {})
        options = {name: student.pop(name) for name in STUDENT_OPTIONS if name in student}
        self.loss_options = dict(upstream_config.get("loss") or {})
        unknown = set(self.loss_options) - set(LOSS_OPTIONS)
        if unknown:
            raise ValueError(f"loss: expected {', '.join(LOSS_OPTIONS)}, got {', '.join(sorted(unknown))}")
        self.teacher = load_teacher(upstream_config["teacher"])
        config = student_config(options.get("preset", "gendistiller"), self.teacher.config, student)
        model = gd.Model(config, seed=torch.initial_seed() % 2 ** 63)
        if options.get("init_from_teacher", True):
            self.teacher.initialise(model)
        self.model = GenDistiller(model)
        self.minimum = config.min_samples

    def get_train_dataloader(self) -> DataLoader:
        dataset = Waves(self.upstream_config["task"], self.datarc["train_batch_size"],
                        **{name: self.datarc[name] for name in ("file_path", "sets", "max_timestep", "libri_root")
                           if name in self.datarc})
        return DataLoader(dataset, batch_size=1, shuffle=True, num_workers=self.datarc["num_workers"],
                          collate_fn=dataset.collate_fn)

    def forward(self, data: tuple, records: dict = {}, global_step: int = 0, log_step: int = 1000,
                **kwargs: Any) -> tuple[Tensor, dict]:
        """data: a batch of the loader. The loss, whose backward gives the student its gradient; records get the
        feature penalty, each layer's l1 and cosine where the step is logged."""
        padded, _, lengths, _ = data
        wavs = [np.pad(wav[:length].numpy(), (0, max(0, self.minimum - int(length))))
                for wav, length in zip(padded, lengths)]
        config, model = self.model.config, self.model.model
        targets, _ = self.teacher.targets(wavs, config.target_layers)
        seed = (*torch.randint(2 ** 62, (2,)).tolist(), 0) if self.training else None
        result = None

        def step() -> Any:
            nonlocal result
            result = model.distill_step(wavs, targets, dropout_seed=seed, **self.loss_options)
            return result
        params = [self.model.get_parameter(tensor.name) for tensor in model.tensors]
        loss = _Distil.apply(step, model.tensors, *params)
        if global_step % log_step == 0:
            records["feature_penalty"] = result.feature_penalty
            for layer, l1, similarity in zip(config.target_layers, result.l1, result.similarity):
                records[f"l1_{layer}"], records[f"similarity_{layer}"] = float(l1), float(similarity)
        return loss, records

    def log_records(self, records: dict, logger: Any, prefix: str, global_step: int, **kwargs: Any) -> None:
        for name, value in records.items():
            logger.add_scalar(f"{prefix}{name}", value, global_step=global_step)

    def add_state_to_save(self, all_states: dict) -> dict:
        all_states[STATE] = {name: value.cpu() for name, value in self.model.state_dict().items()}
        all_states["Upstream_Config"] = self.upstream_config
        expdir = getattr(all_states.get("Args"), "expdir", None)
        if expdir:
            self.model.save(os.path.join(expdir, "student.safetensors"))
        return all_states

    def load_model(self, all_states: dict) -> None:
        self.model.load_state_dict(all_states[STATE])

    def on_before_zero_grad(self) -> None:
        pass
