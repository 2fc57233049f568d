"""The run folder: masks survive the store, headers are compared, one writer at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as coco

from fewref.benchmark.store import (
    Row,
    RunFolder,
    decode_masks,
    encode_masks,
    file_name,
    merge_header,
    read_header,
    read_rows,
    shards_in,
)
from fewref.episodes.errors import InputError

HEADER = {"format": 1, "run": "r", "defines": {"method": "m", "episodes": {"shots": 1}}, "environment": {"python": "3"}}


def row(manifest, number: int, **changes) -> Row:
    episode = manifest.episodes[0]
    values = {
        "run": "r",
        "episode": episode.id,
        "group": "1",
        "category": episode.category,
        "seed": 0,
        "query": episode.queries[number].id,
        "video": "v",
        "method": "m",
        "status": "ok",
        "error": "",
        "frames": 2,
        "window": 10,
        "confidence": 0.1,
        "scores": {"davis": {"j": [1 / 3, 0.1 + 0.2], "f": [1.0, 0.0], "size": [3, 4], "inter": 1, "union": 3}},
    }
    return Row(**{**values, **changes})


def order_of(manifest):
    return [(manifest.episodes[0].id, query.id) for query in manifest.episodes[0].queries]


def line(entry: Row) -> dict:
    return {"episode": entry.episode, "query": entry.query, "masks": []}


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 41, 57)])
def test_masks_survive(shape):
    for masks in (np.random.default_rng(0).random(shape) > 0.5, np.zeros(shape, bool), np.ones(shape, bool)):
        entries = json.loads(json.dumps(encode_masks(masks)))
        assert np.array_equal(decode_masks(entries), masks)
        assert [entry["size"] for entry in entries] == [list(shape[1:])] * shape[0]
        assert coco.area({**entries[0], "counts": entries[0]["counts"].encode()}) == masks[0].sum()


def test_rows_keep_every_digit(small, tmp_path):
    entry = row(small.manifest, 0)
    with RunFolder(tmp_path, HEADER, small.manifest, order_of(small.manifest)) as folder:
        folder.append(entry, line(entry))
    (read,) = read_rows(tmp_path, partial=True)
    assert read == entry
    assert read.means("davis") == ((1 / 3 + (0.1 + 0.2)) / 2, 0.5)


def test_rows_out_of_order_are_put_in_order_at_the_end(small, tmp_path):
    order = order_of(small.manifest)
    with RunFolder(tmp_path, HEADER, small.manifest, order) as folder:
        for number in (2, 0, 1):
            folder.append(row(small.manifest, number), line(row(small.manifest, number)))
        assert [entry.key for entry in folder.finish()] == order[:3]
    for name in ("rows", "predictions"):
        lines = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
        assert [(entry["episode"], entry["query"]) for entry in lines] == order[:3]


def test_predictions_without_rows_and_rows_without_predictions_are_dropped(small, tmp_path):
    order = order_of(small.manifest)
    with RunFolder(tmp_path, HEADER, small.manifest, order) as folder:
        folder.append(row(small.manifest, 0), line(row(small.manifest, 0)))
        folder.append(row(small.manifest, 1), None)
    with (tmp_path / "predictions.jsonl").open("a") as file:
        file.write(json.dumps(line(row(small.manifest, 2))) + "\n")
    with RunFolder(tmp_path, HEADER, small.manifest, order) as folder:
        assert list(folder.rows) == order[:1]
    assert (tmp_path / "predictions.jsonl").read_text().count("\n") == 1
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 1


def test_one_writer_at_a_time(small, tmp_path):
    pytest.importorskip("fcntl")
    with (
        RunFolder(tmp_path, HEADER, small.manifest, order_of(small.manifest)),
        pytest.raises(InputError, match="in use by another process"),
    ):
        RunFolder(tmp_path, HEADER, small.manifest, order_of(small.manifest))
    RunFolder(tmp_path, HEADER, small.manifest, order_of(small.manifest)).close()


def test_file_names(tmp_path):
    assert file_name("rows", (0, 1)) == "rows.jsonl"
    assert file_name("header", (1, 3)) == "header-1of3.json"
    for name in ("header-10of12.json", "header-2of12.json", "headers.json", "header-x.json"):
        (tmp_path / name).write_text("{}")
    assert shards_in(tmp_path) == [(2, 12), (10, 12)]


def test_headers_are_compared_field_by_field(tmp_path):
    path = tmp_path / "header.json"
    assert merge_header(path, HEADER) == HEADER
    path.write_text(json.dumps(HEADER))
    elsewhere = {**HEADER, "environment": {"python": "4"}}
    assert merge_header(path, elsewhere) == {**HEADER, "resumed": [{"python": "4"}]}
    other = {**HEADER, "defines": {"method": "m", "episodes": {"shots": 5}}}
    with pytest.raises(InputError, match="a run with episodes.shots = 1, not 5; use another output folder"):
        merge_header(path, other)
    path.write_text("[]")
    with pytest.raises(InputError, match="not the header of a run"):
        merge_header(path, HEADER)


def test_folders_that_hold_no_single_run(small, tmp_path):
    with pytest.raises(InputError, match="no run folder"):
        read_rows(tmp_path)
    (tmp_path / "header-0of2.json").write_text(json.dumps(HEADER))
    (tmp_path / "header-1of2.json").write_text(json.dumps({**HEADER, "run": "other"}))
    with pytest.raises(InputError, match=r"header-1of2\.json: is of another run"):
        read_header(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "q"}, "is of run q, the header of r"),
        ({"query": "nobody:0"}, "nobody:0 .* not of its manifest"),
    ],
)
def test_rows_of_something_else(small, tmp_path, change, message):
    with RunFolder(tmp_path, HEADER, small.manifest, order_of(small.manifest)) as folder:
        folder.append(row(small.manifest, 0, **change), None)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path, partial=True)


def test_rows_of_another_version(small, tmp_path):
    RunFolder(tmp_path, HEADER, small.manifest, order_of(small.manifest)).close()
    episode, query = order_of(small.manifest)[0]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"episode": episode, "query": query, "stars": 5}) + "\n")
    with pytest.raises(InputError, match="fields unlike this version's"):
        read_rows(tmp_path)
