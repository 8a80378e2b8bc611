#!/usr/bin/env python3
"""Writes a model of the shape of a small Llama whose weights are noise, with the tokenizer of the bundled model.

    bench/random_model.py DIR [hidden] [layers] [intermediate]

What it says is nothing, and how long it takes is what a trained model of this shape would take: for measurements that the bundled model is too small for.
Wants nothing but Python.
"""

import array, json, pathlib, random, shutil, struct, sys

directory = pathlib.Path(sys.argv[1])
hidden, layers, intermediate = (int(given) if given else default for given, default in zip(sys.argv[2:5] + [""] * 3, (512, 8, 1536)))
demo = pathlib.Path(__file__).parent.parent / "models" / "demo"
config = json.loads((demo / "config.json").read_text())
head_dim = 64
config |= {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate, "head_dim": head_dim,
           "num_attention_heads": hidden // head_dim, "num_key_value_heads": hidden // head_dim // 2,
           "max_position_embeddings": 32768}

kv = config["num_key_value_heads"] * head_dim
shapes = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
for layer in range(layers):
    shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in {
        "input_layernorm": [hidden], "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [kv, hidden], "self_attn.v_proj": [kv, hidden],
        "self_attn.o_proj": [hidden, hidden], "mlp.gate_proj": [intermediate, hidden],
        "mlp.up_proj": [intermediate, hidden], "mlp.down_proj": [hidden, intermediate]}.items()}


def bf16(value):
    return struct.unpack("<I", struct.pack("<f", value))[0] >> 16


# Noise that is drawn once and read from different places: a draw for each weight would take minutes.
rng = random.Random(1)
noise = array.array("H", (bf16(rng.gauss(0, hidden**-0.5)) for _ in range(1 << 20)))
header, offset = {}, 0
for name, shape in shapes.items():
    size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
    offset += size
directory.mkdir(parents=True, exist_ok=True)
with open(directory / "model.safetensors", "wb") as file:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name, shape in shapes.items():
        left = shape[0] * (shape[1] if len(shape) > 1 else 1)
        if "norm" in name:
            file.write(array.array("H", [bf16(1.0)] * left).tobytes())
            continue
        while left:
            start = rng.randrange(len(noise) // 2)
            run = noise[start : start + left]
            file.write(run.tobytes())
            left -= len(run)
(directory / "config.json").write_text(json.dumps(config, indent=1))
for file in demo.iterdir():
    if file.name.startswith("tokenizer") or "generation" in file.name or "special" in file.name:
        shutil.copy(file, directory)
