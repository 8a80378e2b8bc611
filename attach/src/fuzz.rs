//! What fuzzing calls: the bytes that a router sends, as gRPC hands them over. Nothing may panic, or pass a submission that a step
//! could stumble over.

use crate::{
    LegId, StreamId, Submission,
    submission::{Model, decode_grammar},
};
use proto::{Message, RouterFrame};

/// Reads `input` as a frame of a router, and every submission in it.
pub fn frame(input: &[u8]) {
    let model = Model { vocab_size: 100, page_tokens: 16, eos: vec![0], adapters: None };
    let Ok(frame) = RouterFrame::decode(input) else { return };
    for mut submit in frame.submit {
        let id = LegId { stream: StreamId(1), attempt: submit.attempt };
        let _ = submit.grammar.take().map(decode_grammar);
        if let Ok(submission) = Submission::decode(id, submit, &model) {
            let (known, prompt) = (submission.sequence.history.len(), submission.sequence.prompt_tokens);
            assert!((1..=known).contains(&prompt), "{prompt} of {known} tokens are the prompt");
            assert!(submission.sequence.history.tokens().iter().all(|token| *token < 100), "a token nobody knows");
            assert!(known - prompt < submission.sequence.stop.max_tokens, "nothing is left to draw");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A frame that a worker would take.
    fn good() -> Vec<u8> {
        let submit = proto::Submit {
            attempt: 7,
            tokens: proto::pack(&[&(0..40).collect::<Vec<_>>()]),
            prompt_tokens: 33,
            sampling: Some(proto::Sampling { top_p: 1.0, repetition_penalty: 1.0, ..Default::default() }),
            stop: Some(proto::Stop { max_tokens: 90, ..Default::default() }),
            fetch: Some(proto::Fetch { worker: "w".into(), link: "l:1".into(), pages: 2, ..Default::default() }),
            leg: Some(proto::submit::Leg::Local(proto::Local {})),
            ..Default::default()
        };
        RouterFrame { submit: vec![submit], ..Default::default() }.encode_to_vec()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4_000, ..Default::default() })]

        #[test]
        fn any_bytes_are_read_or_refused(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6)) {
            let mut bytes = good();
            for (at, byte) in edits {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            frame(&bytes);
        }
    }
}
