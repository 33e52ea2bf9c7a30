"""Take the pictures serve.jpg and report.jpg of docs/images, with Chromium and DeiT-tiny, whose weights are given.

python docs/screens.py deit_tiny_patch16_224.safetensors
"""

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).resolve().parent
PHOTO = "notebooks/chelsea.png"
MODEL = ["--model", "deit_tiny_patch16_224", "--checkpoint", sys.argv[1]]
TOKENTM = [sys.executable, "-m", "tokentm_jax"]


def save(content: bytes, name: str, width: int) -> None:
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    picture.save(DOCS / "images" / name, quality=82, optimize=True)


with sync_playwright() as running, tempfile.TemporaryDirectory() as folder:
    chromium = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

    command = [*TOKENTM, "serve", "--port", "0", *MODEL]
    with subprocess.Popen(command, cwd=DOCS.parent, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = re.findall(r"http://\S+", server.stdout.readline())[0]
            page = chromium.new_page(viewport={"width": 1180, "height": 800})
            page.goto(address)
            page.locator('[data-path$="/cat_and_cup.jpg"]').click()
            page.locator("body:not(.waiting) #status", has_text="TokenTM").wait_for()
            page.mouse.move(0, 0)
            save(page.screenshot(), "serve.jpg", 1180)
        finally:
            server.terminate()

    out = f"{folder}/report.html"
    subprocess.run([*TOKENTM, "report", PHOTO, "--out", out, *MODEL], cwd=DOCS.parent, check=True)
    page = chromium.new_page(viewport={"width": 1200, "height": 1628})
    page.goto(f"file://{out}")
    page.locator("#gallery button").first.click()
    page.locator("#photo[open] #curve svg").wait_for()
    page.locator("#share").fill("30")
    save(page.screenshot(), "report.jpg", 900)
    chromium.close()
