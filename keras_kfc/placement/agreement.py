"""Whether all workers are about to train the same thing."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from keras_kfc.placement.api import Placement

# Characters of a description that are exchanged.
_LONGEST = 1 << 15


def check_alike(placement: Placement, facts: Mapping[str, Any]) -> None:
    """Refuses workers that differ from each other; in cross-replica context, eagerly.

    Workers that differ would wait for each other for ever, or train apart without a word.

    Args:
        placement: Where the workers are.
        facts: What has to be the same on all of them, as JSON has it.

    Raises:
        ValueError: On all workers, if any two of them differ.
    """
    text = json.dumps(facts, sort_keys=True, default=str).encode()
    fingerprint = hashlib.sha256(text).digest()
    found = _gathered(placement, fingerprint)
    if len(set(found)) == 1:
        return
    texts = _gathered(placement, text[:_LONGEST].ljust(_LONGEST))
    other = next(number for number, each in enumerate(found) if each != found[0])
    first, second = (_parsed(texts[number]) for number in (0, other))
    differences = [
        f"{name} is {first.get(name)!r} on the one and {second.get(name)!r} on the other"
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name)
    ]
    raise ValueError(
        "All workers must train the same model with the same optimizer and the same versions. "
        f"Received: replicas 0 and {other} with the fingerprints {found[0].hex()[:12]} and "
        f"{found[other].hex()[:12]}. {'; '.join(differences)}"
    )


def _gathered(placement: Placement, content: bytes) -> list[bytes]:
    """Bytes of all replicas, as many of each."""
    part = tf.constant(np.frombuffer(content, "uint8").astype("int32"))
    rows = placement.gather_parts([part] * len(placement.numbers))
    return [row.astype("uint8").tobytes() for row in rows.numpy()]


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except ValueError:
        return {"a description longer than can be compared": hashlib.sha256(text).hexdigest()[:12]}
