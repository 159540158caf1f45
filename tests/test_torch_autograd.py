"""Gradients of the PyTorch module: the reference's; dropout; and torch's machinery around them."""

from __future__ import annotations

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gendistiller_ext as gd
from conftest import SEED, SMALL_TEACHERS
from reference import torch_train
from reference.layout import random_state
from reference.torch_model import Reference
from torch_cases import CONFIG, LENGTHS, grads_of, in_place, loss_of, module_of, same, states, wavs_of

# ---- Backward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [None, 1, 3])
def test_gradients_equal_autograd(num_layers):
    module = module_of()
    ours = grads_of(module, num_layers=num_layers)
    reference = Reference(CONFIG, random_state(CONFIG, SEED), torch.float64, grad=True)
    hidden, _ = reference.forward([wav.numpy() for wav in wavs_of()], num_layers)
    torch.manual_seed(SEED)
    sum((state * torch.randn(state.shape[-1])).sum() for state in hidden).backward()
    theirs = torch_train.gradients(reference)
    whole = np.sqrt(sum((grad ** 2).sum() for grad in theirs.values()))
    assert set(ours) == set(theirs)
    for name, grad in theirs.items():
        difference = np.linalg.norm(ours[name].numpy() - grad)
        assert difference <= 1e-3 * np.linalg.norm(grad) + 2e-7 * whole, name


def test_unused_states_and_frozen_parameters():
    module = module_of()
    hidden, _ = module(wavs_of())
    hidden[0].sum().backward()  # f alone: the block has no part in it
    assert module.get_parameter("post_extract_proj.weight").grad.abs().sum() > 0
    assert module.get_parameter("encoder.layers.0.fc1.weight").grad.abs().sum() == 0
    whole = grads_of(module)
    module.get_parameter("encoder.layers.0.fc1.weight").requires_grad_(False)
    part = grads_of(module)
    assert set(whole) - set(part) == {"encoder.layers.0.fc1.weight"}
    assert all(torch.equal(part[name], whole[name]) for name in part)
    for param in module.parameters():
        param.requires_grad_(False)
    assert not module(wavs_of())[0][0].requires_grad


def test_gradients_add_up():
    module = module_of()
    once = grads_of(module)
    loss_of(module).backward()
    assert all(torch.equal(param.grad, 2 * once[name]) for name, param in module.named_parameters())


def test_write_between_forward_and_backward_is_an_error():
    module = module_of()
    loss = loss_of(module)
    in_place(module)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_graph_outlives_the_module():
    module = module_of()
    expected = grads_of(module)["layer_norm.weight"]
    module.zero_grad()
    param, loss = module.get_parameter("layer_norm.weight"), loss_of(module)
    del module
    loss.backward()
    assert torch.equal(param.grad, expected)


def test_training_equals_pytorch():
    """Three steps of the same optimiser, here and on the reference in float64."""
    module = module_of()
    reference = Reference(CONFIG, random_state(CONFIG, SEED), torch.float64, grad=True)
    ours = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    theirs = torch.optim.SGD(reference.params.values(), lr=1e-3, momentum=0.9)
    curve, expected = [], []
    for _ in range(3):
        loss = sum(state.square().mean() for state in module(wavs_of())[0])
        ours.zero_grad()
        loss.backward()
        ours.step()
        curve.append(loss.item())
        hidden, _ = reference.forward([wav.numpy() for wav in wavs_of()])
        loss = sum(state.square().mean() for state in hidden)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        expected.append(loss.item())
    np.testing.assert_allclose(curve, expected, rtol=1e-5)
    assert curve[-1] < curve[0]
    for name, param in module.named_parameters():
        np.testing.assert_allclose(param.detach().numpy(), reference.params[name].detach().numpy(), atol=2e-6)


def test_teachers_run_forward_only():
    module = module_of(gd.Config(**SMALL_TEACHERS["wavlm"]))
    assert len(states(module)) == 4 and len(states(module, num_layers=2)) == 3
    with pytest.raises(NotImplementedError, match="encoder"):
        loss_of(module).backward()


# ---- Dropout -----------------------------------------------------------------------------------------------


def test_dropout_when_training():
    module = module_of(train=True)
    plain = states(module)  # no gradients wanted: none
    assert same(plain, states(module.eval()))
    module.train()
    torch.manual_seed(1)
    first, second = (module(wavs_of())[0] for _ in range(2))
    assert not same(first, plain) and not same(first, second)
    torch.manual_seed(1)
    assert same(module(wavs_of())[0], first)
    for param in module.parameters():
        param.requires_grad_(False)
    assert same(module(wavs_of())[0], plain)


def test_dropout_of_a_given_seed():
    module, seed = module_of(), (7, 2, 5)
    hidden, _ = module(wavs_of(), dropout_seed=torch.tensor(seed))
    expected, _ = module.model.forward([wav.numpy() for wav in wavs_of()], dropout_seed=seed)
    assert same([state.detach() for state in hidden], [torch.from_numpy(state) for state in expected])
    assert not same([state.detach() for state in hidden], states(module))
    grads = grads_of(module, dropout_seed=torch.tensor(seed))
    torch.manual_seed(SEED)
    given = [np.broadcast_to(torch.randn(state.shape[-1]).numpy(), state.shape).copy() for state in hidden]
    flat = module.model.backward([wav.numpy() for wav in wavs_of()], given, dropout_seed=seed)
    for tensor in module.model.tensors:
        part = flat[tensor.offset:tensor.offset + tensor.size].reshape(tensor.shape)
        np.testing.assert_array_equal(grads[tensor.name].numpy(), part)


# ---- PyTorch's machinery -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, (1, 2, 3)])
def test_operators_are_well_formed(seed):
    module = module_of()
    seed = None if seed is None else torch.tensor(seed)
    params = [module.get_parameter(tensor.name) for tensor in module.model.tensors]
    wavs, lengths = torch.stack([wavs_of([4000])[0], wavs_of([4000], 1)[0]]), torch.tensor([4000, 2345])
    torch.library.opcheck(torch.ops.gendistiller.forward.default,
                          (params, wavs, lengths, seed, module._handle, 0, True))
    grads = [torch.ones(2, 12, 12), None, torch.ones(2, 12, 12)]
    params = [param.detach() for param in params]
    torch.library.opcheck(torch.ops.gendistiller.backward.default,
                          (params, wavs, lengths, seed, grads, module._handle, 0))


def test_compiles_without_graph_breaks():
    module = module_of()
    compiled = torch.compile(lambda wavs: loss_of_states(module, wavs), backend="aot_eager", fullgraph=True)
    for lengths in (LENGTHS, [5000, 800], [3000]):
        wavs = wavs_of(lengths)
        expected = loss_of_states(module, wavs)
        module.zero_grad()
        expected.backward()
        grads = {name: param.grad.clone() for name, param in module.named_parameters()}
        module.zero_grad()
        loss = compiled(wavs)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for name, param in module.named_parameters():
            torch.testing.assert_close(param.grad, grads[name], msg=name)
        in_place(module)  # the compiled function, too, sees it


def loss_of_states(module, wavs):
    return sum(state.square().mean() for state in module(wavs)[0])


def test_autocast_leaves_it_in_float32():
    module = module_of()
    expected, grads = states(module), grads_of(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, _ = module(wavs_of())
        product = hidden[-1] @ torch.ones(hidden[-1].shape[-1], 2)
    assert product.dtype == torch.bfloat16
    assert same([state.detach() for state in hidden], expected)
    module.zero_grad()
    torch.manual_seed(SEED)
    sum((state * torch.randn(state.shape[-1])).sum() for state in hidden).backward()
    assert all(torch.equal(param.grad, grads[name]) for name, param in module.named_parameters())


def test_anomaly_detection_and_nested_modules():
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.upstream, self.head = module_of(), torch.nn.Linear(12, 3)

        def forward(self, wavs):
            return self.head(self.upstream(wavs)[0][-1].mean(1))

    model = Classifier().float().eval()
    assert "upstream.encoder.layers.0.fc1.weight" in model.state_dict()
    with torch.autograd.set_detect_anomaly(True):
        model(wavs_of()).sum().backward()
    assert all(param.grad is not None for param in model.parameters())


def ddp_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank,
                                         world_size=2)
    # Different weights at first: DDP hands out rank 0's, in place.
    module = torch.nn.parallel.DistributedDataParallel(module_of(seed=SEED + rank))
    loss_of_states(module, wavs_of([2000 + 500 * rank], rank)).backward()
    torch.save({name: param.grad for name, param in module.module.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_distributed_data_parallel(tmp_path):
    env = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS",)}
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        torch.multiprocessing.spawn(ddp_worker, (str(tmp_path),), nprocs=2)
    finally:
        for name, value in env.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    module = module_of()
    loss = sum(loss_of_states(module, wavs_of([2000 + 500 * rank], rank)) for rank in range(2)) / 2
    loss.backward()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, param in module.named_parameters():
        assert torch.equal(results[0][name], results[1][name])
        torch.testing.assert_close(results[0][name], param.grad, rtol=1e-4, atol=1e-6)
