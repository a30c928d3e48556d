"""What a model's name stands for, and which names cannot be trained at all."""

import json
import re
from pathlib import Path

from qvl.errors import UserError

ASSETS = Path(__file__).parent / "assets"
_FIRST_QWEN = re.compile(r"qwen/qwen-(1_8b|7b|14b|72b)(-chat)?(-int[48])?", re.IGNORECASE)
_FIRST_QWEN_TYPE = "qwen"


def model_source(name: str) -> str:
    """What `from_pretrained` takes for a model name: hub ids and paths as they are, `qvl/...` as the shipped folder.

    Raises:
        UserError: a GGUF file, a first-generation Qwen, or an embedded model that does not exist.
    """
    _refuse_gguf(name)
    embedded = ASSETS / name.removeprefix("qvl/")
    if name.startswith("qvl/"):
        if not embedded.is_dir():
            shipped = ", ".join(sorted(f"qvl/{path.name}" for path in ASSETS.iterdir() if path.is_dir()))
            raise UserError(f"There is no embedded model {name}; there are {shipped}.")
        return str(embedded)
    _refuse_first_generation(name)
    return name


def _refuse_gguf(name: str) -> None:
    """A GGUF file, or a folder whose only weights are in one."""
    folder = Path(name)
    has_others = any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*"))
    files = [folder] if name.endswith(".gguf") else [] if has_others else sorted(folder.glob("*.gguf"))
    if files:
        raise UserError(
            f"{files[0]} is a GGUF file: its weights are packed for inference and cannot be trained or carry LoRA. "
            'Dequantize it once to safetensors: python -c "from transformers import AutoModelForCausalLM as M, '
            f"AutoTokenizer as T; of = dict(gguf_file='{files[0].name}'); m = M.from_pretrained('FOLDER', **of); "
            # transformers 5.23 holds the dense model for a packed one, which it would not save.
            "m.hf_quantizer = None; m.config.__dict__.pop('quantization_config', None); m.save_pretrained('OUT'); "
            "T.from_pretrained('FOLDER', **of).save_pretrained('OUT')\" (needs `pip install gguf`), then name OUT, or "
            "name the model's original repository."
        )


def _refuse_first_generation(name: str) -> None:
    """The first Qwen runs on Python code of its own, for a transformers of 2023; transformers 5 has no class for it."""
    config = Path(name) / "config.json"
    is_first = _FIRST_QWEN.fullmatch(name) is not None
    if config.is_file():
        is_first = json.loads(config.read_text(encoding="utf-8")).get("model_type") == _FIRST_QWEN_TYPE
    if is_first:
        raise UserError(
            f"{name} is a first-generation Qwen, which runs on Python code of its own that transformers 5 cannot use. "
            "Its successors are plain transformers models: Qwen/Qwen3-14B or Qwen/Qwen2.5-14B-Instruct."
        )
