"""The settings of a run, and the student that is made after a teacher."""
import dataclasses

import numpy as np
import pytest

pytest.importorskip("yaml")

import gendistiller_ext as gd  # noqa: E402
from gendistiller_ext.training.recipe import Recipe, dump_yaml, load_yaml, model_value  # noqa: E402
from gendistiller_ext.student import init_from_teacher, student_config  # noqa: E402

CONV = ((8, 10, 5),) + ((8, 3, 2),) * 4 + ((8, 2, 2),) * 2
TEACHER = dict(architecture="encoder", conv_feature_layers=CONV, encoder_layers=4, encoder_embed_dim=16,
               encoder_ffn_embed_dim=24, encoder_attention_heads=2, conv_pos=8, conv_pos_groups=2, num_buckets=8,
               max_distance=16, skip_connection=False, output_layer=False, target_layers=())
MODEL = dict(target_layers=(1, 3))


def test_defaults_are_s3prls():
    fields = {item.name: item.default for item in dataclasses.fields(Recipe)}
    expected = dict(steps=200000, batch_size=24, crop_seconds=250000 / 16000, clip=5.0, lr=2e-4, warmup=0.07, eps=1e-6,
                    weight_decay=1e-6, optimizer="adamw", lam=1.0, feat_pen_loss=0.0, reduction="mean",
                    mask_padding=True, history="free", init_from_teacher=True, freeze_extractor=False)
    assert {key: fields[key] for key in expected} == expected
    assert Recipe().betas == [0.9, 0.98]


@pytest.mark.parametrize("change,message", [
    (dict(teacher=None), "teacher: expected a value"),
    (dict(audio=[]), "audio: expected a value"),
    (dict(steps=0), "steps: expected a number >= 1, got 0"),
    (dict(steps=2.5), "steps: expected an integer, got 2.5"),
    (dict(steps=True), "steps: expected an integer, got True"),
    (dict(lr="fast"), "lr: expected a number, got 'fast'"),
    (dict(lr=float("nan")), "lr: expected a number"),
    (dict(feat_pen_loss=-1.0), "feat_pen_loss: expected a number >= 0, got -1.0"),
    (dict(warmup=1.0), "warmup: expected a number >= 0 and < 1, got 1.0"),
    (dict(readers=257), "readers: expected a number >= 1 and <= 256, got 257"),
    (dict(seed=2 ** 63), "seed: expected a number >= 0 and <= 9223372036854775807, got 9223372036854775808"),
    (dict(optimizer="sgd"), "optimizer: expected adamw or adamw_s3prl, got 'sgd'"),
    (dict(betas=[0.9]), "betas: expected two numbers"),
    (dict(betas=[0.9, 1.0]), "betas: expected two numbers"),
    (dict(init_from_teacher="yes"), "init_from_teacher: expected true or false, got 'yes'"),
    (dict(teacher="s3prl:hubert", teacher_precision="int8"),
     "teacher_precision: expected none with s3prl:hubert, which PyTorch computes, got int8"),
    (dict(accumulate=25), r"accumulate: expected at most batch_size \(24\), got 25"),
    (dict(accumulate=2, mask_padding=False), "accumulate: expected 1 where padding counts"),
])
def test_bad_settings_name_the_key(change, message):
    settings = dict(teacher="t", audio=["a"], out="o")
    settings.update(change)
    with pytest.raises(ValueError, match=message):
        Recipe(**settings).validate()


def test_bounds_belong_to_the_range():
    for readers, threads, seed in ((1, 0, 0), (256, 1024, 2 ** 63 - 1)):
        Recipe(teacher="t", audio=["a"], out="o", warmup=0.0, readers=readers, threads=threads, seed=seed).validate()


def test_yaml_keys(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 2e-4\nbatch-size: 8\naudio: one\ntarget_layers: [1, 3]\ndropout: 0\n"
                    "conv_feature_layers: '[(8, 10, 5)] + [(8, 3, 2)] * 4'\n")
    settings = load_yaml(str(path))
    model = settings.pop("model")
    assert model["target_layers"] == (1, 3) and model["dropout"] == 0.0 and isinstance(model["dropout"], float)
    assert gd.Config(**{**dataclasses.asdict(gd.Config()), **model}).conv_feature_layers[1:] == ((8, 3, 2),) * 4
    made = Recipe(teacher="t", out="o", **settings).validate()
    assert (made.lr, made.batch_size, made.audio) == (2e-4, 8, ["one"])


@pytest.mark.parametrize("text,message", [
    ("stepz: 3", r"unknown key stepz \(did you mean steps\?\)"), ("- 1", "expected keys and values, got a list"),
    ("a: [", "c.yaml: "), ("dropout: much", "dropout: expected a number, got 'much'")])
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_yaml(str(path))


def test_config_written_is_config_read(tmp_path):
    made = Recipe(teacher="t", audio=["a", "b"], out="o", lr=1e-6, seed=3).validate()
    config = gd.Config.preset("table4_conv256")
    dump_yaml(str(tmp_path / "c.yaml"), made, config.to_dict())
    settings = load_yaml(str(tmp_path / "c.yaml"))
    fields = [item.name for item in dataclasses.fields(Recipe)]
    assert list(settings)[:-1] == [name for name in fields if name in settings and name != "model"]
    assert gd.Config(**settings.pop("model")) == config
    assert Recipe(**settings).validate() == made


def test_model_values_from_text():
    assert model_value("target_layers", "4,8,12") == (4, 8, 12)
    assert model_value("target_layers", "4") == (4,)
    assert model_value("encoder_ffn_embed_dim", "1024") == 1024
    assert model_value("gru_rel_pos", "false") is False
    assert model_value("padding", "s3prl") == "s3prl"
    assert model_value("conv_feature_layers", "[[8, 10, 5], [8, 4, 2]]") == ((8, 10, 5), (8, 4, 2))
    with pytest.raises(ValueError, match="target_layers: expected integers"):
        model_value("target_layers", "4,x")
    with pytest.raises(ValueError, match=r"droput: unknown key \(did you mean dropout\?\)"):
        model_value("droput", "0")


# ---- Student after teacher ---------------------------------------------------------------------------------

def test_student_takes_the_teachers_sizes():
    teacher = gd.Config(**TEACHER)
    student = student_config("gendistiller", teacher, {"target_layers": (1, 3)})
    for name in ("conv_feature_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads",
                 "conv_pos", "conv_pos_groups", "num_buckets", "max_distance"):
        assert getattr(student, name) == getattr(teacher, name), name
    assert student.encoder_layers == 1 and student.architecture == "generative" and student.dropout == 0.1
    assert student_config("table4_ffn2048", teacher, {"target_layers": (1,)}).encoder_ffn_embed_dim == 2048
    assert student_config("gendistiller_plain", teacher, {"target_layers": (1,)}).feature_layer_norm is False
    assert student_config("gendistiller", teacher, {"target_layers": (1,), "encoder_ffn_embed_dim": 7}
                          ).encoder_ffn_embed_dim == 7


@pytest.mark.parametrize("preset,overrides,message", [
    ("wavlm_base", {}, "preset: expected a student, got the teacher 'wavlm_base'"),
    ("gendistiller", {}, "target_layers: expected layers from 0 to 4, which the teacher has, got 8"),
    ("gendistiller", {"target_layers": (1,), "encoder_embed_dim": 32}, "encoder_embed_dim: expected the teacher's"),
    ("gendistiller", {"target_layers": (1,), "conv_feature_layers": CONV[:-1]},
     "conv_feature_layers: expected the teacher's frames of 400 samples every 320, got 240 every 160"),
])
def test_pairs_that_do_not_fit(preset, overrides, message):
    with pytest.raises(ValueError, match=message):
        student_config(preset, gd.Config(**TEACHER), overrides)


def test_frame_geometry():
    config = gd.Config(conv_feature_layers=((4, 7, 3), (4, 5, 2)))
    assert (gd.Config().min_samples, gd.Config().hop) == (400, 320)
    assert (config.min_samples, config.hop) == (7 + 4 * 3, 6)


def test_init_from_teacher():
    teacher = gd.Model(gd.Config(**TEACHER), seed=1)
    config = student_config("gendistiller", teacher.config, MODEL)
    student, untouched = gd.Model(config, seed=2), gd.Model(config, seed=2)
    copied, left = init_from_teacher(student, teacher)
    assert left == ["output_layer.0.bias", "output_layer.0.weight", "output_layer.2.bias", "output_layer.2.weight"]
    assert sorted(copied + left) == sorted(student.params)
    for name in copied:
        assert np.array_equal(student.params[name], teacher.params[name])
    for name in left:
        assert np.array_equal(student.params[name], untouched.params[name])
    narrow = gd.Model(dataclasses.replace(config, encoder_ffn_embed_dim=8), seed=2)
    assert "encoder.layers.0.fc1.weight" in init_from_teacher(narrow, teacher)[1]
