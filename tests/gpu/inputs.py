"""What the scripts beside this file measure with: a checkpoint with random weights, and photos of one size.

Random weights give real speed and memory; losses and answers mean nothing. They are made by a command, so that the GPU
is free again behind it:

    python tests/gpu/inputs.py FOLDER_WITH_CONFIG_AND_PROCESSOR FOLDER_TO_MAKE
"""

import shutil
import subprocess
import sys
from pathlib import Path

from qvl.files import read_jsonl, write_jsonl_atomically

ROOT = Path(__file__).resolve().parents[2]
# Flickr8k's own; photos of one size make batches of one shape.
_LONG_SIDE, _SHORT_SIDE = 500, 375


def checkpoint(model: str, work: Path) -> str:
    """`model` itself if it has weights or is no folder; else a checkpoint of its shape in `work`, made once."""
    source = Path(model)
    if not source.is_dir():
        return model
    if any(source.glob("*.safetensors")):
        return str(source.resolve())
    target = work / f"{source.resolve().name}-random"
    if not target.is_dir():
        print(f"Making {target} with random weights ...", flush=True)
        subprocess.run([sys.executable, __file__, str(source.resolve()), str(target.resolve())], check=True, cwd=ROOT)
    return str(target)


def make_checkpoint(source: Path, target: Path) -> None:
    """Writes `target`, whole or not at all: the files of `source` and random weights, made on a GPU if there is one."""
    import torch

    from qvl.random_weights import build_with_random_weights
    from qvl.settings import parse_settings

    settings = parse_settings({"model_name_or_path": str(source), "dtype": "auto"}, {}, [])
    model = build_with_random_weights(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    beside = target.with_name(f".{target.name}-in-writing")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside, max_shard_size="4GB")
    # Over what was saved: a loaded model's configuration names the attention of this machine.
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(".index.json"):
            shutil.copy(file, beside)
    beside.rename(target)


def photos(source: Path, work: Path, num_rows: int) -> Path:
    """A data folder with `num_rows` training rows: scaled photos of `source`, as often as needed, with captions turned.

    Repeated rows keep a measurement within one epoch, without a pause for workers that begin anew.

    Args:
        source: folder with `captions.jsonl`, whose rows have `image`, `captions` and `split` (train or test).
        work: where the folder is made, once for each number of rows.
        num_rows: training rows; those of the split test are kept as they are.
    """
    target = work / f"photos-{num_rows}"
    if (target / "captions.jsonl").is_file():
        return target
    rows = read_jsonl(source / "captions.jsonl")
    for row in rows:
        _scale(source / row["image"], target / row["image"])
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    repeated = []
    for index in range(num_rows):
        row = train[index % len(train)]
        turn = index // len(train) % len(row["captions"])
        repeated.append({**row, "captions": row["captions"][turn:] + row["captions"][:turn]})
    write_jsonl_atomically(target / "captions.jsonl", [*repeated, *test])
    return target


def _scale(source: Path, target: Path) -> None:
    from PIL import Image

    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as photo:
        is_wide = photo.width >= photo.height
        size = (_LONG_SIDE, _SHORT_SIDE) if is_wide else (_SHORT_SIDE, _LONG_SIDE)
        photo.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(target, quality=90)


if __name__ == "__main__":
    make_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
