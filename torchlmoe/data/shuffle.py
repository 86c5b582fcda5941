"""Permutes 0 .. size - 1 by a key, computed for each place, so that the permutation is never in memory.

A balanced Feistel network permutes 0 .. n - 1, with n the smallest power of four that is at least `size`. If the result
is `size` or more, the network runs again on it until it is less ("cycle walking": Black and Rogaway, Ciphers with
Arbitrary Finite Domains, CT-RSA 2002), on average at most four times.
"""

import hashlib

import numpy as np

NUM_ROUNDS = 8


def permuted(places: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Applies the permutation of range(size) with a key to `places`, int64 in [0, size). Returns the same kind."""
    half_bits, round_keys = _network(size, key)
    out = places.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        out[outside] = _feistel(out[outside], half_bits, round_keys)
        outside = out >= size
    return out.astype(np.int64)


def place_of(value: int, size: int, key: tuple[int, ...]) -> int:
    """The inverse of `permuted`: returns the place that it maps to `value`."""
    half_bits, round_keys = _network(size, key)
    out = np.array([value], dtype=np.uint64)
    while True:
        # With swapped halves and keys in reverse order, a Feistel network is its own inverse.
        out = _swapped(_feistel(_swapped(out, half_bits), half_bits, round_keys[::-1]), half_bits)
        if out[0] < size:
            return int(out[0])


def _network(size: int, key: tuple[int, ...]) -> tuple[np.uint64, list[np.uint64]]:
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    digests = [hashlib.sha256(repr((key, i)).encode()).digest() for i in range(NUM_ROUNDS)]
    return half_bits, [np.frombuffer(digest[:8], dtype="<u8")[0] for digest in digests]


def _swapped(x: np.ndarray, half_bits: np.uint64) -> np.ndarray:
    return ((x & ((np.uint64(1) << half_bits) - np.uint64(1))) << half_bits) | (x >> half_bits)


def _feistel(x: np.ndarray, half_bits: np.uint64, round_keys: list[np.uint64]) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = x >> half_bits, x & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half_bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: every input bit affects every output bit (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
