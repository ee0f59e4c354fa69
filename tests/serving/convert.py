"""Make a GGUF beside each checkpoint with llama.cpp's own converter: convert.py LLAMA_CPP DIRECTORY...

The tiny checkpoints have no tokenizer, so the vocabulary is left out. Prints what went wrong with which, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, sys.argv[1])
import convert_hf_to_gguf

_found = convert_hf_to_gguf.get_model_class
_load = convert_hf_to_gguf.ModelBase.load_hparams


def _without_vocabulary(architecture: str, *rest: Any, **options: Any) -> Any:
    converter = _found(architecture, *rest, **options)

    def set_vocab(self: Any) -> None:
        self._set_vocab_none()
        if not any("vocab_size" in key for keys in self.gguf_writer.kv_data for key in keys):
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    converter.set_vocab = set_vocab
    return converter


def _raw_config_too(directory: Path, *rest: Any, **options: Any) -> dict[str, Any]:
    """Keys as older releases of transformers kept them, for which the converter is written, where newer ones don't."""
    return json.loads((directory / "config.json").read_text()) | _load(directory, *rest, **options)


def _convert(directory: str) -> str:
    """The error, "" if there was none."""
    sys.argv = ["convert", directory, "--outfile", f"{directory}.gguf", "--outtype", "f32"]
    try:
        convert_hf_to_gguf.main()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    convert_hf_to_gguf.get_model_class = _without_vocabulary
    convert_hf_to_gguf.ModelBase.load_hparams = staticmethod(_raw_config_too)
    found = {directory: _convert(directory) for directory in sys.argv[2:]}
    print(json.dumps(found))
