import os
from pathlib import Path

import pytest

from fewref.episodes.errors import InputError, read_json
from fewref.splits import DATASETS, base_categories, complete, load_split, novel_categories

GOLDEN = Path(os.environ.get("FEWREF_GOLDEN_DIR", Path(__file__).parent / "golden")) / "protocol"


@pytest.mark.parametrize("dataset", ["mini-ref-youtube-vos", "builtin"])
@pytest.mark.parametrize("group", ["1", "2", "3", "4"])
def test_ids_and_groups_are_those_of_the_golden_lists(dataset, group):
    expected = read_json(GOLDEN / "expected.json")[group]
    split = load_split(dataset)
    assert [split.categories[name] for name in novel_categories(split, group)] == expected["test_class_list"]
    assert [split.categories[name] for name in base_categories(split, group)] == expected["train_class_list"]


def test_names_belong_to_the_golden_ids():
    """Videos of one category fix the id of its name; all that the golden files fix must agree."""
    listed, meta = read_json(GOLDEN / "expected.json")["category_to_videos"], read_json(GOLDEN / "meta.json")["videos"]
    categories = load_split("mini-ref-youtube-vos").categories
    fixed = {}
    for number, videos in listed.items():
        for video in videos:
            names = {entry["category"] for entry in meta[video]["objects"].values()}
            if len(names) == 1:
                fixed[names.pop()] = int(number)
    assert fixed
    assert fixed.items() <= categories.items()
    assert sorted(categories.values()) == list(range(1, 49))


def test_sail_ids_are_those_of_the_golden_lists():
    listed = read_json(GOLDEN / "sail_expected.json")["train"]["videos"]
    meta = read_json(GOLDEN / "sail_meta.json")["videos"]
    split = load_split("mini-ref-sail-vos")
    assert split.categories == {"dog": 1, "car": 2, "person": 3}
    for number, videos in listed.items():
        for video in videos:
            names = {entry["category"] for entry in meta[video]["objects"].values()}
            assert int(number) in {split.categories[name] for name in names}
    assert novel_categories(split, "all") == ("dog", "car", "person")
    assert base_categories(split, "all") == ()


def test_published_counts():
    assert load_split("mini-ref-youtube-vos").counts == {"videos": 1668, "categories": 48}


def test_every_dataset_loads_and_the_built_in_ones_share_the_lists():
    layouts = {name: load_split(name).layout for name in DATASETS}
    assert set(layouts.values()) == {"youtube", "sail", "davis", "mevis"}
    assert load_split("builtin").categories == load_split("mini-ref-youtube-vos").categories
    assert load_split("builtin").counts == {}


def test_a_dataset_without_published_classes_takes_those_it_has():
    split = complete(load_split("mini-davis"), ["dog", "car", "dog"])
    assert split.categories == {"car": 1, "dog": 2}
    assert novel_categories(split, "all") == ("car", "dog")
    published = load_split("mini-ref-sail-vos")
    assert complete(published, ["sofa"]) == published


def test_unknown_names_get_near_ones():
    with pytest.raises(InputError, match="mini-ref-youtube-vos"):
        load_split("mini-ref-youtub-vos")
    with pytest.raises(InputError, match="choose from 1, 2, 3, 4"):
        novel_categories(load_split("builtin"), "5")
