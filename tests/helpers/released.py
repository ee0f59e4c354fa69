"""The released locks: they lie beside the repository, not in it, so a plain clone goes without."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "released_locks"
LLAMA_8B = FOLDER / "Meta-Llama-3-8B-Instruct.safelock"
LLAMA_70B = FOLDER / "Meta-Llama-3-70B-Instruct_48.safelock"
NEMO_12B = FOLDER / "Mistral_Nemo_12B.safelock"
LOCKS = (LLAMA_8B, LLAMA_70B, NEMO_12B)

needs_released = pytest.mark.skipif(
    not all(path.is_file() for path in LOCKS), reason=f"the released locks are not in {FOLDER}"
)
