"""report.html in a real browser, its size, what it does without some of the files, and the closing text table."""

import io
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from qvl.files import read_jsonl, write_json_atomically, write_jsonl_atomically
from qvl.gallery import MAX_GALLERY_EXAMPLES, evenly_spaced
from qvl.plots import Bar, loss_curve, score_bars
from qvl.report import MAX_PAGE_BYTES, write_report
from qvl.score_table import comparison_table

MARKUP = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\"> a \"dog\" & </script> cat"
SCORES = {
    "bleu4": {"label": "BLEU-4", "higher_is_better": True},
    "rouge_l": {"label": "ROUGE-L", "higher_is_better": True},
    "cider": {"label": "CIDEr", "higher_is_better": True},
    "bleu4_first_reference": {"label": "BLEU-4, first reference", "higher_is_better": True},
    "perplexity": {"label": "perplexity", "higher_is_better": False},
}
METRICS = {
    "scores": SCORES,
    "baseline": {
        "bleu4": 0.1009,
        "rouge_l": 0.342,
        "cider": 0.5943,
        "bleu4_first_reference": 0.0712,
        "perplexity": 2401.61,
        "num_examples": 500,
        "interval": {"bleu4": {"low": 0.0921, "high": 0.1103}, "perplexity": {"low": 1822.7, "high": 3137.3}},
    },
    "finetuned": {
        "bleu4": 0.1294,
        "rouge_l": 0.401,
        "cider": 0.601,
        "bleu4_first_reference": 0.0913,
        "perplexity": 13.25,
        "num_examples": 500,
        "interval": {"bleu4": {"low": 0.119, "high": 0.1402}, "perplexity": {"low": 12.1, "high": 14.4}},
    },
    "difference": {
        "bleu4": {
            "mean": 0.0285,
            "low": 0.021,
            "high": 0.0361,
            "p_value": 0.002,
            "relative": {"mean": 0.282, "low": 0.12, "high": 0.453},
            "verdict": "better",
        },
        "rouge_l": {"mean": 0.059, "low": None, "high": None},
        "cider": {
            "mean": 0.0067,
            "low": -0.01,
            "high": 0.02,
            "p_value": 0.458,
            "relative": {"mean": 0.0113, "low": -0.02, "high": 0.034},
            "verdict": "no clear difference",
        },
    },
    "train": {"samples_per_second": 38.2, "peak_gib": 20.61, "final_loss": None},
}


def _photo(example_id: str) -> Image.Image:
    """A picture that JPEG cannot make small: noise and a shape, as large as Flickr8k's photos."""
    generator = random.Random(example_id)
    image = Image.frombytes("RGB", (125, 94), generator.randbytes(125 * 94 * 3)).resize((500, 375))
    ImageDraw.Draw(image).ellipse([100, 80, 400, 300], fill=generator.choice(["teal", "tomato", "gold"]))
    return image


def _rows(stage: str, num_examples: int) -> list[dict[str, Any]]:
    """Predictions in which fine-tuning gains in every example, by different amounts."""
    words = "over the green field" if stage == "finetuned" else "somewhere"
    return [
        {
            "id": f"row-{index}",
            "image": f"images/{index}.jpg",
            "images": [f"images/{index}.jpg"],
            "prompt": "Describe the image.",
            "prediction": f"a dog runs {words} {'x ' * (index % 5)}",
            "references": [f"a dog runs over the green field number {index}", "another <b>reference</b>"],
            # Gains that differ, the first one a loss.
            "scores": {"rouge_l": 0.4 + (0.1 * (index % 7) - 0.05 if stage == "finetuned" else 0.0)},
        }
        for index in range(num_examples)
    ]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with every file that the page reads."""
    folder = tmp_path / "flickr8k" / "evening-run"
    folder.mkdir(parents=True)
    baseline, finetuned = _rows("baseline", 6), _rows("finetuned", 6)
    finetuned[0]["prediction"] = MARKUP
    write_jsonl_atomically(folder / "baseline_predictions.jsonl", baseline)
    write_jsonl_atomically(folder / "finetuned_predictions.jsonl", finetuned)
    write_json_atomically(folder / "metrics.json", METRICS)
    log: list[dict[str, Any]] = [{"step": step, "loss": 3 / step, "grad_norm": 1.0} for step in range(1, 40)]
    log += [{"step": 20, "eval_bleu4": 0.25, "eval_perplexity": 13.0, "eval_generation_seconds": 1.5}]
    samples = [
        {**row, "step": step, "prediction": f"answer of step {step} {MARKUP}"}
        for step in (0, 20)
        for row in baseline[:2]
    ]
    write_jsonl_atomically(folder / "training_samples.jsonl", samples)
    log += [{"step": 40, "loss": float("nan")}, {"step": 40, "eval_loss": 0.5}, {"train_runtime": 3.0}]
    write_jsonl_atomically(folder / "training_log.jsonl", log)
    segments = [
        {"text": "<|im_start|>user\n" + "<|image_pad|>" * 192 + MARKUP, "is_target": False},
        {"text": "A cat.<|im_end|>", "is_target": True},
    ]
    examples = [{"id": "train-1", "where": "captions.jsonl:12", "image_names": ["1.jpg"], "segments": segments}]
    write_json_atomically(folder / "training_examples.json", examples)
    checks = [
        {"name": "lora_placement", "value": 252, "threshold": 252, "passed": True, "detail": "language model only"},
        {"name": "frozen_unchanged", "value": None, "threshold": None, "passed": False, "detail": MARKUP},
    ]
    write_json_atomically(folder / "checks.json", checks)
    (folder / "settings.yaml").write_text(
        "model_name_or_path: Qwen/Qwen3-VL-8B-Instruct\nlearning_rate: 0.0002\nlora_target_modules: [q_proj, v_proj]\n"
        "max_steps: -1\nhub_token: my-own-secret\ninstruction: 'say <b>what</b> you see'\n"
    )
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}"]
    for flag in flags:
        options.add_argument(f"--{flag}")
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def _open(browser: Any, page: Path, width: int = 1400) -> None:
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())


def _shown_ids(browser: Any) -> list[str]:
    script = "return [...document.querySelectorAll('.card')].filter(c => !c.hidden).map(c => c.ariaLabel)"
    return [label.removeprefix("Example row-") for label in browser.execute_script(script)]


def _focused(browser: Any) -> str:
    return browser.switch_to.active_element.get_attribute("aria-label")


def test_gallery_sorts_filters_and_follows_the_keys(browser: Any, run_dir: Path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    _open(browser, write_report(run_dir, _photo))
    assert _shown_ids(browser) == ["0", "1", "2", "3", "4", "5"]
    sort = Select(browser.find_element(By.ID, "sort"))
    sort.select_by_visible_text("largest loss first")
    badges = [float(badge.text.replace("−", "-")) for badge in browser.find_elements(By.CLASS_NAME, "badge")]
    assert badges == sorted(badges)
    assert badges[0] < 0 < badges[-1]
    assert _shown_ids(browser)[0] == "0"
    sort.select_by_visible_text("largest gain first")
    assert _shown_ids(browser)[-1] == "0"
    sort.select_by_visible_text("as in the data set")

    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys("/")
    browser.switch_to.active_element.send_keys("Number 3")
    assert _shown_ids(browser) == ["3"]
    assert browser.find_element(By.ID, "count").text == "1 of 6 examples"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert _focused(browser) == "Example row-3"
    body.send_keys("/")
    browser.switch_to.active_element.send_keys("no such words")
    assert _shown_ids(browser) == []
    assert browser.find_element(By.ID, "nothing").is_displayed()
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert len(_shown_ids(browser)) == 6

    for keys, expected in (("j", "0"), ("j", "1"), (Keys.ARROW_RIGHT, "2"), ("k", "1"), (Keys.ARROW_DOWN, "3")):
        browser.switch_to.active_element.send_keys(keys)
        assert _focused(browser) == f"Example row-{expected}"
    outline = browser.switch_to.active_element.value_of_css_property("outline-width")
    assert outline == "3px"
    with Image.open(io.BytesIO(browser.get_screenshot_as_png())) as picture:
        # What is looked at is a page with its pictures, not an empty one: hundreds of colours.
        assert len(picture.convert("RGB").resize((200, 200)).getcolors(200 * 200)) > 200
    browser.switch_to.active_element.send_keys(Keys.END)
    browser.switch_to.active_element.send_keys("j")
    assert _focused(browser) == "Example row-5"


def test_markup_in_texts_is_shown_and_does_not_run(browser: Any, run_dir: Path):
    from selenium.webdriver.common.by import By

    _open(browser, write_report(run_dir, _photo))
    assert browser.title == "flickr8k · evening-run"
    predictions = [item.text for item in browser.find_elements(By.CSS_SELECTOR, ".prediction.finetuned dd")]
    assert predictions[0] == MARKUP
    assert browser.find_elements(By.CSS_SELECTOR, "b, img[src=x]") == []
    # Even markup that got in unescaped would not run: the policy knows the page's own script only.
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = \"document.title = 'run'\";"
        "document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=`run`\">')"
    )
    assert browser.title == "flickr8k · evening-run"
    browser.get_log("browser")  # empties it of the refusals, for the next test


@pytest.mark.parametrize("width", [1400, 420])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_page_fits_the_window_in_both_modes(browser: Any, run_dir: Path, width: int, mode: str):
    features = [{"name": "prefers-color-scheme", "value": mode}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    _open(browser, write_report(run_dir, _photo), width)
    content, window = browser.execute_script(
        "const r = document.documentElement; return [r.scrollWidth, r.clientWidth]"
    )
    assert content == window
    assert width - 20 < window <= width
    colors = browser.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    lightness = [sum(int(part) for part in color[4:-1].split(",")) for color in colors]
    assert (lightness[0] > lightness[1]) == (mode == "light")
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


def test_page_holds_every_part_and_no_secret(run_dir: Path):
    page = write_report(run_dir, _photo).read_text()
    for text in ("Qwen/Qwen3-VL-8B-Instruct", "q_proj, v_proj", "38.2"):
        assert text in page
    for text in ("+0.0285", "+0.0210 to +0.0361", "0.0921 to 0.1103", "+28%", "+12% to +45%", "2401.6", "p = 0.002"):
        assert text in page
    assert page.count("no clear difference") == 1
    assert page.index("CIDEr") < page.index("perplexity") < page.index("Against the first reference only")
    assert page.index("Against the first reference only") < page.index("BLEU-4, first reference")
    assert page.count('class="whisker"') == 2
    assert "bootstrap over the images" in page
    assert "<|image_pad|> × 192".replace("<", "&lt;").replace(">", "&gt;") in page
    assert "<mark>A cat.&lt;|im_end|&gt;</mark>" in page
    assert page.count("✓ passed") == 1
    assert page.count("✗ failed") == 1
    assert "my-own-secret" not in page
    # One of training, six of the gallery, and two of them again where the answers while training are.
    assert page.count("<img ") == page.count('src="data:image/jpeg;base64,') == 9
    assert 'id="samples-title"' in page
    assert "<span>step 20</span>answer of step 20" in page
    assert "<td>0.2500</td>" in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("<script") == 1


def test_five_hundred_pictures_stay_under_the_limit(tmp_path: Path):
    for stage in ("baseline", "finetuned"):
        write_jsonl_atomically(tmp_path / f"{stage}_predictions.jsonl", _rows(stage, 500))
    path = write_report(tmp_path, _photo)
    assert MAX_PAGE_BYTES * 0.5 < path.stat().st_size <= MAX_PAGE_BYTES
    assert path.read_text().count("data:image/jpeg") == 500


def test_five_hundred_long_texts_stay_under_the_limit(tmp_path: Path):
    long = " ".join(f"word{number}" for number in range(1000))
    for stage in ("baseline", "finetuned"):
        rows = [{**row, "prompt": f"{row['id']} {long}", "references": [long]} for row in _rows(stage, 500)]
        write_jsonl_atomically(tmp_path / f"{stage}_predictions.jsonl", rows)
    path = write_report(tmp_path, _photo)
    assert path.stat().st_size <= MAX_PAGE_BYTES
    page = path.read_text()
    assert 50 <= page.count('aria-label="Example row-') < 500
    assert " of 500 examples: the largest gains and losses" in page


def test_of_too_many_examples_the_extremes_are_kept(tmp_path: Path):
    rows = _rows("finetuned", 2 * MAX_GALLERY_EXAMPLES)
    rows[77]["scores"]["rouge_l"] = 2.0
    rows[78]["scores"]["rouge_l"] = -1.0
    write_jsonl_atomically(tmp_path / "finetuned_predictions.jsonl", rows)
    page = write_report(tmp_path, lambda example_id: None).read_text()
    assert page.count('<article class="card"') == MAX_GALLERY_EXAMPLES
    assert f"{MAX_GALLERY_EXAMPLES} of {2 * MAX_GALLERY_EXAMPLES:,} examples" in page
    assert 'aria-label="Example row-77"' in page
    assert 'aria-label="Example row-78"' in page


@pytest.mark.parametrize(
    "missing",
    [
        "settings.yaml",
        "metrics.json",
        "training_log.jsonl",
        "training_examples.json",
        "checks.json",
        "baseline_predictions.jsonl",
        "finetuned_predictions.jsonl",
    ],
)
def test_a_missing_file_leaves_the_rest(run_dir: Path, missing: str):
    complete = write_report(run_dir, _photo).read_text()
    (run_dir / missing).unlink()
    page = write_report(run_dir, _photo).read_text()
    titles = [f'id="{name}-title"' for name in ("settings", "scores", "training", "examples", "checks", "gallery")]
    assert all(title in complete for title in titles)
    gone = {"settings.yaml": "settings", "training_examples.json": "examples", "checks.json": "checks"}.get(missing)
    assert [title for title in titles if title not in page] == ([f'id="{gone}-title"'] if gone else [])
    if missing.endswith("predictions.jsonl"):
        assert "best score first" in page
        assert 'class="badge' not in page
        assert page.count('<div class="prediction') == 6


def test_an_empty_folder_gives_a_page(tmp_path: Path):
    page = write_report(tmp_path, lambda example_id: None, recipe="qwen_chat").read_text()
    assert "No scores yet" in page
    assert "<h1>qwen_chat</h1>" in page
    assert "<script" not in page


def test_text_only_rows_have_their_prompts_and_no_pictures(browser: Any, run_dir: Path):
    path = run_dir / "finetuned_predictions.jsonl"
    rows = [{**row, "image": None, "images": [], "prompt": f"question {row['id']}"} for row in read_jsonl(path)]
    rows[1]["references"] = []
    write_jsonl_atomically(path, rows)
    (run_dir / "baseline_predictions.jsonl").unlink()
    report = write_report(run_dir, lambda example_id: None)
    _open(browser, report)
    page = report.read_text()
    assert "<img" not in page
    assert 'class="card with-picture"' not in page
    assert "bootstrap over the examples" in page
    assert '<p class="prompt">question row-5</p>' in page
    assert len(_shown_ids(browser)) == 6


@pytest.mark.skipif("QVL_SHARED" not in os.environ and not Path("../shared/photos").is_dir(), reason="needs photos")
def test_real_photos_of_all_sizes(tmp_path: Path):
    folder = Path(os.environ.get("QVL_SHARED", "../shared")) / "photos"
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    predictions = [
        {
            "id": row["image"],
            "image": row["image"],
            "prompt": "",
            "prediction": row["captions"][0],
            "references": row["captions"],
            "scores": {"rouge_l": 1.0},
        }
        for row in rows
    ]
    write_jsonl_atomically(tmp_path / "baseline_predictions.jsonl", predictions)
    page = write_report(tmp_path, lambda example_id: Image.open(folder / example_id)).read_text()
    assert page.count("data:image/jpeg") == len(rows)
    assert page.count('<span class="score">1.00</span>') == len(rows)


def test_errors_that_shrink_are_gains(run_dir: Path):
    """The badge and the order follow the direction of the score."""
    write_json_atomically(
        run_dir / "metrics.json",
        {"scores": {"cer": {"label": "character error rate", "higher_is_better": False}}},
    )
    for stage, errors in (("baseline", 0.75), ("finetuned", 0.25)):
        rows = [{**row, "scores": {"cer": errors}} for row in _rows(stage, 3)]
        write_jsonl_atomically(run_dir / f"{stage}_predictions.jsonl", rows)
    page = write_report(run_dir, _photo).read_text()
    assert "its own character error rate (lower is better)" in page
    assert page.count('<span class="badge gain">+0.50</span>') == 3
    assert page.count('data-value="0.500000"') == 3


def test_comparison_table():
    assert comparison_table(METRICS).splitlines() == [
        "                                 baseline        fine-tuned          difference        relative      p",
        "BLEU-4                             0.1009            0.1294             +0.0285            +28%  0.002",
        "  better                 0.0921 to 0.1103  0.1190 to 0.1402  +0.0210 to +0.0361    +12% to +45%",
        "ROUGE-L                            0.3420            0.4010             +0.0590",
        "CIDEr                              0.5943            0.6010             +0.0067             +1%  0.458",
        "  no clear difference                                        -0.0100 to +0.0200      -2% to +3%",
        "perplexity                         2401.6             13.25                   -",
        "                         1822.7 to 3137.3    12.10 to 14.40",
        "on 500 examples, with 95% intervals",
    ]


def test_long_numbers_do_not_run_together():
    wide = {"perplexity": 471630.4, "interval": {"perplexity": {"low": 409123.1, "high": 551107.4}}, "num_examples": 3}
    difference = {"perplexity": {"mean": -470000.1, "low": -471220.4, "high": -400509.9, "verdict": "better"}}
    metrics = {"scores": SCORES, "baseline": wide, "finetuned": wide, "difference": difference}
    assert "409123.1 to 551107.4  409123.1 to 551107.4  -471220.4 to -400509.9" in comparison_table(metrics)


def test_comparison_table_of_half_a_run():
    half = {"baseline": {"bleu4": 0.0, "exact_match": 0.5, "num_examples": 3}, "finetuned": None, "difference": None}
    assert comparison_table({"scores": SCORES, **half}).splitlines()[1:] == [
        "BLEU-4                             0.0000                 -                   -",
        "exact_match                        0.5000                 -                   -",
        "on 3 examples, with 95% intervals",
    ]
    assert comparison_table({}) == "No scores yet: neither the stage baseline nor evaluate has run."


def test_whiskers_lie_within_the_plot():
    svg = score_bars("x", [Bar("a", "baseline", 0.1, (-0.2, 0.9)), Bar("b", "finetuned", 0.5)])
    whisker = svg.split('class="whisker" d="M')[1].split('"')[0]
    assert float(whisker.split()[0]) == 92.0
    assert svg.count("whisker") == 1


def test_evenly_spaced_keeps_the_ends():
    assert evenly_spaced(range(3), 8) == [0, 1, 2]
    assert evenly_spaced(range(100), 4) == [0, 33, 66, 99]


@pytest.mark.parametrize("losses", [[2.0], [1.5, 1.5], [1e-7, 3e-7], [-1.0, 2.0], [float(n % 7) for n in range(5000)]])
def test_loss_curve_stays_within_its_frame(losses: list[float]):
    svg = loss_curve([(10.0 * step, loss) for step, loss in enumerate(losses)], [])
    points = svg.split('points="')[1].split('"')[0].split()
    assert 1 <= len(points) <= 600
    for point in points:
        x, y = (float(number) for number in point.split(","))
        assert 0 <= x <= 720
        assert 0 <= y <= 300
