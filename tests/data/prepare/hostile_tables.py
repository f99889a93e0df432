"""Tables of addresses that mean harm, and what each must end in; hostile.py meets them with the other files."""

import io
import json
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from flm_scale.data.prepare.annotations import open_listed
from flm_scale.data.prepare.spec import InputConfig, Spec
from flm_scale.data.prepare.tables import open_table

MANY, LONG = 1_000_000, 10_000_000
ROWS = 1000
# A count of rows as a footer holds it: a field of 64 bits, one behind the last, and 1000 or 1001 in zigzag.
STATED, FALSE = b"\x16\xd0\x0f", b"\x16\xd2\x0f"


def written(columns: dict[str, object], **options: object) -> bytes:
    """A parquet file of these columns."""
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def repeated(text: str, count: int) -> pa.Array:
    """One text, named many times."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))


def parquet_files() -> dict[str, tuple[bytes, str]]:
    """By name: content and outcome."""
    urls = [f"http://example.com/{number}.jpg" for number in range(ROWS)]
    good = written({"url": urls, "caption": urls})
    small = written({"url": urls[:10], "caption": urls[:10]})
    footer = struct.unpack("<I", good[-8:-4])[0] + 8
    foreign = pa.array([b"\xff\xfe", b"good"], pa.binary()).view(pa.string())
    return {
        "good": (good, "harmless"),
        "nothing": (b"", "refused unreadable"),
        "html": (b"<!doctype html><title>404</title>", "refused unreadable"),
        "marks alone": (b"PAR1" + bytes(4) + b"PAR1", "refused unreadable"),
        "cut off": (good[:-100], "refused unreadable"),
        "footer longer than the file": (good[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1", "refused unreadable"),
        "footer of a larger file": (small[:-footer] + good[-footer:], "refused unreadable"),
        "footer of zeros": (good[:-footer] + bytes(footer - 8) + good[-8:], "refused unreadable"),
        "pages of zeros": (good[:4] + bytes(len(good) - footer - 4) + good[-footer:], "refused unreadable"),
        "one row more in the file than in its row group": (good.replace(STATED, FALSE, 1), "refused rows"),
        "one row more than there are": (good.replace(STATED, FALSE), "refused rows"),
        "encrypted footer": (b"PARE" + good[4:-4] + b"PARE", "refused encrypted"),
        "text of 10 MB named a million times": (written({"url": repeated("x" * LONG, MANY), "caption": repeated("x", MANY)}), "refused too_large"),
        "the same, not as Arrow's dictionary": (
            written({"url": repeated("x" * LONG, MANY), "caption": repeated("x", MANY)}, store_schema=False), "refused too_large"),
        "list of a text of 10 MB": (
            written({"url": ["u"], "caption": [["x" * LONG, "x"]]}), "refused too_large"),
        "other columns": (written({"address": urls, "words": urls}), "refused columns"),
        "column in two spellings": (written({"URL": urls, "Url": urls, "caption": urls}), "refused columns"),
        "column twice": (_twice(urls), "refused columns"),
        "numbers for addresses": (written({"url": list(range(ROWS)), "caption": urls}), "refused type"),
        "structures for captions": (written({"url": urls, "caption": [{"a": 1}] * ROWS}), "refused type"),
        "lists of addresses": (written({"url": [[url] for url in urls], "caption": urls}), "refused type"),
        "extension type": (written({"url": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"x" * 16], pa.binary(16))), "caption": ["x"]}),
                           "refused type"),
        "texts that are not UTF-8": (written({"url": foreign, "caption": ["x", "x"]}), "rejected bad_text 1"),
        "text above the limit": (written({"url": ["u", "u"], "caption": ["x" * 100_000, "x"]}), "rejected bad_text 1"),
        "nothing in the rows": (written({"url": pa.array([None, "u"]), "caption": pa.array(["x", None])}), "rejected no_caption 1, no_url 1"),
    }


def _twice(urls: list[str]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays([pa.array(urls)] * 3, ["url", "url", "caption"]), buffer)
    return buffer.getvalue()


def csv_files() -> dict[str, tuple[bytes, str]]:
    """By name: content and outcome."""
    head = b"url,caption\n"
    return {
        "good": (head + b'http://a,"a ""big"" dog,\nrunning"\n', "harmless"),
        "nothing": (b"", "refused columns"),
        "blank lines": (b"\n\n\n", "refused columns"),
        "html": (b"<!doctype html>\n<title>404</title>", "refused columns"),
        "UTF-16": (head.decode().encode("utf-16"), "refused columns"),
        "line of two megabytes": (head + b"x" * 2_000_000, "refused too_large"),
        "quote that is never closed": (head + b'u,"x\n' + b"u,x\n" * 50_000, "rejected bad_row 1"),
        "too few and too many fields": (head + b"u\nu,x,y\nu,x\n", "rejected bad_row 2"),
        "foreign bytes": (head + b"u,\xff\xfe\n\xff,x\nu,x\n", "rejected bad_text 2"),
        "NUL": (head + b"\0,x\nu,\0\nu,x\n", "harmless"),
        "old line ends": (head.replace(b"\n", b"\r") + b"u,x\ru,y\r", "refused columns"),
    }


def annotation_files() -> dict[str, tuple[bytes, str]]:
    """COCO's captions, by name: content and outcome."""
    image = {"id": 1, "coco_url": "u"}
    return {
        "good": (_json(images=[image], annotations=[{"image_id": 1, "caption": "x"}]), "harmless"),
        "nothing": (b"", "refused unreadable"),
        "cut off": (_json(images=[image], annotations=[])[:-5], "refused unreadable"),
        "list": (b"[1, 2]", "refused unreadable"),
        "empty object": (b"{}", "rejected no rows"),
        "nested a million deep": (b'{"images":' + b"[" * 1_000_000, "refused unreadable"),
        "caption of no picture": (_json(images=[image], annotations=[{"image_id": 2, "caption": "x"}]), "refused unreadable"),
        "picture without an address": (_json(images=[{"id": 1}], annotations=[]), "refused unreadable"),
        "numbers for pictures": (_json(images=[1, 2], annotations=[]), "refused unreadable"),
        "list for a number": (_json(images=[{"id": [1], "coco_url": "u"}], annotations=[]), "refused unreadable"),
        "number of a million digits": (b'{"images":[{"id":' + b"9" * 1_000_000 + b',"coco_url":"u"}],"annotations":[]}', "refused unreadable"),
        "half a character": (rb'{"images":[{"id":1,"coco_url":"\ud800"}],"annotations":[{"image_id":1,"caption":"x"}]}', "rejected bad_text 1"),
        "text that never ends": (b'{"images":["' + b"x" * 80_000_000, "refused unreadable"),
    }


def _json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def meet_table(kind: str, content: bytes, folder: Path) -> str:
    """Read a table the way the preparation does and say how its rows ended. Raises DataError."""
    file = folder / f"hostile.{'json' if kind == 'annotations' else kind}"
    file.write_bytes(content)
    part = open_listed(file, Spec(input=InputConfig(kind="coco"))) if kind == "annotations" else open_table(file, Spec())
    # From the middle too: another way in.
    fates = Counter(row.fate for row in part.read(0, part.rows) if row.fate)
    assert len(list(part.read(part.rows // 2, part.rows))) == part.rows - part.rows // 2
    if not part.rows:
        return "rejected no rows"
    return f"rejected {', '.join(f'{fate} {count}' for fate, count in sorted(fates.items()))}" if fates else "harmless"
