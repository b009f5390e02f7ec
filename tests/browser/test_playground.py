"""The playground in a real browser: what a person does with it, and what must not happen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.browser.conftest import answer_with, checkerboard, encoded, picture, png, tab_to

pytestmark = pytest.mark.system

SMALL = {"side": 64}
WIDTHS = (360, 768, 1280)


def test_typing_a_prompt_gives_a_picture(visit, klein) -> None:
    """Blurred previews come first, then the picture, with its size, seed and seconds by stage."""
    here = visit(klein).wait_until_ready().choose(**SMALL, seed=7)
    here.page.evaluate(
        """() => {
            window.seen = [];
            const image = document.getElementById("picture");
            new MutationObserver(() => window.seen.push(image.alt))
                .observe(image, {attributes: true, attributeFilter: ["src", "alt"]});
        }"""
    )
    data = here.make("a fox in the snow")
    facts = here.page.inner_text("#caption-facts")

    assert picture(data).size == (64, 64)
    assert "A preview of the picture on its way" in here.page.evaluate("window.seen")
    assert here.page.get_attribute("#picture", "alt") == "a fox in the snow"
    assert "64 × 64" in facts
    assert "seed 7" in facts
    assert "Denoising" in here.page.inner_text("#stage-list")
    assert (
        data
        == klein.post(
            "/generate", {"prompt": "a fox in the snow", "width": 64, "height": 64, "seed": 7}
        )[2]
    )


@pytest.mark.alone
def test_cancelling_frees_the_card(visit, scripted) -> None:
    """The page says so, the worker stops at its next step, and the next picture can be made."""
    server = scripted("slow=20")
    server.wait_until_ready()
    here = visit(server).wait_until_ready().choose(steps=40)
    here.page.fill("#prompt", "a picture that nobody waits for")
    here.page.click("#make")
    here.page.wait_for_selector("#progress-text:text-matches('^Step [1-9]')")
    here.page.click("#cancel")
    here.page.wait_for_selector("#announcer:text('Cancelled.')", state="attached")
    wait_until(lambda: server.metric("klein_requests_running") == 0, timeout_s=2.0)

    assert here.page.get_attribute("#stage", "aria-busy") == "false"
    assert not here.page.is_visible("#error")
    assert server.metric("klein_requests_total", outcome="cancelled") == 1


def test_who_waits_is_told_how_many_come_first(visit, scripted) -> None:
    """The place in the queue as it moves, then the steps."""
    server = scripted("slow=3")
    server.wait_until_ready()
    here = visit(server).wait_until_ready()
    here.page.fill("#prompt", "the last one")
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(server.post, "/generate", {"prompt": "one of the first"})
        wait_until(lambda: server.metric("klein_queue_size") == 2)
        here.page.click("#make")
        for text in ("2 pictures before", "One picture before", "Next in line", "Step "):
            here.page.wait_for_selector(f"#progress-text:text('{text}')")
        here.wait_for_picture()


def test_a_mask_painted_on_the_picture_keeps_the_rest(visit, klein) -> None:
    """What is painted changes; where nothing was painted every pixel is the upload's own."""
    source = checkerboard(128)
    here = visit(klein).wait_until_ready().choose(seed=3).upload(source)
    here.page.click("text=Paint a mask")
    here.page.wait_for_selector("#mask-dialog[open]")

    assert here.page.get_attribute("#mask-done", "aria-disabled") == "true"

    here.page.fill("#brush", "40")
    box = here.box("#mask-canvas")
    x, y, width, height = (box[name] for name in ("x", "y", "width", "height"))
    here.page.mouse.move(x + width * 0.1, y + height * 0.05)
    here.page.mouse.down()
    here.page.mouse.move(x + width * 0.1, y + height * 0.95, steps=5)
    here.page.mouse.up()
    here.page.click("#mask-done")
    made = picture(here.make("a field of grain"))
    right = (64, 0, 128, 128)
    left = (0, 32, 32, 96)

    assert made.size == (128, 128)
    assert made.crop(right).tobytes() == source.crop(right).tobytes()
    assert made.crop(left).tobytes() != source.crop(left).tobytes()


def test_a_mask_that_is_not_encoded_yet_is_waited_for(visit, klein) -> None:
    """The page is free as soon as a mask is taken, and the edit that is asked for then has it."""
    source = checkerboard(128)
    here = visit(klein).wait_until_ready().choose(seed=3).upload(source)
    here.page.click("text=Paint a mask")
    here.page.click("#mask-canvas", position={"x": 10, "y": 10})
    here.page.evaluate(
        """() => {
            const {toBlob} = HTMLCanvasElement.prototype;
            HTMLCanvasElement.prototype.toBlob = function (done, ...how) {
                toBlob.call(this, (blob) => setTimeout(done, 500, blob), ...how);
            };
        }"""
    )
    here.page.click("#mask-done")

    assert not here.page.is_visible("#mask-dialog")
    assert here.page.evaluate("document.activeElement.className") == "mask"

    made = picture(here.make("a field of grain"))
    corner, rest = (0, 0, 8, 8), (64, 64, 128, 128)

    assert made.crop(rest).tobytes() == source.crop(rest).tobytes()
    assert made.crop(corner).tobytes() != source.crop(corner).tobytes()


def test_everything_can_be_done_with_the_keyboard(visit, klein) -> None:
    """Prompt, picture, mask and edit without a pointer; the focus is always seen and never lost."""
    here = visit(klein).wait_until_ready().choose(**SMALL)
    keys = here.page.keyboard
    here.page.evaluate("document.activeElement.blur()")
    tab_to(here.page, "prompt")
    keys.type("a lamp")
    tab_to(here.page, "make")
    keys.press("Enter")
    here.wait_for_picture()
    here.page.focus("#make")
    tab_to(here.page, "reuse")
    keys.press("Enter")
    here.page.wait_for_selector("#references button.mask")

    assert here.page.evaluate("document.activeElement.id") == "prompt"

    tab_to(here.page, "mask", by="className")
    keys.press("Enter")
    here.page.wait_for_selector("#mask-dialog[open]")

    assert here.page.evaluate("document.activeElement.id") == "mask-canvas"

    keys.down(" ")
    for _ in range(6):
        keys.press("ArrowRight")
    keys.up(" ")

    assert "may change" in here.page.inner_text("#coverage")

    tab_to(here.page, "mask-done")
    keys.press("Enter")
    here.page.wait_for_selector("#references button.unmask")

    assert here.page.evaluate("document.activeElement.className") == "mask"

    here.page.focus("#prompt")
    keys.press("Control+Enter")
    here.page.wait_for_selector('#stage[aria-busy="true"]', state="attached")
    here.wait_for_picture()

    assert here.page.locator("#gallery li").count() == 2


def test_a_prompt_full_of_markup_stays_text(visit, klein) -> None:
    """Neither the prompt nor the name of an upload can become a part of the page."""
    evil = '<img src=x onerror="window.broken=1"><b>bold</b><script>window.broken=1</script>'
    here = visit(klein).wait_until_ready().choose(**SMALL)
    here.upload(checkerboard(64), name='<img src=x onerror="window.broken=1">.png')
    here.make(evil)
    here.page.wait_for_timeout(200)

    assert here.page.inner_text("#caption-prompt") == evil
    assert here.page.evaluate("window.broken") is None
    assert here.page.locator("main b, main script, img[src='x']").count() == 0


def test_the_page_may_not_run_what_is_not_ours(visit, klein) -> None:
    """The security policy stops inline scripts, foreign hosts and markup made of texts."""
    here = visit(klein).wait_until_ready()
    here.expected = [
        "Fetch API",
        "Refused to",
        "Connecting to",
        "Executing inline",
        "This document",
    ]
    tried = here.page.evaluate(
        """async () => {
            const inline = document.createElement("script");
            try { inline.text = "window.broken = 1"; document.body.append(inline); } catch {}
            let markup = "refused";
            try {
                document.body.insertAdjacentHTML("beforeend", "<i id=made></i>");
                markup = "made";
            } catch {}
            const foreign = await fetch("https://example.invalid/").catch(() => "refused");
            return [window.broken ?? "refused", markup, foreign];
        }"""
    )

    assert tried == ["refused", "refused", "refused"]


def test_n_pictures_take_seeds_in_a_row(visit, klein) -> None:
    """Two pictures, seed and seed+1, both in the gallery; the first can be had again."""
    here = visit(klein).wait_until_ready().choose(**SMALL, seed=40, count=2)
    second = here.make("a stone")
    here.page.click("#gallery li:nth-child(2) button")
    here.page.wait_for_selector("#download[download*='40']")
    first = here.download()

    assert "seed 40" in here.page.inner_text("#caption-facts")
    assert first != second

    here.page.click("#restore")

    assert here.page.input_value("#seed") == "40"
    assert here.make("a stone") == first
    assert here.page.locator("#gallery li").count() == 3


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_picture_can_be_pasted_or_dropped(visit, klein, way) -> None:
    """Anywhere on the page; it becomes a picture to work from, and the size follows it."""
    here = visit(klein).wait_until_ready()
    here.page.evaluate(
        """async (way) => {
            const canvas = Object.assign(document.createElement("canvas"), {width: 96, height: 64});
            canvas.getContext("2d").fillRect(0, 0, 96, 64);
            const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
            const data = new DataTransfer();
            data.items.add(new File([blob], "found.png", {type: "image/png"}));
            const options = {bubbles: true, cancelable: true};
            document.body.dispatchEvent(way === "paste"
                ? new ClipboardEvent("paste", {...options, clipboardData: data})
                : new DragEvent("drop", {...options, dataTransfer: data}));
        }""",
        way,
    )
    here.page.wait_for_selector("#references li")

    assert picture(here.make("the same in winter")).size == (96, 64)


def test_recipes_make_the_same_picture(visit, klein, tmp_path) -> None:
    """What is copied as curl and as Python runs as it is and gives the same bytes."""
    here = visit(klein, permissions=["clipboard-read", "clipboard-write"]).wait_until_ready()
    data = here.choose(**SMALL, seed=11).make("""it's a "sign", 50 % off\n$HOME \\ `id`""")

    assert run_recipes(here, tmp_path) == [data, data]


def test_recipes_of_an_edit_make_the_same_picture(visit, klein, tmp_path) -> None:
    """With the pictures beside them: an upload whose name needs quoting, and the saved mask."""
    here = visit(klein, permissions=["clipboard-read", "clipboard-write"]).wait_until_ready()
    name = """bob's "best" day.png"""
    here.choose(seed=5).upload(checkerboard(64), name=name)
    here.page.click("text=Paint a mask")
    here.page.click("#mask-canvas")
    with here.page.expect_download() as saving:
        here.page.click("#mask-save")
    saving.value.save_as(tmp_path / "mask.png")
    here.page.click("#mask-done")
    checkerboard(64).save(tmp_path / name)
    data = here.make("@a day, <b>bold</b>; type=text")

    assert run_recipes(here, tmp_path) == [data, data]


def test_errors_are_said_in_words(visit, klein) -> None:
    """The service's own sentence, beside the field that it is about, and gone when mended."""
    here = visit(klein).wait_until_ready()
    here.expected = ["Failed to load resource: the server responded with a status of 400"]
    here.page.click("#make")

    assert "prompt is empty" in here.page.inner_text("#error")
    assert here.page.evaluate("document.activeElement.id") == "prompt"

    here.choose(side=1000)
    here.page.fill("#prompt", "a cat")
    here.page.click("#make")
    here.page.wait_for_selector("#error:text('nearest valid size')")
    here.choose(**SMALL).make("a cat")

    assert not here.page.is_visible("#error")


def test_a_failure_in_the_middle_is_said_in_words(visit, scripted) -> None:
    """Out of memory after the stream has begun: the reason, and the form as it was."""
    server = scripted("oom@1")
    server.wait_until_ready()
    here = visit(server).wait_until_ready()
    here.page.fill("#prompt", "too much")
    here.page.click("#make")
    here.page.wait_for_selector("#error:text('The card has no room for this picture')")

    assert here.page.input_value("#prompt") == "too much"
    here.make("less")


@pytest.mark.parametrize("total_s", [0.001, 0.2, 30])
def test_the_timing_bar_is_full_however_short_the_picture(visit, klein, total_s) -> None:
    """The stages share the whole bar by their seconds, also where those do not add up to one."""
    shares = {"text": 0.2, "denoise": 0.7, "decode": 0.1}
    timings = [f"{stage};dur={share * total_s * 1000:.6f}" for stage, share in shares.items()]
    timing = f"timing {', '.join(timings)}, total;dur={total_s * 1000}"
    done = {"type": "image_generation.completed", "seed": 1, "size": "64x64"}
    here = visit(klein).wait_until_ready()
    answer_with(here.page, {**done, **encoded(checkerboard(64))}, comment=timing)
    here.make("a fox in the snow")
    bar, stages = here.page.evaluate(
        """() => {
            const width = (it) => it.getBoundingClientRect().width;
            const bar = document.getElementById("stages");
            return [width(bar), [...bar.children].map(width)];
        }"""
    )
    room = bar - 2 * (len(stages) - 1)  # gaps of two pixels

    assert stages == pytest.approx([share * room for share in shares.values()], abs=1)


@pytest.mark.parametrize("end", ["failure", "failure after a preview", "cancel"])
def test_a_first_picture_that_is_not_made_leaves_the_page_as_it_was(visit, scripted, end) -> None:
    """The frame is empty again, with its examples, and one of them can be taken."""
    server = scripted("slow=20" if end == "cancel" else "oom@1")
    server.wait_until_ready()
    here = visit(server).wait_until_ready().choose(steps=40)
    height = here.page.locator("#frame").bounding_box()["height"]
    if end == "failure after a preview":
        preview = {"type": "image_generation.partial_image", "partial_image_index": 0}
        failure = {"error": {"message": "The card has no room for this picture."}}
        answer_with(here.page, {**preview, **encoded(checkerboard(64))}, failure)
    here.page.fill("#prompt", "too much")
    here.page.click("#make")
    if end == "cancel":
        here.page.wait_for_selector("#progress-text:text-matches('^Step [1-9]')")
        here.page.click("#cancel")
    else:
        here.page.wait_for_selector("#error:text('The card has no room')")
    here.page.wait_for_selector('#stage[aria-busy="false"]')

    assert here.page.get_attribute("#frame", "data-state") == "empty"
    assert here.page.locator("#frame").bounding_box()["height"] == height
    assert not here.page.is_visible("#picture")

    example = here.page.locator("#examples button").first
    example.click()

    assert here.page.input_value("#prompt") == example.inner_text()


def test_a_server_that_went_away_is_said_in_words(visit, scripted) -> None:
    """No picture and no riddle."""
    server = scripted()
    server.wait_until_ready()
    here = visit(server).wait_until_ready()
    here.expected = ["Failed to load resource: net::ERR_"]
    server.stop()
    here.page.fill("#prompt", "a cat")
    here.page.click("#make")
    here.page.wait_for_selector("#error:text('The service cannot be reached')")


def test_a_key_is_asked_for_and_kept_in_the_tab_only(visit, scripted) -> None:
    """A field appears where one is wanted; a wrong key is refused; the right one ends with the
    tab."""
    key = "a-key-for-the-test"
    server = scripted(api_keys=key)
    server.wait_until_ready()
    here = visit(server, permissions=["clipboard-read", "clipboard-write"])
    here.expected = ["Failed to load resource: the server responded with a status of 401"]
    here.page.wait_for_selector("#status:text('A key is needed')")
    here.page.click("#make")

    assert here.page.evaluate("document.activeElement.id") == "key"

    here.page.fill("#key", "a-wrong-key")
    here.page.press("#key", "Enter")
    here.page.wait_for_selector("#status:text('The key was refused')")
    here.page.fill("#key", key)
    here.page.press("#key", "Enter")
    here.wait_until_ready()

    assert not here.page.is_visible("#key-form"), "the key was accepted"
    assert here.page.evaluate("document.activeElement.id") == "prompt"

    here.make("a cat")
    here.page.click("#copy-curl")
    here.page.wait_for_selector("#copy-curl:text('Copied')")

    assert here.page.evaluate("sessionStorage['klein.key']") == key
    assert key not in here.page.evaluate("JSON.stringify({...localStorage}) + document.cookie")
    assert here.page.evaluate("location.search + location.hash") == ""
    assert "$KLEIN_API_KEY" in here.page.evaluate("navigator.clipboard.readText()")
    assert key not in here.page.content()

    here.page.click("#key-forget")
    here.page.wait_for_selector("#status:text('A key is needed')")

    assert here.page.evaluate("'klein.key' in sessionStorage") is False
    assert here.page.is_visible("#key-form")
    assert not here.page.is_visible("#key-forget")
    assert here.page.evaluate("document.activeElement.id") == "key"


def test_a_key_that_was_accepted_before_is_not_asked_for_again(visit, scripted) -> None:
    """A page loaded anew has it from the tab, and shows no field."""
    server = scripted(api_keys="a-key-for-the-test")
    server.wait_until_ready()
    here = visit(server)
    here.expected = ["Failed to load resource: the server responded with a status of 401"]
    here.page.fill("#key", "a-key-for-the-test")
    here.page.press("#key", "Enter")
    here.wait_until_ready().page.reload()
    here.wait_until_ready()

    assert not here.page.is_visible("#key-form")
    assert here.page.is_visible("#key-forget")


def test_every_limit_of_the_form_is_the_services(visit, klein) -> None:
    """Sizes, steps, seed, prompt, references and formats are those that `/health` hands out."""
    here = visit(klein)
    health = json.loads(klein.get("/health")[2])
    health["output_formats"] = ["jpeg", "tiff"]
    health["limits"] |= {
        **{"min_side": 128, "max_side": 640, "multiple": 64, "max_ratio": 2},
        **{"max_pixels": 450_000, "max_steps": 7, "max_references": 1, "max_seed": 120},
        "max_prompt_characters": 50,
    }
    here.page.route("**/health", lambda route: route.fulfill(json=health))
    here.page.reload()
    here.wait_until_ready()
    sizes = here.page.evaluate(
        "[...document.querySelectorAll('input[name=size]')].map(({value}) => value)"
    )
    pairs = [[int(side) for side in size.split("x")] for size in sizes[1:-1]]

    assert pairs
    assert all(side % 64 == 0 and 128 <= side <= 640 for pair in pairs for side in pair)
    assert all(w * h <= 450_000 and max(w, h) <= 2 * min(w, h) for w, h in pairs)
    for side in ("width", "height"):
        it = here.page.locator(f"#{side}")
        assert [it.get_attribute(name) for name in ("min", "max", "step")] == ["128", "640", "64"]
    assert here.page.get_attribute("#steps", "max") == "7"
    assert here.page.get_attribute("#prompt", "maxlength") == "50"
    assert here.page.locator("#format option").all_inner_texts() == ["JPEG", "TIFF"]

    here.page.fill("#prompt", "a cat")
    here.page.locator("#seed-fixed").check()
    for field, value, said in (("steps", "8", "from 1 to 7"), ("seed", "121", "from 0 to 120")):
        kept = here.page.input_value(f"#{field}")
        here.page.fill(f"#{field}", value)
        here.page.click("#make")
        assert said in here.page.inner_text("#error")
        here.page.fill(f"#{field}", kept or "1")
    here.upload(checkerboard(640).crop((0, 0, 640, 130)))

    assert "256 × 128" in here.page.inner_text("#settings-summary")

    file = {"name": "b.png", "mimeType": "image/png", "buffer": png(checkerboard(64))}
    here.page.set_input_files("#files", [file])
    here.page.wait_for_selector("#error:text('At most 1 picture')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_can_be_read(visit, klein, tmp_path, width, scheme) -> None:
    """At a phone's, a tablet's and a desk's width nothing sticks out and no text is too faint."""
    here = visit(klein, width=width, color_scheme=scheme)
    names = [
        f"a-style-with-a-{'very-' * (number % 9)}long-name-{number:02}" for number in range(12)
    ]
    adapters = [{"id": name, "preview": f"/v1/loras/{name}/preview"} for name in names]
    here.offer(*adapters, preview=png(checkerboard(64)))
    here.page.evaluate("for (const it of document.querySelectorAll('details')) it.open = true")
    here.upload(checkerboard(64)).make("a boat")
    for name in names[4:8]:
        here.page.check(f"[id='adapter:{name}']")
    here.page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
    found = here.page.evaluate(_JUDGE)

    assert found == {"overflow": [], "faint": [], "nameless": [], "small": []}


def test_nothing_moves_for_those_who_want_it_still(visit, scripted) -> None:
    """`prefers-reduced-motion` ends the sweep over the picture that is on its way, and every
    change of a colour, a place or a length is there at once."""
    server = scripted("slow=3")
    server.wait_until_ready()
    here = visit(server, reduced_motion="reduce").wait_until_ready()
    here.page.evaluate(
        """() => {
            window.moved = [];
            const note = ({target, propertyName, animationName}) => window.moved.push(
                `${target.tagName}#${target.id} ${propertyName ?? animationName}`);
            document.addEventListener("transitionrun", note);
            document.addEventListener("animationstart", note);
        }"""
    )
    here.page.fill("#prompt", "a cat")
    here.page.click("#settings summary")
    here.page.click("#make")
    here.page.wait_for_selector('#frame[data-state="working"]')

    assert here.page.evaluate("document.getAnimations().length") == 0

    here.wait_for_picture()

    assert here.page.evaluate("window.moved") == []


def run_recipes(here, folder) -> list[bytes]:
    """Copy and run both recipes in *folder*; return the pictures that they saved."""
    name = here.page.get_attribute("#download", "download")
    found = []
    for which, command in (("curl", ["bash", "-euc"]), ("python", [sys.executable, "-c"])):
        here.page.click(f"#copy-{which}")
        here.page.wait_for_selector(f"#copy-{which}:text('Copied')")
        text = here.page.evaluate("navigator.clipboard.readText()")
        (folder / name).unlink(missing_ok=True)
        ran = subprocess.run(
            [*command, text], cwd=folder, capture_output=True, text=True, env=dict(os.environ)
        )

        assert ran.returncode == 0, ran.stderr

        found.append((folder / name).read_bytes())
    return found


def wait_until(is_true, *, timeout_s: float = 10.0) -> None:
    """Ask again and again until it is true."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# What sticks out of the window, text under 4.5:1 on its background, controls without a name, and
# targets under 24 pixels.
_JUDGE = """() => {
    const all = [...document.querySelectorAll("body *")].filter((it) => it.checkVisibility());
    const say = (it) => `${it.tagName}#${it.id}.${it.className} ${it.textContent.slice(0, 30)}`;
    const isHidden = (it) => it.closest(".visually-hidden, .skip, svg, option, select") !== null;
    const shown = all.filter((it) => !isHidden(it));
    const overflow = shown.filter((it) => it.getBoundingClientRect().right > innerWidth + 1);
    const rgb = (text) => {
        const canvas = document.createElement("canvas").getContext("2d");
        canvas.fillStyle = text;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (colour) => {
        const [r, g, b] = colour.slice(0, 3).map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (it) => {
        for (let at = it; at; at = at.parentElement) {
            const colour = rgb(getComputedStyle(at).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255, 255];
    };
    const hasText = (it) =>
        [...it.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const faint = shown.filter((it) => {
        if (!hasText(it) || it.closest("label")?.querySelector(":disabled")) return false;
        const [one, other] = [light(rgb(getComputedStyle(it).color)), light(behind(it))];
        return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05) < 4.5;
    });
    const kinds = "button, a[href], input, select, textarea, summary, canvas";
    const controls = all.filter((it) => it.matches(kinds) && !it.matches(".skip"));
    const nameless = controls.filter((it) =>
        !(it.textContent.trim() || it.getAttribute("aria-label") || it.labels?.length));
    const small = controls.filter((it) => {
        const box = it.getBoundingClientRect();
        return box.height < 24 || box.width < 24;
    });
    return Object.fromEntries(Object.entries({overflow, faint, nameless, small})
        .map(([name, found]) => [name, found.map(say)]));
}"""
