"""book/_ext/light_pages.py without a build: what is made of tables, pictures and icons."""

import base64
from types import SimpleNamespace

import pytest

SCRIPT = "book/_ext/light_pages.py"


@pytest.fixture
def app(tmp_path):
    part = SimpleNamespace(caption="Findings", items=["book/06_rank"])
    site_map = SimpleNamespace(root=SimpleNamespace(subtrees=[part]))
    return SimpleNamespace(
        outdir=tmp_path, builder=SimpleNamespace(format="html"), env=SimpleNamespace(external_site_map=site_map)
    )


def mended(script, app, **context):
    context = {"script_files": [], "css_files": [], "pathto": lambda path, _: f"../{path}", **context}
    script.mend_page(app, "book/06_rank", "page.html", context, None)
    return context


def test_headers_say_what_they_head_and_empty_ones_head_nothing(script, app):
    body = (
        '<table border="1" class="dataframe"><thead><tr style="x"><th></th><th>arm</th></tr></thead>'
        '<tbody><tr><th>0</th><td>opd</td></tr><tr><th scope="rowgroup">1</th><td>sft</td></tr></tbody></table><th>'
    )
    assert mended(script, app, body=body)["body"] == (
        '<table border="1" class="dataframe"><thead><tr style="x"><td></td><th scope="col">arm</th></tr></thead>'
        '<tbody><tr><th scope="row">0</th><td>opd</td></tr><tr><th scope="rowgroup">1</th><td>sft</td></tr></tbody>'
        "</table><th>"
    )


def test_a_picture_in_the_page_becomes_a_file_of_its_size(script, app):
    picture = bytes(16) + (800).to_bytes(4, "big") + (600).to_bytes(4, "big") + bytes(4000)
    text = base64.b64encode(picture).decode()
    body = mended(script, app, body=f'<p><img src="data:image/png;base64,{text}" alt="six curves" hidden></p>')["body"]
    (file,) = (app.outdir / "_images").iterdir()
    assert file.read_bytes() == picture
    assert body == (
        f'<p><img width="800" height="600" loading="lazy" src="../_images/{file.name}" alt="six curves" hidden></p>'
    )


def test_a_picture_has_its_room_before_it_is_there(script, app):
    said = 'alt="curves" src="a.png" style="width: 731px; height: 571px;" />'
    assert mended(script, app, body=f"<img {said}")["body"] == f'<img width="731" height="571" {said}'
    for body in (f'<img width="1" {said}', '<img src="a.png" style="width: 50%;" />'):
        assert mended(script, app, body=body)["body"] == body


def test_small_pictures_stay(script, app):
    body = '<img src="data:image/png;base64,AAAA" alt="a dot">'
    assert mended(script, app, body=body)["body"] == body


def test_a_page_knows_its_part(script, app):
    assert mended(script, app)["parents"] == [{"title": "Findings", "link": ""}]


def test_icons_in_use_stay_under_any_of_their_names(script, app):
    icons = app.outdir / "_static" / "scripts" / "fontawesome.js"
    icons.parent.mkdir(parents=True)
    bars, house, twins, monero = (
        'bars:[448,512,["navicon"],"f0c9","M0 96"],',
        'house:[576,512,[127968,"home"],"f015","M575.8"],',
        '"twin-tones":[512,512,[],"f1",["M1","M2"]],',
        'monero:[496,512,[],"f3d0","M352 384"]',
    )
    icons.write_text(f"var c={{{bars}{house}{twins}{monero}}};go(c)")
    (app.outdir / "index.html").write_text('<i class="fa-solid fa-bars"></i><i class="fa-solid fa-home"></i>')
    script.keep_icons_in_use(app, None)
    assert icons.read_text() == f"var c={{{bars}{house}}};go(c)"
