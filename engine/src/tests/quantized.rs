//! Quantised checkpoints: every layout against the weights it stands for, quantising at load, and files that cannot be used.

use super::{
    Runner,
    checkpoints::{copy, edit, refused},
    load, repository, watched,
};
use crate::{
    Error, Model, Quantize,
    cpu::{kernels::Kernels, scheme::widen_e4m3},
};
use half::f16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fs, path::Path};

type Tensors = BTreeMap<String, Stored>;

/// A tensor of a file that is to be written.
#[derive(Clone)]
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    fn f32(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    fn f16(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
        Self { dtype: Dtype::F16, shape: shape.to_vec(), bytes }
    }

    fn bytes(dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Self {
        Self { dtype, shape: shape.to_vec(), bytes }
    }

    /// Words of codes: `code(row, column, index)` is code `index` of a word.
    fn words(rows: usize, columns: usize, bits: usize, code: impl Fn(usize, usize, usize) -> u32) -> Self {
        let mut bytes = Vec::new();
        for row in 0..rows {
            for column in 0..columns {
                let word = (0..32 / bits).fold(0, |word, index| word | code(row, column, index) << (bits * index));
                bytes.extend(word.to_le_bytes());
            }
        }
        Self { dtype: Dtype::I32, shape: vec![rows, columns], bytes }
    }
}

fn read(path: &Path) -> Tensors {
    let file = fs::read(path).expect("a file");
    let tensors = SafeTensors::deserialize(&file).expect("safetensors");
    let stored = |view: &TensorView<'_>| Stored::bytes(view.dtype(), view.shape(), view.data().to_vec());
    tensors.iter().map(|(name, view)| (name.to_owned(), stored(&view))).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, stored)| {
        (name, TensorView::new(stored.dtype, stored.shape.clone(), &stored.bytes).expect("sizes agree"))
    });
    let bytes = safetensors::serialize(views, None).expect("serialised");
    fs::write(path, bytes).expect("written");
}

/// Changes the tensors of a checkpoint.
fn edit_tensors(dir: &Path, change: impl FnOnce(&mut Tensors)) {
    let path = dir.join("model.safetensors");
    let mut tensors = read(&path);
    change(&mut tensors);
    write(&path, &tensors);
}

/// A linear, quantised by a test: its tensors, and the weights they stand for.
struct Linear {
    tensors: Vec<(&'static str, Stored)>,
    weights: Vec<f32>,
}

/// Numbers that look random, below `end`.
fn any(index: usize, salt: usize, end: usize) -> usize {
    (index.wrapping_mul(2_654_435_761).wrapping_add(salt.wrapping_mul(40_503)) >> 7) % end
}

/// A small scale that f16 holds exactly.
fn scale(index: usize, salt: usize) -> f32 {
    f16::from_f32((any(index, salt, 50) + 20) as f32 * 2e-4).to_f32()
}

/// Replaces all linears of the golden llama as [`check_on`] does.
fn check(what: &str, config: &Value, quantize: &dyn Fn(usize, usize, usize) -> Linear) {
    check_on("llama", what, config, quantize);
}

/// Replaces all linears of a golden checkpoint by what `quantize(outputs, inputs, salt)` makes, and compares what the model
/// computes with the model of the weights that stand for it.
fn check_on(golden: &str, what: &str, config: &Value, quantize: &dyn Fn(usize, usize, usize) -> Linear) {
    let (quantised, plain) = (copy(golden), copy(golden));
    edit(quantised.path(), "config.json", |json| json["quantization_config"] = config.clone());
    let mut linears = BTreeMap::new();
    edit_tensors(quantised.path(), |tensors| {
        let names: Vec<String> = tensors.keys().filter(|name| name.ends_with("_proj.weight")).cloned().collect();
        for (salt, name) in names.into_iter().enumerate() {
            let shape = tensors.remove(&name).expect("it is there").shape;
            let linear = quantize(shape[0], shape[1], salt);
            let module = name.strip_suffix(".weight").expect("a weight");
            for (tensor, stored) in &linear.tensors {
                tensors.insert(format!("{module}.{tensor}"), stored.clone());
            }
            linears.insert(name, Stored::f32(&shape, &linear.weights));
        }
    });
    edit_tensors(plain.path(), |tensors| tensors.extend(linears));
    let mut reports = Vec::new();
    let model = Model::load(quantised.path(), &mut |progress| reports.push(progress.done)).expect(what);
    assert_eq!(reports[reports.len() - 2], *reports.last().expect("progress"), "{what}: every tensor was counted");
    let reference = Model::load(plain.path(), &mut |_| {}).expect("a good checkpoint");
    let tokens: Vec<u32> = (0..40).map(|index| index * 23 % 1000).collect();
    for kernels in Kernels::available() {
        let logits = |model: &std::sync::Arc<Model>| {
            let mut runner = Runner::new(model.clone(), kernels);
            runner.draw(&tokens, 0, 64, &watched());
            runner.engine.logits(0).expect("sampled").to_vec()
        };
        let (ours, expected) = (logits(&model), logits(&reference));
        let largest = expected.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
        let worst = ours.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest > 0.01 && largest.is_finite(), "{what} {}: {largest}", kernels.name);
        // Eight-bit floats meet inputs rounded to bf16 on some units, integers those of sixteen bits on all.
        let limit = if config["quant_method"] == "fp8" || config["format"] == "float-quantized" { 1e-3 } else { 1e-4 };
        assert!(worst <= limit * largest, "{what} {}: logits differ by {worst} of {largest}", kernels.name);
    }
}

/// GPTQ codes with zeros all over their range; `scatter` gives inputs to groups in no order.
fn gptq(bits: usize, group: usize, zero_shift: u32, scatter: bool) -> impl Fn(usize, usize, usize) -> Linear {
    move |outputs, inputs, salt| {
        let (per_word, groups, end) = (32 / bits, inputs / group, 1 << bits);
        let code = |output: usize, input: usize| any(output * inputs + input, salt, end) as u32;
        let zero = |output: usize, index: usize| (any(output * groups + index, salt + 1, end - 1) + 1) as u32;
        let scales: Vec<f32> = (0..groups * outputs).map(|index| scale(index, salt) * 8.0 / end as f32).collect();
        // Another order for each linear, or one for all of q, k and v as real files have it.
        let place = |input: usize| if scatter { input * 37 % inputs } else { input };
        let weight = |output: usize, input: usize| {
            let index = place(input) / group;
            scales[index * outputs + output] * (code(output, input) as f32 - zero(output, index) as f32)
        };
        let groups_of = (0..inputs).flat_map(|input| ((place(input) / group) as i32).to_le_bytes()).collect();
        Linear {
            weights: (0..outputs * inputs).map(|at| weight(at / inputs, at % inputs)).collect(),
            tensors: vec![
                (
                    "qweight",
                    Stored::words(inputs / per_word, outputs, bits, |row, output, index| {
                        code(output, row * per_word + index)
                    }),
                ),
                (
                    "qzeros",
                    Stored::words(groups, outputs / per_word, bits, |row, column, index| {
                        zero(column * per_word + index, row) - zero_shift
                    }),
                ),
                ("scales", Stored::f16(&[groups, outputs], &scales)),
                ("g_idx", Stored::bytes(Dtype::I32, &[inputs], groups_of)),
            ],
        }
    }
}

#[test]
fn gptq_of_both_versions_and_widths() {
    let config = |bits: usize, group: i64, format: &str| {
        json!({"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": false, "sym": false,
            "checkpoint_format": format})
    };
    check("int8", &config(8, 32, "gptq"), &gptq(8, 32, 1, false));
    check("int8 act-order", &config(8, 16, "gptq"), &gptq(8, 16, 1, true));
    check("int4 v2", &config(4, 16, "gptq_v2"), &gptq(4, 16, 0, false));
    check("int4 v2 act-order", &config(4, 32, "gptq_v2"), &gptq(4, 32, 0, true));
    check("int4 one group", &config(4, -1, "gptq"), &|outputs, inputs, salt| {
        gptq(4, inputs, 1, false)(outputs, inputs, salt)
    });
}

#[test]
fn experts_and_latents_with_and_without_an_order() {
    for golden in ["qwen3moe", "deepseek_v2", "deepseek_v3"] {
        for scatter in [false, true] {
            let config = json!({"quant_method": "gptq", "bits": 8, "group_size": 8, "desc_act": scatter});
            check_on(golden, &format!("{golden} {scatter}"), &config, &gptq(8, 8, 1, scatter));
        }
    }
}

#[test]
fn experts_and_latents_quantised_at_load() {
    for golden in ["mixtral", "qwen3moe", "deepseek_v2", "deepseek_v3"] {
        let mut reports = Vec::new();
        let dir = repository("tests/golden").join(golden);
        let model = Model::load_quantized(&dir, Some(Quantize::Int8), &mut |progress| reports.push(progress.done));
        let model = model.expect("a good checkpoint");
        assert_eq!(reports[reports.len() - 2], *reports.last().expect("progress"), "every tensor was counted");
        for kernels in Kernels::available() {
            let mut runner = Runner::new(model.clone(), kernels);
            runner.draw(&[1, 2, 3, 4, 5], 0, 64, &watched());
            let logits = runner.engine.logits(0).expect("sampled");
            assert!(logits.iter().all(|logit| logit.is_finite()), "{golden} {}", kernels.name);
        }
    }
}

#[test]
fn awq_with_zeros_all_over() {
    // Where each nibble of a word comes from.
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let config = json!({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": true, "version": "GEMM",
        "modules_to_not_convert": ["lm_head"]});
    check("awq", &config, &|outputs, inputs, salt| {
        let groups = inputs / 16;
        let code = |output: usize, input: usize| any(output * inputs + input, salt, 16) as u32;
        let zero = |output: usize, index: usize| any(output * groups + index, salt + 1, 16) as u32;
        let scales: Vec<f32> = (0..groups * outputs).map(|index| scale(index, salt)).collect();
        let weight = |output: usize, input: usize| {
            let index = input / 16;
            scales[index * outputs + output] * (code(output, input) as f32 - zero(output, index) as f32)
        };
        Linear {
            weights: (0..outputs * inputs).map(|at| weight(at / inputs, at % inputs)).collect(),
            tensors: vec![
                (
                    "qweight",
                    Stored::words(inputs, outputs / 8, 4, |input, word, nibble| code(word * 8 + ORDER[nibble], input)),
                ),
                (
                    "qzeros",
                    Stored::words(groups, outputs / 8, 4, |index, word, nibble| zero(word * 8 + ORDER[nibble], index)),
                ),
                ("scales", Stored::f16(&[groups, outputs], &scales)),
            ],
        }
    });
}

/// e4m3 with scales by blocks, which need not divide the matrix.
fn fp8_blocks(rows: usize, columns: usize, name: &'static str) -> impl Fn(usize, usize, usize) -> Linear {
    move |outputs, inputs, salt| {
        let codes: Vec<u8> = (0..outputs * inputs)
            .map(|index| any(index, salt, 256) as u8)
            .map(|code| if code & 0x7f == 0x7f { 0x80 } else { code })
            .collect();
        let (down, across) = (outputs.div_ceil(rows), inputs.div_ceil(columns));
        let scales: Vec<f32> = (0..down * across).map(|index| scale(index, salt) / 30.0).collect();
        let weight = |at: usize| {
            let block = at / inputs / rows * across + at % inputs / columns;
            widen_e4m3(codes[at]) * scales[block]
        };
        Linear {
            weights: (0..codes.len()).map(weight).collect(),
            tensors: vec![
                ("weight", Stored::bytes(Dtype::F8_E4M3, &[outputs, inputs], codes.clone())),
                (name, Stored::f32(&[down, across], &scales)),
            ],
        }
    }
}

#[test]
fn fp8_in_blocks_and_whole() {
    let config = |block: Value| json!({"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": block});
    check("blocks of 128", &config(json!([128, 128])), &fp8_blocks(128, 128, "weight_scale_inv"));
    check("odd blocks", &config(json!([5, 24])), &fp8_blocks(5, 24, "weight_scale_inv"));
    let mut whole = config(Value::Null);
    whole["activation_scheme"] = json!("static");
    check("one block", &whole, &|outputs, inputs, salt| {
        let mut linear = fp8_blocks(outputs, inputs, "weight_scale")(outputs, inputs, salt);
        linear.tensors[1].1.shape = vec![];
        linear.tensors.push(("input_scale", Stored::f32(&[], &[0.5])));
        linear
    });
}

/// Configuration of compressed-tensors with one group of linears.
fn compressed(format: &str, weights: Value) -> Value {
    json!({"quant_method": "compressed-tensors", "format": format, "ignore": ["re:.*lm_head"],
        "config_groups": {"group_0": {"targets": ["re:.*_proj"], "weights": weights, "input_activations": null}}})
}

#[test]
fn compressed_tensors_by_group_and_block() {
    let block =
        json!({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 40], "symmetric": true});
    check("blocks", &compressed("float-quantized", block), &fp8_blocks(32, 40, "weight_scale"));
    for bits in [4, 8] {
        let packed =
            json!({"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": false});
        check("packed", &compressed("pack-quantized", packed), &|outputs, inputs, salt| {
            let (groups, per_word, end) = (inputs / 32, 32 / bits, 1usize << bits);
            let code = |output: usize, input: usize| any(output * inputs + input, salt, end) as u32;
            let zero = |output: usize, index: usize| any(output * groups + index, salt + 1, end) as u32;
            let scales: Vec<f32> = (0..groups * outputs).map(|index| scale(index, salt) * 8.0 / end as f32).collect();
            let weight = |output: usize, input: usize| {
                scales[output * groups + input / 32] * (code(output, input) as f32 - zero(output, input / 32) as f32)
            };
            Linear {
                weights: (0..outputs * inputs).map(|at| weight(at / inputs, at % inputs)).collect(),
                tensors: vec![
                    (
                        "weight_packed",
                        Stored::words(outputs, inputs / per_word, bits, |output, word, index| {
                            code(output, word * per_word + index)
                        }),
                    ),
                    (
                        "weight_zero_point",
                        Stored::words(outputs / per_word, groups, bits, |word, group, index| {
                            zero(word * per_word + index, group)
                        }),
                    ),
                    ("weight_scale", Stored::f32(&[outputs, groups], &scales)),
                    ("weight_shape", Stored::bytes(Dtype::I64, &[2], vec![0; 16])),
                ],
            }
        });
    }
    let bytes = json!({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": false});
    check("bytes", &compressed("int-quantized", bytes), &|outputs, inputs, salt| {
        let code = |at: usize| any(at, salt, 256) as u8 as i8;
        let zero = |output: usize| any(output, salt + 1, 256) as u8 as i8;
        let scales: Vec<f32> = (0..outputs).map(|index| scale(index, salt) / 30.0).collect();
        Linear {
            weights: (0..outputs * inputs)
                .map(|at| scales[at / inputs] * (f32::from(code(at)) - f32::from(zero(at / inputs))))
                .collect(),
            tensors: vec![
                (
                    "weight",
                    Stored::bytes(
                        Dtype::I8,
                        &[outputs, inputs],
                        (0..outputs * inputs).map(|at| code(at) as u8).collect(),
                    ),
                ),
                ("weight_scale", Stored::f32(&[outputs, 1], &scales)),
                (
                    "weight_zero_point",
                    Stored::bytes(Dtype::I8, &[outputs, 1], (0..outputs).map(|at| zero(at) as u8).collect()),
                ),
            ],
        }
    });
}

#[test]
fn a_quantised_head_and_linears_that_stay_floats() {
    let dir = copy("llama-fp8-channel");
    edit(dir.path(), "config.json", |config| {
        config["quantization_config"]["ignore"] = json!(["model.layers.1.mlp", "re:.*q_proj"]);
    });
    // What is excluded must be floats.
    refused(dir.path(), "model.safetensors", &["model.layers.0.self_attn.q_proj.weight", "F8_E4M3", "expected F32"]);
    let plain = Stored::f16(&[96, 96], &(0..96 * 96).map(|at| scale(at, 3) - 0.008).collect::<Vec<_>>());
    let wide = |rows: usize, columns: usize| {
        Stored::f16(&[rows, columns], &(0..rows * columns).map(|at| scale(at, 4) - 0.008).collect::<Vec<_>>())
    };
    edit_tensors(dir.path(), |tensors| {
        for layer in 0..3 {
            tensors.insert(format!("model.layers.{layer}.self_attn.q_proj.weight"), plain.clone());
        }
        tensors.insert("model.layers.1.mlp.gate_proj.weight".into(), wide(160, 96));
        tensors.insert("model.layers.1.mlp.up_proj.weight".into(), wide(160, 96));
        tensors.insert("model.layers.1.mlp.down_proj.weight".into(), wide(96, 160));
        let head = tensors.get_mut("lm_head.weight").expect("a head");
        *head = Stored::bytes(Dtype::F8_E4M3, &head.shape, vec![0x38; 1031 * 96]);
        tensors.insert("lm_head.weight_scale".into(), Stored::f32(&[1031, 1], &vec![0.01; 1031]));
    });
    let model = Model::load(dir.path(), &mut |_| {}).expect("a good checkpoint");
    let mut runner = Runner::new(model, Kernels::detect());
    runner.draw(&[5, 6, 7], 0, 3, &watched());
    let logits = runner.engine.logits(0).expect("sampled");
    assert!(logits.iter().all(|logit| *logit == logits[0] && logit.is_finite()), "a head of equal rows");
}

#[test]
fn quantising_at_load_stays_close_and_is_another_model() {
    // Random weights carry errors on and amplify them; trained ones, the last, forgive more.
    for (path, tied, limits) in [
        ("tests/golden/llama", false, [0.2, 0.4, 0.8]),
        ("tests/golden/llama3-bf16-sharded", true, [0.2, 0.4, 0.8]),
        ("models/demo", true, [0.06, 0.1, 0.25]),
    ] {
        let dir = repository(path);
        let plain = load(path);
        let tokens: Vec<u32> = (0..60).map(|index| index * 13 % 900).collect();
        let logits = |model: std::sync::Arc<Model>, kernels| {
            let mut runner = Runner::new(model, kernels);
            runner.draw(&tokens, 0, 64, &watched());
            runner.engine.logits(0).expect("sampled").to_vec()
        };
        let mut fingerprints = vec![plain.info().fingerprint.clone()];
        for (quantize, limit) in [Quantize::Int8, Quantize::Fp8, Quantize::Int4].into_iter().zip(limits) {
            let mut reports = Vec::new();
            let model = Model::load_quantized(&dir, Some(quantize), &mut |progress| reports.push(progress.done));
            let model = model.expect("a good checkpoint");
            assert_eq!(reports[reports.len() - 2], *reports.last().expect("progress"), "every tensor was counted");
            fingerprints.push(model.info().fingerprint.clone());
            assert_eq!(model.info().dtype, format!("{quantize} (quantised from {})", plain.info().dtype));
            assert_eq!(model.info().parameters, plain.info().parameters);
            assert!(model.info().weight_bytes < plain.info().weight_bytes, "{quantize} {tied}");
            for kernels in Kernels::available() {
                let (ours, expected) = (logits(model.clone(), kernels), logits(plain.clone(), kernels));
                let size = |values: &[f32]| values.iter().map(|value| f64::from(value * value)).sum::<f64>().sqrt();
                let difference: Vec<f32> = ours.iter().zip(&expected).map(|(a, b)| a - b).collect();
                let error = size(&difference) / size(&expected);
                assert!(error < limit && error > 1e-5, "{path} {quantize} {}: {error}", kernels.name);
            }
        }
        fingerprints.sort();
        fingerprints.dedup();
        assert_eq!(fingerprints.len(), 4, "models that compute other pages have other names");
    }
}

#[test]
fn every_family_can_be_quantised_at_load() {
    let tokens: Vec<u32> = (0..20).map(|index| index * 13 % 900).collect();
    for family in [
        "cohere",
        "deepseek_v2",
        "deepseek_v3",
        "gemma2",
        "gemma3",
        "gptneox",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3moe",
    ] {
        let dir = repository("tests/golden").join(family);
        let logits = |quantize: Option<Quantize>| {
            let model = Model::load_quantized(&dir, quantize, &mut |_| {}).expect(family);
            let mut runner = Runner::new(model, Kernels::detect());
            runner.draw(&tokens, 0, 64, &watched());
            runner.engine.logits(0).expect("sampled").to_vec()
        };
        let (ours, expected) = (logits(Some(Quantize::Int8)), logits(None));
        let size = |values: &[f32]| values.iter().map(|value| f64::from(value * value)).sum::<f64>().sqrt();
        let difference: Vec<f32> = ours.iter().zip(&expected).map(|(a, b)| a - b).collect();
        let error = size(&difference) / size(&expected);
        assert!(error > 1e-5 && error < 0.15, "{family}: {error}");
    }
}

#[test]
fn what_cannot_be_quantised_is_named() {
    let quantised = repository("tests/golden/llama-awq-int4-g32");
    let error = Model::load_quantized(&quantised, Some(Quantize::Int4), &mut |_| {}).expect_err("it is already");
    let Error::Setting { field, problem } = &error else { panic!("{error:?}") };
    assert_eq!(*field, "quantize");
    assert!(problem.contains("int4 (awq, group 32)"), "{problem}");

    let dir = copy("llama");
    edit_tensors(dir.path(), |tensors| {
        let weight = tensors.get_mut("model.layers.1.mlp.up_proj.weight").expect("it is there");
        weight.bytes[(7 * 96 + 3) * 4..][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    });
    let error = Model::load_quantized(dir.path(), Some(Quantize::Int8), &mut |_| {}).expect_err("infinity");
    let text = error.to_string();
    for word in ["model.safetensors", "model.layers.1.mlp.up_proj.weight", "output 7 and input 3 is inf"] {
        assert!(text.contains(word), "{text:?} lacks {word:?}");
    }
}

#[test]
fn names_for_people_tell_width_method_and_groups() {
    for (name, dtype) in [
        ("llama-gptq-int4-g32", "int4 (gptq, group 32)"),
        ("llama-awq-int4-g32", "int4 (awq, group 32)"),
        ("llama-fp8-tensor", "fp8 (compressed-tensors, per tensor)"),
        ("llama-int8-w8a8", "int8 (compressed-tensors, per channel)"),
    ] {
        assert_eq!(load(&format!("tests/golden/{name}")).info().dtype, dtype);
    }
}

#[test]
fn unsupported_configurations_are_named_with_what_is_known() {
    let check = |name: &str, change: &dyn Fn(&mut Value), words: &[&str]| {
        let dir = copy(name);
        edit(dir.path(), "config.json", |config| change(&mut config["quantization_config"]));
        refused(dir.path(), "config.json", words);
    };
    let gptq = "llama-gptq-int4-g32";
    check(
        gptq,
        &|it| it["quant_method"] = json!("bitsandbytes"),
        &["quantization_config.quant_method", "bitsandbytes", "gptq, awq, fp8"],
    );
    check(gptq, &|it| it["quant_method"] = Value::Null, &["quantization_config.quant_method", "unknown"]);
    check(gptq, &|it| it["bits"] = json!(3), &["quantization_config.bits: 3 is not supported; known: 4, 8"]);
    check(gptq, &|it| it["bits"] = json!("four"), &["quantization_config.bits", "four"]);
    check(gptq, &|it| it["group_size"] = json!(36), &["quantization_config.group_size: 36 is not supported"]);
    check(
        gptq,
        &|it| it["group_size"] = json!(64),
        &["quantization_config.group_size: 64 does not divide the 96 inputs of", "q_proj"],
    );
    check(
        gptq,
        &|it| it["checkpoint_format"] = json!("marlin"),
        &["quantization_config.checkpoint_format: marlin", "gptq_v2"],
    );
    check(gptq, &|it| it["dynamic"] = json!({"+:.*": {"bits": 8}}), &["quantization_config.dynamic"]);
    let awq = "llama-awq-int4-g32";
    check(
        awq,
        &|it| it["version"] = json!("gemv"),
        &["quantization_config.version: gemv is not supported; known: gemm"],
    );
    check(awq, &|it| it["bits"] = json!(8), &["quantization_config.bits: 8 is not supported; known: 4"]);
    check(awq, &|it| it["zero_point"] = json!(false), &["quantization_config.zero_point: false"]);
    let fp8 = "llama-fp8-channel";
    let at = "quantization_config.config_groups.group_0.weights";
    check(
        fp8,
        &|it| it["format"] = json!("nvfp4-pack-quantized"),
        &["quantization_config.config_groups.group_0.format: nvfp4", "int-quantized"],
    );
    check(fp8, &|it| it["config_groups"] = json!({}), &["quantization_config.config_groups: empty"]);
    check(fp8, &|it| it["ignore"] = json!(["re:("]), &["quantization_config.ignore"]);
    let weights = |it: &mut Value, field: &str, value: Value| it["config_groups"]["group_0"]["weights"][field] = value;
    check(fp8, &|it| weights(it, "num_bits", json!(4)), &[at, ".num_bits: 4 is not supported; known: 8"]);
    check(fp8, &|it| weights(it, "strategy", json!("tensor_group")), &[at, ".strategy: tensor_group", "channel"]);
    check(
        fp8,
        &|it| weights(it, "type", json!("int")),
        &[at, ".type: int is not supported with format float-quantized"],
    );
    check(fp8, &|it| weights(it, "symmetric", json!(false)), &[at, ".symmetric: false"]);
    let block = json!({"quant_method": "fp8", "weight_block_size": [128, 12]});
    check(fp8, &|it| *it = block.clone(), &["quantization_config.weight_block_size: [128, 12] is not supported"]);
    check(fp8, &|it| *it = json!({"quant_method": "fp8", "fmt": "e5m2"}), &["quantization_config.fmt: e5m2", "e4m3"]);
    check(
        fp8,
        &|it| *it = json!({"quant_method": "fp8", "activation_scheme": "none"}),
        &["quantization_config.activation_scheme: none"],
    );
}

#[test]
fn hostile_tensors_are_named() {
    let check = |name: &str, tensor: &str, change: &dyn Fn(&mut Stored), words: &[&str]| {
        let dir = copy(name);
        let tensor = format!("model.layers.1.{tensor}");
        edit_tensors(dir.path(), |tensors| change(tensors.get_mut(&tensor).expect("it is there")));
        refused(dir.path(), "model.safetensors", &[&[tensor.as_str()], words].concat());
    };
    let gone = |name: &str, tensor: &str, words: &[&str]| {
        let dir = copy(name);
        let tensor = format!("model.layers.1.{tensor}");
        edit_tensors(dir.path(), |tensors| drop(tensors.remove(&tensor)));
        refused(dir.path(), "model.safetensors", &[&[tensor.as_str(), "missing"], words].concat());
    };
    let gptq = "llama-gptq-int4-g32";
    for tensor in ["qweight", "qzeros", "scales"] {
        gone(gptq, &format!("mlp.up_proj.{tensor}"), &[]);
        let turn = |it: &mut Stored| it.shape.reverse();
        check(gptq, &format!("mlp.up_proj.{tensor}"), &turn, &["shape", "expected"]);
    }
    gone("llama-awq-int4-g32", "self_attn.o_proj.scales", &[]);
    for name in ["llama-fp8-channel", "llama-fp8-tensor", "llama-int8-w8a8"] {
        gone(name, "mlp.down_proj.weight_scale", &[]);
    }
    let half =
        |value: f32| move |it: &mut Stored| it.bytes[10..12].copy_from_slice(&f16::from_f32(value).to_le_bytes());
    for (value, found) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-1.0, "-1"), (-0.0, "-0")] {
        let words = [&format!("scale 5 is {found}, expected a finite number from 0 on")[..]];
        check(gptq, "mlp.up_proj.scales", &half(value), &words);
        check("llama-awq-int4-g32", "mlp.up_proj.scales", &half(value), &words);
    }
    let single =
        |at: usize, value: f32| move |it: &mut Stored| it.bytes[at * 4..][..4].copy_from_slice(&value.to_le_bytes());
    check("llama-fp8-channel", "mlp.up_proj.weight_scale", &single(9, f32::NAN), &["scale 9 is NaN"]);
    check("llama-int8-w8a8", "mlp.up_proj.weight_scale", &single(9, f32::NAN), &["scale 9 is NaN"]);
    check("llama-fp8-tensor", "mlp.up_proj.weight_scale", &single(0, f32::INFINITY), &["scale 0 is inf"]);
    check("llama-fp8-tensor", "mlp.up_proj.input_scale", &single(0, 0.0), &["scale 0 is 0"]);
    check("llama-fp8-tensor", "mlp.up_proj.input_scale", &single(0, f32::NAN), &["scale 0 is NaN"]);
    check(
        "llama-fp8-channel",
        "mlp.up_proj.weight",
        &|it| it.bytes[2 * 96 + 5] = 0xff,
        &["output 2 and input 5 is NaN"],
    );
    check(
        "llama-fp8-channel",
        "mlp.up_proj.weight",
        &|it| it.shape = vec![80, 192],
        &["shape [80, 192], expected [160, 96]"],
    );
    check("llama-int8-w8a8", "mlp.up_proj.weight", &|it| it.dtype = Dtype::U8, &["type U8, expected I8"]);
    check(gptq, "mlp.up_proj.g_idx", &single(4, f32::from_bits(9)), &["input 4 is in group 9, expected one of 3"]);
    check(gptq, "mlp.up_proj.g_idx", &single(4, f32::from_bits(-2i32 as u32)), &["input 4 is in group -2"]);
    check(gptq, "mlp.up_proj.g_idx", &single(4, f32::from_bits(2)), &["group 0 has 31 inputs, expected 32"]);
}
