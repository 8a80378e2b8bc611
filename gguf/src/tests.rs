use crate::{Error, File, TensorType, Value, Writer};
use rand::{Rng, SeedableRng, rngs::StdRng};

fn parse(bytes: &[u8]) -> Result<File<'_>, Error> {
    File::parse(bytes, bytes.len() as u64)
}

fn sample() -> Writer {
    let mut writer = Writer::default();
    writer.text("general.architecture", "llama").u32("llama.block_count", 3).f32("eps", 1e-5).flag("yes", true);
    writer.texts("tokens", &["a", "b", ""]).i32s("types", &[1, -2]).f32s("scores", &[0.5]);
    writer.tensor("norm", &[4], TensorType::F32, &[7; 16]).tensor("w", &[2, 32], TensorType::Q8_0, &[9; 68]);
    writer
}

#[test]
fn what_is_written_is_read() {
    let bytes = sample().finish();
    let file = parse(&bytes).expect("a good file");
    assert_eq!(file.text("general.architecture"), Ok(Some("llama")));
    assert_eq!(file.count("llama.block_count"), Ok(Some(3)));
    assert_eq!(file.number("eps"), Ok(Some(f64::from(1e-5_f32))));
    assert_eq!(file.flag("yes"), Ok(Some(true)));
    assert_eq!(file.text("absent"), Ok(None));
    let tokens: Vec<_> = file.array("tokens").expect("an array").expect("there").iter().collect();
    assert_eq!(tokens, [Value::Text(b"a"), Value::Text(b"b"), Value::Text(b"")]);
    let types: Vec<_> = file.array("types").expect("an array").expect("there").iter().collect();
    assert_eq!(types, [Value::Signed(1), Value::Signed(-2)]);

    let norm = file.tensor("norm").expect("a tensor");
    assert_eq!((&norm.shape[..], norm.kind, &bytes[norm.bytes.clone()]), (&[4][..], TensorType::F32, &[7; 16][..]));
    let w = file.tensor("w").expect("a tensor");
    assert_eq!((&w.shape[..], w.kind.name(), &bytes[w.bytes.clone()]), (&[2, 32][..], "Q8_0", &[9; 68][..]));
    assert!(file.count("eps").expect_err("a float").to_string().contains("`eps`"));
}

#[test]
fn the_header_is_enough() {
    let bytes = sample().finish();
    let file_bytes = bytes.len() as u64;
    let header = parse(&bytes).expect("a good file").tensor("norm").expect("there").bytes.start;
    for length in 0..header - 32 {
        assert_eq!(File::parse(&bytes[..length], file_bytes).expect_err("too short"), Error::Incomplete(length));
        assert!(matches!(parse(&bytes[..length]), Err(Error::Invalid(_))), "a file cut after {length}");
    }
    let file = File::parse(&bytes[..header], file_bytes).expect("the header");
    assert_eq!(file.tensors().count(), 2);
    assert!(parse(&bytes[..bytes.len() - 32]).expect_err("cut").to_string().contains("`w`"));
}

/// Writes `new` over the first place where `old` stands.
fn replaced(bytes: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    let at = bytes.windows(old.len()).position(|window| window == old).expect("it is there");
    let mut bytes = bytes.to_vec();
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

#[test]
fn problems_are_named() {
    let good = sample().finish();
    let check = |bytes: &[u8], words: &[&str]| {
        let error = parse(bytes).expect_err("a bad file").to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{error:?} lacks {word:?}"));
    };
    check(b"", &["magic"]);
    check(b"GGML\x03\0\0\0", &["GGML", "GGUF"]);
    check(&replaced(&good, b"GGUF\x03", b"GGUF\x01"), &["version 1", "2, 3"]);
    check(&replaced(&good, b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03"), &["big-endian"]);
    check(&replaced(&good, b"\x02\0\0\0\0\0\0\0\x07", &[0xff; 8]), &["tensor_count", "18446744073709551615"]);
    check(&replaced(&good, b"\x07\0\0\0\0\0\0\0\x14", &[0xff; 7]), &["metadata_kv_count"]);
    let huge = [&b"tokens\x09\0\0\0\x08\0\0\0"[..], &[0xff; 8]].concat();
    check(&replaced(&good, b"tokens\x09\0\0\0", &huge), &["tokens", "18446744073709551615"]);
    check(&replaced(&good, b"eps\x06", b"eps\x0d"), &["eps", "13"]);
    check(&replaced(&good, b"scores", b"tokens"), &["tokens", "twice"]);
    let norm = |tail: &[u8]| replaced(&good, b"norm\x01\0\0\0", &[b"norm".as_slice(), tail].concat());
    check(&norm(b"\x05\0\0\0"), &["norm", "5 dimensions"]);
    check(&norm(b"\x01\0\0\0\0\0\0\0\0\0\0\0"), &["norm", "[0]"]);
    check(&norm(b"\x01\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff"), &["norm", "18446744073709551615"]);
    check(&norm(b"\x01\0\0\0\x04\0\0\0\0\0\0\0\x63\0\0\0"), &["norm", "type 99"]);
    check(&norm(b"\x01\0\0\0\x04\0\0\0\0\0\0\0\0\0\0\0\x01"), &["norm", "offset 1", "32"]);
    check(&norm(b"\x01\0\0\0\x04\0\0\0\0\0\0\0\0\0\0\0\x20"), &["norm", "overlap"]);
    check(&norm(b"\x01\0\0\0\x04\0\0\0\0\0\0\0\x08\0\0\0"), &["norm", "Q8_0", "4"]);
    let mut twice = sample();
    check(&twice.tensor("w", &[1], TensorType::F32, &[0; 4]).finish(), &["`w`", "twice"]);
    check(&sample().u32("general.alignment", 33).finish(), &["general.alignment", "33"]);
}

#[test]
fn arrays_of_arrays_end_somewhere() {
    let nested = |depth: usize| {
        let mut file = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0k\x09\0\0\0".to_vec();
        (1..depth).for_each(|_| file.extend(b"\x09\0\0\0\x01\0\0\0\0\0\0\0"));
        file.extend(b"\0\0\0\0\x01\0\0\0\0\0\0\0\x2a");
        file
    };
    let bytes = nested(4);
    let outer = parse(&bytes).expect("four levels").array("k").expect("an array").expect("there");
    assert!(matches!(outer.iter().next(), Some(Value::Array(inner)) if inner.len() == 1));
    assert!(parse(&nested(5)).expect_err("five levels").to_string().contains('k'));
    assert!(parse(&nested(100_000)).is_err());
}

#[test]
fn other_types_keep_their_names() {
    let mut writer = Writer::default();
    let bytes = writer.tensor("x", &[256], TensorType::Q6K, &[0; 210]).finish();
    let bytes = replaced(&bytes, b"\x0e\0\0\0", b"\x0c\0\0\0");
    assert_eq!(parse(&bytes).expect("known").tensor("x").expect("there").kind, TensorType::Q4K);
    let bytes = replaced(&bytes, b"\x0c\0\0\0", b"\x10\0\0\0");
    let kind = parse(&bytes).expect("known").tensor("x").expect("there").kind;
    assert_eq!((kind.name(), kind.block_bytes()), ("IQ2_XXS", 66));
    assert!(!TensorType::READABLE.contains(&kind));
}

/// Whatever stands in the file, it is read to the end of every array or refused.
#[test]
fn mutations_never_panic() {
    let good = sample().finish();
    let mut rng = StdRng::seed_from_u64(1);
    for _ in 0..5_000 {
        let mut bytes = good.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bytes.len());
            match rng.random_range(0..4) {
                0 => bytes[at] = rng.random(),
                1 => bytes[at] ^= 1 << rng.random_range(0..8),
                2 => bytes.truncate(at.max(1)),
                _ => bytes[at..].iter_mut().take(8).for_each(|byte| *byte = 0xff),
            }
        }
        if let Ok(file) = parse(&bytes) {
            let elements = file.metadata().filter_map(|(_, value)| match value {
                Value::Array(array) => Some(array.iter().count()),
                _ => None,
            });
            assert!(elements.sum::<usize>() <= bytes.len());
            file.tensors().for_each(|(_, tensor)| assert!(tensor.bytes.end <= bytes.len()));
        }
    }
}
