from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.data.exam_folders import picture
from tests.data.videos import KINDS, blocks, film
from ultra.data import video
from ultra.data.video import VideoFrames, read_video, video_kind


def read(data: bytes, max_frames: int = 64, max_pixels: int = 10**6) -> VideoFrames:
    return read_video(
        data, "3", max_pixels=max_pixels, max_frames=max_frames, duplicate_threshold=2.0
    )


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_comes_in_order(kind: str) -> None:
    found = read(film(kind, list(range(9))))
    assert found.frame_sources == tuple(f"3#{i}" for i in range(9))
    assert found.frame_sizes == ((64, 48),) * 9
    assert found.num_duplicates == 0
    for seed, frame in enumerate(found.frames):
        # Codecs subsample colour and GIF has 256 of them, so only grey levels come close.
        difference = pixels(frame).mean(-1) - blocks(seed).mean(-1)
        assert np.abs(difference).mean() < 20
        assert np.abs(pixels(frame).mean(-1) - blocks(seed + 20).mean(-1)).mean() > 40


def test_a_lossless_video_gives_its_very_pixels() -> None:
    found = read(film("lossless.avi", [1, 2]))
    for seed, frame in zip((1, 2), found.frames, strict=True):
        assert frame[1:4] == b"PNG"
        assert (pixels(frame) == blocks(seed)).all()
    assert read(film("mp4", [1])).frames[0][:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_still_is_dropped_and_the_rest_sampled(kind: str) -> None:
    found = read(film(kind, [1, 1, 2, 2, 2, 3, 4, 4, 5, 6]), max_frames=3)
    assert found.num_duplicates == 4
    # Of the distinct frames 0, 2, 5, 6, 8 and 9 the first, the third and the last.
    assert found.frame_sources == ("3#0", "3#5", "3#9")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_a_cut_file_is_refused(kind: str, share: float) -> None:
    data = film(kind, list(range(12)))
    with pytest.raises(ValueError, match=r"^damaged or cut short$"):
        read(data[: max(12, int(len(data) * share))])


def test_a_file_with_its_index_in_front_is_refused_when_cut(tmp_path: Path) -> None:
    path = tmp_path / "front.mp4"
    with (
        av.open(io.BytesIO(film("mp4", list(range(12))))) as given,
        av.open(str(path), "w", options={"movflags": "faststart"}) as moved,
    ):
        source = given.streams.video[0]
        target = moved.add_stream_from_template(source)
        for packet in given.demux(source):
            if packet.dts is not None:
                packet.stream = target
                moved.mux(packet)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert len(read(data).frames) == 12
    with pytest.raises(ValueError, match="damaged or cut short"):
        read(data[:-200])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_turned_round_never_escape_as_another_error(kind: str) -> None:
    data = film(kind, list(range(4)))
    rng = np.random.default_rng(0)
    for _ in range(25):
        hurt = bytearray(data)
        for place in rng.integers(12, len(data), 20):
            hurt[place] ^= int(rng.integers(1, 256))
        try:
            found = read(bytes(hurt))
        except ValueError:
            continue
        assert found.frames


@pytest.mark.parametrize("kind", ["mp4", "avi"])
def test_a_frame_over_the_cap_is_never_decoded(kind: str) -> None:
    with pytest.raises(ValueError, match="64 x 48 pixels, at most 3071 are let in"):
        read(film(kind, [1]), max_pixels=3071)


def test_a_gif_that_claims_to_be_huge_is_never_decoded() -> None:
    data = bytearray(film("gif", [1]))
    data[6:10] = b"\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="65535 x 65535 pixels, at most 1000000 are let in"):
        read(bytes(data))


def test_caps_on_frames_and_pixels_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    data = film("gif", [1, 2, 3, 4])
    monkeypatch.setattr(video, "MAX_VIDEO_PIXELS", 3 * 64 * 48)
    with pytest.raises(ValueError, match="more than the 9216 pixels that are let in together"):
        read(data)
    monkeypatch.setattr(video, "MAX_VIDEO_FRAMES", 3)
    with pytest.raises(ValueError, match="more than the 3 frames that are let in"):
        read(data)


def test_sound_alone_is_no_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        for _ in range(4):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), "float32"), "fltp", "mono")
            silence.sample_rate = 16000
            container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="no pictures in it"):
        read(buffer.getvalue())


def test_the_kind_follows_from_the_content() -> None:
    assert [video_kind(film(kind, [1])) for kind in KINDS] == ["mp4", "avi", "avi", "gif"]
    assert video_kind(picture(1)) == video_kind(picture(1, "PNG")) == video_kind(b"") == ""
    assert video_kind(b"RIFF\0\0\0\0WEBPVP8 ") == ""
