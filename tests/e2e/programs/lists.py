"""Lists and dicts of Python objects: built, changed, sorted, and one digest printed. Argument: thousands of entries."""

import hashlib
import sys

count = int(sys.argv[1]) * 1000
words = {f"{i * 7919 % 1000003:x}": [i] * (i % 5) for i in range(count)}
for i in range(0, count, 3):
    words[f"{i * 7919 % 1000003:x}"].append("x" * (i % 50))
for key in list(words)[::7]:
    del words[key]
numbers = sorted(range(count), key=lambda i: (i * 2654435761) % 4294967296)
digest = hashlib.sha256()
for key in sorted(words):
    digest.update(f"{key}{words[key]}".encode())
digest.update(repr(numbers[::11]).encode())
print(len(words), digest.hexdigest())
