import dataclasses

import pytest

from kvjax.core.errors import InputError
from kvjax.models.config import known_configs, layer_runs
from kvjax.models.hf_config import from_hf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    ("name", "kv_bytes", "weights"),
    [
        ("llama-3.1-8b", 131_072, 8.03e9),
        ("llama-3.1-70b", 327_680, 70.55e9),
        ("qwen2.5-7b", 57_344, 7.62e9),
        ("qwen3-8b", 147_456, 8.19e9),
        ("gemma-3-270m", 18_432, 0.268e9),
        ("gemma-3-1b", 26_624, 1.0e9),
        ("gemma-3-4b", 139_264, 3.88e9),
        ("smollm2-135m", 23_040, 0.1345e9),
        ("smollm2-1.7b", 196_608, 1.711e9),
    ],
)
def test_known_models_have_their_published_sizes(name, kv_bytes, weights):
    config = known_configs()[name]
    assert config.kv_bytes_per_token() == kv_bytes
    assert config.weight_count() == pytest.approx(weights, rel=3e-3)
    hash(config)


def test_runs_are_maximal_and_extra_keys_split_them():
    gemma = known_configs()["gemma-3-270m"]
    runs = layer_runs(gemma)
    assert [(r.start, r.stop) for r in runs] == [
        (0, 5),
        (5, 6),
        (6, 11),
        (11, 12),
        (12, 17),
        (17, 18),
    ]
    assert [r.window for r in runs] == [512, None] * 3
    assert [r.rope_theta for r in runs] == [1e4, 1e6] * 3
    smollm = known_configs()["smollm2-135m"]
    assert [r.length for r in layer_runs(smollm)] == [30]
    keys = ["dense"] * 2 + ["packed"] * 27 + ["dense"]
    assert [r.length for r in layer_runs(smollm, keys)] == [2, 27, 1]
    with pytest.raises(InputError, match="29 keys; expected one for each of the 30 layers"):
        layer_runs(smollm, keys[1:])


def test_local_layers_rotate_unscaled():
    runs = layer_runs(known_configs()["gemma-3-4b"])
    assert runs[0].rope_scaling is None
    assert runs[1].rope_scaling.factor == 8.0


def test_hf_defaults():
    config = from_hf(LLAMA, "x")
    assert (config.head_dim, config.q_per_kv, config.windows) == (16, 2, (None,) * 4)
    assert not config.tie_embeddings
    assert config.rope_theta == 1e4


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "linear", "factor": 2.0},
    ],
)
def test_old_and_new_spellings_of_rope_agree(scaling):
    old = from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling}, "x")
    parameters = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    assert old == from_hf({**LLAMA, "rope_parameters": parameters}, "x")


def test_old_and_new_spellings_of_windows_agree():
    gemma = {**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 8}
    types = ["sliding_attention"] * 5 + ["full_attention"]
    assert from_hf({**gemma, "layer_types": types}) == from_hf(
        {**gemma, "sliding_window_pattern": 6}
    )
    nested = from_hf({"model_type": "gemma3", "text_config": gemma}, "x")
    assert dataclasses.replace(nested, name="") == dataclasses.replace(from_hf(gemma), name="")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type .*'mamba'; expected one of llama"),
        ({"hidden_size": None}, "hidden_size .* got nothing"),
        ({"hidden_act": "relu"}, "hidden_act .*'relu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type .*'yarn'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping .* 30.0"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 3}, "4 query heads over 3 kv heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 2.5}, "2.5; expected a positive integer"),
        ({"rope_parameters": 3}, "rope_parameters .* got 3; expected a JSON object"),
        ({"head_dim": 15}, "head_dim .* got 15; expected an even number"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(InputError, match=message) as caught:
        from_hf({**LLAMA, **change}, "x")
    assert "\n" not in str(caught.value)
