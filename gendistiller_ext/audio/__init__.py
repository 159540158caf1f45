"""Recordings: files, lists and shards of them (files, shards), and hours of audio in constant memory (chunked)."""
