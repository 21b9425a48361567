"""What the things in a photo are: said on the page, kept in the instance folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from imagelab.errors import UserError
from mifo.learning.classes import read_classes
from mifo_page import draft as drafts
from mifo_page.draft import classes_of, open_instance, save_instance

NEEDED = "the page needs gradio: pip install '.[app]'"


@pytest.mark.parametrize(
    ("classes", "content"),
    [
        (("car",), {"class": "car"}),
        (("cat", "red  fox"), {"class": ["cat", "red fox"]}),
    ],
)
def test_classes_are_saved_as_learning_reads_them(places, draft, classes, content):
    folder = save_instance(places, "new", draft, False, classes)
    assert json.loads((folder / "instance.json").read_text()) == content
    assert read_classes(folder, 2) == (("car",) if len(classes) == 1 else ("cat", "red fox"))
    assert classes_of(open_instance(places, "new")) == " ".join(", ".join(classes).split())


def test_without_classes_none_are_written(places, draft):
    folder = save_instance(places, "new", draft, False, ())
    assert sorted(p.name for p in folder.iterdir()) == ["img.png", "mask0.png", "mask1.png"]
    assert classes_of(open_instance(places, "new")) == ""


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (("<asset0>",), "'<asset0>' is no class; write one for all, such as car, or one for each"),
        (("cat", "fox", "owl"), "there are 3 classes for 2 masks; write one for all"),
    ],
)
def test_classes_that_do_not_fit_are_told_before_anything_is_written(
    places, draft, monkeypatch, classes, told
):
    monkeypatch.setattr(drafts, "_write", lambda *_: pytest.fail("written"))
    with pytest.raises(UserError, match=told) as error:
        save_instance(places, "new", draft, False, classes)
    assert "{" not in str(error.value)  # nothing of files, which the page writes
    assert [path.name for path in Path(places.folder_path).iterdir()] == ["toys"]


def test_two_classes_do_not_do_for_three_masks(places, draft):
    third = replace(draft, masks=(*draft.masks, ~draft.masks[0]))
    with pytest.raises(UserError, match="there are 2 classes for 3 masks"):
        save_instance(places, "new", third, False, ("cat", "fox"))
    save_instance(places, "new", third, False, ("cat",))


def test_an_instance_is_replaced_with_its_class(places, draft):
    folder = Path(places.folder_path, "toys")
    for now, then in ((("car",), '{"class": "car"}'), ((), None), (("a", "b"), None)):
        save_instance(places, "toys", draft, True, now)
        assert (folder / "instance.json").exists() == bool(now)
        if then:
            assert json.loads((folder / "instance.json").read_text()) == json.loads(then)
    # one that does not fit its masks can be mended on the page
    (folder / "instance.json").write_text('{"class": ["a", "b", "c"]}')
    save_instance(places, "toys", draft, True, ("a",))
    assert read_classes(folder, 2) == ("a",)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("scene.json", '{"size": 512}'),
        ("instance.json", '{"class": "car", "look": "red"}'),
        ("instance.json", "my notes"),
    ],
)
def test_a_folder_that_says_more_than_the_page_is_not_replaced(places, draft, name, text):
    folder = Path(places.folder_path, "toys")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"toys holds {name}, which would be lost"):
        save_instance(places, "toys", draft, True, ("car",))
    assert (folder / name).read_text() == text and (folder / "img.jpg").is_file()


def test_a_class_with_a_comma_is_not_taken_for_two(places):
    folder = Path(places.folder_path, "toys")
    (folder / "instance.json").write_text('{"class": "dog, black and white"}')
    with pytest.raises(UserError, match="instance.json has a class with a comma"):
        classes_of(open_instance(places, "toys"))


# ----------------------------------------------------------------------------------------------
# the tab


def test_the_tab_saves_what_the_things_are_and_fills_it_in_again(places, draft, events):
    values = {"draft": draft, "name": "new", "classes": " cat , fox ", "replace": False}
    plan, _ = events("saved", **values)
    assert "--instance new" in plan
    content = Path(places.folder_path, "new", "instance.json").read_text()
    assert json.loads(content) == {"class": ["cat", "fox"]}
    name, classes, opened, *_ = events("name", at="open", open="new")
    assert (name, classes, len(opened.masks)) == ("new", "cat, fox", 2)
    assert events("name", at="open", open="toys")[:2] == ("toys", "")


def test_a_file_of_classes_that_do_not_fit_is_told_and_can_be_mended(places, events, monkeypatch):
    import gradio

    told = []
    monkeypatch.setattr(gradio, "Warning", told.append)
    file = Path(places.folder_path, "toys", "instance.json")
    file.write_text('{"class": ["cat", "fox", "<owl>"]}')
    name, classes, opened, *_ = events("name", at="open", open="toys")
    assert (name, classes) == ("toys", "")
    assert len(told) == 1 and "has 3 classes for 2 masks" in told[0]
    values = {"draft": opened, "name": "toys", "classes": "cat", "replace": True}
    events("saved", **values)
    assert json.loads(file.read_text()) == {"class": "cat"}


def test_another_photo_forgets_what_the_last_one_showed(places, draft, events):
    path = str(Path(places.folder_path, "toys", "img.jpg"))
    first = events("classes", at="photo", photo=path, draft=None, classes="car")
    assert first[0] == "car" and first[1].masks == ()
    next_one = events("classes", at="photo", photo=path, draft=replace(draft), classes="car")
    assert next_one[0] == ""
