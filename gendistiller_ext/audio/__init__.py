"""Recordings: found in folders, lists and shards (find, lists, shards), read (files), and hours of audio in constant
memory (chunked)."""

RATE = 16000  # Hz, of all audio that the models hear
