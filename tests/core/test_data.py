"""Data sets by name: what is read, what is fetched, and what every failure says and leaves."""

import hashlib
import json
import logging.handlers
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from torch import nn

from toolkit.core import data, nets
from toolkit.core.data import download, manifest

TEXT = "To be, or not to be, that is the question.\n" * 200


class Site:
    """A web server on this machine: `pages` maps a path to bytes or to a status code.

    A list gives its items one after the other. `cut` paths announce more than they send.
    """

    def __init__(self):
        self.pages, self.cut, self.asked = {}, set(), []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append(self.path)
                page = site.pages.get(self.path, 404)
                if isinstance(page, list):
                    page = page.pop(0)
                if isinstance(page, int):
                    self.send_error(page)
                    return
                self.send_response(200)
                extra = 1000 if self.path in site.cut else 0
                self.send_header("Content-Length", str(len(page) + extra))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, *words):
                """Keep the test output clean."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path):
        return f"http://127.0.0.1:{self.server.server_port}{path}"


@pytest.fixture
def site():
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data directory, and downloads that do not wait for a second attempt."""
    folder = tmp_path / "data"
    monkeypatch.setenv("TOOLKIT_DATA", str(folder))
    monkeypatch.setattr(download, "RETRIES", 0)
    return folder


@pytest.fixture
def declare(tmp_path, monkeypatch):
    """Writes a manifest with one set `play` and makes it the manifest."""

    def write(*forms):
        lines = ['[play]\ntitle = "t"\nlicence = "l"\nhomepage = "https://h"\ncitation = "c"\n']
        for reader, files in forms:
            lines.append(f'[[play.forms]]\nreader = "{reader}"\nnote = "n"\n')
            for file in files:
                lines.append("[[play.forms.files]]\n")
                lines += [f"{key} = {json.dumps(value)}\n" for key, value in file.items()]
        path = tmp_path / "manifest.toml"
        path.write_text("".join(lines), encoding="utf-8")
        manifest.read_manifest.cache_clear()
        monkeypatch.setattr(manifest, "manifest_path", lambda: path)

    yield write
    manifest.read_manifest.cache_clear()


def entry(path, content, *urls):
    promise = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return {"path": path, **promise, "urls": list(urls)}


def left_over(folder):
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def dead_url():
    """An address at which nobody listens."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    port = server.server_port
    server.server_close()
    return f"http://127.0.0.1:{port}/a.txt"


def test_a_set_is_fetched_once_and_then_read_from_the_data_directory(site, folder, declare):
    site.pages["/a"] = TEXT.encode()
    declare(("text", [entry("sub/a.txt", TEXT.encode(), site.url("/a"))]))
    assert data.load("play") == TEXT
    assert data.load("play") == TEXT
    assert site.asked == ["/a"]
    assert left_over(folder) == [folder / "sub" / "a.txt"]


def test_wrong_bytes_from_every_address_are_refused(site, folder, declare):
    good = TEXT.encode()
    site.pages |= {"/a": good.replace(b"question", b"answer!!"), "/b": good.upper()}
    declare(("text", [entry("a.txt", good, site.url("/a"), site.url("/b"))]))
    with pytest.raises(data.ChecksumError, match="nothing was kept") as error:
        data.load("play")
    assert site.url("/a") in str(error.value)
    assert site.url("/b") in str(error.value)
    assert site.asked == ["/a", "/b"]
    assert left_over(folder) == []


@pytest.mark.parametrize("announced", [True, False])
def test_a_download_cut_short_leaves_nothing(site, folder, declare, announced):
    good = TEXT.encode()
    site.pages["/a"] = good[:-1000]
    if announced:
        site.cut.add("/a")
    declare(("text", [entry("a.txt", good, site.url("/a"))]))
    with pytest.raises(data.DataError, match=r"IncompleteRead|truncated"):
        data.load("play")
    assert left_over(folder) == []


def test_a_mirror_stands_in_for_a_dead_and_a_lying_host(site, folder, declare):
    good = TEXT.encode()
    site.pages |= {"/wrong": b"<html>moved</html>", "/mirror": good}
    urls = (dead_url(), site.url("/gone"), site.url("/wrong"), site.url("/mirror"))
    declare(("text", [entry("a.txt", good, *urls)]))
    assert data.load("play") == TEXT
    assert site.asked == ["/gone", "/wrong", "/mirror"]
    assert left_over(folder) == [folder / "a.txt"]


def test_a_host_that_fails_once_is_asked_again(site, folder, declare, monkeypatch):
    monkeypatch.setattr(download, "RETRIES", 1)
    site.pages["/a"] = [503, TEXT.encode()]
    declare(("text", [entry("a.txt", TEXT.encode(), site.url("/a"))]))
    assert data.load("play") == TEXT
    assert site.asked == ["/a", "/a"]


def test_without_network_both_remedies_are_named(folder, declare):
    file = entry("a.txt", TEXT.encode(), dead_url())
    declare(("text", [file]))
    with pytest.raises(data.DownloadError) as error:
        data.load("play")
    for part in ("Connect to the network", "TOOLKIT_DATA", str(folder), file["sha256"], "a.txt"):
        assert part in str(error.value)
    assert left_over(folder) == []


def test_a_set_without_address_says_which_file_to_put_where(folder, declare):
    file = entry("a.txt", TEXT.encode())
    declare(("text", [file]))
    with pytest.raises(data.DownloadError, match="no address") as error:
        data.load("play")
    assert file["sha256"] in str(error.value)
    assert not folder.exists()


def test_an_unwritable_directory_is_named_before_anything_is_fetched(
    site, tmp_path, declare, monkeypatch
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TOOLKIT_DATA", str(tmp_path / "file" / "data"))
    site.pages["/a"] = TEXT.encode()
    declare(("text", [entry("a.txt", TEXT.encode(), site.url("/a"))]))
    with pytest.raises(data.DirectoryError, match="cannot be written") as error:
        data.load("play")
    assert str(tmp_path / "file" / "data") in str(error.value)
    assert "TOOLKIT_DATA" in str(error.value)
    assert site.asked == []


def test_a_place_that_turns_out_unwritable_is_named(site, folder, declare):
    folder.mkdir()
    (folder / "sub").write_text("in the way")
    site.pages["/a"] = TEXT.encode()
    declare(("text", [entry("sub/a.txt", TEXT.encode(), site.url("/a"))]))
    with pytest.raises(data.DirectoryError, match="could not be written"):
        data.load("play")
    assert left_over(folder) == [folder / "sub"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda good: good[:-1], "truncated: 8,599 of 8,600 bytes"),
        (lambda good: good + b"x", "too long: 8,601 instead of 8,600 bytes"),
        (lambda good: good.replace(b"be", b"eb"), "sha256 is"),
    ],
)
def test_a_damaged_local_file_is_refused_and_left_alone(site, folder, declare, damage, words):
    good = TEXT.encode()
    folder.mkdir()
    (folder / "a.txt").write_bytes(damage(good))
    site.pages["/a"] = good
    declare(("text", [entry("a.txt", good, site.url("/a"))]))
    with pytest.raises(data.ChecksumError, match=words) as error:
        data.load("play")
    assert "Delete it" in str(error.value)
    assert (folder / "a.txt").read_bytes() == damage(good)
    assert site.asked == []


def test_a_file_replaced_after_it_was_checked_is_checked_again(folder, declare):
    good = TEXT.encode()
    folder.mkdir()
    path = folder / "a.txt"
    path.write_bytes(good)
    declare(("text", [entry("a.txt", good)]))
    assert data.load("play") == TEXT
    path.write_bytes(good.replace(b"not", b"now"))
    os.utime(path, ns=(1, 1))
    with pytest.raises(data.ChecksumError):
        data.load("play")


def test_a_checked_file_is_not_hashed_twice(folder, declare, monkeypatch):
    folder.mkdir()
    (folder / "a.txt").write_bytes(TEXT.encode())
    declare(("text", [entry("a.txt", TEXT.encode())]))
    calls = []
    real = hashlib.file_digest

    def counted(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    assert data.load("play") == data.load("play") == TEXT
    assert len(calls) == 1


def test_only_the_missing_file_of_a_form_is_fetched(site, folder, declare):
    rows = {split: f"a {split} sentence\t1\n".encode() for split in ("train", "dev", "test")}
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_bytes(rows[split])
    site.pages["/test"] = rows["test"]
    files = [entry(f"{split}.tsv", row, site.url(f"/{split}")) for split, row in rows.items()]
    declare(("sst2_tsv", files))
    tables = data.load("play")
    assert site.asked == ["/test"]
    assert {split: table.values.tolist() for split, table in tables.items()} == {
        split: [[f"a {split} sentence", 1]] for split in rows
    }


def test_any_form_may_lie_in_the_data_directory(folder, declare):
    packed = b"second packing"
    folder.mkdir()
    (folder / "a.txt").write_bytes(packed)
    first = entry("a.txt", TEXT.encode(), dead_url())
    declare(("text", [first]), ("text", [entry("a.txt", packed)]))
    assert data.load("play") == "second packing"


def test_the_next_form_is_tried_when_a_host_is_dead(site, folder, declare):
    site.pages["/b"] = b"other form"
    forms = [
        ("text", [entry("a.txt", TEXT.encode(), dead_url())]),
        ("text", [entry("b.txt", b"other form", site.url("/b"))]),
    ]
    declare(*forms)
    assert data.load("play") == "other form"


def test_progress_is_shown_except_while_a_chapter_is_recorded(
    site, folder, declare, monkeypatch, capfd
):
    site.pages["/a"] = TEXT.encode()
    declare(("text", [entry("a.txt", TEXT.encode(), site.url("/a"))]))
    monkeypatch.delenv("TOOLKIT_RESULTS", raising=False)
    data.load("play")
    assert "100%" in capfd.readouterr().err
    (folder / "a.txt").unlink()
    monkeypatch.setenv("TOOLKIT_RESULTS", str(folder))
    notes = logging.handlers.BufferingHandler(1000)
    logger = pooch.get_logger()
    logger.addHandler(notes)
    data.load("play")
    logger.removeHandler(notes)
    shown = capfd.readouterr()
    assert (shown.out, shown.err, notes.buffer) == ("", "", [])


def test_importing_loads_nothing_heavy():
    program = (
        "import sys, toolkit.core.data, toolkit.core.nets, toolkit.core.scale\n"
        "heavy = {'pandas', 'pooch', 'requests', 'sklearn', 'transformers', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"Did you mean 'cifar10'\?"):
        data.load("cifar")
    with pytest.raises(ValueError, match=r"name: unknown data set 'zzz'\. Choose one of cifar10"):
        data.hashes(["zzz"])


def test_options_are_refused_where_there_are_none(folder):
    with pytest.raises(TypeError, match="'sst2' takes no options, got test"):
        data.load("sst2", test=3)


def test_hashes_need_no_file_and_follow_the_manifest(folder, declare):
    declare(("text", [entry("a.txt", b"one")]))
    first = data.hashes(["play"])
    declare(("text", [entry("a.txt", b"two")]))
    assert data.hashes(["play"]) != first
    assert not folder.exists()
    assert set(data.hashes(["digits", "minilm"])) == {"digits", "minilm"}


def test_the_default_directory_is_a_cache_folder_of_this_project(monkeypatch, tmp_path):
    monkeypatch.delenv("TOOLKIT_DATA", raising=False)
    assert data.directory().name == "parameters-in-motion"
    monkeypatch.setenv("TOOLKIT_DATA", str(tmp_path))
    assert data.directory() == tmp_path


def test_the_manifest_promises_something_for_every_file():
    entries = manifest.read_manifest(manifest.manifest_path())
    assert set(entries) | {"digits"} == set(data.available())
    for name, item in entries.items():
        assert item.forms, name
        assert item.homepage.startswith("https://")
        assert all((item.title, item.licence, item.citation))
        assert data.describe(name)["licence"] == item.licence
        assert any(all(file.urls for file in form.files) for form in item.forms), name
        for form in item.forms:
            assert form.reader in download.READERS
            assert form.note
            for file in form.files:
                assert bool(file.sha256) == bool(file.bytes) != bool(file.content), file.path
                assert len(bytes.fromhex(file.sha256 or file.content)) == 32
                assert all(url.startswith("https://") for url in file.urls)
                assert not Path(file.path).is_absolute()
                assert ".." not in Path(file.path).parts


def _here(name):
    entry = manifest.read_manifest(manifest.manifest_path())[name]
    folder = data.directory()
    return any(all((folder / f.path).is_file() for f in form.files) for form in entry.forms)


SIZES = {
    "mnist": lambda d: (d.x_train.shape, d.y_test.shape) == ((60000, 28, 28), (10000,)),
    "cifar10": lambda d: d.x_train.shape[1:] == (32, 32, 3) and len(d.classes) == 10,
    "fsdd": lambda d: len(d.recordings()) == 3000 and d.sample_rate == 8000,
    "sst2": lambda d: [len(d[split]) for split in ("train", "dev", "test")] == [6920, 872, 1821],
    "cola": lambda d: [len(table) for table in d.values()] == [8551, 527, 516],
    "tinyshakespeare": lambda d: len(d) == 1115394 and d.startswith("First Citizen"),
    "cranfield": lambda d: [len(t) for t in d[:3]] == [1400, 225, 1837],
}


@pytest.mark.parametrize("name", sorted(SIZES))
def test_real_sets_have_their_known_sizes(name):
    if not _here(name):
        pytest.skip(f"{name} is not in the data directory {data.directory()}")
    assert SIZES[name](data.load(name))


def test_digits_are_split_without_overlap():
    digits = data.load("digits", test=300, seed=1)
    assert digits.x_train.shape == (1497, 8, 8)
    assert digits.x_test.shape == (300, 8, 8)
    assert digits.x_train.dtype == np.float32
    assert 0 <= digits.x_train.min() < digits.x_train.max() == 1
    again = data.load("digits", test=300, seed=1)
    assert np.array_equal(digits.x_test, again.x_test)
    assert not np.array_equal(digits.x_test, data.load("digits", test=300, seed=2).x_test)
    both = np.concatenate([digits.y_train, digits.y_test])
    assert np.bincount(both).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    with pytest.raises(ValueError, match="test: must lie between"):
        data.load("digits", test=1797)


def linears(network):
    return [module for module in network if isinstance(module, nn.Linear)]


def test_the_planted_teacher_differs_by_exactly_the_planted_ranks():
    ranks = (0, 6, 0, 2, 0)
    base, teacher = nets.planted_teacher(ranks, generator=torch.Generator().manual_seed(3))
    assert [layer.weight.shape for layer in linears(base)] == [
        (48, 32), (48, 48), (48, 48), (48, 48), (8, 48)
    ]  # fmt: skip
    for rank, mine, planted in zip(ranks, linears(base), linears(teacher), strict=True):
        values = torch.linalg.svdvals((planted.weight - mine.weight).double())
        torch.testing.assert_close(
            values[:rank], torch.full((rank,), 2.0).double(), rtol=1e-5, atol=0
        )
        assert (values[rank:] < 1e-5).all()
        assert torch.equal(planted.bias, mine.bias)
    assert linears(base)[0].weight is not linears(teacher)[0].weight


def test_the_planted_teacher_follows_its_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pairs = [nets.planted_teacher(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(5, 32)
    first, same, other = (teacher(x) for _, teacher in pairs)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ((1, 2), "need one per layer, 5 for 6 widths, got 2"),
        ((0, 0, 0, 0, 9), "layer 4 is 8 x 48 and cannot hold rank 9; choose 0 to 8"),
        ((-1, 0, 0, 0, 0), "layer 0"),
    ],
)
def test_impossible_planted_ranks_are_refused(ranks, words):
    with pytest.raises(ValueError, match=words):
        nets.planted_teacher(ranks)


def test_digits_are_those_of_scikit_learn(monkeypatch):
    from sklearn.datasets import load_digits

    here = data.digits()
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(1797)
    np.testing.assert_array_equal(np.concatenate([here.y_train, here.y_test]), labels[order])
    np.testing.assert_array_equal(
        np.concatenate([here.x_train, here.x_test]).reshape(-1, 64), pixels[order] / 16
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # laid out otherwise
    np.testing.assert_array_equal(data.digits().x_train, here.x_train)
