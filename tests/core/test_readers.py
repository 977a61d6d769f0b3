"""Readers: the forms of one data set, made small here, give the same set."""

import gzip
import io
import struct
import tarfile
import wave
import zipfile

import numpy as np
import pytest

from toolkit.core.data import download, readers
from toolkit.core.data.datasets import content_digest
from toolkit.core.data.manifest import File


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def mnist_like():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = random.integers(0, 10, 30, dtype=np.uint8)
    return images[:20], labels[:20], images[20:], labels[20:]


def test_all_copies_of_mnist_give_the_same_arrays(tmp_path, mnist_like):
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "a.npz", **dict(zip(names, mnist_like, strict=True)))
    by_class = np.argsort(mnist_like[1], kind="stable")
    moved = (mnist_like[0][by_class], mnist_like[1][by_class], *mnist_like[2:])
    np.savez_compressed(tmp_path / "b.npz", **dict(zip(names, moved, strict=True)))
    paths = []
    for name, array in zip(names, mnist_like, strict=True):
        header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        paths.append(tmp_path / f"{name}.gz")
        paths[-1].write_bytes(gzip.compress(header + array.tobytes()))
    first = readers.mnist_npz([tmp_path / "a.npz"])
    copies = (readers.mnist_npz([tmp_path / "b.npz"]), readers.mnist_idx(paths))
    for copy in copies:
        assert all(np.array_equal(a, b) for a, b in zip(first[:4], copy[:4], strict=True))
    pairs = {(x.tobytes(), int(y)) for x, y in zip(first.x_train, first.y_train, strict=True)}
    assert pairs == {
        (x.tobytes(), int(y)) for x, y in zip(mnist_like[0], mnist_like[1], strict=True)
    }
    assert first.y_train.dtype == np.int64


def test_cifar_rows_become_images_with_colour_last(tmp_path):
    random = np.random.default_rng(1)
    rows = random.integers(0, 10, (12, 3073), dtype=np.uint8)
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        add(archive, "cifar-10-batches-bin/test_batch.bin", rows[10:].tobytes())
        for number in (5, 4, 3, 2, 1):
            part = rows[2 * number - 2 : 2 * number].tobytes()
            add(archive, f"cifar-10-batches-bin/data_batch_{number}.bin", part)
        add(archive, "cifar-10-batches-bin/readme.html", b"read me")
    cifar = readers.cifar_binary([tmp_path / "c.tar.gz"])
    assert cifar.x_train.shape == (10, 32, 32, 3)
    assert cifar.x_test.shape == (2, 32, 32, 3)
    assert cifar.y_train.tolist() == rows[:10, 0].tolist()
    # The file holds 1,024 reds, then greens, then blues, each row by row.
    assert cifar.x_train[3, 5, 7].tolist() == [
        rows[3, 1 + colour * 1024 + 5 * 32 + 7] for colour in range(3)
    ]
    np.savez(
        tmp_path / "c.npz",
        **{name: getattr(cifar, name) for name in ("x_train", "y_train", "x_test", "y_test")},
        classes=np.array(cifar.classes),
    )
    assert content_digest(readers.cifar_npz([tmp_path / "c.npz"])) == content_digest(cifar)


def speech_tar(path, recordings, level=9):
    with tarfile.open(path, "w:gz", compresslevel=level) as archive:
        for name, samples in recordings.items():
            sound = io.BytesIO()
            with wave.open(sound, "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes(samples.astype("<i2").tobytes())
            add(archive, f"digits-1.0/recordings/{name}.wav", sound.getvalue())
        add(archive, "digits-1.0/README.md", b"words")


RECORDINGS = {
    "7_theo_12": np.arange(5),
    "0_jackson_3": np.array([-3, 2]),
    "7_theo_2": np.array([9, 9, 9]),
}


def test_speech_is_joined_in_the_order_of_names(tmp_path):
    speech_tar(tmp_path / "s.tar.gz", RECORDINGS)
    speech = readers.fsdd_tar([tmp_path / "s.tar.gz"])
    assert speech.digit.tolist() == [0, 7, 7]
    assert speech.speaker.tolist() == ["jackson", "theo", "theo"]
    assert speech.index.tolist() == [3, 12, 2]
    assert [part.tolist() for part in speech.recordings()] == [
        [-3, 2], [0, 1, 2, 3, 4], [9, 9, 9]
    ]  # fmt: skip
    fields = speech._asdict()
    fields.pop("note")
    np.savez(tmp_path / "s.npz", **fields)
    assert content_digest(readers.fsdd_npz([tmp_path / "s.npz"])) == content_digest(speech)


def test_an_archive_is_known_by_its_content_and_not_by_its_packing(tmp_path):
    first, second, other = (tmp_path / f"{name}.tar.gz" for name in "abc")
    speech_tar(first, RECORDINGS, level=9)
    speech_tar(second, dict(reversed(RECORDINGS.items())), level=1)
    speech_tar(other, {**RECORDINGS, "0_jackson_3": np.array([-3, 3])})
    file = File("a.tar.gz", most=1000, content=content_digest(readers.fsdd_tar([first])))
    assert first.read_bytes() != second.read_bytes()
    assert download.fault(first, file, "fsdd_tar") == ""
    assert download.fault(second, file, "fsdd_tar") == ""
    assert "content sha256 is" in download.fault(other, file, "fsdd_tar")
    first.write_bytes(first.read_bytes()[:100])
    assert "not a readable archive" in download.fault(first, file, "fsdd_tar")


def test_sentences_are_taken_literally(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("null\t0\nit's \"half\t1\nNA\t1\ncafé\t0\n", encoding="utf-8")
    tables = readers.sst2_tsv([path, path, path])
    assert tables["dev"].sentence.tolist() == ["null", "it's \"half", "NA", "café"]
    assert tables["dev"].label.tolist() == [0, 1, 1, 0]


def test_cola_is_the_same_from_files_and_from_the_archive(tmp_path):
    lines = {
        "in_domain_train": 'gj04\t1\t\tThe "sailors rode.\ngj04\t0\t*\tRode sailors the.\n',
        "in_domain_dev": "bc01\t1\t\tOne.\n",
        "out_of_domain_dev": "clc95\t0\t??\tTwo.",
    }
    for name, text in lines.items():
        (tmp_path / f"{name}.tsv").write_text(text, encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "cola.zip", "w") as archive:
        for name, text in lines.items():
            archive.writestr(f"cola_public/raw/{name}.tsv", text)
    tables = readers.cola_tsv([tmp_path / f"{name}.tsv" for name in lines])
    assert list(tables) == ["train", "dev", "dev_out_of_domain"]
    assert tables["train"].values.tolist() == [
        ['The "sailors rode.', 1, "gj04"],
        ["Rode sailors the.", 0, "gj04"],
    ]
    packed = readers.cola_zip([tmp_path / "cola.zip"])
    assert all(table.equals(packed[split]) for split, table in tables.items())


def test_cranfield_queries_are_numbered_as_the_judgements_count_them(tmp_path):
    documents, queries, judgements = (tmp_path / name for name in ("d", "q", "j"))
    documents.write_text(
        "<doc><docno>1</docno><title>a\nwing</title><author>b</author><bib>c</bib>"
        "<text>lift &lt; drag</text></doc>\n<doc><docno>2</docno><title/></doc>"
    )
    queries.write_text(
        "<?xml version='1.0'?>\n<xml><top><num> 1</num><title>\nwhy\n</title></top>"
        "<top><num> 4</num><title>how</title></top></xml>"
    )
    judgements.write_text("1 0 2 3\n2 0  1 1\n")
    cranfield = readers.cranfield([documents, queries, judgements])
    assert cranfield.documents.values.tolist() == [
        [1, "a\nwing", "b", "c", "lift < drag"],
        [2, "", "", "", ""],
    ]
    assert cranfield.queries.values.tolist() == [[1, "why"], [2, "how"]]
    assert cranfield.judgements.to_dict("list") == {
        "query": [1, 2], "document": [2, 1], "grade": [3, 1]
    }  # fmt: skip
