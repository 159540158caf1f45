"""Folders as S3PRL's `pretrain/` has them; `s3prl_upstream.pretraining` adds them to its list."""
