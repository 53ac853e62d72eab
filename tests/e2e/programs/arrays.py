"""numpy on arrays of some size: sort, gather, exact matrix product, cumulative sums. Argument: MiB of one array."""

import hashlib
import sys

import numpy as np

count = int(sys.argv[1]) << 17
values = (np.arange(count, dtype=np.uint64) * np.uint64(6364136223846793005)) ^ np.uint64(0x9E3779B97F4A7C15)
order = np.argsort(values, kind="stable")
ranked = values[order]
assert (ranked[1:] >= ranked[:-1]).all()
ranked[::2] ^= values[::-2]
side = 1 << (int(count**0.5).bit_length() - 2)
square = (values[: side * side] % np.uint64(1024)).astype(np.float64).reshape(side, side)
product = square[:256] @ square  # whole numbers below 2^53: exact in any order of summation
print(hashlib.sha256(ranked).hexdigest(), hashlib.sha256(product).hexdigest(), int(np.cumsum(order)[-1]))
