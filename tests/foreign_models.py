"""Small models of other projects' own classes, with random weights, for the tests of foreign checkpoints."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")

CONV = "[(6,10,5)] + [(7,3,2)] * 2"
LAYERS = ((6, 10, 5), (7, 3, 2), (7, 3, 2))
SIZES = {"encoder_layers": 2, "encoder_embed_dim": 12, "encoder_ffn_embed_dim": 20,
         "encoder_attention_heads": 3,
         "conv_pos": 8, "conv_pos_groups": 2}
LARGE = {"extractor_mode": "layer_norm", "conv_bias": True, "layer_norm_first": True}
ENCODER = {**SIZES, "architecture": "encoder", "skip_connection": False, "output_layer": False,
           "target_layers": (),
           "conv_feature_layers": LAYERS, "relative_position_embedding": False, "gru_rel_pos": False,
           "activation_dropout": 0.0}


def s3prl(module: str):
    return pytest.importorskip(f"s3prl.upstream.{module}")


def scatter(model):
    """Random weights everywhere: torch starts biases at 0, norms at 1, where an exchange would go unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def wavlm(large=False, **changes):
    module = s3prl("wavlm.WavLM")
    cfg = {**SIZES, "conv_feature_layers": CONV, "relative_position_embedding": True, "gru_rel_pos": True,
           "num_buckets": 12, "max_distance": 20, "normalize": large, **(LARGE if large else {}), **changes}
    full = dict(module.WavLMConfig(cfg).__dict__)
    return scatter(module.WavLM(module.WavLMConfig(cfg))), full


def hubert(large=False, **changes):
    module = s3prl("hubert.hubert_model")
    cfg = module.HubertConfig(label_rate=50, conv_feature_layers=CONV, **SIZES, **(LARGE if large else {}),
                              **changes)
    task = module.HubertPretrainingConfig(normalize=large)
    symbols = [["a", "b", "c"]]
    return scatter(module.HubertModel(cfg, task,
                                      symbols)), dataclasses.asdict(cfg), dataclasses.asdict(task), symbols


def wav2vec2(large=False):
    module = s3prl("wav2vec2.wav2vec2_model")
    cfg = module.Wav2Vec2Config(conv_feature_layers=CONV, **SIZES, **(LARGE if large else {}),
                                quantize_targets=True,
                                final_dim=4, latent_vars=5)
    task = module.AudioPretrainingConfig(normalize=large)
    return scatter(module.Wav2Vec2Model(cfg)), dataclasses.asdict(cfg), dataclasses.asdict(task)


def large_fields(large):
    return {**LARGE, "normalize": True} if large else {}
