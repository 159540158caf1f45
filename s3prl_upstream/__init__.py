"""S3PRL's way to a GenDistiller student: `-u gendistiller -k student.safetensors` in an unmodified S3PRL.

An installed wheel registers itself by `gendistiller_s3prl.pth` (see `_hook`). Where that line does not run
(an editable install, GENDISTILLER_S3PRL=0) a program registers the upstreams with

    import s3prl_upstream
    s3prl_upstream.register()
"""


def register() -> None:
    """Add the upstreams to s3prl.hub, and what S3PRL needs on current torchaudio, whenever s3prl is imported:
    now, if it already was. May be called any number of times, before or after s3prl and torchaudio are
    imported."""
    from . import _hook

    _hook.install()
