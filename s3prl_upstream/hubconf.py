"""The upstreams as s3prl.hub knows them: `getattr(s3prl.hub, NAME)(ckpt=..., model_config=...,
refresh=...)`."""

from __future__ import annotations

import os
from typing import Any, Optional

UPSTREAMS = ("gendistiller", "gendistiller_local", "gendistiller_url")


def gendistiller_local(ckpt: str, model_config: Optional[str] = None, **kwargs: Any) -> Any:
    """A model on this machine.

    ckpt: a checkpoint of any format that gendistiller_ext.Model.load reads, students and teachers.
    model_config: a YAML file of options, see `s3prl_upstream.expert.UpstreamExpert`.
    """
    if not os.path.exists(ckpt):
        raise FileNotFoundError(f"ckpt: no such checkpoint: {ckpt}")
    from .expert import UpstreamExpert

    return UpstreamExpert(ckpt, model_config, **kwargs)


def gendistiller_url(ckpt: str, model_config: Optional[str] = None, refresh: bool = False,
                     **kwargs: Any) -> Any:
    """A model from the web, kept in a cache; `refresh` downloads it anew. A URL that ends in `#sha256=HEX` is
    checked."""
    from .download import cached

    return gendistiller_local(str(cached(ckpt, refresh)), model_config, **kwargs)


def gendistiller(ckpt: Optional[str] = None, model_config: Optional[str] = None, refresh: bool = False,
                 **kwargs: Any) -> Any:
    """A path or a URL; without one, the small student that is part of the package."""
    if ckpt is None:
        from gendistiller_ext import weights

        ckpt = str(weights.student_tiny())
    if "://" in ckpt:
        return gendistiller_url(ckpt, model_config, refresh, **kwargs)
    return gendistiller_local(ckpt, model_config, **kwargs)
