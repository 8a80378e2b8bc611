//! How vocabularies spell bytes.

/// Appends the bytes that `token` stands for to `out`: it is spelled in the byte-level alphabet of GPT-2, or as a sentence piece
/// with byte fallback.
pub fn token_bytes(token: &str, byte_level: bool, out: &mut Vec<u8>) {
    if byte_level { byte_level_bytes(token, out) } else { sentence_piece_bytes(token, out) }
}

/// Undoes GPT-2's printable spelling of bytes. A token with a character outside that alphabet stands for itself.
fn byte_level_bytes(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        match byte_of_char(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// The byte-level alphabet: printable Latin-1 stands for itself, the 68 other bytes for U+0100 and up, in order.
fn byte_of_char(c: char) -> Option<u8> {
    match u32::from(c) {
        c @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(c as u8),
        c @ 0x100..=0x120 => Some((c - 0x100) as u8),
        c @ 0x121..=0x142 => Some((c - 0x121) as u8 + 0x7f),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// `▁` is a space, `<0x0A>` is a byte, all else stands for itself.
fn sentence_piece_bytes(token: &str, out: &mut Vec<u8>) {
    let byte = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')).filter(|hex| hex.len() == 2);
    match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => out.push(byte),
        None => out.extend_from_slice(token.replace('▁', " ").as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let mut seen = [false; 256];
        for c in (0..0x200).filter_map(char::from_u32) {
            if let Some(byte) = byte_of_char(c) {
                assert!(!seen[byte as usize], "{byte} has two characters");
                seen[byte as usize] = true;
            }
        }
        assert!(seen.iter().all(|&s| s));
        assert_eq!(byte_of_char('Ġ'), Some(b' '));
        assert_eq!(byte_of_char('Ċ'), Some(b'\n'));
    }

    #[test]
    fn sentence_pieces_are_spaces_bytes_or_themselves() {
        let bytes = |token| {
            let mut out = Vec::new();
            sentence_piece_bytes(token, &mut out);
            out
        };
        assert_eq!(bytes("▁a"), b" a");
        assert_eq!(bytes("<0xE2>"), [0xe2]);
        assert_eq!(bytes("<0xEE"), b"<0xEE");
    }
}
