"""S3PRL's own trainer, unmodified: run_pretrain.py -u gendistiller."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("s3prl")
for module in ("soundfile", "soxr", "yaml", "tqdm", "tensorboardX", "matplotlib", "pandas"):
    pytest.importorskip(module)
import torch  # noqa: E402
import yaml  # noqa: E402

import gendistiller_ext as gd  # noqa: E402
import s3prl_upstream  # noqa: E402

S3PRL = Path(importlib.util.find_spec("s3prl").origin).parent
PTH = Path(s3prl_upstream.__file__).parent / "gendistiller_s3prl.pth"
PATH = os.pathsep.join(filter(None, sys.path))
RUNNER = {
    "runner": {"n_epochs": -1, "total_steps": 60, "gradient_clipping": 5.0, "gradient_accumulate_steps": 1,
               "log_step": 5, "save_step": 20, "max_keep": 2, "fp16": False},
    "optimizer": {"name": "AdamW_with_schedule", "lr": 0.01, "warmup_proportion": 0.2, "betas": [0.9, 0.98]},
    "pretrain_expert": {"datarc": {"num_workers": 0, "train_batch_size": 3, "max_timestep": 0, "sets": ["train"]}},
}


@pytest.fixture
def configs(corpus, tmp_path):
    """(runner's YAML, upstream's YAML): the corpus as one of S3PRL's bucket CSVs."""
    import soundfile
    lines = [f"{i},{name},{soundfile.info(os.path.join(corpus[1], name)).frames},"
             for i, name in enumerate(sorted(os.listdir(corpus[1])))]
    (tmp_path / "train.csv").write_text("\n".join([",file_path,length,label", *lines]) + "\n")
    runner = yaml.safe_load(yaml.safe_dump(RUNNER))
    runner["pretrain_expert"]["datarc"].update(libri_root=corpus[1], file_path=str(tmp_path))
    model = {"teacher": corpus[0], "student": {"target_layers": [1, 3]}, "task": {"sequence_length": 4800}}
    for name, content in (("runner.yaml", runner), ("model.yaml", model)):
        (tmp_path / name).write_text(yaml.safe_dump(content))
    return tmp_path / "runner.yaml", tmp_path / "model.yaml"


def program(tmp_path, way, *words):
    """S3PRL's programs look for `pretrain/` where they are started."""
    env = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
    if way == "command":
        command = ["-m", "gendistiller_ext", "s3prl", "run_pretrain"]
    else:
        site = tmp_path / "site"
        site.mkdir(exist_ok=True)
        (site / PTH.name).write_text(PTH.read_text())
        (site / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(site)!r})")
        env["PYTHONPATH"] = os.pathsep.join((str(site), PATH))
        command = ["run_pretrain.py"] if way == "file" else ["-m", "s3prl.run_pretrain"]
    done = subprocess.run([sys.executable, *command, *map(str, words), "--device", "cpu"], env=env, cwd=S3PRL,
                          text=True, capture_output=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("way", ["command", "file", "module"])
def test_it_distils(configs, corpus, tmp_path, way):
    runner, model = configs
    before = sorted(path for path in S3PRL.rglob("*") if "__pycache__" not in path.parts)
    code, said = program(tmp_path, way, "-u", "gendistiller", "-c", runner, "-g", model, "-n", "x", "-p",
                         tmp_path / "exp")
    assert code == 0, said
    assert before == sorted(path for path in S3PRL.rglob("*") if "__pycache__" not in path.parts)
    student = gd.Model.load(str(tmp_path / "exp" / "student.safetensors"))
    assert student.config.target_layers == (1, 3)
    teacher = gd.Model.load(corpus[0])
    start = gd.Model(student.config)
    start.load_params({name: value for name, value in teacher.params.items()
                       if name in start.params and start.params[name].shape == value.shape})
    wavs = [np.random.default_rng(7).uniform(-0.5, 0.5, 4800).astype(np.float32)]
    hidden, _ = teacher.forward(wavs)
    losses = [model.distill_step(wavs, np.stack([hidden[1], hidden[3]])).loss for model in (start, student)]
    assert losses[1] < 0.9 * losses[0]
    if way != "file":
        return
    code, said = program(tmp_path, way, "-u", "gendistiller", "-n", "x", "-e", tmp_path / "exp" / "states-40.ckpt")
    assert code == 0 and "Resume from" in said and "Loading upstream weights" in said, said


def test_the_default_configs_are_found(corpus, tmp_path):
    """They lack a teacher, which is what the message says."""
    code, said = program(tmp_path, "file", "-u", "gendistiller", "-n", "x", "-p", tmp_path / "exp")
    assert code == 1 and "teacher: expected a checkpoint or s3prl:NAME" in said, said
    assert sorted(name for name in os.listdir(tmp_path / "exp") if name.endswith(".yaml")) == ["config_model.yaml",
                                                                                            "config_runner.yaml"]
    code, said = program(tmp_path, "file", "-u", "no_such", "-n", "x", "-p", tmp_path / "exp")
    assert code == 2 and "invalid choice" in said and "gendistiller" in said


@pytest.fixture
def expert(configs, monkeypatch):
    """The class, with S3PRL's folder first on the path as in its programs."""
    monkeypatch.syspath_prepend(str(S3PRL))
    for name in [name for name in sys.modules if name.partition(".")[0] == "pretrain"]:
        monkeypatch.delitem(sys.modules, name)
    import pretrain
    monkeypatch.setattr(pretrain, "__path__", [*pretrain.__path__, str(PTH.parent / "pretrain")])
    from pretrain.gendistiller.pretrain_expert import UpstreamPretrainExpert
    datarc = yaml.safe_load(configs[0].read_text())["pretrain_expert"]["datarc"]
    yield lambda **changes: UpstreamPretrainExpert(datarc, {**yaml.safe_load(configs[1].read_text()), **changes})
    for name in [name for name in sys.modules if name.partition(".")[0] == "pretrain"]:
        del sys.modules[name]


def test_loss_and_gradient_are_the_engines(expert):
    upstream = expert(loss={"lam": 0.5, "feat_pen_loss": 20.0, "history": "teacher"}).eval()  # no dropout
    batch = next(iter(upstream.get_train_dataloader()))
    wavs = [wav[:length].numpy() for wav, length in zip(batch[0], batch[2])]
    assert batch[3].sum(1).tolist() == batch[2].tolist() and batch[0].shape[1] <= 4800
    records = {}
    loss, records = upstream((*batch,), records=records, global_step=5, log_step=5)
    (2 * loss).backward()
    targets, _ = upstream.teacher.targets(wavs, (1, 3))
    out = upstream.model.model.distill_step(wavs, targets, lam=0.5, feat_pen_loss=20.0, history="teacher")
    assert out.loss > (out.l1 + 0.5 * out.cos).mean() + 1e-3
    assert loss.item() == pytest.approx(out.loss, rel=1e-6)
    for name, grad in out.grads.items():
        np.testing.assert_array_equal(upstream.model.get_parameter(name).grad.numpy(), 2 * grad, err_msg=name)
    assert records["feature_penalty"] == out.feature_penalty
    assert records["l1_1"] == out.l1[0] and records["similarity_3"] == out.similarity[1]
    upstream.train()
    torch.manual_seed(0)
    noisy, _ = upstream((*batch,))
    torch.manual_seed(0)
    assert noisy.item() != loss.item() and noisy.item() == upstream((*batch,))[0].item()


def test_states_round_trip(expert):
    one, other = expert(), expert()
    with torch.no_grad():
        for param in one.model.parameters():
            param.add_(0.5)
    other.load_model(one.add_state_to_save({}))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters()))


def test_bad_settings(expert):
    for changes, message in (({"teacher": None}, "teacher: expected a checkpoint"),
                             ({"loss": {"lambda": 1}},
                              "loss: expected lam, loss_type, feat_pen_loss, history, detach_history, got lambda")):
        with pytest.raises(ValueError, match=message):
            expert(**changes)
