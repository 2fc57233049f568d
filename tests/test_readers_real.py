"""The readers on real video and real annotation files, where they are at hand."""

import json
from pathlib import Path

import pytest

from fewref.episodes.errors import InputError
from fewref.episodes.readers import read_frame, read_index, read_masks

REAL = Path(__file__).resolve().parents[2] / "shared/realdata"


def put(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.skipif(not (REAL / "davis").is_dir(), reason="real videos absent")
def test_real_davis_videos():
    index = read_index("mini-davis", REAL / "davis")
    assert len(index.videos) == 20
    assert index.warnings == ()
    for name in ("bmx-trees", "drift-chicane"):
        video = index.videos[name]
        masks = [read_masks(index, name, video.frames, [number]) for number in video.objects]
        assert sum(mask.astype(int) for mask in masks).max() == 1
        assert all(mask.any((1, 2)).all() for mask in masks)  # as its README says
        assert masks[0].shape[1:] == read_frame(index, name, video.frames[0]).shape[:2] == (480, 854)


@pytest.mark.skipif(not (REAL / "text").is_dir(), reason="real annotation files absent")
def test_real_sentences_without_truth_are_refused_by_name(tmp_path):
    """The validation part of Ref-YouTube-VOS names no objects."""
    spoken = json.loads((REAL / "text/ref_youtube_vos_valid_meta_expressions.json").read_text())
    objects = {"objects": {"1": {"category": "dog"}}}
    put(tmp_path / "meta.json", {"videos": dict.fromkeys(spoken["videos"], objects)})
    put(tmp_path / "meta_expressions.json", spoken)
    with pytest.raises(InputError, match="meta_expressions.json: .* names no object"):
        read_index("mini-ref-youtube-vos", tmp_path)
    for record in spoken["videos"].values():
        for entry in record["expressions"].values():
            entry["obj_id"] = "1"
    put(tmp_path / "meta_expressions.json", spoken)
    index = read_index("mini-ref-youtube-vos", tmp_path)
    assert sum(len(video.expressions) for video in index.videos.values()) == 2096
    assert index.warnings == ()
