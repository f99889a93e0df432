"""`flm caption`: what a trained run says of the user's own picture files, printed and drawn beneath them."""

from pathlib import Path

import numpy as np

from flm_scale.checkpoint.weights import read_run
from flm_scale.data.clips import contact_sheet, decode_sample, is_clip
from flm_scale.errors import DataError
from flm_scale.evals.caption import BEAMS, Caption, write_captions
from flm_scale.evals.run import open_run
from flm_scale.parallel.processes import start_processes

PICTURE_SIDE, FOOT_HEIGHT, MARGIN, LETTER_SIZE = 384, 64, 12, 18
"""Pixels."""


def caption_files(run_dir: Path, images: list[Path], *, out: Path, tensor: int = 1, pipe: int = 1) -> None:
    """Print a greedy and a beam caption of each file, and write OUT/NAME.caption.png: the square that the model saw, or four frames of the clip,
    with both beneath.

    tensor, pipe: how the model is cut over this launch's processes; the replicas that are left share the files, rank 0 prints and writes.
    Raises DataError for the first file that is missing or not a picture, or not a clip where the run has seen clips; nothing is written then.
    """
    frames = read_run(run_dir).vision.frames
    read = [(path, read_file(path, frames=frames)) for path in images]
    trained = open_run(run_dir, tensor=tensor, pipe=pipe)
    processes = start_processes(trained.run.parallel)
    model = trained.model(processes)
    pixels = [decode_sample(data, size=trained.run.vision.image_size, frames=frames) for _, data in processes.share(read)]
    greedy, beam = (processes.gather(write_captions(trained.run, model, np.stack(pixels), tokenizer=trained.tokenizer, objective=trained.objective,
                                                    beams=beams) if pixels else []) for beams in (1, BEAMS))
    if processes.rank:
        return
    out.mkdir(parents=True, exist_ok=True)
    for number, (path, data) in enumerate(read):
        lines = [f"greedy: {describe(greedy[number])}", f"beam:   {describe(beam[number])}"]
        # Files of one name from several folders must not replace each other.
        twins = sum(other.stem == path.stem for other, _ in read[:number])
        picture = out / f"{path.stem}{f'-{twins + 1}' if twins else ''}.caption.png"
        draw_caption(data, lines, picture)
        print("\n  ".join([str(path), *lines, str(picture)]))


def read_file(path: Path, *, frames: int) -> bytes:
    """Return a picture's or clip's bytes. Raises DataError, one line, when it is missing, does not decode, or is no clip of several frames."""
    try:
        data = path.read_bytes()
        decode_sample(data, size=8, frames=frames)
    except OSError as error:
        raise DataError(f"picture {path}: {error.strerror}; check the path") from error
    except DataError as error:
        raise DataError(f"picture {path}: {error}") from error
    return data


def describe(caption: Caption) -> str:
    """Return the caption, in one line whatever a language model says, and its mean log-probability a token."""
    return f"{' '.join(caption.text.split())} ({caption.score:.2f})"


def draw_caption(data: bytes, lines: list[str], path: Path) -> None:
    """Write the picture's centre square, or four frames of the clip, with lines of text beneath."""
    from PIL import Image, ImageDraw, ImageFont

    sheet = Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE + FOOT_HEIGHT), "white")
    look = contact_sheet(data, side=PICTURE_SIDE) if is_clip(data) else decode_sample(data, size=PICTURE_SIDE).transpose(1, 2, 0)
    sheet.paste(Image.fromarray(look))
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        size = LETTER_SIZE
        while size > 1 and draw.textlength(line, font=ImageFont.load_default(size)) > PICTURE_SIDE - 2 * MARGIN:
            size -= 1
        draw.text((MARGIN, PICTURE_SIDE + MARGIN + number * LETTER_SIZE * 1.2), line, fill="black", font=ImageFont.load_default(size))
    sheet.save(path)
