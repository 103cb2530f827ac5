"""Every supported architecture loads exactly; everything else is refused in one clear sentence."""

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import (
    ARCHITECTURES,
    COMMON,
    GATED,
    GLOBAL,
    LLAMA3_ROPE,
    LOCAL,
    NEOX,
    prompt_ids,
    save_tiny,
)
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.model import conversion
from circuit_tracer_qk.model import load as models
from circuit_tracer_qk.model.load import load_transformer

KNOWN = HookedTransformerConfig.__dataclass_fields__
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
NOTHING: Any = None  # Hugging Face annotates these options without None
SIZES: dict[str, Any] = dict(GATED)
NEOX_SIZES: dict[str, Any] = dict(NEOX)
WIDE: dict[str, Any] = COMMON | {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}

# What the shared matrix leaves out: one entry for each further fact of `conversion.build_config`.
EXTRA: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "gpt2-scaled-by-layer": lambda: transformers.GPT2Config(
        vocab_size=97,
        n_positions=64,
        n_embd=24,
        n_layer=3,
        n_head=3,
        n_inner=30,
        activation_function="relu",
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
    ),
    "neox-no-bias": lambda: transformers.GPTNeoXConfig(
        **NEOX_SIZES, num_attention_heads=4, attention_bias=False, hidden_act="gelu_new"
    ),
    "llama-linear-rope": lambda: transformers.LlamaConfig(**SIZES, rope_scaling=dict(LINEAR)),
    "llama-yarn": lambda: transformers.LlamaConfig(**SIZES, rope_scaling=dict(YARN)),
    "llama-tied-mha": lambda: transformers.LlamaConfig(
        **WIDE, num_attention_heads=3, tie_word_embeddings=True
    ),
    "mistral-no-window": lambda: transformers.MistralConfig(**SIZES, sliding_window=NOTHING),
    "qwen2-sliding": lambda: transformers.Qwen2Config(
        **WIDE,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen3-bias-sliding": lambda: transformers.Qwen3Config(
        **SIZES,
        attention_bias=True,
        rope_scaling=dict(LLAMA3_ROPE),
        layer_types=[LOCAL, GLOBAL, LOCAL],
        use_sliding_window=True,
        sliding_window=7,
    ),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, rope_theta=700.0),
    "gemma2-no-caps": lambda: transformers.Gemma2Config(
        **SIZES,
        attn_logit_softcapping=NOTHING,
        final_logit_softcapping=NOTHING,
        attention_bias=True,
    ),
    "gemma3-linear-rope": lambda: transformers.Gemma3TextConfig(
        **SIZES,
        rope_scaling=dict(LINEAR),
        layer_types=[LOCAL, GLOBAL, LOCAL],
        sliding_window=80,
        final_logit_softcapping=6.0,
    ),
}
NEEDS = {
    "gemma3": "rotary_base_local",
    "gemma3-linear-rope": "rotary_base_local",
    "llama-linear-rope": "rotary_scaling_factor",
    "llama-yarn": "use_yarn_rope",
}
TOKENS = torch.randint(97, (2, 50), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[[str], tuple[Path, Any]]:
    """name -> (folder, Hugging Face model); every model is made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            with pytest.MonkeyPatch.context() as patch:
                if name in EXTRA:
                    patch.setitem(ARCHITECTURES, name, EXTRA[name])
                made[name] = folder, save_tiny(name, folder)
        return made[name]

    return get


@pytest.fixture
def copy(tiny, tmp_path) -> Callable[..., Path]:
    """A copy of a tiny model's folder that a test may damage."""

    def get(name: str = "llama", folder: str = "copy") -> Path:
        return Path(shutil.copytree(tiny(name)[0], tmp_path / folder))

    return get


def config_only(folder: Path, config: Any, **changes: Any) -> Path:
    config.save_pretrained(folder)
    if changes:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def refusal(name: Any, **options: Any) -> str:
    """The one sentence with which loading ``name`` is refused."""
    with pytest.raises(UserError) as caught:
        load_transformer(name, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def error_of(model: Any, reference: Any, tokens: torch.Tensor = TOKENS) -> float:
    logits = reference(tokens).logits
    return float((model(tokens) - logits).abs().max() / (logits.max() - logits.min()))


# Exactness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARCHITECTURES, *EXTRA])
def test_logits_are_hugging_faces(name, tiny):
    folder, reference = tiny(name)
    if name in NEEDS and NEEDS[name] not in KNOWN:
        assert "install" in refusal(folder, device="cpu")
        return
    with torch.no_grad():
        model = load_transformer(str(folder), device="cpu")
        assert error_of(model, reference) < 3e-6
        double = load_transformer(str(folder), dtype=torch.float64, device="cpu")
        assert error_of(double, reference.double()) < 3e-6  # HF's norms and angles stay float32
        reference.float()
        half = load_transformer(str(folder), dtype=torch.bfloat16, device="cpu")
        assert error_of(half, reference) < 0.05
    for loaded, dtype in ((model, torch.float32), (double, torch.float64), (half, torch.bfloat16)):
        assert loaded.cfg.dtype == dtype and not loaded.training
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert not any(p.requires_grad for p in loaded.parameters())
    assert model.cfg.model_name == name
    assert model.tokenizer is None and model.cfg.tokenizer_name is None


def test_gemma_in_bfloat16_scales_embeddings_as_hugging_face_does(tiny):
    folder, _ = tiny("gemma2")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = load_transformer(folder, dtype=torch.bfloat16, device="cpu")
    hidden = reference(TOKENS, output_hidden_states=True).hidden_states[0].float()
    ours = model.W_E[TOKENS].float()
    assert (ours - hidden).abs().max() <= 2**-7 * hidden.abs().max()
    assert (ours - hidden).mean().abs() < 1e-4


def test_words_in_the_folder_name_mean_nothing(copy, tiny):
    folder = copy("gpt2", "llama-gemma-thing")
    with torch.no_grad():
        assert error_of(load_transformer(folder, device="cpu"), tiny("gpt2")[1]) < 3e-6


def test_relative_folder(tiny, monkeypatch):
    folder, _ = tiny("gpt2")
    monkeypatch.chdir(folder.parent)
    assert load_transformer("gpt2", device="cpu").cfg.d_model == 24


def test_equal_buffers_are_shared_and_only_those(tiny):
    model: Any = load_transformer(tiny("gemma2")[0], device="cpu")
    attention = [block.attn for block in model.blocks]
    assert attention[0].mask is attention[2].mask and attention[0].mask is not attention[1].mask
    assert attention[0].rotary_cos is attention[2].rotary_cos


def test_long_contexts_are_capped():
    config = transformers.LlamaConfig(**dict(SIZES, max_position_embeddings=131072))
    assert models.build_config(config, "LlamaForCausalLM").n_ctx == conversion.MAX_CONTEXT


def test_nothing_is_printed_and_logging_is_left_alone(tiny, capfd):
    handlers, verbosity = logging.root.handlers[:], transformers.logging.get_verbosity()
    filters = warnings.filters[:]
    load_transformer(tiny("neox")[0], device="cpu")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert logging.root.handlers == handlers and warnings.filters == filters
    assert transformers.logging.get_verbosity() == verbosity


# The comparison with Hugging Face -----------------------------------------------------------------


@pytest.mark.parametrize("key", ["attn.W_Q", "attn._b_K", "mlp.W_out", "ln1.w"])
def test_a_wrong_conversion_is_refused(key, tiny, monkeypatch):
    convert = vars(weight_conversions)["convert_qwen2_weights"]

    def sabotaged(hf_model, cfg):
        state = convert(hf_model, cfg)
        state[f"blocks.1.{key}"] = state[f"blocks.1.{key}"] * 1.1
        return state

    monkeypatch.setattr(weight_conversions, "convert_qwen2_weights", sabotaged)
    if key.endswith("b_K"):  # put right afterwards from Hugging Face's own biases
        load_transformer(tiny("qwen2")[0], device="cpu")
    else:
        message = refusal(tiny("qwen2")[0], device="cpu")
        assert "logits for qwen2 differ from Hugging Face's" in message


@pytest.mark.parametrize(
    ("field", "wrong", "what"),
    [
        ("rotary_base", 900.0, "rotary positions"),
        ("window_size", 7, "on 16 tokens"),
        ("eps", 0.1, "logits"),
        ("attn_scores_soft_cap", -1.0, "logits"),
    ],
)
def test_a_wrong_configuration_is_refused(field, wrong, what, tiny, monkeypatch):
    build = models.build_config

    def sabotaged(config, architecture):
        cfg = build(config, architecture)
        setattr(cfg, field, wrong)
        return cfg

    monkeypatch.setattr(models, "build_config", sabotaged)
    assert what in refusal(tiny("gemma2")[0], device="cpu")


def test_a_window_longer_than_16_is_exercised(tmp_path, monkeypatch):
    monkeypatch.setitem(
        ARCHITECTURES,
        "mistral-20",
        lambda: transformers.MistralConfig(**SIZES, sliding_window=20),
    )
    save_tiny("mistral-20", tmp_path)
    build = models.build_config

    def without_window(config, architecture):
        cfg = build(config, architecture)
        cfg.attn_types = ["global"] * cfg.n_layers
        return cfg

    monkeypatch.setattr(models, "build_config", without_window)
    assert "on 28 tokens" in refusal(tmp_path, device="cpu")


# Mistakes of the user -----------------------------------------------------------------------------


def test_folder_without_config(tmp_path):
    assert "no config.json" in refusal(tmp_path)


def test_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(tmp_path)


def test_unknown_model_type(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    assert "nonesuch" in refusal(tmp_path)


def test_truncated_safetensors(copy):
    folder = copy()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is truncated" in refusal(folder)


def test_no_weights(copy):
    folder = copy()
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda w: w[:5].clone(),
            r"up_proj.weight of copy should have shape \[40, 24\].*\[5, 24\]",
        ),
        (lambda w: None, "up_proj.weight is missing from copy"),
        (lambda w: w.index_fill(0, torch.tensor(3), float("nan")), "up_proj.weight.* NaN"),
        (lambda w: w.index_fill(0, torch.tensor(3), float("-inf")), "up_proj.weight.* infinity"),
    ],
)
def test_bad_weight_is_named(copy, damage, expected):
    folder = copy()
    file, key = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    bad = damage(tensors.pop(key))
    save_file(tensors | ({} if bad is None else {key: bad}), file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=expected):
        load_transformer(folder)


def test_broken_tokenizer(copy):
    folder = copy()
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer" in refusal(folder)


@pytest.mark.parametrize("base", ["org/base", None])
@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_without_its_base(tmp_path, base, config):
    settings = {"peft_type": "LORA"} | ({"base_model_name_or_path": base} if base else {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"lora_A": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    if config:
        save_tiny("llama", tmp_path)
        (tmp_path / "model.safetensors").unlink()
    said = refusal(tmp_path)
    assert str(tmp_path) in said and "is an adapter" in said and "merge_and_unload" in said
    assert (" of org/base " in said) == (base is not None)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c", "", "two words"])
def test_missing_folder(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "not a folder" in refusal(name) if name else "no config.json" in refusal(name)


def test_a_file_is_not_a_folder(copy):
    assert "is not a folder" in refusal(copy() / "model.safetensors")


def test_unknown_name():
    assert "nonesuch is neither a folder nor a name" in refusal("nonesuch")


def test_unsupported_dtype(tiny):
    assert "float8" in refusal(tiny("gpt2")[0], dtype=torch.float8_e4m3fn)


# Refusals by name ---------------------------------------------------------------------------------

T = transformers
REFUSALS = {
    "bloom": (lambda: T.BloomConfig(), "ALiBi"),
    "mpt": (lambda: T.MptConfig(), "ALiBi"),
    "t5": (lambda: T.T5Config(), "relative position"),
    "gpt-oss": (lambda: T.GptOssConfig(), "sinks"),
    "mixtral": (lambda: T.MixtralConfig(), "mixture of experts"),
    "qwen3-moe": (lambda: T.Qwen3MoeConfig(), "mixture of experts"),
    "olmoe": (lambda: T.OlmoeConfig(), "mixture of experts"),
    "deepseek-v3": (lambda: T.DeepseekV3Config(), "mixture of experts"),
    "olmo2": (lambda: T.Olmo2Config(), "QK norm over whole vectors"),
    "olmo3": (lambda: T.Olmo3Config(), "QK norm over whole vectors"),
    "llava": (lambda: T.LlavaConfig(), "multimodal"),
    "opt": (lambda: T.OPTConfig(), "OPTForCausalLM"),
    "bidirectional": (
        lambda: T.Gemma3TextConfig(use_bidirectional_attention=True),
        "bidirectional",
    ),
    "dynamic-rope": (
        lambda: T.LlamaConfig(**SIZES, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "rope_scaling of type dynamic",
    ),
    "linear-and-window": (
        lambda: T.Qwen3Config(
            **SIZES,
            rope_scaling=dict(LINEAR),
            layer_types=[LOCAL, GLOBAL, LOCAL],
            use_sliding_window=True,
            sliding_window=4,
        ),
        "rope_scaling of type linear in a model with sliding windows",
    ),
    "activation": (lambda: T.LlamaConfig(**SIZES, hidden_act="mish"), "function mish"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_name(name, tmp_path):
    config, expected = REFUSALS[name]
    assert expected in refusal(config_only(tmp_path / name, config()))


@pytest.mark.parametrize("config", [T.LlamaConfig(**SIZES), T.Gemma3Config()])
def test_quantised_weights_are_refused(tmp_path, config):
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    folder = config_only(tmp_path / "small", config, **quantised)
    assert "quantised" in refusal(folder)


def test_the_text_part_of_a_multimodal_gemma3(tmp_path):
    """As older and newer transformers write it; its weights are those of the whole."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "image_size": 28, "patch_size": 14}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = ARCHITECTURES["gemma3"]().to_dict()
    config = T.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    whole = T.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    ids = torch.tensor([prompt_ids("gemma3", 12)])
    with torch.no_grad():
        expected = whole(ids).logits
    path = tmp_path / "model.safetensors"
    older, newer = "language_model.model.", "model.language_model."
    stored = {key.replace(newer, older): value for key, value in load_file(path).items()}
    assert any(key.startswith(older) for key in stored)
    for prefix in (older, newer):
        tensors = {key.replace(older, prefix): value for key, value in stored.items()}
        save_file(tensors, path, metadata={"format": "pt"})
        model = load_transformer(tmp_path, device="cpu")
        assert model.cfg.original_architecture == "Gemma3ForCausalLM"
        assert float((model(ids) - expected).abs().max()) < 1e-5


def test_second_rotary_base_is_refused_by_an_old_transformer_lens(tiny, monkeypatch):
    fields = {k: v for k, v in KNOWN.items() if k != "rotary_base_local"}
    monkeypatch.setattr(HookedTransformerConfig, "__dataclass_fields__", fields)
    assert "second rotary base" in refusal(tiny("gemma3")[0])


# Tokenizers and the hub ---------------------------------------------------------------------------


def save_tokenizer(folder: Path, **special: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<bos>", "<eos>", *"abcdefgh"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", **special
    ).save_pretrained(folder)


@pytest.mark.parametrize("special", [{"bos_token": "<bos>"}, {}])
def test_tokenizer_gives_hugging_faces_ids(copy, special):
    folder = copy()
    save_tokenizer(folder, **special)
    model: Any = load_transformer(folder, device="cpu")
    assert model.cfg.tokenizer_name == str(folder.resolve())
    again = transformers.AutoTokenizer.from_pretrained(model.cfg.tokenizer_name)
    expected = again("a b h zzz c", add_special_tokens=False).input_ids
    assert expected == [3, 4, 10, 0, 5]
    assert model.tokenizer("a b h zzz c", add_special_tokens=False).input_ids == expected


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Callable[[str, Path], None]:
    """An offline hub cache; call it to put a folder there under a hub id."""
    import huggingface_hub.constants
    import transformers.utils.hub

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(cache))

    def put(hub_id: str, folder: Path, revision: str = "main") -> None:
        repo = cache / f"models--{hub_id.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / revision).write_text(commit)
        shutil.copytree(folder, repo / "snapshots" / commit)

    return put


@pytest.mark.parametrize(
    ("name", "hub_id", "revision"),
    [
        ("someone/thing", "someone/thing", "main"),
        ("someone/thing@v2", "someone/thing", "v2"),
        ("qwen2-0.5b", "Qwen/Qwen2-0.5B", "main"),
    ],
)
def test_hub_id_and_alias_load_offline_from_the_cache(hub, copy, tiny, name, hub_id, revision):
    folder = copy("qwen2")
    save_tokenizer(folder, bos_token="<bos>")
    hub(hub_id, folder, revision)
    model = load_transformer(name, device="cpu")
    assert model.cfg.model_name == model.cfg.tokenizer_name == hub_id
    with torch.no_grad():
        assert error_of(model, tiny("qwen2")[1]) < 3e-6


def test_other_architectures_of_the_hub_go_through_transformer_lens(hub, tmp_path):
    folder = tmp_path / "opt"
    config = T.OPTConfig(
        vocab_size=97,
        hidden_size=24,
        ffn_dim=30,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
    )
    T.OPTForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, bos_token="<bos>")
    hub("facebook/opt-125m", folder)
    model = load_transformer("opt-125m", device="cpu")
    reference = T.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        assert error_of(model, reference) < 1e-5


def test_hub_that_cannot_be_reached(hub):
    message = refusal("someone/nothing")
    assert "someone/nothing is not in the local cache" in message and "network" in message
