"""Reading a model's configuration: what is understood, and one clear error for what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cache.errors import ConfigError, LoraCacheError
from lora_cache.plan import SlotSettings, read_model, slot_cost
from lora_cache.plan.architectures import KNOWN
from lora_cache.plan.slots import check_target_modules, smallest_rank
from tests.plan.configs import ARCHITECTURES, PUBLISHED, TINY, tiny, write_config


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    return write_config(tmp_path / "8b", PUBLISHED["Llama-3.1-8B"][1])


def test_a_directory_or_the_file_itself(llama_8b: Path) -> None:
    for path in (llama_8b, str(llama_8b), llama_8b / "config.json"):
        model = read_model(path)
        assert (model.architecture, model.dtype, model.like) == (
            "LlamaForCausalLM",
            "bfloat16",
            None,
        )
        assert model.max_len == 512
        assert not model.is_estimate


def test_a_known_slot(llama_8b: Path) -> None:
    """As measured on an H100: 84 MB of linear layers at rank 16, 0.53 MB a rank for the rest."""
    model = read_model(llama_8b)
    cost = slot_cost(model, SlotSettings(16))
    linear = cost.bytes_per_slot - cost.of(("embed_tokens", "lm_head"))
    assert linear == 83_886_080 == model.adapter_numbers(16) * 2
    assert cost.of(("embed_tokens", "lm_head")) == 16 * 529_408
    assert slot_cost(model, SlotSettings(64)).bytes_per_slot == 4 * cost.bytes_per_slot
    assert cost.nbytes(3) == 3 * cost.bytes_per_slot + cost.fixed_bytes


def test_kv_heads_are_divided_and_then_copied(llama_8b: Path) -> None:
    model = read_model(llama_8b)
    tokens = [model.kv_bytes_per_token(tp) for tp in (1, 2, 8, 16, 32)]
    assert tokens == [131072, 65536, 16384, 16384, 16384]
    assert model.kv_bytes_per_token(1, "fp8") == 65536
    with pytest.raises(ConfigError, match="KV cache dtype 'int3'"):
        model.kv_bytes_per_token(1, "int3")


def test_more_gpus_than_heads_hold_the_same_ones(llama_8b: Path) -> None:
    model = read_model(llama_8b)
    b = [model.layers[0].tensors(16, tp, sharded=False).b for tp in (8, 16)]
    assert b == [((512, 16), (128, 16), (128, 16)), ((256, 16), (128, 16), (128, 16))]


@pytest.mark.parametrize(
    ("changes", "dtype", "expected"),
    [
        ({"torch_dtype": "float16"}, "auto", "float16"),
        ({"torch_dtype": "float32"}, "auto", "bfloat16"),
        ({"torch_dtype": None}, "auto", "bfloat16"),
        ({"torch_dtype": None, "dtype": "float16"}, "auto", "float16"),
        ({"dtype": "torch.float16"}, "auto", "float16"),
        ({"torch_dtype": "float16"}, "float32", "float32"),
        ({}, "half", "float16"),
    ],
)
def test_dtypes(tmp_path: Path, changes: dict[str, Any], dtype: str, expected: str) -> None:
    assert read_model(tiny(tmp_path, "llama", **changes), dtype=dtype).dtype == expected


# ---------------------------------------------------------------------- quantized weights


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 16 / 128 + 4 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8 + 8 / 128),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4 + 16 / 128),
        ({"quant_method": "mxfp4"}, 4.25),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
            },
            8,
        ),
        ({"quant_method": "never heard of it"}, 16),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, 16),
    ],
)
def test_quantized_blocks(llama_8b: Path, config: dict[str, Any], bits: float) -> None:
    plain = read_model(llama_8b)
    made = json.loads((llama_8b / "config.json").read_text()) | {"quantization_config": config}
    (llama_8b / "config.json").write_text(json.dumps(made))
    model = read_model(llama_8b)
    assert model.is_estimate
    assert model.quantization.bits == pytest.approx(bits)
    blocks = sum(layer.weights(1) for layer in model.layers if layer.quantizes)
    assert blocks == 6_979_321_856, "embeddings, head and norms are not quantized"
    saved = plain.weight_bytes(1) - model.weight_bytes(1)
    assert saved == pytest.approx(blocks * (16 - bits) / 8, rel=1e-9)
    slots = [slot_cost(m, SlotSettings(16)).bytes_per_slot for m in (plain, model)]
    assert slots[0] == slots[1]


# ---------------------------------------------------------------------- what is refused


def refused(directory: Path, config: Any, **options: Any) -> str:
    write_config(directory, {}).joinpath("config.json").write_text(
        config if isinstance(config, str) else json.dumps(config)
    )
    with pytest.raises(ConfigError) as caught:
        read_model(directory, **options)
    return str(caught.value)


LLAMA = TINY | ARCHITECTURES["llama"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "a JSON object is expected"),
        ({}, "names no architectures"),
        ({"architectures": []}, "names no architectures"),
        (LLAMA | {"hidden_size": None}, "has no hidden_size"),
        (LLAMA | {"hidden_size": "large"}, "hidden_size is 'large'"),
        (LLAMA | {"hidden_size": -1}, "hidden_size is -1"),
        (LLAMA | {"vocab_size": True}, "vocab_size is True"),
        (LLAMA | {"num_hidden_layers": 1 << 60}, "not a whole number"),
        (LLAMA | {"torch_dtype": "int3"}, "dtype 'int3'"),
        (TINY | ARCHITECTURES["qwen2_moe"] | {"mlp_only_layers": 3}, "not a list of numbers"),
    ],
)
def test_malformed_configurations(tmp_path: Path, config: Any, words: str) -> None:
    assert words in refused(tmp_path, config)


def test_an_unknown_architecture_names_the_known_ones_and_what_to_do(tmp_path: Path) -> None:
    config = LLAMA | {"architectures": ["DeepseekV3ForCausalLM"]}
    message = refused(tmp_path, config)
    assert "DeepseekV3ForCausalLM is not known" in message
    assert all(name in message for name in KNOWN)
    assert "--like" in message
    assert "start vLLM" in message
    assert "Nonsense is not known" in refused(tmp_path, config, like="Nonsense")
    model = read_model(tmp_path, like="LlamaForCausalLM")
    assert (model.like, model.is_estimate) == ("LlamaForCausalLM", True)


def test_names_come_out_as_text(tmp_path: Path) -> None:
    assert "\x1b" not in refused(tmp_path, LLAMA | {"architectures": ["\x1b[2J"]})


def test_nothing_there(tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "nowhere", "acme/never-downloaded", "not a repository!!"):
        with pytest.raises(ConfigError, match=r"no config\.json there"):
            read_model(name)


def test_a_model_in_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = write_config(tmp_path, LLAMA) / "config.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(cached))
    assert read_model("acme/base").name == "acme/base"


@given(
    st.dictionaries(
        st.sampled_from([*TINY, "architectures", "quantization_config", "tie_word_embeddings"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab-1", max_size=5),
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.dictionaries(st.sampled_from(["bits", "quant_method"]), inner)
            ),
            max_leaves=4,
        ),
        max_size=4,
    )
)
def test_any_configuration(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    """Understood or refused: never an error of another kind."""
    directory = write_config(tmp_path_factory.mktemp("any"), LLAMA | changes)
    try:
        model = read_model(directory)
        slot_cost(model, SlotSettings(8, tp=2))
        model.weight_bytes(2)
    except LoraCacheError:
        pass


# ---------------------------------------------------------------------- settings of slots


@pytest.mark.parametrize(
    ("name", "changes", "settings", "words"),
    [
        ("llama", {}, {"tp": 3}, "outputs, heads of 64: that cannot be divided among 3 GPUs"),
        ("llama", {"num_key_value_heads": 3}, {"tp": 2}, "192 outputs, heads of 64"),
        ("llama", {"intermediate_size": 99}, {"tp": 2}, "99 outputs"),
        (
            "llama",
            {
                "num_attention_heads": 64,
                "num_key_value_heads": 64,
                "hidden_size": 4096,
                "intermediate_size": 4096,
            },
            {"tp": 128},
            "heads of 64",
        ),
        ("llama", {}, {"max_lora_rank": 12}, "vLLM takes 1, 8, 16"),
        ("llama", {}, {"lora_dtype": "int8"}, "lora_dtype 'int8'"),
        ("llama", {}, {"max_lora_rank": 1, "tp": 2, "fully_sharded": True}, "have rank 1"),
        ("llama", {"vocab_size": 300_000}, {}, "at most 258048"),
    ],
)
def test_settings_that_vllm_refuses(
    tmp_path: Path, name: str, changes: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    model = read_model(tiny(tmp_path, name, **changes))
    with pytest.raises(ConfigError) as caught:
        slot_cost(model, SlotSettings(**{"max_lora_rank": 8, **settings}))
    assert words in str(caught.value)


def test_a_large_vocabulary_is_fine_without_a_head_in_the_slots(tmp_path: Path) -> None:
    for name, targets in (("llama", ("q_proj",)), ("gemma3", None)):
        model = read_model(tiny(tmp_path, name, vocab_size=262_144))
        slot_cost(model, SlotSettings(8, target_modules=targets))


def test_target_modules_are_checked(tmp_path: Path) -> None:
    model = read_model(tiny(tmp_path, "mistral"))
    check_target_modules(model, ("q_proj", "gate_up_proj"))
    with pytest.raises(ConfigError, match="'lm_head': vLLM has slots for down_proj, gate_proj"):
        check_target_modules(model, ("q_proj", "lm_head"))


def test_the_smallest_rank_that_fits() -> None:
    assert [smallest_rank(rank) for rank in (1, 2, 8, 9, 257, 512)] == [1, 8, 8, 16, 320, 512]
    with pytest.raises(ConfigError, match="up to 512"):
        smallest_rank(513)
