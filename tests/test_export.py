"""`python -m qvl.export`: folders that others can use, compared with the adapter before they get their names."""

import contextlib
import hashlib
import http.server
import json
import math
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import CHAT, CPU, VISION, message, picture, processing_class, settings_for

from qvl.adapter_origin import TRAINED_WITH, origin, other_origin
from qvl.adapters import add_adapter
from qvl.chat import main as chat
from qvl.clip_llm import composition_record
from qvl.errors import UserError
from qvl.export import main, parse_arguments
from qvl.exported_folder import export_adapter
from qvl.files import write_json_atomically
from qvl.given_prompts import read_prompts
from qvl.models import load_base, load_processing_class
from qvl.parity import check_parity, listen
from qvl.recipe import run
from qvl.trained_model import load_trained
from recipes.flickr8k import RECIPE

ROOT = Path(__file__).parents[1]
COMPOSED = "CLIP + Qwen3"
KINDS = [*VISION, CHAT]
CLIP_FLAGS = ("--vision_encoder", "qvl/tiny-clip", "--train_projector")
QUESTION = "Describe the scene ."
GREEDY = {"max_new_tokens": 24}
# Of full tokens, as a server would: nothing of ours takes part.
WITHOUT_QVL = """
import json, sys
sys.modules["qvl"] = None
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
torch.set_num_threads(1)
answers = {}
for name, (folder, base, image) in json.loads(sys.argv[1]).items():
    auto = AutoModelForImageTextToText if image else AutoModelForCausalLM
    if base:
        model = PeftModel.from_pretrained(auto.from_pretrained(base, dtype=torch.float32), folder)
    else:
        stored = auto.from_pretrained(folder, dtype="auto")
        assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}, name
        model = auto.from_pretrained(folder, dtype=torch.float32)
    content = [{"type": "text", "text": "Describe the scene ."}]
    if image:
        processor = AutoProcessor.from_pretrained(folder)
        chat = [{"role": "user", "content": [{"type": "image", "image": Image.open(image)}, *content]}]
    else:
        processor = AutoTokenizer.from_pretrained(folder)
        chat = [{"role": "user", "content": content[0]["text"]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.eval().generate(**inputs, max_new_tokens=24, do_sample=False)
    answers[name] = tokens[0, inputs["input_ids"].shape[1]:].tolist()
print(json.dumps(answers))
"""


def make_adapter(
    name: str,
    folder: Path,
    *flags: str,
    strength: float = 0.1,
    only: Sequence[str] = ("",),
    **trained_with: Any,
) -> Path:
    """An adapter that changes answers, saved as a training saves it."""
    settings = settings_for(name, *flags)
    model = add_adapter(load_base(settings, CPU), settings)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_B" in key and any(part in key for part in only):
            parameter.data = torch.randn(parameter.shape, generator=generator) * strength
    model.save_pretrained(folder)
    processor = load_processing_class(settings)
    processor.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    write_json_atomically(folder / "adapter_config.json", config | {"base_model_name_or_path": name})
    known = {**origin(settings, processor, None), **composition_record(settings, model.get_base_model())}
    write_json_atomically(folder / TRAINED_WITH, {**known, "dtype": "float32", **trained_with})
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    picture(96, 96).save(folder / "noise.png")
    (folder / "questions.txt").write_text(f"{QUESTION}\n\nWhat colour is the background ?\n", encoding="utf-8")
    turns = [{"role": "user", "content": f"<image>{QUESTION}"}, {"role": "assistant", "content": "never read"}]
    rows = [{"images": ["noise.png"], "messages": turns}, {"images": [], "instruction": QUESTION, "response": "-"}]
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """A run of the captioning recipe, a few steps long."""
    flags = {
        "smoke": True,
        "num_train_examples": 8,
        "num_eval_examples": 3,
        "max_steps": 2,
        "max_new_tokens": 8,
        "output_dir": str(place / "run"),
    }
    run(RECIPE, flags)
    return place / "run"


@pytest.fixture(scope="module")
def adapters(place: Path, trained: Path) -> dict[str, Path]:
    made = {name: make_adapter(name, place / Path(name).name) for name in KINDS[1:]}
    composed = make_adapter("qvl/tiny-qwen3-text", place / "composed", *CLIP_FLAGS)
    return {KINDS[0]: trained / "adapter", **made, COMPOSED: composed}


@pytest.fixture(scope="module")
def merged(place: Path, adapters: dict[str, Path]) -> dict[str, Path]:
    folders = {}
    for name, adapter in adapters.items():
        folders[name] = adapter.with_name(f"{adapter.name}-whole")
        prompts = place / ("questions.txt" if name == CHAT else "pictures.jsonl")
        export_adapter(adapter, folders[name], merge=True, prompts_file=None if name == KINDS[0] else prompts)
    return folders


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    folder = trained / "adapter-exported"
    with pytest.raises(SystemExit) as stopped:
        main(["--adapter", str(trained / "adapter"), "--format", "adapter"])
    assert stopped.value.code == 0
    return folder


@pytest.mark.slow
def test_plain_transformers_and_peft_give_the_adapters_answers(
    place: Path, adapters: dict[str, Path], merged: dict[str, Path], exported: Path
) -> None:
    image = str(place / "noise.png")
    asked = {name: (str(folder), None, None if name == CHAT else image) for name, folder in merged.items()}
    asked["adapter"] = (str(exported), str(ROOT / "qvl" / "assets" / Path(KINDS[0]).name), image)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_QVL, json.dumps(asked)], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len({tuple(answer) for answer in answers.values()}) == 4, "the kinds answer differently"
    for name, adapter in {**adapters, "adapter": adapters[KINDS[0]]}.items():
        prompts = place / ("questions.txt" if name == CHAT else "pictures.jsonl")
        said = listen(load_trained(adapter, False, GREEDY), read_prompts(prompts, 1))
        assert answers[name] == said.answers[0].tolist(), name


@pytest.mark.slow
def test_the_adapter_changes_what_is_said(adapters: dict[str, Path], place: Path) -> None:
    """Else the comparisons here would hold of a base that lost its adapter."""
    for name, adapter in adapters.items():
        prompts = read_prompts(place / ("questions.txt" if name == CHAT else "pictures.jsonl"), 1)
        with_it, without = (listen(load_trained(adapter, bare, GREEDY), prompts) for bare in (False, True))
        assert with_it.answers[0].tolist() != without.answers[0].tolist(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", [KINDS[0], CHAT])
def test_chat_says_the_same_on_both_folders(
    name: str,
    place: Path,
    adapters: dict[str, Path],
    merged: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = [] if name == CHAT else ["--image", str(place / "noise.png")]
    said = []
    for folder in (adapters[name], merged[name]):
        with pytest.raises(SystemExit) as stopped:
            chat(["--adapter", str(folder), "--prompt", QUESTION, "--max_new_tokens", "24", *image])
        screen = capsys.readouterr()
        said.append((stopped.value.code, screen.out))
        assert "Warning" not in screen.err
    assert said[0] == said[1]
    assert said[0][1].strip()
    with pytest.raises(UserError, match="is a merged model"):
        load_trained(merged[name], True, GREEDY)


def test_what_is_saved_says_what_made_it(trained: Path, merged: dict[str, Path]) -> None:
    own = json.loads((trained / "adapter" / TRAINED_WITH).read_text(encoding="utf-8"))
    config = json.loads((ROOT / "qvl/assets/tiny-qwen3-vl/config.json").read_text(encoding="utf-8"))
    del config["transformers_version"]
    assert own["config_sha256"] == hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    assert own["versions"].keys() == {"qvl", "torch", "transformers", "peft", "trl"}
    assert own["versions"]["torch"] == torch.__version__.partition("+")[0]
    whole = json.loads((merged[KINDS[0]] / TRAINED_WITH).read_text(encoding="utf-8"))
    assert whole == {**own, "merged": True}
    parity = json.loads((merged[KINDS[0]] / "parity.json").read_text(encoding="utf-8"))
    assert [check["passed"] for check in parity] == [True, True]
    assert {path.stat().st_mode & 0o777 for path in merged[KINDS[0]].iterdir()} == {0o644}


def test_the_model_card_is_read_by_the_hubs_own_reader(trained: Path, merged: dict[str, Path], exported: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))
    for folder, library in ((merged[KINDS[0]], "transformers"), (exported, "peft")):
        card = ModelCard.load(folder / "README.md")
        data = card.data.to_dict()
        assert (data["library_name"], data["license"]) == (library, "apache-2.0")
        assert data["pipeline_tag"] == "image-text-to-text"
        (row,) = re.findall(r"^\| CIDEr \|.*$", card.text, re.MULTILINE)
        ends = metrics["finetuned"]["interval"]["cider"]
        for number in (metrics["baseline"]["cider"], metrics["finetuned"]["cider"], ends["low"], ends["high"]):
            assert f"{number:.4f}" in row
        for text in ("qvl/scenes", "| learning_rate | 0.005 |", "| LoRA r | 16 |", "| trl | ", "fingerprint"):
            assert text in card.text
        assert str(trained.parent) not in card.text
    text = ModelCard.load(merged[CHAT] / "README.md")
    assert (text.data.pipeline_tag, "Not measured." in text.text) == ("text-generation", True)


@pytest.mark.slow
def test_a_merge_into_full_weights_says_how_far_it_is_from_four_bits(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(CHAT, tmp_path / "adapter", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(SystemExit) as stopped:
        main(["--adapter", str(adapter), "--format", "merged", "--prompts", str(place / "questions.txt")])
    screen = capsys.readouterr().out
    assert stopped.value.code == 0
    found = re.search(r"trained on 4-bit weights .* moves it: (\S+) nats a token .* (\d) of 2 greedy", screen)
    assert found
    assert 1e-4 < float(found[1]) < 1
    assert found[0] in (tmp_path / "adapter-merged" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("strength", "said"), [(3.0, r"divergence_from_the_adapter.*\n.*export with --format adapter"), (math.nan, "NaN")]
)
def test_a_merge_that_sixteen_bits_cannot_hold_leaves_nothing(
    strength: float, said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a norm behind queries and keys, large ones make attention so sharp that rounding moves it."""
    adapter = make_adapter(VISION[1], tmp_path / "adapter", strength=strength, only=("q_proj", "k_proj"))
    with pytest.raises(SystemExit) as stopped:
        main(["--adapter", str(adapter), "--format", "merged", "--prompts", str(place / "questions.txt")])
    assert stopped.value.code == 1
    assert re.search(said, capsys.readouterr().err, re.DOTALL)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_weights_that_were_changed_afterwards_are_found(
    place: Path, adapters: dict[str, Path], merged: dict[str, Path], tmp_path: Path
) -> None:
    prompts = read_prompts(place / "questions.txt", 2)
    said = listen(load_trained(adapters[CHAT], False, GREEDY), prompts)
    for path in merged[CHAT].iterdir():
        (tmp_path / path.name).symlink_to(path)

    def verdicts() -> list[bool]:
        heard = listen(load_trained(tmp_path, False, GREEDY), prompts, said.answers)
        return [check.passed for check in check_parity(said, heard, 0.01)]

    assert verdicts() == [True, True]
    weights = load_file(merged[CHAT] / "model.safetensors")
    name = next(key for key in weights if key.endswith("layers.1.mlp.down_proj.weight"))
    (tmp_path / "model.safetensors").unlink()
    save_file({**weights, name: torch.zeros_like(weights[name])}, tmp_path / "model.safetensors", {"format": "pt"})
    assert verdicts() == [False, False]


def test_mistakes_are_found_before_anything_is_loaded(
    place: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = str(adapters[CHAT])
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    words = ["--adapter", own, "--format", "merged"]
    cases = [
        (["--adapter", str(tmp_path), "--format", "adapter"], "holds no adapter"),
        ([*words, "--out", str(tmp_path)], "is there already"),
        (words, "lies in no run folder: name prompts"),
        ([*words, "--prompts", str(tmp_path / "none.txt")], "there is no such file"),
        ([*words, "--prompts", str(tmp_path / "empty.txt")], "holds no prompt"),
        ([*words, "--prompts", str(tmp_path / "bad.jsonl")], 'bad.jsonl:1: "messages" is empty'),
        ([*words, "--prompts", str(place / "pictures.jsonl")], "takes text only"),
        ([*words, "--push_to_hub", "no owner"], "--push_to_hub no owner"),
        ([*words, "--push_to_hub", "mine"], "name the owner too"),
        ([*words, "--push_to_hub", "me/mine"], "HF_HUB_OFFLINE"),
    ]
    for arguments, said in cases:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2, arguments
        assert said in capsys.readouterr().err, arguments
    assert not Path(f"{own}-merged").exists()


def test_what_lies_beside_an_adapter_is_not_given_to_others(place: Path, tmp_path: Path) -> None:
    """A checkpoint has the optimizer's states, a downloaded folder the download's cache."""
    adapter = make_adapter(CHAT, tmp_path / "adapter")
    for name in ("optimizer.pt", "rng_state.pth", "trainer_state.json", ".cache/huggingface/lock", "README.md"):
        (adapter / name).parent.mkdir(parents=True, exist_ok=True)
        (adapter / name).write_text("left there", encoding="utf-8")
    export_adapter(adapter, tmp_path / "out", merge=False, prompts_file=place / "questions.txt")
    held = {path.name for path in (tmp_path / "out").rglob("*")}
    assert held == {
        *("adapter_config.json", "adapter_model.safetensors", TRAINED_WITH, "parity.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") != "left there"


def test_rows_that_the_run_went_past_are_no_prompts(tmp_path: Path) -> None:
    adapter = make_adapter(KINDS[0], tmp_path / "run" / "adapter")
    rows = []
    for number, (width, split) in enumerate([(64, "train"), (600, "test"), (32, "test"), (48, "test")]):
        picture(width, 2).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "instruction": QUESTION, "response": "Noise.", "split": split})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = {
        "model_name_or_path": KINDS[0],
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "dataset_test_split": "test",
        "skip_bad_rows": True,
    }
    (tmp_path / "run" / "settings.yaml").write_text(json.dumps(own), encoding="utf-8")
    export_adapter(adapter, tmp_path / "out", merge=False, prompts_file=None)
    checked = json.loads((tmp_path / "out" / "parity.json").read_text(encoding="utf-8"))
    assert any("2 prompts" in json.dumps(check) for check in checked)


def test_a_place_that_cannot_be_written_to_is_found_before_anything_is_loaded(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(CHAT, tmp_path / "adapter")
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    words = ["--adapter", str(adapter), "--format", "merged", "--prompts", str(place / "questions.txt")]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--out", str(tmp_path / "file" / "out")])
    screen = capsys.readouterr()
    assert stopped.value.code == 2
    assert "cannot be made" in screen.err
    assert "Merging" not in screen.out


def test_a_card_says_what_only_qvl_can_serve(place: Path, tmp_path: Path) -> None:
    adapter = make_adapter("qvl/tiny-qwen3-text", tmp_path / "adapter", *CLIP_FLAGS, "--num_image_tokens", "16")
    export_adapter(adapter, tmp_path / "out", merge=True, prompts_file=place / "pictures.jsonl")
    assert "needs qvl" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    chat_with = load_trained(tmp_path / "out", False, GREEDY)
    assert chat_with.model.config.image_seq_length == 16
    assert chat_with.answer([message("user", QUESTION, 1)], [picture(96, 96)])


def test_a_base_that_comes_quantized_is_not_merged_into(place: Path, tmp_path: Path) -> None:
    settings = settings_for(CHAT, "--load_in_4bit")
    packed = load_base(settings, CPU)
    packed.save_pretrained(tmp_path / "base")
    processing_class(CHAT).save_pretrained(tmp_path / "base")
    adapter = make_adapter(CHAT, tmp_path / "adapter")
    known = json.loads((adapter / TRAINED_WITH).read_text(encoding="utf-8"))
    write_json_atomically(adapter / TRAINED_WITH, {**known, "base_model_name_or_path": str(tmp_path / "base")})
    with pytest.raises(UserError, match="comes quantized"):
        export_adapter(adapter, tmp_path / "out", True, place / "questions.txt")
    assert not list(tmp_path.glob("*out*"))


def test_another_origin_is_named_beside_the_own(
    place: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, tokenizer = settings_for(CHAT), processing_class(CHAT)
    assert other_origin(adapters[CHAT], settings, tokenizer, None) == []
    revised = settings_for(CHAT, "--model_revision", "v2")
    assert other_origin(adapters[CHAT], revised, tokenizer, None) == [
        "It was trained on the base's revision main, and is loaded on v2."
    ]
    other = other_origin(adapters[CHAT], settings_for(KINDS[0]), processing_class(KINDS[0]), None)
    known = json.loads((adapters[CHAT] / TRAINED_WITH).read_text(encoding="utf-8"))
    assert len(other) == 3
    assert f"trained on {CHAT}, and is loaded on {KINDS[0]}" in other[0]
    assert known["config_sha256"][:12] in other[1]
    assert known["chat_template_sha256"][:12] in other[2]

    for path in adapters[CHAT].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    template = tmp_path / "chat_template.jinja"
    template.write_text("{# mine #}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(SystemExit):
        chat(["--adapter", str(tmp_path), "--prompt", QUESTION, "--max_new_tokens", "2"])
    assert f"Warning, {tmp_path}: It was trained with a chat template" in capsys.readouterr().err


def test_commits_count_where_both_are_known(adapters: dict[str, Path], tmp_path: Path) -> None:
    known = json.loads((adapters[CHAT] / TRAINED_WITH).read_text(encoding="utf-8"))
    write_json_atomically(tmp_path / TRAINED_WITH, {**known, "commit": "a" * 40})
    settings, tokenizer = settings_for(CHAT, "--model_revision", "v2"), processing_class(CHAT)
    assert other_origin(tmp_path, settings, tokenizer, "a" * 40) == []
    (line,) = other_origin(tmp_path, settings, tokenizer, "b" * 40)
    assert "a" * 40 in line and "b" * 40 in line


class Hub(http.server.BaseHTTPRequestHandler):
    """The few endpoints of a model hub that an upload needs; keeps what it is given."""

    received: dict[str, Any]

    def do_GET(self) -> None:
        knows = self.path == "/api/whoami-v2" and self.headers["Authorization"] == "Bearer good"
        self.answer({"name": "me", "type": "user"} if knows else None, 401)

    def do_PUT(self) -> None:
        self.received["blobs"][self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/api/repos/create":
            self.received["created"] = json.loads(body)
            self.answer({"url": f"http://{self.headers['Host']}/me/tiny", "name": "me/tiny"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            large = [file["path"].endswith(".safetensors") for file in files]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
                for file, is_large in zip(files, large, strict=True)
            ]
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            place = f"http://{self.headers['Host']}/blob"
            self.answer(
                {
                    "transfer": "basic",
                    "objects": [
                        {**item, "actions": {"upload": {"href": f"{place}/{item['oid']}"}}} for item in objects
                    ],
                }
            )
        elif "/commit/" in self.path:
            self.received["commit"] = [json.loads(line) for line in body.splitlines()]
            self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/me/tiny/commit/1", "commitOid": "1" * 40, "success": True}
            )
        else:
            self.answer(None, 404)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, value: Any, status_without: int = 200) -> None:
        content = json.dumps(value if value is not None else {"error": "no"}).encode()
        self.send_response(200 if value is not None else status_without)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        self.received["requests"].append(self.requestline)


@contextlib.contextmanager
def hub() -> Iterator[tuple[str, dict[str, Any]]]:
    received: dict[str, Any] = {"blobs": {}, "requests": []}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHub", (Hub,), {"received": received}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
def test_an_upload_holds_what_the_folder_holds(place: Path, tmp_path: Path) -> None:
    adapter = make_adapter(CHAT, tmp_path / "adapter")

    def upload(endpoint: str, token: str) -> subprocess.CompletedProcess[str]:
        words = ["--adapter", str(adapter), "--format", "adapter", "--out", str(tmp_path / "out")]
        words += ["--prompts", str(place / "questions.txt"), "--push_to_hub", "me/tiny"]
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        # Its chunks go to a service of their own; this hub takes whole files, as every hub does.
        environment["HF_HUB_DISABLE_XET"] = "1"
        return subprocess.run(
            [sys.executable, "-m", "qvl.export", *words],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    with hub() as (endpoint, received):
        refused = upload(endpoint, "bad-token-of-mine")
        assert (refused.returncode, "does not let you in" in refused.stderr) == (2, True), refused.stderr
        assert "bad-token" not in refused.stderr
        assert not (tmp_path / "out").exists()
        done = upload(endpoint, "good")
        assert done.returncode == 0, (done.stderr[-1500:], received["requests"])
    assert f"Uploaded: {endpoint}/me/tiny" in done.stdout
    # huggingface_hub 2 says it in a word, 1 in a switch.
    assert received["created"].get("visibility") == "private" or received["created"]["private"] is True
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    assert received["blobs"] == {hashlib.sha256(weights.read_bytes()).hexdigest(): weights.read_bytes()}
    named = {line["value"]["path"] for line in received["commit"] if line["key"] in ("file", "lfsFile")}
    assert named == {path.name for path in (tmp_path / "out").iterdir()}


def test_the_commands_of_the_readme_are_accepted() -> None:
    lines = re.findall(r"^python -m qvl\.export (.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        assert parse_arguments(shlex.split(line, comments=True)).adapter
