"""The page: what it refuses, what it draws and how a picture is repeated; and all of it in a real browser."""

import html
import json
import os
import shlex
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.nn.functional import cosine_similarity

from kosmosg.app import page as app_page
from kosmosg.app import requests as app
from kosmosg.app import run as run_page
from kosmosg.cli import build_parser, main
from kosmosg.drawing import load_controlnet, load_loras
from kosmosg.generation import Settings, file_record, read_parameters
from kosmosg.image_processing import read_image
from kosmosg.looking import CLIPEncoder, DinoEncoder, Segmenter
from kosmosg.pipeline import KosmosGPipeline
from tests import tiny
from tests.conftest import REPOSITORY
from tests.datamodules.curation.tiny_models import write_clipseg

SETTINGS = Settings(2, 3.0)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module")
def served(tiny_model, tiny_stable_diffusion, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    KosmosGPipeline.from_pretrained(tiny_model, tiny_stable_diffusion).save_pretrained(folder)
    pipeline = KosmosGPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return app.Served(pipeline, [str(folder)], {"model": "tiny", "dtype": "float32"}, 3.0, 2)


@pytest.fixture
def files(tmp_path):
    for name, colour in (("dog", "sienna"), ("hero", "navy")):
        Image.new("RGB", (70, 80), colour).save(tmp_path / f"{name}.png")
    return [str(tmp_path / "dog.png"), str(tmp_path / "hero.png"), None, None]


def ask(files, prompt="<2> in the suit of <1>", weights=(1, 1, 1, 1), count=1, masks=(None,) * 4):
    return app.build_request(prompt, files, weights, masks, seed=5, count=count)


def test_numbers_name_images_in_any_order(files):
    request = ask(files, weights=(0.5, 1, 1, 1))
    assert request.prompt == "<i> in the suit of <i>" and request.image_weights == (1.0, 0.5)
    assert [Path(file).name for file in request.images] == ["hero.png", "dog.png"]
    assert ask(files, "a dog").images == () and ask(files).image_weights == ()


def test_what_is_refused_is_named(files, tmp_path):
    text, large = tmp_path / "text.png", tmp_path / "large.png"
    text.write_text("not an image")
    Image.new("1", (10_000, 5_000)).save(large)
    for changed, options, message in (
        (files, {"prompt": "<3> there"}, "has <3>, but there is no image 3"),
        (files, {"prompt": " "}, "prompt is empty"),
        (files, {"prompt": "<i>"}, "refer to images by number"),
        (files, {"count": 9}, "9 images requested; at most 8"),
        ([str(text), None, None, None], {"prompt": "<1>"}, "'text.png' is not a readable image"),
        ([str(large), None, None, None], {"prompt": "<1>"}, "'large.png' has 10000×5000 pixels; at most 25,000,000"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(changed, **options)
    assert "10000×5000 pixels" in app.prompt_html("<1>", str(large)), "not read for a hint either"
    torn = tmp_path / "torn.png"
    torn.write_bytes(Path(files[0]).read_bytes()[:-40])
    assert "the image 'torn.png' cannot be read" in html.unescape(app.prompt_html("<1>", str(torn))), (
        "no folders of the server"
    )
    foreign, info = tmp_path / "foreign.png", PngInfo()
    info.add_itxt("kosmosg", '{"prompt": "<i>"}')
    Image.new("RGB", (8, 8)).save(foreign, pnginfo=info)
    with pytest.raises(ValueError, match=r"'foreign\.png' contains settings that"):
        app.read_settings(str(foreign), {})


def test_a_picture_restores_its_settings_and_its_command_draws_it_again(served, files, tmp_path, monkeypatch):
    mask = app.save_mask(half_mask(), str(tmp_path))
    request = ask(files, weights=(0.5, 1, 1, 1), count=2, masks=(mask, None, None, None))
    *steps, (_, kept) = app.draw(served, request, SETTINGS, tmp_path / "drawn")
    assert [share for share, _ in steps] == [0.5, 1]
    assert [Path(file).name for file in kept] == ["image-5.png", "image-6.png"]
    found, note = app.read_settings(kept[1], served.identity)
    assert found["prompt"] == "<1> in the suit of <2>" and found["seed"] == 6 and found["image_weights"] == [1.0, 0.5]
    assert "image 1: hero.png" in note and "another model" not in note
    assert f"mask of image 2: {Path(mask).name}" in note
    assert "another model" in app.read_settings(kept[1], {"model": "other"})[1]
    with pytest.raises(ValueError, match=r"'dog\.png' contains no settings"):
        app.read_settings(files[0], served.identity)
    words = app.command(served, request, SETTINGS)
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(words)[1:], "--output", "again"]) == 0
    for file in kept:
        again = tmp_path / "again" / Path(file).name
        assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(file)))
        assert read_parameters(again)["image_weights"] == [1.0, 0.5]
    whole = list(app.draw(served, replace(request, image_masks=()), SETTINGS, tmp_path / "whole"))[-1][1]
    assert not np.array_equal(np.asarray(Image.open(whole[0])), np.asarray(Image.open(kept[0])))
    assert "image_masks" not in read_parameters(Path(whole[0]))


def test_controlnet_lora_and_an_initial_image_are_repeated_and_restored(served, files, tmp_path, monkeypatch):
    pipeline = KosmosGPipeline.from_pretrained(served.arguments[0])
    controlnet, lora = tiny.write_controlnet_and_lora(tmp_path, pipeline.unet)
    load_loras(pipeline, [str(lora)])
    network = load_controlnet(str(controlnet), pipeline)
    identity = served.identity | {"controlnet": "some", "loras": [file_record(str(lora))]}
    served = replace(
        served, pipeline=pipeline, identity=identity, controlnet=("controlnet", network), loras=["lora.safetensors"]
    )
    more = {"control_image": files[0], "control_scale": 0.5, "init_image": files[1], "strength": 0.6}
    request = app.build_request("<1> there", files, (1,) * 4, (None,) * 4, seed=5, **more)
    settings = Settings(5, 3.0)
    *steps, (_, kept) = app.draw(served, request, settings, tmp_path / "drawn", [0.5])
    assert [share for share, _ in steps] == pytest.approx([1 / 3, 2 / 3, 1])  # three of five steps
    found, note = app.read_settings(kept[0], identity)
    assert (found["control_scale"], found["strength"], found["lora_scales"]) == (0.5, 0.6, [0.5])
    assert "control image: dog.png" in note and "initial image: hero.png" in note and "another" not in note
    assert "other LoRA files" in app.read_settings(kept[0], identity | {"loras": []})[1]
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(app.command(served, request, settings, [0.5]))[1:], "--output", "again"]) == 0
    assert np.array_equal(np.asarray(Image.open("again/image-5.png")), np.asarray(Image.open(kept[0])))


def half_mask():
    mask = Image.new("L", (70, 80))
    mask.paste(255, (0, 0, 35, 80))
    return mask


def test_what_the_brush_painted_is_a_mask_of_the_images_size(files, tmp_path):
    shown = app.brush_layers(files[0], app.save_mask(half_mask(), str(tmp_path)))
    assert np.array_equal(np.asarray(app.painted_mask(shown["mask"], (70, 80))), np.asarray(half_mask()))
    nothing = app.data_url(Image.new("RGBA", (448, 512)))
    assert app.painted_mask(nothing, (70, 80)) is None
    with pytest.raises(ValueError, match="5000×10 pixels; at most 512 a side"):
        app.painted_mask(app.data_url(Image.new("RGBA", (5000, 10))), (70, 80))


def test_a_segmenter_masks_what_words_name(tmp_path):
    segment = Segmenter(write_clipseg(tmp_path / "clipseg"))
    image = Image.effect_noise((70, 50), 100).convert("RGB")
    masks = [segment(image, words) for words in ("a dog", "a boat")]
    assert {mask.size for mask in masks} == {(70, 50)} and {mask.mode for mask in masks} == {"L"}
    assert set(np.unique(np.asarray(masks[0]))) <= {0, 255}
    certain = segment.model.decoder.transposed_convolution.bias
    for bias, value in ((50.0, 255), (-50.0, 0)):
        certain.data.fill_(bias)
        assert np.unique(np.asarray(segment(image, "a dog"))) == value


def test_scores_compare_with_the_images_that_were_read_and_with_the_text(served, files, tmp_path):
    weights = REPOSITORY / "datamodules" / "toyland" / "weights"
    clip, dino = CLIPEncoder(weights / "clip"), DinoEncoder(weights / "dino")
    mug, boot = (str(weights.parent / "examples" / f"{name}.png") for name in ("mug", "boot"))
    request = app.build_request("<1> and <2> there", [mug, boot, None, None], (1,) * 4, (None,) * 4)
    seen = replace(served, scores={"clip": clip, "dino": dino})
    table = app.score_table(seen, request, {"one": [mug], "both": [mug, boot]}).splitlines()
    assert table[0] == "|  | DINO | CLIP | text |" and app.score_table(served, request, {"one": [mug]}) == ""
    images = [read_image(mug), read_image(boot)]
    across = float(cosine_similarity(*dino.images(images).split(1)))
    text = [float(cosine_similarity(clip.images([image]), clip.texts(["and there"]))) for image in images]
    one, both = (line.split("|")[2:5] for line in table[2:4])
    assert one[0].strip() == f"1.00, {across:.2f}" and one[2].strip() == f"{text[0]:.2f}"
    assert both[0].strip() == f"{(1 + across) / 2:.2f}, {(1 + across) / 2:.2f}"
    assert float(both[2]) == pytest.approx(sum(text) / 2, abs=0.006)


def test_a_prompt_is_shown_with_its_images_and_hints(files, tmp_path):
    files[2] = str(tmp_path / "strip.png")
    Image.new("RGB", (90, 30)).save(files[2])
    shown = app.prompt_html("a <3> & <1>", *files)
    assert [f'alt="image {n}"' in shown for n in (1, 2, 3)] == [True, False, True]
    assert "<p>a <img" in shown and " &amp; <img" in shown and shown.count("data:image/png;base64,") == 2
    assert "begins with &#x27;a&#x27;" in shown and "&lt;3&gt; &amp; &lt;1&gt;" in shown  # by their numbers, as typed
    assert "Image 3 is 90×30" in shown and "Image 2 is not used" in shown
    assert "there is no image 4" in app.prompt_html("<4>", *files) and "no image 4" in app.prompt_html(
        "<1> <4>", *files
    )
    assert "refer to images by number" in app.prompt_html("<i>", *files)
    assert app.prompt_html("", *files) == "" and "<script>" not in app.prompt_html("<script><1>", *files)


def test_files_of_one_name_are_told_apart_in_the_command(served, files, tmp_path):
    for folder, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / folder / "image.png")
    pasted = [str(tmp_path / "one" / "image.png"), str(tmp_path / "two" / "image.png"), None, None]
    assert app.unique_copy([pasted[0], *files[1:]], 0, str(tmp_path)) is None
    assert app.unique_copy([pasted[0], pasted[0], None], 1, str(tmp_path)) is None  # the same file, twice
    pasted[1] = app.unique_copy(pasted, 1, str(tmp_path))
    assert pasted[1] == f"{tmp_path}/image-{file_record(pasted[1])['sha256'][:8]}.png"
    assert app.unique_copy(pasted, 0, str(tmp_path)) is None
    assert np.array_equal(np.asarray(Image.open(pasted[1])), np.asarray(Image.open(tmp_path / "two" / "image.png")))
    words = app.command(served, ask(pasted), SETTINGS)
    assert f"--images {Path(pasted[1]).name} image.png " in words


def test_a_command_is_read_back_whatever_it_says(served, files, tmp_path):
    dashed, mask = [str(shutil.copy(files[0], tmp_path / "-dog.png")), *files[1:]], str(tmp_path / "-mask.png")
    half_mask().save(mask)
    parser = build_parser()
    for prompt in ("--seed <1>", "-5 <1>", "it's <1>\n$(ls) déjà 🌙", "<1>"):
        request = app.build_request(prompt, dashed, (0.5,) * 4, (mask,) * 4, negative_prompt="-rain & <b>")
        found = parser.parse_args(shlex.split(app.command(served, request, SETTINGS))[1:])
        assert (found.prompt, found.model) == (request.prompt, served.arguments[0])
        assert (found.images, found.image_masks) == (["./-dog.png"], ["./-mask.png"])
        assert (found.negative_prompt, found.image_weights, found.steps) == ("-rain & <b>", [0.5], 2)


@pytest.fixture
def training_run(tmp_path):
    run = tmp_path / "runs" / "stage"
    (run / "grids" / "before").mkdir(parents=True)
    for step, colour in ((100, "red"), (200, "blue")):
        Image.new("RGB", (60, 40), colour).save(run / "grids" / f"step-{step:08d}.png")
    rows = [f"{step},{2 / step},{'' if step % 2 else 3},0.1" for step in range(1, 5001)]
    (run / "metrics.csv").write_text("\n".join(["step,train/loss,val/loss,lr", *rows]))
    (tmp_path / "runs" / "evaluation").mkdir()
    (tmp_path / "runs" / "evaluation" / "report.html").write_text('<p>Does it "keep" the subject?</p>')
    return run


def test_a_runs_folder_is_read_while_it_grows(training_run, tmp_path, capsys):
    assert list(run_page.grids(training_run)) == [100, 200]
    table = run_page.losses(training_run)
    assert set(table["name"]) == {"train/loss", "val/loss"} and len(table) <= 2 * run_page.MAX_POINTS
    curve = table[table["name"] == "train/loss"]
    assert np.allclose(curve["loss"], 2 / curve["step"]) and curve["step"].max() > 4900
    assert table[table["name"] == "val/loss"]["loss"].eq(3).all()
    (training_run / "metrics.csv").unlink()
    assert run_page.losses(training_run).empty
    assert main(["app", "--run", str(tmp_path)]) == 2
    assert "is not a training run: it has neither metrics.csv nor grids" in capsys.readouterr().err
    assert main(["app"]) == 2


def resident():
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_twenty_requests_at_once_are_answered_in_order_with_bounded_memory(served, files, monkeypatch):
    begun, drawing, together, original = [], [], [], app.draw

    def draw(served, request, *arguments):
        begun.append(request.seed)
        drawing.append(request.seed)
        together.append(len(drawing))
        yield from original(served, request, *arguments)
        drawing.remove(request.seed)

    monkeypatch.setattr(app_page, "draw", draw)
    _, address, _ = app_page.serve(served, "127.0.0.1", None, prevent_thread_lock=True, quiet=True)
    config = httpx.get(f"{address}config").json()
    (run, *_) = [event for event in config["dependencies"] if event["api_name"] == "generate"]
    labels = {component["id"]: component["props"] for component in config["components"]}

    def ask(seed, session):
        values = [labels[id].get("value") for id in run["inputs"]]
        for place, id in enumerate(run["inputs"]):
            changed = {"prompt": f"a dog {seed}", "seed": seed}
            values[place] = changed.get(labels[id].get("elem_id"), values[place])
        asked = {"data": values, "fn_index": run["id"], "session_hash": session}
        httpx.post(f"{address}gradio_api/queue/join", json=asked).raise_for_status()

    def answers(session):
        with httpx.stream("GET", f"{address}gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
            messages = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line]
        return [message["output"]["data"][1] for message in messages if message["msg"] == "process_completed"]

    try:
        ask(100, "first")  # for what libraries load once
        answers("first")
        before = resident()
        for seed in range(20):
            ask(seed, "others")
        lines = answers("others")
        assert begun[1:] == list(range(20)) and max(together) == 1
        assert len(lines) == 20 and all(f"'a dog {seed}'" in line for seed, line in enumerate(lines))
        assert resident() - before < 100_000_000
    finally:
        app_page.gr.close_all()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; Debian's package chromium has it")
def test_in_a_browser(served, files, training_run, tmp_path):
    """Typed, dropped, masked, drawn beside another model, restored, refused, served anew; nothing is asked of another
    host, and a second visitor sees nothing of the first's."""
    served = replace(served, beside=[replace(served, arguments=["another"])])
    sync_api = pytest.importorskip("playwright.sync_api")
    running, address, _ = app_page.serve(served, "127.0.0.1", None, training_run, prevent_thread_lock=True, quiet=True)
    foreign, visited = [], []

    def visit(browser):
        page = browser.new_page(viewport={"width": 1280, "height": 900})  # a context of its own
        page.on("request", lambda request: (visited if "127.0.0.1" in request.url else foreign).append(request.url))
        page.goto(address)
        page.locator("#generate").wait_for()
        return page

    def put_in(page, number, file):
        page.locator(f"#image-{number} input[type=file]").set_input_files(file)
        page.locator(f"#image-{number} img").wait_for()

    def draw(page, prompt, expected):
        page.fill("#prompt textarea", prompt)
        page.click("#generate")
        page.wait_for_function(f"document.querySelector('#command textarea').value.includes('{expected}')")
        page.wait_for_function("document.querySelectorAll('#outputs img[src*=image-0]').length == 2")

    try:
        with sync_api.sync_playwright() as browsers:
            browser = browsers.chromium.launch(executable_path=CHROMIUM, args=QUIET)
            page = visit(browser)
            (tmp_path / "pasted").mkdir()
            same_name = shutil.copy(files[1], tmp_path / "pasted" / "dog.png")
            put_in(page, 1, files[0])
            put_in(page, 2, same_name)
            page.locator("#image-2 img[src*='/dog-']").wait_for()
            page.fill("#prompt textarea", "a <1> in the suit of <2>")
            page.get_by_text("begins with 'a'").wait_for()
            page.click("#mask-2")
            page.wait_for_function("document.querySelector('#brush canvas')?.height == 512")
            page.locator("#brush canvas").scroll_into_view_if_needed()
            brush = page.locator("#brush canvas").bounding_box()
            page.mouse.move(brush["x"] + brush["width"] / 4, brush["y"] + brush["height"] / 2)
            page.mouse.down()
            page.mouse.move(brush["x"] + brush["width"] / 2, brush["y"] + brush["height"] / 2, steps=3)
            page.mouse.up()
            page.locator("#masked-2 img").wait_for()
            draw(page, "a <1> in the suit of <2>", "--image-masks - mask-")
            assert "--images dog.png dog-" in page.locator("#command textarea").input_value()
            page.get_by_text("another", exact=True).first.wait_for()
            pictures = [image.get_attribute("src") for image in page.locator("#outputs img").all()]
            picture = tmp_path / "drawn.png"
            picture.write_bytes(page.request.get(pictures[0]).body())
            parameters = read_parameters(picture)
            assert parameters["prompt"] == "a <i> in the suit of <i>" and parameters["image_masks"][0] is None

            visited.clear()
            other = visit(browser)
            assert other.locator("#outputs img").count() == other.locator("#image-1 img").count() == 0
            put_in(other, 1, files[1])
            draw(other, "<1> at night", "at night")
            assert not [url for url in visited if "dog.png" in url or url in pictures]
            assert [image.get_attribute("src") for image in page.locator("#outputs img").all()] == pictures
            other.close()

            page.fill("#prompt textarea", "")
            page.locator("#restore input[type=file]").set_input_files(picture)
            page.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('a <1>')")
            page.wait_for_function("document.querySelector('#restored textarea')?.value.includes('image 1: dog.png')")
            page.fill("#prompt textarea", "<4>")
            page.click("#generate")
            page.get_by_text("there is no image 4").first.wait_for()
            text, large = tmp_path / "text.png", tmp_path / "large.png"
            text.write_text("not an image")
            Image.new("1", (10_000, 5_000)).save(large)
            for number, file, message in (
                (3, text, "'text.png' is not a readable image"),
                (4, large, "has 10000×5000 pixels"),
            ):
                put_in(page, number, file)
                page.fill("#prompt textarea", f"<{number}>")
                page.locator("#hints").get_by_text(message).wait_for()
                page.click("#generate")
                page.locator(".toast-body").get_by_text(message).first.wait_for()
                page.get_by_label("Remove Image").last.click()

            page.fill("#prompt textarea", "<1> there")
            page.locator("#hints img").wait_for()
            # Connections of one process may outlive its server, so that the browser does not see that it was lost.
            running.get_blocks().server.force_exit = True
            app_page.gr.close_all()
            port = int(address.split(":")[2].strip("/"))
            for _ in range(100):
                with socket.socket() as free:
                    if free.connect_ex(("127.0.0.1", port)):  # nobody listens any more
                        break
                time.sleep(0.2)
            app_page.serve(served, "127.0.0.1", port, training_run, prevent_thread_lock=True, quiet=True)
            page.goto(address)
            page.wait_for_function("document.querySelector('#prompt textarea')?.value == '<1> there'")
            page.locator("#hints").get_by_text("there is no image 1").wait_for()
            put_in(page, 1, files[0])
            draw(page, "<1> there", "dog.png")
            page.fill("#prompt textarea", "")
            page.click("#generate")
            page.locator(".toast-body").get_by_text(
                "The prompt is empty; enter text, image numbers such as <1>"
            ).wait_for()
            page.get_by_role("tab", name="Training run").click()
            page.get_by_text("Step 200").wait_for()
            page.get_by_label("range slider for Grid").press("ArrowLeft")
            page.get_by_text("Step 100").wait_for()
            page.locator("#losses canvas, #losses svg").first.wait_for()
            page.get_by_role("button", name="Evaluation report").click()
            page.frame_locator("#report iframe").get_by_text('Does it "keep" the subject?').wait_for()
            assert not [url for url in foreign if not url.startswith(("data:", "blob:"))]
            browser.close()
    finally:
        app_page.gr.close_all()
