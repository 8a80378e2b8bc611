"""Makes the GGUF files of this directory and what is expected of them: `pip install gguf numpy safetensors`, then `python make.py`.

Written with the `gguf` package of llama.cpp, so that our reader is tested against another writer. What a model computes is
computed here in float64 from the weights as that package dequantises them.
"""

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type, GGUFReader, GGUFWriter, dequantize, quantize
from safetensors.numpy import load_file

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
K_BYTES = {Type.Q4_K: 144, Type.Q5_K: 176, Type.Q6_K: 210}


def permute(weights, heads):
    """Puts rows of q and k into the order in which llama.cpp turns them (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def unpermute(weights, heads):
    return weights.reshape(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def random_blocks(rng, shape, kind):
    """K-quant blocks of random codes, with scales that give weights of a sensible size."""
    rows, blocks = shape[0], shape[1] // 256
    data = rng.integers(0, 256, (rows, blocks, K_BYTES[kind]), dtype=np.uint8)
    scale = lambda size: rng.uniform(0.5 * size, size, (rows, blocks, 1)).astype(np.float16).view(np.uint8)
    if kind == Type.Q6_K:
        data[..., 208:210] = scale(3e-5)
    else:
        data[..., 0:2] = scale(2e-4 if kind == Type.Q4_K else 1e-4)
        data[..., 2:4] = scale(1.5e-3)
    return data.reshape(rows, -1)


def forward(config, weights, ids):
    """Logits after the last of `ids`; a decoder of Llama or Qwen2."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    norm = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w
    x = weights["model.embed_tokens.weight"][ids]
    positions = np.arange(len(ids))
    angles = positions[:, None] * config["rope_theta"] ** -(np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def turned(x):
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    for layer in range(config["num_hidden_layers"]):
        w = lambda part: weights[f"model.layers.{layer}.{part}.weight"]
        bias = lambda part: weights.get(f"model.layers.{layer}.{part}.bias", 0.0)
        linear = lambda x, part: x @ w(part).T + bias(part)
        h = norm(x, w("input_layernorm"))
        q = turned(linear(h, "self_attn.q_proj").reshape(len(ids), heads, dim))
        k = turned(linear(h, "self_attn.k_proj").reshape(len(ids), kv_heads, dim)).repeat(heads // kv_heads, 1)
        v = linear(h, "self_attn.v_proj").reshape(len(ids), kv_heads, dim).repeat(heads // kv_heads, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
        scores = np.where(positions[None, :, None] >= positions[None, None, :], scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        x = x + linear(np.einsum("hqk,khd->qhd", scores, v).reshape(len(ids), -1), "self_attn.o_proj")
        h = norm(x, w("post_attention_layernorm"))
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x[-1], weights["model.norm.weight"]) @ head.T


PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def stored_name(name):
    part, suffix = name.rsplit(".", 1)
    if not part.startswith("model.layers."):
        return f"{ENDS[part]}.{suffix}"
    layer, part = part.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{PARTS[part]}.{suffix}"


def write_tokenizer(writer, directory, config):
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    model = tokenizer["model"]
    pieces = model["byte_fallback"]
    tokens = [f"[PAD{i}]" for i in range(config["vocab_size"])]
    types = [5] * len(tokens)
    for text, i in model["vocab"].items():
        tokens[i], types[i] = text, 6 if pieces and text.startswith("<0x") else 1
    for added in tokenizer["added_tokens"]:
        special = 2 if added["content"] == model["unk_token"] else 3
        tokens[added["id"]], types[added["id"]] = added["content"], special if added["special"] else 4
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pieces:
        scores = [-1e6] * len(tokens)
        for rank, (left, right) in reversed(list(enumerate(merges))):
            scores[model["vocab"][left + right]] = -float(rank)
        writer.add_token_scores(scores)
    else:
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges([" ".join(m) for m in merges])
    writer.add_add_bos_token("TemplateProcessing" in json.dumps(tokenizer["post_processor"]))
    for name, add in [("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("unk", writer.add_unk_token_id),
                      ("pad", writer.add_pad_token_id)]:
        token = settings.get(f"{name}_token")
        if token is not None:
            add(tokens.index(token))
    writer.add_chat_template(settings["chat_template"])


def write(name, arch, config, weights, directory=None):
    """Writes a file of `weights`: name -> (type, stored rows)."""
    writer = GGUFWriter(HERE / name, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if directory:
        write_tokenizer(writer, directory, config)
    for tensor, (kind, rows) in weights.items():
        writer.add_tensor(stored_name(tensor), rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def expect(name, arch, config, prompts):
    """Reads a file back and records the logits of its dequantised weights, and some of the weights themselves."""
    elsewhere = {stored: part for part, stored in {**PARTS, **ENDS}.items()}
    weights = {}
    samples = {}
    for tensor in GGUFReader(HERE / name).tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        part, suffix = tensor.name.rsplit(".", 1)
        if part.startswith("blk."):
            _, layer, stored = part.split(".")
            full = f"model.layers.{layer}.{elsewhere[stored]}.{suffix}"
            if arch == "llama" and stored in ("attn_q", "attn_k"):
                heads = "num_attention_heads" if stored == "attn_q" else "num_key_value_heads"
                values = unpermute(values, config[heads])
        else:
            full = f"{elsewhere[part]}.{suffix}"
        weights[full] = values
        if values.ndim == 2 and not part.startswith(("blk.1", "blk.2")):
            samples[full] = [float(np.float32(v)) for v in values[1, :: max(1, values.shape[1] // 8)]]
    logits = [{"ids": ids, "logits": [round(float(v), 6) for v in forward(config, weights, ids)]} for ids in prompts]
    (HERE / name).with_suffix(".json").write_text(json.dumps({"prompts": logits, "rows": samples}))


def golden(name, arch, directory, kinds):
    directory = GOLDEN / directory
    config = json.loads((directory / "config.json").read_text())
    stored = load_file(directory / "model.safetensors")
    prompts = [p["ids"] for p in json.loads((directory / "expected.json").read_text())["prompts"]][:3]
    check = load_file(directory / "logits.safetensors")
    for prompt in json.loads((directory / "expected.json").read_text())["prompts"]:
        error = np.abs(forward(config, {k: v.astype(np.float64) for k, v in stored.items()}, prompt["ids"]) - check[prompt["name"]])
        assert error.max() < 1e-3 * prompt["logit_absmax"], error.max()
    weights = {}
    for tensor, values in stored.items():
        if arch == "llama" and ("q_proj" in tensor or "k_proj" in tensor):
            values = permute(values, config["num_attention_heads" if "q_proj" in tensor else "num_key_value_heads"])
        kind = Type.F32 if values.ndim == 1 else kinds(tensor)
        weights[tensor] = (kind, quantize(values, kind) if kind != Type.F32 else values)
    write(name, arch, config, weights, directory)
    expect(name, arch, config, prompts)


def k_quants():
    """A Llama of random codes: the `gguf` package does not quantise to these types, but reads them."""
    rng = np.random.default_rng(7)
    config = {"vocab_size": 132, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
              "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512}
    shapes = {
        "model.embed_tokens": (Type.Q6_K, (132, 256)),
        "model.layers.0.self_attn.q_proj": (Type.Q4_K, (256, 256)),
        "model.layers.0.self_attn.k_proj": (Type.Q4_K, (64, 256)),
        "model.layers.0.self_attn.v_proj": (Type.Q6_K, (64, 256)),
        "model.layers.0.self_attn.o_proj": (Type.Q4_K, (256, 256)),
        "model.layers.0.mlp.gate_proj": (Type.Q5_K, (256, 256)),
        "model.layers.0.mlp.up_proj": (Type.Q5_K, (256, 256)),
        "model.layers.0.mlp.down_proj": (Type.Q6_K, (256, 256)),
        "lm_head": (Type.Q5_K, (132, 256)),
    }
    weights = {f"{name}.weight": (kind, random_blocks(rng, shape, kind)) for name, (kind, shape) in shapes.items()}
    for norm in ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]:
        weights[f"{norm}.weight"] = (Type.F32, rng.uniform(0.5, 1.5, 256).astype(np.float32))
    write("k-quants.gguf", "llama", config, weights)
    expect("k-quants.gguf", "llama", config, [[1, 2, 3], [int(i) for i in rng.integers(0, 132, 100)]])


golden("llama-q4_0.gguf", "llama", "llama", lambda tensor: Type.Q8_0 if "lm_head" in tensor else Type.Q4_0)
golden("qwen2-q8_0.gguf", "qwen2", "qwen2",
       lambda tensor: Type.BF16 if "v_proj" in tensor else Type.Q4_0 if "mlp" in tensor else Type.Q8_0)
k_quants()
