"""Bytes: files here and in object stores. It knows no checkpoint and no lock."""
