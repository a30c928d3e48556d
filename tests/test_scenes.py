"""Generated scenes tell the truth, repeat exactly, keep the splits apart; the embedded tiny models can see them."""

import collections
import hashlib
import json
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qvl import scenes
from qvl.errors import UserError

ASSETS = Path(scenes.__file__).parent / "assets"
MODELS = ("tiny-qwen3-vl", "tiny-qwen2.5-vl", "tiny-qwen3-chat")
VISION_MODELS = MODELS[:2]
BASE_WORDS = {"big": "large", "little": "small"}


def fingerprint(seed: int) -> str:
    digest = hashlib.sha256()
    for index in range(20):
        scene = scenes.make_scene(index, seed)
        digest.update(scenes.draw(scene).tobytes())
        digest.update("\n".join(scenes.captions(scene)).encode())
    return digest.hexdigest()


def test_equal_seed_gives_equal_scenes_in_another_process_and_on_another_machine() -> None:
    folder = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import test_scenes; print(test_scenes.fingerprint(3))"
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"}).stdout
    assert other.strip() == fingerprint(3) == FINGERPRINT_OF_SEED_3


def test_another_seed_gives_other_scenes() -> None:
    assert fingerprint(3) != fingerprint(4)


# --- captions


def mentioned(caption: str) -> list[tuple[str, str, str]]:
    """The (size, colour, shape) triples of a caption in order of mention."""
    words = caption.lower().split()
    found = []
    for size, colour, shape in zip(words, words[1:], words[2:], strict=False):
        if colour in scenes.COLOURS and shape in scenes.SHAPES:
            found.append((BASE_WORDS.get(size, size), colour, shape))
    return found


def claimed_order(caption: str) -> str:
    """The relation that a caption states between its first and its second thing."""
    claims = (
        (r"to the left of|on the left and", "left of"),
        (r"to the right of", "right of"),
        (r" above | at the top and", "above"),
        (r" below ", "below"),
    )
    found = [relation for pattern, relation in claims if re.search(pattern, caption)]
    assert len(found) == 1, caption
    return found[0]


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_are_five_and_true_of_the_pixels(split: scenes.Split) -> None:
    for index in range(150):
        scene = scenes.make_scene(index, seed=5, split=split)
        image = scenes.draw(scene)
        assert image.mode == "RGB" and image.size == (scene.width_px, scene.height_px)
        by_words = collections.defaultdict(list)
        for thing in (scene.first, scene.second):
            by_words[thing.size, thing.colour, thing.shape].append(thing)
            assert nearest(image.getpixel((thing.x_px, thing.y_px)), scenes.COLOURS) == thing.colour
        assert nearest(image.getpixel((0, 0)), scenes.BACKGROUNDS) == scene.background
        texts = scenes.captions(scene)
        assert len(set(texts)) == scenes.NUM_CAPTIONS == 5
        for text in texts:
            names = mentioned(text)
            assert sorted(names) == sorted(key for key, things in by_words.items() for _ in things), text
            assert f"a {scene.background} background" in text
            if names[0] == names[1]:
                continue  # twins: either may be meant, the sentence is true for one order
            one, other = (by_words[name][0] for name in names)
            dx_px, dy_px = other.x_px - one.x_px, other.y_px - one.y_px
            order = (
                ("left of" if dx_px > 0 else "right of")
                if abs(dx_px) > abs(dy_px)
                else ("above" if dy_px > 0 else "below")
            )
            assert claimed_order(text) == order, text


def nearest(pixel: tuple[int, int, int], palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: sum((a - b) ** 2 for a, b in zip(pixel, palette[name], strict=True)))


def test_drawn_sizes_are_as_named_and_things_do_not_touch() -> None:
    for index in range(150):
        scene = scenes.make_scene(index, seed=6)
        image = scenes.draw(scene)
        first, second = scene.first, scene.second
        gap_px = second.x_px - first.x_px if scene.relation == "left" else second.y_px - first.y_px
        assert gap_px > first.radius_px + second.radius_px
        for thing in (first, second):
            box = (
                thing.x_px - thing.radius_px,
                thing.y_px - thing.radius_px,
                thing.x_px + thing.radius_px + 1,
                thing.y_px + thing.radius_px + 1,
            )
            assert box[0] >= 0 and box[1] >= 0 and box[2] <= image.width and box[3] <= image.height
            extent_px = 2 * thing.radius_px
            assert extent_px >= 40 if thing.size == "large" else extent_px <= 26
            assert thing.fill in image.crop(box).get_flattened_data()


def test_every_word_is_used_and_images_have_many_shapes() -> None:
    made = [scenes.make_scene(index, seed=1) for index in range(400)]
    assert {thing.shape for scene in made for thing in (scene.first, scene.second)} == set(scenes.SHAPES)
    assert {thing.colour for scene in made for thing in (scene.first, scene.second)} == set(scenes.COLOURS)
    assert {scene.background for scene in made} == set(scenes.BACKGROUNDS)
    assert {scene.relation for scene in made} == set(scenes.RELATIONS)
    sizes = {(scene.width_px, scene.height_px) for scene in made}
    assert len(sizes) == 9 and any(width != height for width, height in sizes)


def test_no_test_scene_shows_what_a_training_scene_shows_under_any_seed() -> None:
    train = {scenes.make_scene(index, seed, "train").content for seed in (0, 1) for index in range(1500)}
    test = {scenes.make_scene(index, seed, "test").content for seed in (0, 2) for index in range(300)}
    assert not train & test
    assert len(test) > 500


def test_terse_style_says_the_same_in_other_words() -> None:
    scene = scenes.make_scene(0, seed=0)
    terse = scenes.terse(scene)
    first, second, background = terse.split(" ; ")
    assert first.split()[:3] == [scene.first.shape, scene.first.colour, scene.first.size]
    assert second.split()[:3] == [scene.second.shape, scene.second.colour, scene.second.size]
    assert background == scene.background
    four_grams = {tuple(terse.split()[i : i + 4]) for i in range(8)}
    assert not four_grams & {tuple(text.split()[i : i + 4]) for text in scenes.captions(scene) for i in range(20)}


# --- files


def test_written_scenes_are_whole_and_written_once(tmp_path: Path) -> None:
    folder = scenes.write_scenes(tmp_path / "scenes", num_train=6, num_eval=3, seed=0)
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["split"] for row in rows] == ["train"] * 6 + ["test"] * 3
    assert [row["image"] for row in rows] == [f"images/{number:05d}.png" for number in range(1, 10)]
    assert len({row["image"] for row in rows}) == len(list((folder / "images").iterdir())) == 9
    assert [rows[0][f"caption_{i}"] for i in range(5)] == scenes.captions(scenes.make_scene(0, 0, "train"))
    written = (folder / "captions.jsonl").stat().st_mtime_ns
    assert scenes.write_scenes(folder, num_train=6, num_eval=3, seed=0) == folder
    assert (folder / "captions.jsonl").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    folder = scenes.write_scenes(tmp_path / "scenes", num_train=2, num_eval=1, seed=0)
    with pytest.raises(UserError, match="was asked for"):
        scenes.write_scenes(folder, num_train=3, num_eval=1, seed=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match="not generated scenes"):
        scenes.write_scenes(tmp_path / "mine", num_train=2, num_eval=1, seed=0)


def test_two_processes_may_write_the_same_scenes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=scenes.write_scenes, args=(tmp_path / "scenes", 40, 10, 0)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(list((tmp_path / "scenes" / "images").iterdir())) == 50
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_written_chats_answer_in_sentences_and_truly(tmp_path: Path) -> None:
    folder = scenes.write_chats(tmp_path / "chats", num_train=60, num_eval=20, seed=0)
    rows = [json.loads(line) for line in (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["split"] for row in rows] == ["train"] * 60 + ["test"] * 20
    assert {len(row["messages"]) for row in rows} == {2, 4, 6}
    for index, row in enumerate(rows[:60]):
        scene = scenes.make_scene(index, seed=0)
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            assert answer["content"].endswith(" .")
            if "What colour is the background" in question["content"]:
                assert f"is {scene.background} ." in answer["content"]


# --- embedded models


def test_embedded_models_are_small() -> None:
    assert (ASSETS / "tiny-qwen3-vl" / "model.safetensors").stat().st_size <= 4_000_000
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12_000_000
    for name in MODELS:
        made = json.loads((ASSETS / name / "made.json").read_text(encoding="utf-8"))
        assert f"--model {name}" in made["command"] and made["versions"]["transformers"]


@pytest.mark.parametrize("name", MODELS)
def test_embedded_models_load_with_their_real_classes_and_trl_knows_their_template(name: str) -> None:
    import transformers
    from trl.chat_template_utils import get_training_chat_template

    auto = transformers.AutoModelForImageTextToText if name in VISION_MODELS else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(ASSETS / name)
    processor = (transformers.AutoProcessor if name in VISION_MODELS else transformers.AutoTokenizer).from_pretrained(
        ASSETS / name
    )
    tokenizer = getattr(processor, "tokenizer", processor)
    assert (type(model).__name__, type(processor).__name__) == CLASSES[name]
    assert get_training_chat_template(processor) is not None
    assert (
        model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    )
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    language_model = model.model.language_model if name in VISION_MODELS else model.model
    for path, module in language_model.named_modules():
        if path.endswith("_proj"):
            assert module.in_features % 64 == 0 and module.out_features % 64 == 0
    text = "A large red circle sits above a résumé 猫 .\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


CLASSES = {
    "tiny-qwen3-vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLProcessor"),
    "tiny-qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"),
    "tiny-qwen3-chat": ("Qwen3ForCausalLM", "Qwen2Tokenizer"),
}


# Chance, and what the model has to reach. Qwen2.5-VL's tower, with windows and without DeepStack, learns shapes later.
SHARE_RIGHT = {
    "tiny-qwen3-vl": {"shape": (1 / 5, 0.9), "colour": (1 / 6, 0.9), "size": (1 / 2, 0.9)},
    "tiny-qwen2.5-vl": {"shape": (1 / 5, 0.5), "colour": (1 / 6, 0.7), "size": (1 / 2, 0.75)},
}


@pytest.mark.parametrize("name", VISION_MODELS)
def test_zero_shot_answers_are_terse_and_name_what_is_there(name: str) -> None:
    seen = [scenes.make_scene(index, seed=11, split="test") for index in range(40)]
    answers = describe(name, seen)
    is_terse = [re.fullmatch(r"(\w+ ){4}; (\w+ ){4}; \w+", answer) is not None for answer in answers]
    assert sum(is_terse) >= 36, answers[:5]
    right = collections.Counter()
    for scene, answer in zip(seen, answers, strict=True):
        for said, true in zip(answer.split(), scenes.terse(scene).split(), strict=False):
            right[kind_of(true)] += said == true
    # Each is named 80 times.
    for kind, (chance, least) in SHARE_RIGHT[name].items():
        assert right[kind] / 80 > least > chance, right


def kind_of(word: str) -> str:
    for kind, words in (("shape", scenes.SHAPES), ("colour", scenes.COLOURS), ("size", scenes.RADIUS_PX)):
        if word in words:
            return kind
    return "other"


def describe(name: str, shown: list[scenes.Scene]) -> list[str]:
    import torch
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(ASSETS / name, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(ASSETS / name)
    processor.tokenizer.padding_side = "left"
    content = [{"type": "image"}, {"type": "text", "text": scenes.PROMPT}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    images = [scenes.draw(scene) for scene in shown]
    inputs = processor(text=[prompt] * len(shown), images=images, padding=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# Equal on every machine: whole-pixel drawing, SHA-512 seeded random numbers.
FINGERPRINT_OF_SEED_3 = "e50c1701d156bc3d9347d7d60f9aaace4bd43b8e5845c391c3728f10dd00021f"
