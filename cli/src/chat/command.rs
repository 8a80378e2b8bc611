//! What a line of input means.

/// What `/help` prints.
pub(super) const HELP: &str = "\
/system [TEXT]  show the system message, or set it and start anew
/clear          forget the conversation
/help           this list
/quit           leave (or Ctrl-D)
Ctrl-C stops an answer.";

/// One line, understood.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    Nothing,
    Say(String),
    Help,
    Clear,
    System(Option<String>),
    Quit,
    Unknown(String),
}

impl Input {
    /// Reads a line: commands begin with `/`, everything else is said.
    pub(super) fn read(line: &str) -> Self {
        let line = line.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match word {
            "" => Self::Nothing,
            "/help" => Self::Help,
            "/clear" => Self::Clear,
            "/quit" | "/exit" => Self::Quit,
            "/system" => Self::System((!rest.is_empty()).then(|| rest.to_owned())),
            // A path or a fraction is something to say, a lone word after a slash a mistyped command.
            _ if word.starts_with('/') && word[1..].chars().all(char::is_alphabetic) => Self::Unknown(word.to_owned()),
            _ => Self::Say(line.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expected: Input) {
        assert_eq!(Input::read(line), expected, "{line:?}");
    }

    #[test]
    fn lines_are_understood() {
        check("  ", Input::Nothing);
        check(" What is a page? ", Input::Say("What is a page?".into()));
        check("/help", Input::Help);
        check("/clear", Input::Clear);
        check("/quit", Input::Quit);
        check("/system", Input::System(None));
        check("/system  Be brief. ", Input::System(Some("Be brief.".into())));
        check("/sytem Be brief.", Input::Unknown("/sytem".into()));
        check("/usr/bin is a folder", Input::Say("/usr/bin is a folder".into()));
    }
}
