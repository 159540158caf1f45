"""What a forward pass multiplies: from the shapes, nothing for norms, activations and softmax."""

from __future__ import annotations


def flops(config, samples: int) -> int:
    """Floating-point operations of one utterance, two a multiply-add; every method is charged the direct
    one's, whatever it does in place of it. Architectures generative, multi_head and encoder."""
    frames, channels, macs = samples, 1, 0
    for width, kernel, stride in config.conv_feature_layers:
        frames = (frames - kernel) // stride + 1
        macs += frames * kernel * channels * width
        channels = width
    dim, ffn, targets = config.encoder_embed_dim, config.encoder_ffn_embed_dim, len(config.target_layers)
    if channels != dim:
        macs += frames * channels * dim
    macs += frames * dim * (dim // config.conv_pos_groups) * config.conv_pos
    block = 4 * frames * dim * dim + 2 * frames * frames * dim + 2 * frames * dim * ffn
    if config.gru_rel_pos:
        block += frames * dim * 8
    if config.architecture == "generative":
        macs += targets * (block + (2 * frames * dim * dim if config.output_layer else 0))
    else:
        macs += config.encoder_layers * block
        if config.architecture == "multi_head":
            macs += 2 * targets * frames * dim * dim
    return 2 * macs
