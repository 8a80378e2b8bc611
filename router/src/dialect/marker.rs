//! Finds markers such as `<tool_call>` in a text that comes character by character.

/// What may become a marker.
#[derive(Debug, Default)]
pub(super) struct Finder {
    held: String,
}

impl Finder {
    /// Goes on by `c`. Returns the index in `markers` of the marker that is complete now; what turns out to belong to none is given to
    /// `release`. No marker may begin with another one.
    pub(super) fn read(&mut self, c: char, markers: &[&str], mut release: impl FnMut(char)) -> Option<usize> {
        self.held.push(c);
        // Markers are short, so a few comparisons are all it ever takes.
        while !self.held.is_empty() && !markers.iter().any(|marker| marker.starts_with(&self.held)) {
            release(self.held.remove(0));
        }
        let found = markers.iter().position(|marker| *marker == self.held)?;
        self.held.clear();
        Some(found)
    }

    /// Says whether nothing is held.
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Gives up what is held.
    pub(super) fn finish(&mut self, release: impl FnMut(char)) {
        std::mem::take(&mut self.held).chars().for_each(release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_found_and_the_rest_is_released_in_order() {
        let check = |text: &str, expected: &str| {
            let (mut finder, mut out) = (Finder::default(), String::new());
            for c in text.chars() {
                if let Some(found) = finder.read(c, &["<a>", "<<b", "aab"], |c| out.push(c)) {
                    out.push_str(&format!("[{found}]"));
                }
            }
            finder.finish(|c| out.push(c));
            assert_eq!(out, expected, "{text}");
        };
        check("x<a>y", "x[0]y");
        check("<<a>", "<[0]");
        check("<<<b<a", "<[1]<a");
        check("aaab aa", "a[2] aa");
        check("", "");
    }
}
