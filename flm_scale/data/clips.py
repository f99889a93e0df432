"""Clips: from the bytes of an MP4 to some of its frames (the loader), or to the bytes of a smaller one (the preparation). The only door to PyAV.

The attitude is that of images.py: code of our own reads the header, and what it states is checked, before a decoder sees a byte. The decoder is
then told to refuse what it would else repair without a word, so that a damaged clip is one ImageError like a damaged picture.
"""

import io
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flm_scale.data.images import MAX_PIXELS, Fitted, ImageError, Part, centre_square, decode_image, decode_whole, fitted_size, read_header

if TYPE_CHECKING:
    import av

MAX_CLIP_FRAMES = 20_000
"""Eleven minutes at 30 frames a second."""
MAX_CLIP_PIXELS = 2_000_000_000
"""Of all frames together: what one core decodes in some ten seconds."""
MAX_BOXES = 10_000
CODED_MORE = 128
"""Pixels a side by which codecs round up."""
FOLDER_FRAMES_PER_SECOND = 8
"""That a clip states which was made of a folder of pictures. Nothing here reads it."""
QUALITY = {"crf": "17", "preset": "veryfast", "bf": "0"}
"""Of H.264: differences are hard to see, and frames stand in their order."""
CODECS = {b"avc1": "h264", b"avc3": "h264", b"hvc1": "hevc", b"hev1": "hevc", b"vp09": "vp9", b"av01": "libdav1d", b"mp4v": "mpeg4"}
"""Decoder of each sample entry that is read. MPEG-4's may be any decoder's by a field inside; it must be this one's."""


class ClipHeader(NamedTuple):
    """What a clip says of itself."""

    width: int
    height: int
    frames: int
    seconds: float
    codec: str = ""


def is_clip(data: bytes) -> bool:
    """Return whether a file is of MP4's family."""
    return data[4:8] == b"ftyp"


def spread(available: int, wanted: int) -> list[int]:
    """Return the frame in the middle of each of `wanted` equal pieces of a clip; where it has fewer, some stand for several. 8, 3: 1, 4, 6."""
    return [(2 * piece + 1) * available // (2 * wanted) for piece in range(wanted)]


def decode_sample(data: bytes, *, size: int, frames: int = 1, part: Callable[[int, int], Part] = centre_square) -> NDArray[np.uint8]:
    """Return what a model sees of a sample: [3, size, size] of a picture, or of the frame in a clip's middle; [frames, 3, size, size] of a clip.

    part: of images.decode_image; the same of all frames. Raises ImageError, also for a picture where several frames are wanted.
    """
    if is_clip(data):
        pixels = decode_clip(data, size=size, frames=frames, part=part)
        return pixels if frames > 1 else pixels[0]
    if frames > 1:
        raise ImageError(f"file of {len(data)} bytes is no MP4, and vision.frames ({frames}) needs clips; replace or drop it", reason="format")
    return decode_image(data, size=size, part=part)


def decode_clip(data: bytes, *, size: int, frames: int, max_pixels: int = MAX_PIXELS,
                part: Callable[[int, int], Part] = centre_square) -> NDArray[np.uint8]:
    """Return a part of the frames of `spread`, scaled as by images.decode_image to [frames, 3, size, size].

    Everything before the last of them is decoded; an orientation that the file states does not count. Raises ImageError.
    """
    header = read_clip_header(data, max_pixels=max_pixels)
    cut, wanted = part(header.width, header.height), spread(header.frames, frames)
    pixels = np.empty((frames, 3, size, size), np.uint8)
    for number, frame in zip(range(wanted[-1] + 1), _frames(data, header), strict=False):
        if number in wanted:
            pixels[[place for place, one in enumerate(wanted) if one == number]] = _scaled(frame(), cut, width=size, height=size).transpose(2, 0, 1)
    return pixels


def middle_frame(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return the frame in a clip's middle as it is, [height, width, 3]. Raises ImageError."""
    header = read_clip_header(data, max_pixels=max_pixels)
    return next(islice(_frames(data, header), header.frames // 2, None))()


def contact_sheet(data: bytes, *, side: int) -> NDArray[np.uint8]:
    """Return four frames of a clip in two rows, for people to look at, [side, side, 3]; side: even. Raises ImageError."""
    frames = decode_clip(data, size=side // 2, frames=4).transpose(0, 2, 3, 1)
    return frames.reshape(2, 2, side // 2, side // 2, 3).swapaxes(1, 2).reshape(side, side, 3)


def clip_header(data: bytes | Sequence[bytes], *, max_pixels: int = MAX_PIXELS) -> ClipHeader:
    """Return what an MP4 says of itself, or a folder's pictures, in their order. Raises ImageError as `read_clip_header`."""
    if isinstance(data, bytes):
        return read_clip_header(data, max_pixels=max_pixels)
    sizes = [read_header(picture, max_pixels=max_pixels)[1:] for picture in data]
    if len(set(sizes)) != 1:
        raise ImageError(f"clip of {len(data)} pictures of {len(set(sizes))} sizes; a clip has frames of one size: scale or drop them", reason="size")
    return _bounded(ClipHeader(*sizes[0], len(data), len(data) / FOLDER_FRAMES_PER_SECOND))


def fit_clip(data: bytes | Sequence[bytes], *, size: int, mode: Literal["keep_ratio", "center_crop", "none"], only_if_larger: bool = True,
             max_pixels: int = MAX_PIXELS, pass_through: bool = False) -> Fitted:
    """Decode a clip whole, scale and encode it for storage, as images.fit_image does with a picture: H.264 with half the colour resolution.

    data: an MP4, or pictures of one size.   pass_through: an MP4's own bytes where no pixel needs to change. Sides become even.
    Raises ImageError when the header is refused, when a frame is damaged or missing, and when pictures have several sizes.
    """
    header = clip_header(data, max_pixels=max_pixels)
    part, (width, height) = fitted_size(header.width, header.height, size=size, mode=mode, only_if_larger=only_if_larger)
    if isinstance(data, bytes):
        shots: Iterator[Callable[[], NDArray[np.uint8]]] = _frames(data, header)
        if pass_through and (0, 0, header.width, header.height) == part == (0, 0, width, height):
            for _ in shots:
                pass
            return Fitted(data, width, height, header.width, header.height)
    else:
        shots = (partial(decode_whole, picture, max_pixels=max_pixels) for picture in data)
    width, height = max(2, width - width % 2), max(2, height - height % 2)
    rate = Fraction(min(240.0, max(0.01, header.frames / max(header.seconds, 0.001)))).limit_denominator(1001)
    stored = encode_clip((_scaled(shot(), part, width=width, height=height) for shot in shots), rate=rate)
    return Fitted(stored, width, height, header.width, header.height)


def encode_clip(frames: Iterable[NDArray[np.uint8]], *, rate: Fraction | int = FOLDER_FRAMES_PER_SECOND) -> bytes:
    """Return frames [height, width, 3] of even sides as an MP4; the same frames give the same bytes. rate: frames a second.

    Raises ImageError where the encoder refuses them.
    """
    import av

    buffer, shots = io.BytesIO(), iter(frames)
    first = next(shots)
    try:
        with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("libx264", rate=rate, options=QUALITY)
            stream.height, stream.width = first.shape[:2]
            stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
            for frame in chain([first], shots):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
    except av.error.FFmpegError as error:
        raise ImageError(f"clip of {first.shape[1]} x {first.shape[0]} pixels cannot be encoded ({error}); drop it", reason="side") from error
    return buffer.getvalue()


def read_clip_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ClipHeader:
    """Return size, number of frames and length of an MP4's first video track, in plain Python and without decoding anything.

    Raises ImageError when the data is no MP4, is in fragments, has another codec than those of CODECS, or states more than `max_pixels` a frame,
    MAX_CLIP_FRAMES or MAX_CLIP_PIXELS. Source: ISO/IEC 14496-12, Sec. 4.2 and 8.
    """
    if not is_clip(data):
        raise _refusal(data, "no MP4", reason="format")
    try:
        for track in _boxes(data, b"moov", b"trak"):
            handlers = list(_boxes(data, b"mdia", b"hdlr", inside=track))
            if handlers and data[handlers[0][0] + 8:handlers[0][0] + 12] == b"vide":
                return _video_header(data, track, max_pixels)
    except (struct.error, IndexError) as error:
        raise _refusal(data, "its header is cut off") from error
    raise _refusal(data, "no video in it")


def _video_header(data: bytes, track: tuple[int, int], max_pixels: int) -> ClipHeader:
    media, entry, sizes = (next(iter(_boxes(data, *path, inside=track)), (len(data), 0))[0] for path in (
        (b"mdia", b"mdhd"), (b"mdia", b"minf", b"stbl", b"stsd"), (b"mdia", b"minf", b"stbl", b"stsz")))
    scale, duration = struct.unpack_from(">IQ", data, media + 20) if data[media] == 1 else struct.unpack_from(">II", data, media + 12)
    codec, (width, height) = data[entry + 12:entry + 16], struct.unpack_from(">HH", data, entry + 40)
    frames, = struct.unpack_from(">I", data, sizes + 8)
    if codec not in CODECS:
        raise _refusal(data, f"codec {codec!r}; H.264, HEVC, VP9, AV1 and MPEG-4 are read", reason="format")
    if not frames:
        raise _refusal(data, "no frame in its header; clips in fragments are not read")
    if not 0 < width * height <= max_pixels:
        raise ImageError(f"clip of {width} x {height} pixels exceeds the limit of {max_pixels} pixels, or has none; scale it down or drop it",
                         reason="pixels")
    return _bounded(ClipHeader(width, height, frames, duration / scale if scale else 0.0, CODECS[codec]))


def _bounded(header: ClipHeader) -> ClipHeader:
    if header.frames > MAX_CLIP_FRAMES or header.frames * header.width * header.height > MAX_CLIP_PIXELS:
        raise ImageError(f"clip of {header.frames} frames of {header.width} x {header.height} pixels; {MAX_CLIP_FRAMES} frames and "
                         f"{MAX_CLIP_PIXELS} pixels are the most; cut it into shorter ones or drop it", reason="frames")
    return header


def _boxes(data: bytes, *path: bytes, inside: tuple[int, int] | None = None) -> list[tuple[int, int]]:
    """Return where the contents of the boxes of a path begin and end. inside: begin and end of the box to look in."""
    (at, end), found = inside or (0, len(data)), list[tuple[int, int]]()
    for _ in range(MAX_BOXES):
        if at + 8 > end:
            return found
        size, kind = struct.unpack_from(">I4s", data, at)
        begin = at + 8
        if size == 1:
            size, = struct.unpack_from(">Q", data, begin)
            begin += 8
        stop = at + size if size else end
        if not begin <= stop <= end:
            raise IndexError
        if kind == path[0]:
            found += _boxes(data, *path[1:], inside=(begin, stop)) if path[1:] else [(begin, stop)]
        at = stop
    raise IndexError


def _frames(data: bytes, header: ClipHeader) -> Iterator[Callable[[], NDArray[np.uint8]]]:
    """Yield every frame in order of time, as what makes its pixels [height, width, 3]: most are passed over. Raises ImageError."""
    import av

    # The stream may claim another size than the header, and a decoder would make room for it.
    limits = {"max_pixels": str((header.width + CODED_MORE) * (header.height + CODED_MORE)), "err_detect": "explode"}
    count = 0
    try:
        # The demuxer is named: others read playlists, which may point anywhere. Edit lists would hide frames that the header counts.
        with av.open(io.BytesIO(data), "r", format="mp4", options={"ignore_editlist": "1"}) as container:
            stream = container.streams.video[0]
            if stream.codec_context.name != header.codec:
                raise _refusal(data, f"codec {stream.codec_context.name}", reason="format")
            stream.codec_context.options, stream.codec_context.thread_count = limits, 1
            for frame in container.decode(stream):
                if frame.is_corrupt or (frame.width, frame.height) != (header.width, header.height):
                    raise _refusal(data, f"frame {count} is damaged, or of another size", reason="damaged")
                count += 1
                yield partial(_pixels, frame)
    except (av.error.FFmpegError, ValueError, IndexError, MemoryError) as error:
        reason = "memory" if isinstance(error, MemoryError) else "damaged"
        raise _refusal(data, f"behind frame {count}: {type(error).__name__}: {error}", reason=reason) from error
    if count != header.frames:
        raise _refusal(data, f"{count} of {header.frames} frames are there", reason="damaged")


def _pixels(frame: "av.VideoFrame") -> NDArray[np.uint8]:
    return np.asarray(frame.to_ndarray(format="rgb24", threads=1), np.uint8)  # a pool of threads for each small frame costs more than it gives


def _scaled(frame: NDArray[np.uint8], part: Part, *, width: int, height: int) -> NDArray[np.uint8]:
    """Return a part of a frame [height, width, 3], scaled as pictures are."""
    from PIL import Image

    if part == (0, 0, width, height) and frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=part))


def _refusal(data: bytes, what: str, *, reason: str = "header") -> ImageError:
    return ImageError(f"clip of {len(data)} bytes cannot be decoded ({what}); replace or drop it", reason=reason)
