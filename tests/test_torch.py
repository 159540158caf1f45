"""The PyTorch module: its parameters are the model's, its gradients the reference's, and torch's machinery works on it."""

from __future__ import annotations

import copy
import io
import os
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gendistiller_ext as gd
from conftest import SEED, SMALL, SMALL_TEACHERS, SMALL_VARIANTS
from gendistiller_ext.torch import GenDistiller
from reference import torch_train
from reference.layout import param_shapes, random_state, random_wavs
from reference.torch_model import Reference

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


# ---- Parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["path", "model", "config"])
def test_made_from(source, tmp_path):
    model = gd.Model(CONFIG, seed=3)
    if source == "path":
        model.save(tmp_path / "m.safetensors")
    module = GenDistiller({"path": tmp_path / "m.safetensors", "model": model, "config": CONFIG}[source], seed=3).eval()
    hidden, frames = model.forward([wav.numpy() for wav in wavs_of()])
    assert same(states(module), [torch.from_numpy(state) for state in hidden])
    assert module(wavs_of())[1].tolist() == frames.tolist() and module.config == CONFIG
    assert (module.model is model) == (source == "model")


def test_made_from_something_else():
    with pytest.raises(TypeError, match="source: expected a checkpoint's path.*got dict"):
        GenDistiller({})


@pytest.mark.parametrize("name", ["student", *SMALL_TEACHERS, *SMALL_VARIANTS])
def test_state_dict_has_the_checkpoint_names(name):
    config = gd.Config(**{"student": SMALL, **SMALL_TEACHERS, **SMALL_VARIANTS}[name])
    try:
        module = module_of(config)
    except NotImplementedError as error:
        pytest.skip(str(error))
    shapes = param_shapes(config)
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == shapes
    for key, value in random_state(config, SEED).items():
        np.testing.assert_array_equal(module.state_dict()[key].numpy(), np.asarray(value, np.float32))


def test_parameters_share_the_flat_buffer():
    module = module_of()
    with torch.no_grad():
        module.get_parameter("encoder.layers.0.fc1.weight")[1, 2] = 42.0
    assert module.model.params["encoder.layers.0.fc1.weight"][1, 2] == 42.0


def test_saves_what_it_holds(tmp_path):
    module = module_of()
    with torch.no_grad():
        module.get_parameter("layer_norm.weight").mul_(2)
    module.save(tmp_path / "m.safetensors")
    assert same(states(module), states(GenDistiller(tmp_path / "m.safetensors").eval()))


def test_state_dict_round_trip():
    source, target = module_of(seed=1), module_of(seed=2)
    assert not same(states(source), states(target))
    target.load_state_dict(source.state_dict())
    assert same(states(source), states(target))


# ---- Writes are seen ---------------------------------------------------------------------------------------------


def by_optimizer(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    loss_of(module).backward()
    optimizer.step()


def in_place(module):
    with torch.no_grad():
        module.get_parameter("encoder.layers.0.fc2.weight").mul_(1.5)


def by_data(module):  # moves no version counter
    module.get_parameter("encoder.layers.0.fc2.weight").data.mul_(1.5)


def by_exchanged_rows(module):  # nor a plain sum
    weight = module.get_parameter("encoder.layers.0.fc1.weight").data
    weight[[0, 1]] = weight[[1, 0]]


def by_new_data(module):
    param = module.get_parameter("encoder.layers.0.fc2.weight")
    param.data = param.data * 1.5


def by_vector(module):
    vector = torch.nn.utils.parameters_to_vector(module.parameters())
    torch.nn.utils.vector_to_parameters(vector * 1.01, module.parameters())


def by_loading(module):
    module.load_state_dict({name: value * 1.01 for name, value in module.state_dict().items()})


def by_assigning(module):
    module.load_state_dict({name: value * 1.01 for name, value in module.state_dict().items()}, assign=True)


def by_conversion(module):
    module.to(torch.float64)
    module.get_parameter("encoder.layers.0.fc2.weight").data.mul_(1.5)
    module.to(torch.float32)


def by_new_parameter(module):
    module.encoder.layers._modules["0"].fc2.weight = torch.nn.Parameter(
        module.get_parameter("encoder.layers.0.fc2.weight").detach() * 1.5)


def under_inference_mode(module):
    with torch.inference_mode():
        module.get_parameter("encoder.layers.0.fc2.weight").mul_(1.5)


WRITES = [by_optimizer, in_place, by_data, by_exchanged_rows, by_new_data, by_vector, by_loading, by_assigning,
          by_conversion, by_new_parameter, under_inference_mode]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_sees_writes(write):
    module = module_of()
    before, revision = states(module), module.revision
    assert module.revision == revision
    write(module)
    after = states(module)
    fresh = gd.Model(CONFIG)
    fresh.load_params({name: value.numpy() for name, value in module.state_dict().items()})
    assert same(after, states(GenDistiller(fresh).eval()))
    assert not same(after, before) and module.revision != revision
    for name, param in module.named_parameters():  # moved parameters are back in the buffer
        assert np.shares_memory(param.detach().numpy(), module.model.params[name]), name


def test_packs_anew_only_after_a_write():
    module = module_of()
    states(module)
    revision = module.revision
    for _ in range(3):
        grads_of(module)
        states(module)
    assert module.revision == revision


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_refuses_other_dtypes(dtype):
    module = module_of().to(dtype)
    with pytest.raises(TypeError, match=f"weight: expected float32, got {str(dtype)[6:]}.*call .float"):
        module(wavs_of())


def test_functional_call_leaves_the_own_parameters_alone():
    module = module_of()
    before = states(module)
    others = {name: (value * 1.01).requires_grad_() for name, value in module.state_dict().items()}
    hidden, _ = torch.func.functional_call(module, others, (wavs_of(),))
    assert same(states(module), before)
    twin = module_of()
    twin.load_state_dict(others)
    assert same(hidden, states(twin))
    # The gradients are those at the values of the call, though the module has its own back.
    torch.manual_seed(SEED)
    sum((state * torch.randn(state.shape[-1])).sum() for state in hidden).backward()
    for name, grad in grads_of(twin).items():
        assert torch.equal(others[name].grad, grad), name
    assert module.get_parameter("layer_norm.weight").grad is None


def test_copies():
    module = module_of()
    before = states(module)
    with io.BytesIO() as file:
        torch.save(module, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert same(states(twin), before) and not twin.training
        in_place(twin)
        assert not same(states(twin), before)
        assert same(states(module), before)


def test_copies_keep_what_is_frozen():
    module = module_of()
    module.get_parameter("layer_norm.weight").requires_grad_(False)
    twin = copy.deepcopy(module)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in module.parameters()]


# ---- Forward -----------------------------------------------------------------------------------------------------


def test_list_and_padded_batch_agree():
    module, wavs = module_of(), wavs_of()
    padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True, padding_value=7.0)
    hidden = states(module)
    assert same(states(module, padded, lengths=torch.tensor(LENGTHS)), hidden)
    assert same(states(module, padded, lengths=LENGTHS), hidden)
    assert same(states(module, wavs[0][None]), [state[:1] for state in hidden])


@pytest.mark.parametrize("kind", ["half", "strided", "grad"])
def test_takes_any_floating_audio(kind):
    module, wav = module_of(), wavs_of()[0]
    given = {"half": wav.half(), "strided": torch.stack((wav, wav), 1)[:, 0], "grad": wav.clone().requires_grad_()}[kind]
    expected = wav.half().float() if kind == "half" else wav
    hidden, _ = module([given])
    assert same([state.detach() for state in hidden], states(module, [expected]))
    hidden[-1].sum().backward()
    assert given.grad is None and module.get_parameter("layer_norm.weight").grad is not None


@pytest.mark.parametrize("arguments,message", [
    (dict(wavs=torch.zeros(4000)), r"wavs: expected \(batch, samples\) or a list of 1-D tensors, got \(4000,\)"),
    (dict(wavs=[]), "wavs: expected at least one 1-D tensor"),
    (dict(wavs=[torch.zeros(1, 4000)]), r"wavs: expected at least one 1-D tensor, got shapes \[\(1, 4000\)\]"),
    (dict(wavs=[torch.zeros(4000)], lengths=[4000]), "lengths: expected None with a list of wavs"),
    (dict(wavs=torch.zeros(1, 4000), lengths=[5000]), "lengths"),
    (dict(wavs=[torch.full((4000,), float("nan"))]), "wavs"),
    (dict(wavs=[torch.zeros(399)]), "wavs|lengths"),
    (dict(wavs=[torch.zeros(4000)], dropout_seed=torch.zeros(2, dtype=torch.int64)), r"dropout_seed: expected int64 \(3,\)"),
    (dict(wavs=[torch.zeros(4000)], num_layers=-1), "num_layers"),
])
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        module_of()(**arguments)


def test_number_of_layers():
    module = module_of()
    assert len(states(module, num_layers=4)) == 5
    assert same(states(module, num_layers=4)[:2], states(module, num_layers=1))


# ---- Backward ----------------------------------------------------------------------------------------------------


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
        loss = sum(state.square().mean() for state in reference.forward([wav.numpy() for wav in wavs_of()])[0])
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


# ---- Dropout -----------------------------------------------------------------------------------------------------


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


# ---- PyTorch's machinery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, (1, 2, 3)])
def test_operators_are_well_formed(seed):
    module = module_of()
    seed = None if seed is None else torch.tensor(seed)
    params = [module.get_parameter(tensor.name) for tensor in module.model.tensors]
    wavs, lengths = torch.stack([wavs_of([4000])[0], wavs_of([4000], 1)[0]]), torch.tensor([4000, 2345])
    torch.library.opcheck(torch.ops.gendistiller.forward.default, (params, wavs, lengths, seed, module._handle, 0))
    grads = [torch.ones(2, 12, 12), None, torch.ones(2, 12, 12)]
    torch.library.opcheck(torch.ops.gendistiller.backward.default,
                          ([param.detach() for param in params], wavs, lengths, seed, grads, module._handle, 0))


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
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
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
