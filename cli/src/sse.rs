//! Server-sent events, cut out of a byte stream.

/// Collects bytes and hands out the data of whole events.
#[derive(Debug, Default)]
pub(crate) struct Events {
    buffer: Vec<u8>,
}

impl Events {
    /// Adds what came from the network.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Takes the data of the next `data:` line; other lines (comments, event names) are skipped.
    pub(crate) fn pop(&mut self) -> Option<String> {
        while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            if let Some(data) = line.trim_end_matches(['\r', '\n']).strip_prefix("data:") {
                return Some(data.trim_start().to_owned());
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_any_cut() {
        let stream = ": keep-alive\n\ndata: {\"a\":\"é\"}\n\nevent: x\r\ndata:two\r\n\r\ndata: [DONE]\n\n";
        for chunk in 1..stream.len() {
            let mut events = Events::default();
            let mut seen = Vec::new();
            for bytes in stream.as_bytes().chunks(chunk) {
                events.push(bytes);
                seen.extend(std::iter::from_fn(|| events.pop()));
            }
            assert_eq!(seen, ["{\"a\":\"é\"}", "two", "[DONE]"], "cut every {chunk} bytes");
        }
    }
}
