"""The PyTorch module over a small model, and audio for it: what the tests of gendistiller_ext.torch share."""

from __future__ import annotations

import torch

import gendistiller_ext as gd
from conftest import SEED, SMALL
from gendistiller_ext.torch import GenDistiller
from reference.layout import random_state, random_wavs

LENGTHS = [4000, 400, 2345]
CONFIG = gd.Config(**SMALL)


def wavs_of(lengths=LENGTHS, seed=SEED):
    return [torch.from_numpy(wav) for wav in random_wavs(lengths, seed)]


def module_of(config=CONFIG, seed=SEED, train=False):
    model = gd.Model(config)
    model.load_params(random_state(config, seed))
    return GenDistiller(model).train(train)


def states(module, wavs=None, **options):
    with torch.no_grad():
        return module(wavs_of() if wavs is None else wavs, **options)[0]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


def loss_of(module, wavs=None, **options):
    """A scalar that every state of every valid frame has another share in."""
    hidden, frames = module(wavs_of() if wavs is None else wavs, **options)
    torch.manual_seed(SEED)
    return sum((state * torch.randn(state.shape[-1])).sum() for state in hidden)


def grads_of(module, wavs=None, **options):
    module.zero_grad()
    loss_of(module, wavs, **options).backward()
    return {name: param.grad.clone() for name, param in module.named_parameters() if param.grad is not None}


def in_place(module):
    with torch.no_grad():
        module.get_parameter("encoder.layers.0.fc2.weight").mul_(1.5)
