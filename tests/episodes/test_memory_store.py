"""A memory on disk: bit for bit, whole after a kill at any step, and refused where it does not fit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models as backends

import kvjax
from kvjax.core.errors import InputError
from kvjax.episodes import Conversation, Question, Utterance, store
from kvjax.episodes.index import create
from kvjax.episodes.memory import Memory, Reader, Settings
from kvjax.episodes.store import alone, load, peek, save
from kvjax.generate.evict import packed_shapes
from kvjax.models.load import load as load_model
from kvjax.models.tokenizer import Tokenizer
from kvjax.policies import Eviction, KeyNorm

TINY = Path(__file__).parents[1] / "models" / "tiny" / "llama"
LAYOUT = kvjax.Layout(sink=4, recent=16, page=16)
EPISODES = 2


def counted(texts) -> np.ndarray:
    return np.array([[len(t), t.count("e") + 1, t.count("a") + 1] for t in texts], np.float32)


@pytest.fixture(scope="module")
def reader():
    model = load_model(TINY)
    tokenizer = Tokenizer(Backend(backends.WordLevel({"[UNK]": 0}, unk_token="[UNK]")))
    return reader_of(dataclasses.replace(model, tokenizer=tokenizer))


def reader_of(model, method="turboquant-3", budget=64, compete="head", layout=LAYOUT) -> Reader:
    codec = kvjax.methods.get(method, head_dim=16, layout=layout)
    eviction = Eviction(KeyNorm(), budget=budget, block=32, compete=compete)
    return Reader.create(model, codec, counted, Settings(eviction))


def filled(reader: Reader, seed: int, episodes: int = EPISODES) -> Memory:
    """A memory of random bits: what is stored does not depend on what it means."""
    rng = np.random.default_rng(seed)
    shapes = packed_shapes(reader.plan, reader.settings.eviction, batch=episodes, tail=3)

    def bits(a):
        size = int(np.prod(a.shape)) * a.dtype.itemsize
        return jnp.asarray(np.frombuffer(rng.bytes(size), a.dtype).reshape(a.shape))

    caches = jax.tree.map(bits, shapes)
    said = tuple(Utterance("Ana", f"word {i} é\n", f"D1:{i}", "1 May", "") for i in range(11))
    asked = (Question("When?", "May", ("D1:1", "D1:2"), "2", "3 May"),)
    vectors = rng.normal(size=(3, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = create(vectors, episodes, rng=jax.random.key(seed))
    pending = ((1, 2, 3), ()) if episodes == 2 else ((),) * episodes
    talk = Conversation("talk", said, asked, (0, 5))
    return Memory(talk, index, caches, pending, 77, (0, 4, 8))


@pytest.fixture(scope="module")
def memories(reader):
    return filled(reader, 0), filled(reader, 1)


def equal(a: Memory, b: Memory) -> bool:
    arrays = lambda m: jax.tree.leaves((m.caches, m.index))
    alike = all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(arrays(a), arrays(b), strict=True)
    )
    plain = lambda m: (m.conversation, m.pending, m.read, m.firsts)
    return (
        alike
        and plain(a) == plain(b)
        and jax.tree.structure(a.caches) == jax.tree.structure(b.caches)
    )


def test_bit_for_bit(reader, memories, tmp_path):
    folder = tmp_path / "new" / "memory"
    assert load(reader, folder) is None
    for memory in (*memories, memories[0].park()):
        counts = save(reader, memory, folder)
        assert equal(load(reader, folder), memory)
        assert [p for p in folder.iterdir() if p.is_dir()] == [counts]


def test_without_an_index_and_with_shared_pools(reader, tmp_path):
    nothing = dataclasses.replace(filled(reader, 2), index=None, firsts=())
    save(reader, nothing, tmp_path / "a")
    assert load(reader, tmp_path / "a").index is None
    pooled = reader_of(reader.model, compete="layer")
    memory = filled(pooled, 3)
    (cache,) = memory.caches  # an episode that was opened later shares the pool of the others
    three = filled(pooled, 3, episodes=3)
    shared = dataclasses.replace(
        three.caches[0].kept, **{n: getattr(cache.kept, n) for n in ("key", "value", "positions")}
    )
    grown = (dataclasses.replace(three.caches[0], kept=shared),)
    save(pooled, dataclasses.replace(three, caches=grown), tmp_path / "b")
    assert equal(load(pooled, tmp_path / "b"), dataclasses.replace(three, caches=grown))


def test_peek_needs_no_model(reader, memories, tmp_path):
    assert peek(tmp_path) is None
    save(reader, memories[0], tmp_path, settings={"model": "tiny", "layers": [1, 2]})
    found, facts = peek(tmp_path)
    assert found.caches == ()
    assert found.conversation == memories[0].conversation
    assert found.about(0) == memories[0].about(0) != ""
    assert facts["settings"] == {"model": "tiny", "layers": [1, 2]}
    assert facts["bytes"] == memories[0].bytes()
    assert facts["bytes_per_token"] == 2 * 2 * 3 * 2 * 16  # K and V, bf16, layers, heads, head_dim


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


STEPS = ("os.mkdir", "save_file", "os.fsync", "json.dumps", "os.replace", "shutil.rmtree")


def steps_of(monkeypatch, action) -> int:
    """Counts, or cuts short, the calls by which `save` changes the disk."""
    done = 0

    def watched(real):
        def call(*args, **kwargs):
            nonlocal done
            action(done)
            done += 1
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        owner, attribute = store, name
        if "." in name:
            module, attribute = name.split(".")
            owner = getattr(store, module)
        monkeypatch.setattr(owner, attribute, watched(getattr(owner, attribute)))
    return done


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_step(reader, memories, tmp_path, after):
    """Before each step, and in the middle of the file that is being written."""
    old, new = memories
    save(reader, old, tmp_path)
    outcomes = []
    for at in range(100):
        with pytest.MonkeyPatch.context() as patch:

            def stop(number, at=at):
                if number == at:
                    if after:  # half of what was being written is there
                        for file in tmp_path.rglob("arrays.safetensors"):
                            if file.parent.name != (tmp_path / "current").read_text().split()[0]:
                                os.truncate(file, file.stat().st_size // 2)
                    raise Killed

            steps_of(patch, stop)
            try:
                save(reader, new, tmp_path)
            except Killed:
                done = False
            else:
                done = True
        found = load(reader, tmp_path)
        is_new = equal(found, new)
        assert is_new or equal(found, old)
        outcomes.append(is_new)
        if done:
            break
        save(reader, old, tmp_path)  # goes on from what is there, and tidies up
        assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1
    assert len(outcomes) > 9
    assert outcomes == sorted(outcomes)  # old before the one step that counts, new after it
    assert {False, True} == set(outcomes)


def test_a_full_disk_is_told(reader, memories, tmp_path, monkeypatch):
    save(reader, memories[0], tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device.*as it was"):
        save(reader, memories[1], tmp_path)
    monkeypatch.undo()
    assert equal(load(reader, tmp_path), memories[0])
    with pytest.raises(InputError, match="a folder that does not take it"):
        save(reader, memories[0], tmp_path / "current")


def test_a_real_kill(reader, memories, tmp_path):
    """SIGKILL to a process that saves on and on: what is there is whole, whenever it comes."""
    old, new = memories
    save(reader, old, tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", SAVES, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert equal(load(reader, tmp_path), old)
    save(reader, new, tmp_path)
    assert equal(load(reader, tmp_path), new)


# Writes the memory again and again, step by step as `save` does, without a model: files and
# checksums are those that are there.
SAVES = """
import sys
from pathlib import Path
from kvjax.episodes import store
root = Path(sys.argv[1])
at, facts = store._read_facts(root)
arrays, text = store.load_file(at / store.ARRAYS), (at / store.FACTS).read_text()
class Facts(dict):
    def __or__(self, other):
        return facts
store._facts = lambda reader: Facts()
store._leaves = lambda caches, index: arrays
class Nothing:
    __getattr__ = __call__ = lambda self, *args: self
    __int__ = lambda self: 0
    __iter__ = lambda self: iter(())
store.dataclasses.asdict = lambda value: {}
print("ready", flush=True)
while True:
    store.save(Nothing(), Nothing(), root)
"""


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["arrays.safetensors", "memory.json", "current"])
def test_damage_is_found(reader, memories, tmp_path, name):
    """Cut short, one bit other, or gone: the file is named."""
    for damage in (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: flip(path, 0.02),
        lambda path: flip(path, 0.7),
        lambda path: path.write_bytes(b""),
    ):
        at = save(reader, memories[0], tmp_path)
        path = (tmp_path if name == "current" else at) / name
        damage(path)
        with pytest.raises(InputError, match="cannot be read") as error:
            load(reader, tmp_path)
        if name != "current":  # a wrong checksum there is that of the file
            assert name in str(error.value)
        (tmp_path / "current").unlink()
    at = save(reader, memories[0], tmp_path)
    (at / "arrays.safetensors").unlink()
    with pytest.raises(InputError, match=r"arrays\.safetensors"):
        load(reader, tmp_path)
    with pytest.raises(InputError, match=r"arrays\.safetensors"):
        peek(tmp_path)


def test_another_memory_is_refused(reader, memories, tmp_path, monkeypatch):
    save(reader, memories[0], tmp_path)
    model = reader.model
    other_layout = kvjax.Layout(sink=4, recent=32, page=16)
    params = jax.tree.map(lambda a: a * 2, model.params)
    named = dataclasses.replace(model.config, name="other")
    for other, word in [
        (reader_of(model, method="turboquant-2"), "method turboquant-3"),
        (reader_of(model, budget=80), r"budget \[64\]"),
        (reader_of(model, layout=other_layout), "layout"),
        (reader_of(model, compete="layer"), "eviction"),
        (reader_of(dataclasses.replace(model, params=params)), "weights"),
        (reader_of(dataclasses.replace(model, config=named)), "model llama"),
        (dataclasses.replace(reader, embedder=lambda t: counted(t)[:, ::-1]), "embedder"),
        (dataclasses.replace(reader, embedder=lambda t: counted(t)[:, :2]), "embedder"),
    ]:
        with pytest.raises(InputError, match=f"got .*{word}.*name another folder"):
            load(other, tmp_path)
    monkeypatch.setattr(store, "VERSION", "2")
    with pytest.raises(InputError, match="got version 1; expected 2"):
        load(reader, tmp_path)
    with pytest.raises(InputError, match="got version 1; expected 2"):
        peek(tmp_path)


def test_files_of_others_are_left_alone(reader, memories, tmp_path):
    """A folder of photos by year is no old memory."""
    (tmp_path / "2024").mkdir()
    (tmp_path / "000001").mkdir()
    (tmp_path / "000001" / "photo.jpg").write_text("x")
    (tmp_path / "notes.txt").write_text("mine")
    for memory in memories:
        save(reader, memory, tmp_path)
    assert equal(load(reader, tmp_path), memories[1])
    assert (tmp_path / "2024").is_dir()
    assert (tmp_path / "000001" / "photo.jpg").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_one_writer_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    busy = pytest.raises(InputError, match="another conversation")
    with alone(tmp_path), busy, alone(tmp_path):
        pass
    with alone(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can be written"), alone(tmp_path / "file"):
        pass


def test_facts_are_plain(reader, memories, tmp_path):
    """What a person reads in the file is what was said."""
    at = save(reader, memories[0], tmp_path)
    facts = json.loads((at / "memory.json").read_text(encoding="utf-8"))
    assert facts["conversation"]["utterances"][0]["text"] == "word 0 é\n"
    assert facts["method"] == "turboquant-3"
