//! The wire between a router and its workers, and nothing else.
//!
//! `proto/worker.proto` is the document; this crate is its generated code. Wire types stop at `rpc.rs` in the workers and at
//! `fleet.rs` in the router. The hand-off between workers has its own wire, in `kv-transfer`.
#![forbid(unsafe_code)]
#![allow(missing_debug_implementations, unreachable_pub, clippy::all)]

/// Reads and writes messages outside a stream.
pub use prost::Message;

use prost::bytes::Bytes;

tonic::include_proto!("baton.v1");

/// Version of this protocol; both ends refuse another one, naming both.
pub const PROTOCOL: u32 = 3;

/// Lays the tokens of a [`Submit`] end to end.
pub fn pack(parts: &[&[u32]]) -> Bytes {
    let mut packed = vec![0; 4 * parts.iter().map(|part| part.len()).sum::<usize>()];
    let (mut rest, _) = packed.as_chunks_mut();
    for part in parts {
        let (bytes, behind) = rest.split_at_mut(part.len());
        bytes.iter_mut().zip(*part).for_each(|(bytes, token)| *bytes = token.to_le_bytes());
        rest = behind;
    }
    packed.into()
}

/// Takes them apart; `None` when the last one is cut.
pub fn unpack(bytes: &[u8]) -> Option<Vec<u32>> {
    let (tokens, []) = bytes.as_chunks() else { return None };
    Some(tokens.iter().map(|token| u32::from_le_bytes(*token)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_what_they_were() {
        let tokens = [1, 0, u32::MAX, 0x01020304];
        let packed = pack(&[&tokens[..1], &[], &tokens[1..]]);
        assert_eq!(packed[12..], [4, 3, 2, 1]);
        assert_eq!(unpack(&packed).as_deref(), Some(&tokens[..]));
        assert_eq!((unpack(&packed[..3]), unpack(&[])), (None, Some(vec![])));
    }
}
