//! Stop strings, found across any cut of the text.
//!
//! While a choice has stop strings, its last `max(len) - 1` characters are held back: any stop string that later text completes begins
//! inside them, so nothing is shown that a stop string would have taken away.

/// Searches one choice's text.
#[derive(Debug)]
pub(crate) struct StopStrings {
    strings: Vec<String>,
    /// Whether a found string stays in the text.
    include: bool,
    /// Characters held back.
    hold: usize,
    /// Text not yet shown. A match may begin anywhere in it.
    held: String,
    /// Bytes of `held` in which a match may not begin: text from before `min_tokens` was reached.
    exempt: usize,
}

/// What became of a piece of text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Go on.
    Open,
    /// This stop string (an index) was found; the text has ended.
    Found(usize),
}

impl StopStrings {
    pub(crate) fn new(strings: Vec<String>, include: bool) -> Self {
        let hold = strings.iter().map(|s| s.chars().count()).max().unwrap_or(0).saturating_sub(1);
        Self { strings, include, hold, held: String::new(), exempt: 0 }
    }

    /// Returns the string an [`Outcome::Found`] names.
    pub(crate) fn string(&self, index: usize) -> &str {
        &self.strings[index]
    }

    /// Takes the next piece of text and appends to `out` what may be shown. With `armed` false (before `min_tokens`) nothing
    /// in this piece can begin a match.
    pub(crate) fn push(&mut self, text: &str, armed: bool, out: &mut String) -> Outcome {
        if self.strings.is_empty() {
            out.push_str(text);
            return Outcome::Open;
        }
        self.held.push_str(text);
        if !armed {
            self.exempt = self.held.len();
        }
        if let Some((at, index)) = self.first_match() {
            let end = if self.include { at + self.strings[index].len() } else { at };
            out.push_str(&self.held[..end]);
            self.held.clear();
            return Outcome::Found(index);
        }
        self.release(out);
        Outcome::Open
    }

    /// Appends what was held back: the text ended by itself.
    pub(crate) fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// The match that is complete first, reading from the left, so that no cut of the text changes the answer; of those, the
    /// longest. Returns where it begins and which string it is.
    fn first_match(&self) -> Option<(usize, usize)> {
        let matches = self.strings.iter().enumerate().filter_map(|(index, string)| {
            let at = self.held[self.exempt..].find(string.as_str())? + self.exempt;
            Some((at + string.len(), at, index))
        });
        matches.min().map(|(_, at, index)| (at, index))
    }

    fn release(&mut self, out: &mut String) {
        let keep_from = match self.hold {
            0 => self.held.len(),
            hold => self.held.char_indices().rev().nth(hold - 1).map_or(0, |(at, _)| at),
        };
        out.push_str(&self.held[..keep_from]);
        self.held.drain(..keep_from);
        self.exempt = self.exempt.saturating_sub(keep_from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(pieces: &[&str], stops: &[&str], include: bool) -> (String, Option<usize>) {
        let mut search = StopStrings::new(stops.iter().map(|s| s.to_string()).collect(), include);
        let mut out = String::new();
        for piece in pieces {
            if let Outcome::Found(index) = search.push(piece, true, &mut out) {
                return (out, Some(index));
            }
        }
        search.finish(&mut out);
        (out, None)
    }

    fn check(pieces: &[&str], stops: &[&str], text: &str, found: Option<usize>) {
        assert_eq!(run(pieces, stops, false), (text.to_string(), found), "{pieces:?} {stops:?}");
    }

    #[test]
    fn finds_stops_across_pieces() {
        check(&["one two three"], &["two"], "one ", Some(0));
        check(&["one t", "w", "o three"], &["two"], "one ", Some(0));
        check(&["one t", "en"], &["two"], "one ten", None);
        check(&["ab", "c"], &["bc", "ab"], "", Some(1));
        check(&["abc"], &["abc", "b"], "a", Some(1));
        check(&["größ", "e STOP"], &["ße"], "grö", Some(0));
        check(&["plain"], &[], "plain", None);
        assert_eq!(run(&["a##", "#b"], &["###"], true), ("a###".into(), Some(0)));
    }

    #[test]
    fn holds_back_no_more_than_it_must() {
        let mut search = StopStrings::new(vec!["END".into()], false);
        let mut out = String::new();
        assert_eq!(search.push("abcd", true, &mut out), Outcome::Open);
        assert_eq!(out, "ab");
    }

    #[test]
    fn text_before_min_tokens_cannot_begin_a_match() {
        let mut search = StopStrings::new(vec!["b".into()], false);
        let mut out = String::new();
        assert_eq!(search.push("abc", false, &mut out), Outcome::Open);
        assert_eq!(search.push("ab", true, &mut out), Outcome::Found(0));
        assert_eq!(out, "abca");
    }

    proptest! {
        #[test]
        fn any_split_reads_like_the_whole(text in "[abc]{0,24}", cuts in proptest::collection::vec(1usize..4, 0..24),
                                          stops in proptest::collection::vec("[abc]{1,4}", 0..3), include: bool) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let (mut pieces, mut rest, mut cuts) = (Vec::new(), &text[..], cuts.into_iter());
            while !rest.is_empty() {
                let (head, tail) = rest.split_at(cuts.next().unwrap_or(1).min(rest.len()));
                pieces.push(head);
                rest = tail;
            }
            let (split, split_found) = run(&pieces, &stops, include);
            let (whole, whole_found) = run(&[&text], &stops, include);
            prop_assert_eq!(split_found, whole_found);
            prop_assert_eq!(&split, &whole);
            if split_found.is_none() {
                prop_assert_eq!(split, text);
            }
        }
    }
}
