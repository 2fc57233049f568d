"""One fault at a time is put into sound folders; the check must name it, with its file, and nothing else."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewref.episodes.check import check_dataset
from fewref.episodes.checksums import verify_checksums, write_checksums
from fewref.episodes.errors import InputError
from fewref.episodes.readers import read_index
from fewref.episodes.synthetic import write_synthetic

REAL = Path(__file__).resolve().parents[2] / "shared/realdata/davis"
FOLDERS = {"builtin-sail": "mini-ref-sail-vos", "builtin-davis": "mini-davis", "builtin-mevis": "mini-mevis"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "synthetic"
    write_synthetic(root, layouts=("sail", "davis", "mevis"), size=(64, 64), frames=4, workers=1)
    return root


@pytest.fixture
def place(sound, tmp_path):
    """A copy of one dataset's folder, the name of one of its videos and the names of its frames."""

    def copy(dataset: str) -> tuple[Path, str, tuple[str, ...]]:
        root = shutil.copytree(sound / FOLDERS[dataset], tmp_path / "copy")
        video = next(iter(read_index(dataset, root).videos.values()))
        return root, video.name, video.frames

    return copy


def change(file: Path, act) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    act(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def faults(dataset: str, root: Path, fast: bool = False) -> list[str]:
    found = check_dataset(dataset, root, fast=fast, progress=False)
    assert all("\n" not in line for line in found)
    return found


def only(found: list[str], *parts: str) -> None:
    assert len(found) == 1, found
    for part in parts:
        assert part in found[0]


@pytest.mark.parametrize("dataset", FOLDERS)
def test_sound_folders_have_no_fault_and_are_left_as_they_are(sound, dataset):
    before = sorted(sound.rglob("*"))
    assert faults(dataset, sound) == []
    assert faults(dataset, sound / FOLDERS[dataset], fast=True) == []
    assert sorted(sound.rglob("*")) == before


@pytest.mark.skipif(not REAL.is_dir(), reason="real videos absent")
def test_real_videos_have_no_fault():
    assert faults("mini-davis", REAL, fast=True) == []


@pytest.mark.parametrize("fast", [True, False])
def test_missing_files(place, fast):
    root, video, frames = place("builtin-davis")
    (root / f"JPEGImages/{video}/{frames[1]}.jpg").unlink()
    only(faults("builtin-davis", root, fast), f"JPEGImages/{video}/{frames[1]}.jpg", "no such image")
    shutil.rmtree(root / f"JPEGImages/{video}")
    assert len(faults("builtin-davis", root, fast)) == len(frames)
    shutil.rmtree(root / "JPEGImages")
    only(faults("builtin-davis", root, fast), str(root / "JPEGImages"), "no such folder")


def test_a_missing_mask_is_a_fault_only_where_an_object_should_be(place):
    root, video, frames = place("builtin-davis")
    (root / f"Annotations/{video}/{frames[2]}.png").unlink()
    only(faults("builtin-davis", root, fast=True), f"Annotations/{video}/{frames[2]}.png", "no mask")

    def leave_out(meta: dict) -> None:
        for entry in meta["videos"][video]["objects"].values():
            entry["frames"] = [frame for frame in entry["frames"] if frame != frames[2]]

    change(root / "meta.json", leave_out)
    assert faults("builtin-davis", root) == []


@pytest.mark.parametrize("keep", [0, 20, 400])
def test_broken_images(place, keep):
    root, video, frames = place("builtin-davis")
    image = root / f"JPEGImages/{video}/{frames[0]}.jpg"
    image.write_bytes(image.read_bytes()[:keep])
    only(faults("builtin-davis", root), str(image), "fetch it again")
    assert len(faults("builtin-davis", root, fast=True)) == (1 if keep == 0 else 0)


def test_broken_mask(place):
    root, video, frames = place("builtin-davis")
    mask = root / f"Annotations/{video}/{frames[0]}.png"
    mask.write_bytes(mask.read_bytes()[:90])
    only(faults("builtin-davis", root), str(mask))


@pytest.mark.parametrize("frame", [0, 2])
def test_sizes(place, frame):
    root, video, frames = place("builtin-davis")
    mask = root / f"Annotations/{video}/{frames[frame]}.png"
    with Image.open(mask) as image:
        small = image.resize((60, 64), Image.NEAREST)
    small.save(mask)
    only(faults("builtin-davis", root), str(mask), "64x60", "64x64")


def test_a_frame_of_another_size_than_its_video(place):
    root, video, frames = place("builtin-davis")
    for path in (root / f"JPEGImages/{video}/{frames[3]}.jpg", root / f"Annotations/{video}/{frames[3]}.png"):
        with Image.open(path) as image:
            large = image.resize((70, 64), Image.NEAREST)
        large.save(path)
    only(faults("builtin-davis", root), f"JPEGImages/{video}/{frames[3]}.jpg", "64x70", "64x64")


def test_ids_that_the_metadata_do_not_know(place):
    root, video, frames = place("builtin-davis")
    mask = root / f"Annotations/{video}/{frames[1]}.png"
    with Image.open(mask) as image:
        labels, palette = np.array(image), image.getpalette()
    labels[:2, :2] = 99
    image = Image.fromarray(labels)
    image.putpalette(palette)
    image.save(mask)
    only(faults("builtin-davis", root), str(mask), "object 99")


def test_an_object_that_no_mask_shows(place):
    root, video, _ = place("builtin-davis")
    change(
        root / "meta.json", lambda m: m["videos"][video]["objects"].update({"77": {"category": "dog", "frames": []}})
    )
    only(faults("builtin-davis", root), f"Annotations/{video}", "object 77 (dog) has no pixel")


def test_unknown_category(place):
    root, video, _ = place("builtin-sail")
    change(root / "meta.json", lambda m: m["videos"][video]["objects"]["1"].update(category="persn"))
    only(faults("builtin-sail", root, fast=True), "meta.json", video, "'persn'", "did you mean 'person'")


def test_sail_value_255_is_no_fault_but_another_id_is(place):
    root, video, frames = place("builtin-sail")
    for value, found in ((255, 0), (9, len(frames))):
        for frame in frames:
            mask = root / f"Annotations/{video}/{frame}.png"
            with Image.open(mask) as image:
                labels = np.array(image)
            Image.fromarray(np.where(labels > 0, value, 0).astype(np.uint8)).save(mask)
        told = [line for line in faults("builtin-sail", root) if "pixels of object 9" in line]
        assert len(told) == found


def test_expressions_and_videos(place):
    root, video, _ = place("builtin-davis")
    spoken = json.loads((root / "meta_expressions.json").read_text())["videos"][video]["expressions"]
    first, second = list(spoken)[:2]
    change(root / "meta_expressions.json", lambda m: m["videos"][video]["expressions"][first].update(exp=" "))
    only(faults("builtin-davis", root), "meta_expressions.json", video, f"expression {first} is empty")
    change(root / "meta_expressions.json", lambda m: m["videos"][video]["expressions"][second].update(obj_id="55"))
    assert any("object 55, which the video does not have" in line for line in faults("builtin-davis", root))
    change(root / "meta_expressions.json", lambda m: m["videos"][video].update(frames=[]))
    change(root / "meta.json", lambda m: [o.pop("frames") for o in m["videos"][video]["objects"].values()])
    assert any(f"video {video} has no frames" in line for line in faults("builtin-davis", root))


def test_mevis_tracks(place):
    root, video, frames = place("builtin-mevis")
    number = next(iter(read_index("builtin-mevis", root).videos[video].objects))
    sound = (root / "mask_dict.json").read_text()
    t = next(t for t, entry in enumerate(json.loads(sound)[number]) if entry)
    change(root / "mask_dict.json", lambda m: m[number][t].update(size=[32, 128]))
    only(faults("builtin-mevis", root), "mask_dict.json", f"anno_id {number}", frames[t], "32x128", "64x64")
    change(root / "mask_dict.json", lambda m: m[number].pop())
    assert any(f"{len(frames) - 1} entries for {len(frames)} frames" in line for line in faults("builtin-mevis", root))
    (root / "mask_dict.json").write_text(sound)
    change(root / "mask_dict.json", lambda m: m.update({number: [None] * len(frames)}))
    only(faults("builtin-mevis", root), "mask_dict.json", f"object {number}", "no pixel")
    change(root / "mask_dict.json", lambda m: m[number].__setitem__(0, {"size": "x"}))
    assert any("not a COCO RLE" in line for line in faults("builtin-mevis", root))
    (root / "mask_dict.json").write_text(sound[:-20])
    only(faults("builtin-mevis", root), "mask_dict.json: not valid JSON")


def test_published_counts_are_compared_for_the_real_datasets_only(sound):
    found = faults("mini-ref-sail-vos", sound)
    assert found == []  # three categories, as published
    spare = [line for line in faults("mini-ref-youtube-vos", sound / "mini-davis", fast=True) if "published" in line]
    assert len(spare) == 2
    assert "42 videos where 1668 are published" in spare[0]


def test_a_folder_that_cannot_be_read_is_the_one_fault(tmp_path):
    only(faults("mini-davis", tmp_path), str(tmp_path), "looked for")
    with pytest.raises(InputError, match="mini-davis"):
        check_dataset("mini-davs", tmp_path)


def test_checksums(place, tmp_path):
    root, video, frames = place("builtin-davis")
    (root / "Größe.txt").write_text("x")
    out = root / "checksums.sha256"
    assert write_checksums(root, out, progress=False) == len([p for p in root.rglob("*") if p.is_file()]) - 1
    assert verify_checksums(root, out, progress=False) == []
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--quiet", "--check", out.name], cwd=root, check=True)
    image = root / f"JPEGImages/{video}/{frames[0]}.jpg"
    image.write_bytes(image.read_bytes()[:-1] + b"\0")
    (root / "meta.json").rename(root / "moved.json")
    found = verify_checksums(root, out, progress=False)
    assert [line.split(": ")[0] for line in found] == [str(image), str(root / "meta.json"), str(root / "moved.json")]
    out.write_text("abc  file\n")
    with pytest.raises(InputError, match="line 1"):
        verify_checksums(root, out, progress=False)
    with pytest.raises(InputError, match="--checksums write"):
        verify_checksums(root, tmp_path / "none", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_checksums(root, tmp_path / "file/list", progress=False)
