#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors and the same metadata make other bytes in every call, once the metadata has two keys.
#
# `save_file` and `save` write the tensors in a fixed order (by type, then by name), but the keys of "__metadata__" in an order
# that changes from call to call, also within one process. So a checksum of a LoRA, whose header has a dozen keys, says nothing
# about its weights, and two runs that end in the same bits write files that differ. With no or one key the bytes are always the
# same. Compare tensors and the parsed header instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "safetensors==0.8.0" "numpy==2.3.5"
"$folder/venv/bin/python" - <<'PY'
import hashlib
import json

import numpy as np
from safetensors.numpy import save

tensors = {name: np.arange(4, dtype=np.float32) for name in ("b", "a", "c")}


def variants(keys: int) -> tuple[int, int, int]:
    """Of 100 files with so many metadata keys: how many differ, in how many orders of metadata and of tensors."""
    metadata = {f"key{i}": str(i) for i in range(keys)}
    files = [save(tensors, metadata=metadata) for _ in range(100)]
    headers = [json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")]) for file in files]
    orders = {tuple(header.pop("__metadata__", {})) for header in headers}
    return len({hashlib.sha256(file).hexdigest() for file in files}), len(orders), len({tuple(h) for h in headers})


seen = {keys: variants(keys) for keys in (0, 1, 2, 4)}
for keys, (files, metadata, names) in seen.items():
    print(f"{keys} metadata keys: {files} different files of 100, {metadata} orders of metadata, {names} of tensors")
assert seen[0] == seen[1] == (1, 1, 1)
assert seen[2] == (2, 2, 1) and seen[4][0] == seen[4][1] > 10 and seen[4][2] == 1
PY
