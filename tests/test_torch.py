"""The PyTorch module: its parameters are the model's, however they are written to."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gendistiller_ext as gd
from conftest import SEED, SMALL, SMALL_TEACHERS, SMALL_VARIANTS
from gendistiller_ext.torch import GenDistiller
from reference.layout import param_shapes, random_state
from torch_cases import CONFIG, LENGTHS, grads_of, in_place, loss_of, module_of, same, states, wavs_of

# ---- Parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["path", "model", "config"])
def test_made_from(source, tmp_path):
    model = gd.Model(CONFIG, seed=3)
    if source == "path":
        model.save(tmp_path / "m.safetensors")
    given = {"path": tmp_path / "m.safetensors", "model": model, "config": CONFIG}[source]
    module = GenDistiller(given, seed=3).eval()
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


# ---- Writes are seen ---------------------------------------------------------------------------------------


def by_optimizer(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    loss_of(module).backward()
    optimizer.step()


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


WRITES = [by_optimizer, in_place, by_data, by_exchanged_rows, by_new_data, by_vector, by_loading,
          by_assigning, by_conversion, by_new_parameter, under_inference_mode]


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


# ---- Forward -----------------------------------------------------------------------------------------------


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
    given = {"half": wav.half(), "strided": torch.stack((wav, wav), 1)[:, 0],
             "grad": wav.clone().requires_grad_()}[kind]
    expected = wav.half().float() if kind == "half" else wav
    hidden, _ = module([given])
    assert same([state.detach() for state in hidden], states(module, [expected]))
    hidden[-1].sum().backward()
    assert given.grad is None and module.get_parameter("layer_norm.weight").grad is not None


@pytest.mark.parametrize("arguments,message", [
    (dict(wavs=torch.zeros(4000)),
     r"wavs: expected \(batch, samples\) or a list of 1-D tensors, got \(4000,\)"),
    (dict(wavs=[]), "wavs: expected at least one 1-D tensor"),
    (dict(wavs=[torch.zeros(1, 4000)]),
     r"wavs: expected at least one 1-D tensor, got shapes \[\(1, 4000\)\]"),
    (dict(wavs=[torch.zeros(4000)], lengths=[4000]), "lengths: expected None with a list of wavs"),
    (dict(wavs=torch.zeros(1, 4000), lengths=[5000]), "lengths"),
    (dict(wavs=[torch.full((4000,), float("nan"))]), "wavs"),
    (dict(wavs=[torch.zeros(399)]), "wavs|lengths"),
    (dict(wavs=[torch.zeros(4000)], dropout_seed=torch.zeros(2, dtype=torch.int64)),
     r"dropout_seed: expected int64 \(3,\)"),
    (dict(wavs=[torch.zeros(4000)], num_layers=-1), "num_layers"),
])
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        module_of()(**arguments)


def test_number_of_layers():
    module = module_of()
    assert len(states(module, num_layers=4)) == 5
    assert same(states(module, num_layers=4)[:2], states(module, num_layers=1))
