"""Moments in both formats: they come back, and what is damaged, old or of another model does not."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kvjax.calibrate import orbax_file
from kvjax.calibrate.artefact import CHECKPOINT, FILE, Provenance, load_moments, save_moments
from kvjax.calibrate.moments import Moments
from kvjax.cli.main import main
from kvjax.core.errors import InputError
from kvjax.models.config import layer_runs
from kvjax.models.decoder import Params, regroup
from kvjax.models.fingerprint import fingerprint
from kvjax.models.load import Model, load

TINY = Path(__file__).parents[1] / "models" / "tiny"
each_format = pytest.mark.parametrize("format", ["safetensors", "orbax"])
NAMES = {"safetensors": FILE, "orbax": CHECKPOINT}


@functools.cache
def model(arch: str = "llama", dtype: str = "float32") -> Model:
    return load(TINY / arch, dtype=dtype)


@functools.cache
def moments() -> Moments:
    """Of the model's sizes; any numbers."""
    config, rng = model().config, np.random.default_rng(9300)
    layers, h, d = config.layers, config.kv_heads, config.head_dim
    made: dict = {"tokens": 100, "frequencies": rng.normal(size=(layers, d // 2))}
    made |= {name: rng.normal(size=(layers, h, 3, 2)) for name in ("key_scales", "value_scales")}
    made |= {"bucket_edges": np.array([4.0, 9, 15]), "key_bucket_var": np.ones((layers, h, 2))}
    made["key_bucket_mean"] = rng.normal(size=(layers, h, 2, d))
    for field in dataclasses.fields(Moments):
        vector = field.name.endswith(("mean", "pre")) and "cov" not in field.name
        shape = (layers, h, d) if vector else (layers, h, d, d)
        made.setdefault(field.name, rng.normal(size=shape))
    return Moments(**made)


def about() -> Provenance:
    weights = fingerprint(model().params)
    return Provenance(model().config.name, "a text", "0", moments().tokens, 48, weights)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


@each_format
def test_moments_come_back(format, tmp_path):
    path = save_moments(moments(), tmp_path, about(), format)
    assert path == tmp_path / NAMES[format]
    for place in (tmp_path, path):
        back, provenance = load_moments(place, model().config, model().params)
        assert provenance == about()
        for field in dataclasses.fields(Moments):
            mine, found = getattr(moments(), field.name), getattr(back, field.name)
            np.testing.assert_array_equal(found, np.asarray(mine, np.float32))
    save_moments(moments(), tmp_path, about(), format)  # over the older one
    assert load_moments(tmp_path)[1] == about()
    assert [p.name for p in tmp_path.iterdir()] == [NAMES[format]]


@each_format
def test_what_was_not_measured_stays_unknown(format, tmp_path):
    """Calibrations from before there were scales and buckets; sensitivities are optional too."""
    later = [f.name for f in dataclasses.fields(Moments) if f.default is None]
    assert {"key_scales", "value_scales", "bucket_edges", "key_bucket_mean"} < set(later)
    old = dataclasses.replace(moments(), **dict.fromkeys(later))
    save_moments(old, tmp_path, about(), format)
    back = load_moments(tmp_path, model().config, model().params)[0]
    assert all(getattr(back, name) is None for name in later)
    np.testing.assert_array_equal(back.key_cov, np.float32(moments().key_cov))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"key_scales": np.ones((3, 2))}, "key_scales"),
        ({"key_bucket_mean": np.ones((1, 2, 3, 4))}, "key_bucket_mean"),
        ({"key_bucket_var": None}, "without key_bucket_var"),
        ({"bucket_edges": np.array([4.0, 15, 15])}, "do not rise"),
        ({"value_scales": np.full((2, 2, 3, 2), np.inf)}, "value_scales"),
    ],
)
def test_scales_and_buckets_of_other_shapes(wrong, told, tmp_path):
    save_moments(dataclasses.replace(moments(), **wrong), tmp_path, about())
    with pytest.raises(InputError, match=told) as error:
        load_moments(tmp_path)
    one_line(error)


@each_format
def test_other_models_and_weights_are_refused(format, tmp_path):
    save_moments(moments(), tmp_path, about(), format)
    with pytest.raises(InputError, match="kvjax calibrate --model") as error:
        load_moments(tmp_path, model("gemma3").config)
    one_line(error)
    tuned = dataclasses.replace(model().params, embed=model().params.embed * 1.05)
    with pytest.raises(InputError, match="same checkpoint") as error:
        load_moments(tmp_path, model().config, tuned)
    assert about().weights in one_line(error)
    assert fingerprint(tuned) in one_line(error)


def damaged(path: Path) -> list[Path]:
    """Every file that holds numbers or facts."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [p for p in files if p.stat().st_size and "commit_success" not in p.name]


@each_format
def test_damage_is_told_in_one_line(format, tmp_path):
    path = save_moments(moments(), tmp_path, about(), format)
    largest = max(damaged(path), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(InputError, match="calibrate again") as error:
        load_moments(tmp_path)
    one_line(error)


def test_any_damaged_file_of_a_checkpoint(tmp_path, capfd):
    """Told, or without consequence; and nothing from threads of orbax on stderr."""
    path, refused = save_moments(moments(), tmp_path, about(), "orbax"), {}
    for file in damaged(path):
        whole = file.read_bytes()
        file.write_bytes(b"{}")
        try:
            back = load_moments(tmp_path)[0]
            np.testing.assert_array_equal(back.key_cov, np.float32(moments().key_cov))
        except InputError as error:
            refused[file.relative_to(path).parts[0]] = str(error)
        file.write_bytes(whole)
    assert {"moments", "about"} <= set(refused)
    assert all("Error, " in text and "\n" not in text for text in refused.values())  # by name
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("gone", ["moments", "about", "moments/manifest.ocdbt", "about/metadata"])
def test_parts_of_a_checkpoint_that_are_missing(gone, tmp_path):
    path = save_moments(moments(), tmp_path, about(), "orbax") / gone
    for file in sorted(path.rglob("*"), reverse=True) if path.is_dir() else []:
        file.rmdir() if file.is_dir() else file.unlink()
    path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match="calibrate again") as error:
        load_moments(tmp_path)
    one_line(error)


def rewrite(path: Path, change) -> None:
    """The same tensors, with facts that `change` has had its hands on."""
    if path.is_dir():
        tensors, facts = orbax_file.read(path)
        change(facts)
        orbax_file.write(path, tensors, facts)
        return
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["kvjax"])
    change(facts)
    save_file(load_file(path), path, {"kvjax": json.dumps(facts)})


@each_format
def test_versions(format, tmp_path):
    """Version 1 had no fingerprint and fits any weights; later ones must have one."""
    path = save_moments(moments(), tmp_path, about(), format)

    def first(facts):
        facts["version"] = "1"
        del facts["provenance"]["weights"]

    rewrite(path, first)
    tuned = dataclasses.replace(model().params, embed=model().params.embed * 1.05)
    assert load_moments(tmp_path, model().config, tuned)[1].weights is None
    rewrite(path, lambda facts: facts.update(version="2"))
    with pytest.raises(InputError, match="no fingerprint") as error:
        load_moments(tmp_path)
    one_line(error)
    rewrite(path, lambda facts: facts.update(version="3"))
    with pytest.raises(InputError, match="version 3"):
        load_moments(tmp_path)


def test_mistakes_in_saving_and_naming(tmp_path):
    with pytest.raises(InputError, match="fingerprint"):
        save_moments(moments(), tmp_path, dataclasses.replace(about(), weights=None))
    with pytest.raises(InputError, match="format"):
        save_moments(moments(), tmp_path, about(), "pickle")
    (tmp_path / "file").write_text("")
    for format in NAMES:
        with pytest.raises(InputError, match="a folder to write"):
            save_moments(moments(), tmp_path / "file", about(), format)
        save_moments(moments(), tmp_path / "both", about(), format)
    with pytest.raises(InputError, match="both"):
        load_moments(tmp_path / "both")
    assert load_moments(tmp_path / "both" / CHECKPOINT)[1] == about()
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere"):
        with pytest.raises(InputError, match="no such file"):
            load_moments(tmp_path / place)


def test_a_fingerprint_is_of_the_numbers():
    """Not of the dtype they are loaded in, nor of how layers are grouped."""
    params, config = model().params, model().config
    print_ = fingerprint(params)
    assert len(print_) == 16
    assert print_ == fingerprint(jax.tree.map(jnp.array, params))
    assert print_ == fingerprint(model(dtype="bfloat16").params)
    single = regroup(params, layer_runs(config, range(config.layers)))
    assert len(single.runs) > len(params.runs)
    assert fingerprint(single) == print_


@pytest.mark.parametrize("arch", ["qwen2", "gemma3"])
def test_every_leaf_and_layer_counts(arch):
    """Norms, biases and the last layer too; leaves that trade places are seen."""
    params = model(arch).params
    leaves, tree = jax.tree.flatten(params)
    prints = {fingerprint(params)}
    for i, leaf in enumerate(leaves):
        single = any(leaf is top for top in (params.embed, params.final_norm, params.head))
        other = leaf + 0.25 if single else leaf.at[-1].add(0.25)
        changed = [*leaves[:i], other, *leaves[i + 1 :]]
        prints.add(fingerprint(jax.tree.unflatten(tree, changed)))
    last = params.runs[-1]
    swapped = dataclasses.replace(last, wk=last.wv, wv=last.wk)
    prints.add(fingerprint(Params(params.embed, (*params.runs[:-1], swapped), params.final_norm)))
    assert len(prints) == len(leaves) + 2


def test_the_command_line_checks_weights(tmp_path, capsys, monkeypatch):
    """`compare` and `generate` on a checkpoint of equal name and sizes, with other weights."""
    stale = dataclasses.replace(about(), weights="0" * 16)
    save_moments(moments(), tmp_path / "cal", stale, "orbax")
    text = tmp_path / "text.txt"
    text.write_text("A few words. " * 50)
    shared = ["--model", str(TINY / "llama"), "--calibration", str(tmp_path / "cal")]
    command = ["compare", "--methods", "oscar", "--text", str(text), "--out", str(tmp_path / "out")]
    assert main([*command, *shared]) == 2
    assert "same checkpoint" in capsys.readouterr().err
    talking = dataclasses.replace(model(), tokenizer=object())  # that is looked at later
    monkeypatch.setattr("kvjax.models.load.load", lambda name: talking)
    assert main(["generate", "Words", "--method", "oscar", *shared]) == 2
    assert "same checkpoint" in capsys.readouterr().err
